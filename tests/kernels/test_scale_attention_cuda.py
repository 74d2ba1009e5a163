"""Tests of scale_attention's CUDA kernel, run on the CPU: saved lse, strided inputs and unsupported inputs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels.dispatch import BackendError
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.native import scale_attention_cuda
from mvar_kernels.ops.scale_attention.reference import scale_attention
from tests.helpers import cuda_on_cpu

pytestmark = pytest.mark.slow

SCALES = (1, 4, 9, 16, 70)
L = sum(SCALES)


def qkv(D: int = 64, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    """Return views of a packed projection."""
    packed = torch.randn(2, L, 3, 2, D, generator=torch.Generator().manual_seed(0))
    return packed.to(dtype).unbind(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("queries", [L, 86])
@pytest.mark.parametrize("log_temperature", [None, torch.tensor([0.5, 5.0])], ids=["plain", "normed"])
def test_lse_matches_reference(dtype: torch.dtype, queries: int, log_temperature: Tensor | None) -> None:
    """lse is float32 for any dtype, as another backend's backward uses it; norms of zero rows are 1e-12."""
    q, k, v = qkv(dtype=dtype)
    q[:, 40], k[:, 41] = 0.0, 0.0
    call = Attention(q[:, -queries:], k, v, log_temperature, SCALES, False, 0.25)
    with cuda_on_cpu.installed():
        out, lse = scale_attention_cuda.forward(call)
    exact, exact_lse = scale_attention(Attention(*(t.double() if isinstance(t, Tensor) else t for t in call)))
    # A score sums 64 products, each with a rounding error relative to at most c‖q‖‖k‖.
    lengths = [t.float().norm(dim=-1).max() for t in (q, k)]
    largest = 0.25 * (lengths[0] * lengths[1] if log_temperature is None else 100)
    assert (lse - exact_lse).abs().max() <= 64 * torch.finfo(torch.float32).eps * largest
    # The weights are rounded, and so is the weighted sum of the values.
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * v.abs().max()


def test_underflowing_scale() -> None:
    """The scale underflows in float32, so the output is the mean of the values; masked scores must stay masked."""
    q, k, v = qkv()
    with cuda_on_cpu.installed():
        out = mk.scale_attention(q, k, v, SCALES, scale=1e-50, backend="cuda")
    means = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in v.double().split(SCALES, 1)], 1)
    assert (out - means).abs().max() <= torch.finfo(out.dtype).eps * means.abs().max()


def test_packed_views_are_not_copied() -> None:
    calls: list[tuple[Any, ...]] = []
    kernels = cuda_on_cpu.module()

    def forward(*arguments: Any) -> None:
        calls.append(arguments)
        kernels.scale_attention_forward(*arguments)

    q, k, v = qkv()
    spy = SimpleNamespace(scale_attention_forward=forward)
    with cuda_on_cpu.playing(spy), cuda_on_cpu.installed():  # type: ignore[arg-type]
        mk.scale_attention(q, k, v, SCALES, backend="cuda")
    assert [view[:2] for view in calls[0][-2][:3]] == [(t.data_ptr(), t.stride()) for t in (q, k, v)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pattern": "causal"}, "pattern 'causal' is not 'diagonal'"),
        ({"D": 24}, "head dimension D=24 is not 64 or 128"),
        ({"dtype": torch.float32}, "dtype float32 is not float16 or bfloat16"),
    ],
)
def test_unsupported_inputs(change: dict[str, Any], reason: str) -> None:
    q, k, v = qkv(change.pop("D", 64), change.pop("dtype", torch.float16))
    with cuda_on_cpu.installed(), pytest.raises(BackendError, match=reason):
        mk.scale_attention(q, k, v, SCALES, backend="cuda", **change)


def test_no_backward_kernel() -> None:
    q, k, v = (t.clone().requires_grad_() for t in qkv())
    with cuda_on_cpu.installed():
        out = mk.scale_attention(q, k, v, SCALES, backend="cuda")
        with pytest.raises(BackendError, match="has no backward kernel"):
            out.sum().backward()
