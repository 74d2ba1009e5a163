"""Tests of adaln on constant rows, for which it returns the shift, and on rows with a large mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels.validation import FLOATS

BACKENDS = ("reference", "cpu")  # the contract test covers the other backends
VALUES = (0.0, 100.1, -1000.1, 12345.678, 65504.0)


def offered(backend: str) -> tuple[torch.dtype, ...]:
    return FLOATS if backend == "reference" else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [1, 3, 67, 1000, 1024, 1999])
def test_constant_rows(C: int, backend: str) -> None:
    values = torch.tensor(VALUES)[None, :, None]
    for dtype in offered(backend):
        x = values.expand(1, len(VALUES), C).to(dtype)
        scale, shift = (torch.randn(1, C, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
        want = shift[:, None].expand(x.shape)
        assert torch.equal(mk.adaln(x, scale, shift, backend=backend), want), dtype
        half = x / 2
        x_new, out = mk.gated_adaln(half, half, torch.ones_like(scale), scale, shift, backend=backend)
        assert torch.equal(x_new, x) and torch.equal(out, want), dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 1e-2])
def test_large_mean(spread: float, backend: str) -> None:
    """Compares with float64: outputs to 10⁻⁵, gradients, which scale with 1/σ, to 10⁻⁵ of the largest."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.tensor(VALUES)[None, :, None] + spread * torch.randn(1, len(VALUES), 1000, generator=generator)).clone()
    scale, shift = (torch.randn(1, 1000, generator=generator) for _ in range(2))
    cotangent = torch.randn(x.shape, generator=generator)

    def outputs(call: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, scale, shift)]
        out = call(*leaves)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    got = outputs(lambda *leaves: mk.adaln(*leaves, backend=backend), torch.float32)
    want = outputs(lambda x, s, t: F.layer_norm(x, (1000,), eps=1e-6) * (1 + s[:, None]) + t[:, None], torch.float64)
    for value, exact in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max().clamp(min=1)))
