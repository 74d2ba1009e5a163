"""Tests the C++ extension: instruction sets, threads, and installation without a compiler."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import native as import_native
from mvar_kernels.ops.adaln import native as adaln_native
from mvar_kernels.ops.adaln import reference as adaln_reference
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from tests.helpers.paths import ROOT

EPS = 1e-6

native = import_native()
needs_native = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
INSTRUCTION_SETS = native.build_info()["instruction_sets"] if native else ()


def _inputs(B: int, L: int, C: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(B * L + C)
    shapes = {"x": (B, L, C), "branch": (B, L, C), "grad_x_new": (B, L, C), "grad_out": (B, L, C)}
    shapes |= {"gate": (B, C), "scale": (B, C), "shift": (B, C)}  # type: ignore[dict-item]
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["x"] = tensors["x"] + 3  # a mean far from zero reveals cancellation in the variance
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _run(module: Any, t: dict[str, Tensor], suffix: str) -> list[Tensor]:
    """All outputs of all adaLN kernels."""
    adaln, gated = getattr(module, f"adaln_{suffix}"), getattr(module, f"gated_adaln_{suffix}")
    plain = AdaLN(t["x"], t["scale"], t["shift"], EPS)
    with_gate = GatedAdaLN(t["x"], t["branch"], t["gate"], t["scale"], t["shift"], EPS)
    return [
        *adaln.forward(plain),
        *gated.forward(with_gate),
        *adaln.backward([t["grad_out"]], plain),
        *gated.backward([t["grad_x_new"], t["grad_out"]], with_gate),
    ]


@needs_native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (3, 7, 67), (1, 70, 131), (2, 0, 8)], ids=str)
def test_instruction_set_agrees_with_float64(
    use_instruction_set: Callable[[str], None], name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    use_instruction_set(name)
    t = _inputs(*shape, dtype)
    exact = _run(adaln_reference, {k: v.double() for k, v in t.items()}, "reference")
    same_dtype = _run(adaln_reference, t, "reference")
    for got, same, want in zip(_run(adaln_native, t, "cpu"), same_dtype, exact, strict=True):
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        if want.numel():
            reference_error = (same.double() - want).abs().max().item()
            rounding = torch.finfo(dtype).eps * want.abs().max().item()
            # Allow two roundings, as the reference may be exact by chance on a few values.
            assert (got.double() - want).abs().max().item() <= 2 * reference_error + 2 * rounding


@needs_native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_num_threads_is_bitwise_deterministic(
    use_instruction_set: Callable[[str], None], name: str, dtype: torch.dtype
) -> None:
    use_instruction_set(name)
    t = _inputs(3, 111, 259, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_run(adaln_native, t, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_strided_inputs() -> None:
    t = _inputs(2, 9, 33, torch.float32)
    strided = {
        "x": torch.stack([t["x"], t["grad_out"]], 2)[:, :, 0],
        "branch": t["branch"].transpose(0, 1).contiguous().transpose(0, 1),
        "gate": t["gate"].t().contiguous().t(),
        "scale": t["scale"][:1].expand(2, -1),
        "grad_out": torch.ones(()).expand(2, 9, 33),
    }
    mixed = t | strided
    same = {name: tensor.contiguous() for name, tensor in mixed.items()}
    for got, want in zip(_run(adaln_native, mixed, "cpu"), _run(adaln_native, same, "cpu"), strict=True):
        assert torch.equal(got, want)


@needs_native
def test_unknown_instruction_set() -> None:
    assert native is not None
    with pytest.raises(ValueError, match="sse9"):
        native.use_instruction_set("sse9")


def _setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_install_without_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # setuptools adds its vendored packages
    script = _setup_script()
    cmake, ninja = script.find_tool("cmake"), script.find_tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    monkeypatch.setenv("PATH", str(tmp_path))  # has no compiler
    monkeypatch.delenv("CXX", raising=False)
    tools = {"cmake": cmake, "ninja": ninja}
    monkeypatch.setattr(script, "find_tool", tools.get)
    assert "no C++ compiler" in script.find_obstacle()
    del tools["cmake"]
    assert script.find_obstacle() == "no CMake"

    from setuptools import Distribution

    monkeypatch.chdir(tmp_path)
    command = script.CMakeBuild(Distribution({"ext_modules": script.EXTENSIONS}))
    command.ensure_finalized()
    command.run()
    assert "the C++ kernels were left out: no CMake" in capsys.readouterr().err
    assert command.get_outputs() == [] and list(tmp_path.iterdir()) == []
