"""Tests third-party kernels as baselines: fetching, calling conventions, and ahead-of-time compilation."""

import io
import subprocess
import sys
import tarfile
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import fetch_third_party
from benchmarks.baselines import third_party
from benchmarks.baselines.ops import BASELINES
from mvar_kernels.ops.adaln.spec import SPECS as ADALN
from mvar_kernels.ops.mamba2 import reference
from mvar_kernels.ops.mamba2.inputs import Scan
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER
from mvar_kernels.testing.contract import prepared
from mvar_kernels.testing.spec import Case
from tests.helpers.compiler import compiler_environment


@pytest.fixture
def fake_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the third-party modules by fake ones that implement the documented functions in PyTorch."""

    def causal_conv1d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        initial_state: Tensor,
        output_final_state: bool,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D), weight (D, W), initial_state (B, D, W): the last W tokens, of which W − 1 are used."""
        assert output_final_state and activation == "silu" and initial_state.shape == (len(x), *weight.shape)
        seen = torch.cat([initial_state[:, :, 1:], x.transpose(1, 2)], -1)
        after = torch.cat([initial_state, x.transpose(1, 2)], -1)[:, :, -weight.shape[1] :]
        return F.silu(F.conv1d(seen, weight[:, None], bias, groups=len(weight))).transpose(1, 2), after

    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        *,
        D: Tensor,
        dt_bias: Tensor,
        initial_states: Tensor,
        dt_softplus: bool,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        assert dt_softplus and return_final_states and B.shape[2] == C.shape[2] == 1
        steps = F.softplus(dt + dt_bias)
        return reference.ssd_scan(Scan(x, steps, A, B[:, :, 0], C[:, :, 0], D, initial_states, (x.shape[1],)))

    def rmsnorm(x: Tensor, weight: Tensor, bias: None, *, z: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
        assert not norm_before_gate
        return F.rms_norm(x * F.silu(z), x.shape[-1:], weight, eps)

    class LayerNorm:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    for name, contents in {
        "fla.modules.causal_conv1d": {"causal_conv1d": causal_conv1d},
        "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": scan},
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LayerNorm},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("L", [1, 2, 19])
def test_mamba_ssm_mixer_matches_reference(fake_modules: None, L: int) -> None:
    sizes = {"B": 2, "L": L, "H": 2, "P": 8, "N": 16}
    case = Case("mixer", sizes, {"scales": None}, keeps_dtype=("dt",))
    t = prepared(MAMBA2_MIXER, case, torch.float64)
    assert close(third_party.mamba2_mixer(t, case), MAMBA2_MIXER.reference(t, case))


def test_liger_norm_matches_reference(fake_modules: None) -> None:
    for spec in ADALN:
        case = Case("norm", {"B": 2, "L": 3, "C": 24})
        t = prepared(spec, case, torch.float64)
        assert close(BASELINES[spec.op]["Liger's norm"].run(t, case), spec.reference(t, case))


def test_missing_third_party_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not third_party.has_mamba_ssm() and not third_party.has_liger()
    monkeypatch.setattr(third_party, "FOLDER", tmp_path / "peers")
    third_party.add_to_path()
    assert sys.path == [str(tmp_path)]
    (tmp_path / "peers" / "liger_kernel" / "ops").mkdir(parents=True)
    third_party.add_to_path()
    third_party.add_to_path()
    assert sys.path == [str(tmp_path), str(tmp_path / "peers")] and third_party.has_liger()


def test_unpack_kernels(tmp_path: Path) -> None:
    """The package's __init__ is omitted, so that its folder is importable as a namespace package."""
    names = ("__init__.py", "ops/triton/ssd.py", "ops/scan.py", "utils/torch.py", "../../out.py", "ops/triton/x.cu")
    with tarfile.open(tmp_path / "sources.tar.gz", "w:gz") as content:
        for name in names:
            member = tarfile.TarInfo(f"mamba_ssm-1/mamba_ssm/{name}")
            content.addfile(member, io.BytesIO())
    fetch_third_party.unpack_kernels(tmp_path / "sources.tar.gz", tmp_path / "peers")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py"))
    assert found == ["peers/mamba_ssm/ops/triton/ssd.py", "peers/mamba_ssm/utils/torch.py"]


TWICE = """
import sys, types
from pathlib import Path
import torch
import triton
import triton.language as tl
from benchmarks import precompile
from tests.kernels import compile_ahead
from mvar_kernels.testing.registry import SPECS

@triton.autotune([triton.Config({"BLOCK": n}, num_warps=w) for n, w in ((64, 1), (128, 4))], key=["size"])
@triton.jit
def scale(x_ptr, size, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, factor * tl.load(x_ptr + offs, mask=offs < size), mask=offs < size)

found = {}
precompile.pretend_gpu()
with compile_ahead.compiling("sm_90", 0, found):
    with torch.cuda.device(0):
        scale[(1,)](torch.ones(100), 100, 2.0)
precompile.build_launchers(found)
print(len(found), sorted(kernel.metadata.num_warps for kernel in found.values()))
"""


def test_precompile_autotuned_kernel(tmp_path: Path) -> None:
    """All configurations of an autotuned kernel are compiled ahead, and a second run compiles nothing."""
    environment = compiler_environment() | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    program = tmp_path / "twice.py"
    program.write_text(TWICE)
    made = []
    for _ in range(2):
        done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
        assert done.stdout == "2 [1, 4]\n", done.stderr
        kept = (path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".cubin", ".so"))
        made.append({path: path.stat().st_mtime_ns for path in kept})
    assert made[0] == made[1] and {path.suffix for path in made[0]} == {".cubin", ".so"}
