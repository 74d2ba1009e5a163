"""Tests of the Triton kernels of adaln: tiles, slabs, rounding and limits."""

import pytest
import torch

pytest.importorskip("triton")

from mvar_kernels import adaln, gated_adaln, tiling  # noqa: E402
from mvar_kernels.dispatch import BackendError, unavailable  # noqa: E402
from mvar_kernels.ops.adaln import reference  # noqa: E402
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.triton.backward import slab_length  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable("triton") is not None, reason=str(unavailable("triton"))),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("candidate", range(3))
@pytest.mark.parametrize("C", [200, 1500, 4096])
def test_tiles(candidate: int, C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers every tile; the contract test covers only the chosen one."""
    monkeypatch.setattr(tiling, "chosen", lambda kernel, shape_class, tiles, device: tiles[candidate % len(tiles)])
    x, branch = normal(2, 19, C) + 3, normal(2, 19, C)
    leaves = [t.requires_grad_() for t in (x, branch, normal(2, C), normal(2, C) / 2, normal(2, C))]
    cotangents = [normal(2, 19, C), normal(2, 19, C).flip(1)]
    results = []
    for function in (
        lambda *t: gated_adaln(*t, backend="triton"),
        lambda *t: reference.gated_adaln(GatedAdaLN(*t, EPS)),
    ):
        outs = function(*leaves)
        results.append([*outs, *torch.autograd.grad(outs, leaves, cotangents)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * float(want.detach().abs().max()))


def test_x_new_is_rounded_before_normalization() -> None:
    """Near 1000, float16 has steps of 0.5, so the normalization must use the rounded x_new that is returned."""
    x, branch = (normal(2, 9, 64) + 1000).half(), normal(2, 9, 64, dtype=torch.float16)
    gate, scale, shift = (normal(2, 64, dtype=torch.float16) for _ in range(3))
    x_new, out = gated_adaln(x, branch, gate, scale, shift, backend="triton")
    torch.testing.assert_close(out, reference.adaln(AdaLN(x_new, scale, shift, EPS))[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("C", [1024, 1920])
@pytest.mark.parametrize("B", [1, 8, 32, 96, 600])
def test_slab_length(B: int, C: int) -> None:
    L, multiprocessors, warps = 680, 132, 4 if C == 1024 else 8
    slab = slab_length(B, L, C)
    slabs = -(-L // slab)
    rounds = -(-B * slabs // (multiprocessors * 16 // warps))
    assert slab >= 8
    if B >= 32:
        assert B * L / (rounds * slab) > 0.9 * multiprocessors * 16 / warps  # share of the resident programs in use
        assert slabs * 2 * 4 < 0.1 * L * 2  # bytes of the sums for scale and shift, and of a 16-bit x


def test_empty_input() -> None:
    x, scale = normal(2, 0, 64), normal(2, 64).requires_grad_()
    adaln(x, scale, scale, backend="triton").sum().backward()
    assert scale.grad is not None and not scale.grad.any()


def test_unsupported_width() -> None:
    x, scale = normal(1, 1, 4097), normal(1, 4097)
    with pytest.raises(BackendError, match="C=4097 is not from 1 to 4096"):
        adaln(x, scale, scale, backend="triton")
