"""Tests that sample_tokens' CUDA kernel matches the reference bit for bit. Without a GPU, it runs on the CPU."""

import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels.dispatch import unavailable
from mvar_kernels.ops.sample_tokens import native, noise, reference
from mvar_kernels.ops.sample_tokens.inputs import Sampling
from tests.helpers import cuda_on_cpu
from tests.helpers.paths import ROOT
from tests.kernels.test_sample_tokens_native import finite_rows, image_indices, infinite_rows

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU and unavailable("cuda") is not None, reason="the CUDA kernels were not built"),
]
SEED, SCALE = torch.tensor(2**63 - 5), 2**32 - 1
FILTERS = [
    (0, 1.0),
    (1, 1.0),
    (0.2, 1.0),
    (0, 0.96),
    (0.6, 0.5),
    (1, 0.5),
    (0, 1e-20),
    (0, 1 - 1e-12),
]  # of V, and top_p


def draw(call: Sampling) -> Tensor:
    if ON_GPU:
        call = Sampling(*(value.cuda() if isinstance(value, Tensor) else value for value in call))
    assert native.sample_tokens_cuda.unsupported_reason(call) is None
    with nullcontext() if ON_GPU else cuda_on_cpu.installed():
        tokens: Tensor = native.sample_tokens_cuda.forward(call)[0]
    return tokens.cpu()


@pytest.mark.parametrize("V", [1, 5, 256, 259, 4096, 4097, 16384])
def test_tokens_match_reference(V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    cond = torch.cat([finite_rows(V, 1, generator), infinite_rows(V, 1, generator)])
    index = image_indices(len(cond)) + 2**40  # counted modulo 2³²
    for share, top_p in FILTERS if V < 4096 else FILTERS[3:5]:
        top_k = int(share * V) if isinstance(share, float) else share
        call = Sampling(cond, None, index, 0.0, top_k, top_p, SEED, SCALE)
        assert torch.equal(draw(call), reference.sample_tokens(call)[0]), (top_k, top_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("guidance", [0.0, 0.75, 1e6])
def test_guided_tokens_match_reference(guidance: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = (finite_rows, infinite_rows)
    cond, uncond = (torch.cat([rows(130, 1, generator) for rows in kinds]).to(dtype) for _ in range(2))
    for top_k, top_p in ((0, 1.0), (30, 0.96)):
        call = Sampling(cond, uncond, image_indices(len(cond)), guidance, top_k, top_p, SEED, 1)
        assert torch.equal(draw(call), reference.sample_tokens(call)[0]), (top_k, top_p)


def test_near_ties() -> None:
    """The scores of the two codes differ by at most a rounding error, with and without guidance, so any bit matters."""
    index = torch.tensor([1, -1])
    values = noise.gumbel(index, (2, 400, 2), SCALE, SEED)
    cond = torch.stack([torch.zeros(2, 400), values[..., 0] - values[..., 1]], -1)
    uncond = torch.randn(cond.shape, generator=torch.Generator().manual_seed(0))
    for call in (
        Sampling(cond, None, index, 0.0, 0, 1.0, SEED, SCALE),
        Sampling(cond + 2.0**20, None, index, 0.0, 0, 1.0, SEED, SCALE),
        Sampling((cond + 1.3 * uncond) / 2.3, uncond, index, 1.3, 0, 1.0, SEED, SCALE),
    ):
        want = reference.sample_tokens(call)[0]
        assert 0 < want.sum() < want.numel()
        assert torch.equal(draw(call), want)


def test_top_p_threshold() -> None:
    """The second code is dropped or kept, depending on one unit of its weight."""
    # The results for all but the last two differ if a division is replaced by multiplication by the inverse.
    second = [-2.982736110687256, -1.7156157493591309, -2.588618755340576, -1.6945607662200928, -0.001, -1.0]
    weights = (noise.exp_negative(torch.tensor(second)) * 2**30).long().tolist()
    for x, weight in zip(second, weights, strict=True):
        cond = torch.tensor([0.0, x]).expand(1, 100, 2)
        for limit, kept in ((weight + 0.5, False), (weight - 0.5, True)):
            filters = (0, 1 - limit / (2**30 + weight))
            tokens = draw(Sampling(cond, None, torch.zeros(1).long(), 0.0, *filters, SEED, 0))
            assert bool(tokens.any()) == kept, x


def test_top_p_with_equal_logits() -> None:
    """Of 300 equal codes, whose weights sum to more than 2³², top-p drops exactly those of the lowest indices."""
    cond = torch.zeros(1, 100, 300)
    for dropped in (1, 149, 290, 299):
        call = Sampling(cond, None, torch.zeros(1).long(), 0.0, 0, 1 - (dropped + 0.5) / 300, SEED, 0)
        tokens = draw(call)
        assert torch.equal(tokens, reference.sample_tokens(call)[0])
        assert tokens.min() >= dropped


def test_nan_logits() -> None:
    cond = torch.randn(1, 6, 67, generator=torch.Generator().manual_seed(0))
    cond[0, 1:, ::3] = torch.nan
    cond[0, 3] = -torch.nan
    cond[0, 4, 0] = -torch.inf
    for filters in ((0, 1.0), (5, 1.0), (5, 0.5)):
        call = Sampling(cond, None, torch.zeros(1).long(), 0.0, *filters, SEED, 0)
        tokens = draw(call)
        assert ((tokens >= 0) & (tokens < 67)).all()
        assert torch.equal(tokens, draw(call))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(1, 1, 16385), "16385 codes are not 1 to 16384"),
        (torch.zeros(1, 1, 5, dtype=torch.float64), "dtype float64 is not float32, float16 or bfloat16"),
    ],
)
def test_unsupported_inputs(logits: Tensor, message: str) -> None:
    with nullcontext() if ON_GPU else cuda_on_cpu.installed(), pytest.raises(mk.BackendError, match=message):
        mk.sample_tokens(logits.cuda() if ON_GPU else logits, backend="cuda")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_ptx_has_no_fused_operations(tmp_path: Path) -> None:
    csrc = ROOT / "csrc"
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", f"-I{csrc}", "-DMVAR_CUDA_MODULE=_cuda", "-ptx"]
    ptx = tmp_path / "sample_tokens.ptx"
    subprocess.run([*command, "-o", ptx, csrc / "sample_tokens" / "cuda.cu"], check=True)
    text = ptx.read_text()
    operations = set(re.findall(r"\b(?:mul|add|sub|div|fma|mad)\.[a-z.]*f32\b", text))
    assert operations - {"mul.f32"} == {"mul.rn.f32", "add.rn.f32", "sub.rn.f32", "div.rn.f32"}
    assert re.findall(r"mul\.f32.*, (?!0f3E800000|0f3F000000)\S+;", text) == []  # x / 4 and x / 2, which are exact
