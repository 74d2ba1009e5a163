"""Tests of group_norm_silu: layouts, robustness, gradients, errors, threads, and Triton's tiles and slabs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels import tiling
from mvar_kernels.dispatch import unavailable
from mvar_kernels.ops.group_norm_silu.inputs import flattened
from mvar_kernels.tiling import Tile
from tests.helpers.threads import threads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("reference", "cpu", "triton") if unavailable(name) is None]
TRITON = pytest.mark.skipif(unavailable("triton") is not None, reason=str(unavailable("triton")))
CPU = pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))
EPS = 1e-6


def inputs(B: int, C: int, H: int, W: int, *, channels_last: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B + C + H)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((B, C, H, W), (C,), (C,)))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [t.to(DEVICE, dtype) for t in (x.contiguous(memory_format=memory_format), weight, bias)]


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(torch.group_norm(x.double().contiguous(), groups, weight.double(), bias.double(), EPS))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_is_kept(backend: str, channels_last: bool) -> None:
    """And samples of a larger batch, or of one that is expanded, are read in place."""
    dtype = torch.bfloat16 if backend == "cpu" else torch.float16
    x, weight, bias = inputs(3, 8, 2, 3, channels_last=channels_last, dtype=dtype)
    for part in (x, x[::2], x[:1].expand(2, -1, -1, -1)):
        out = mk.group_norm_silu(part, weight, bias, 4, backend=backend)
        assert out.stride()[1:] == x.stride()[1:] and out.shape == part.shape and out.dtype == x.dtype
        torch.testing.assert_close(out.double(), exact(part, weight, bias, 4), rtol=0, atol=4 * torch.finfo(dtype).eps)
        flat, last = flattened(part)
        assert last == channels_last and flat.data_ptr() == part.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    for shape, channels_last in (((0, 8, 2, 2), True), ((0, 8, 2, 2), False), ((2, 8, 0, 3), False)):
        leaves = [t.requires_grad_(backend != "triton") for t in inputs(*shape, channels_last=channels_last)]
        out = mk.group_norm_silu(*leaves, 4, backend=backend)
        assert out.shape == shape
        if out.requires_grad:
            grads = torch.autograd.grad(out.sum(), leaves)
            assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("channels_last", [False, True])
def test_constant_and_far_from_zero(channels_last: bool, backend: str) -> None:
    """Against float64 alone: PyTorch's own error on a CPU is 0.04 to 0.7 in some of these."""
    x, weight, bias = inputs(2, 10, 5, 5, channels_last=channels_last)
    for value in (12345.678, -1000.1):
        constant = mk.group_norm_silu(torch.full_like(x, value), weight, bias, 2, backend=backend)
        torch.testing.assert_close(constant, F.silu(bias)[:, None, None].expand(x.shape), rtol=1e-6, atol=1e-6)
    far = x * 1e-2 + 1e4
    far[0, 0, 0, 0] = 0.0  # the number that all are counted from is the only one that is far from the others
    got = mk.group_norm_silu(far, weight, bias, 2, backend=backend)
    torch.testing.assert_close(got.double(), exact(far, weight, bias, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1].double(), exact(far, weight, bias, 2)[1], rtol=0, atol=2e-6)


@TRITON
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("one_slab", [False, True])
def test_tiles_and_slabs(channels_last: bool, one_slab: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract test's programs take one tile each: here all candidates, with several tiles in each program."""
    from mvar_kernels.ops.group_norm_silu import triton

    monkeypatch.setattr(triton, "slab_length", lambda programs, tiles: tiles if one_slab else 2)
    x, weight, bias = inputs(1, 18, 13, 37, channels_last=channels_last)
    results = []
    for candidate in range(3):
        monkeypatch.setattr(tiling, "chosen", lambda kernel, name, tiles, device, i=candidate: tiles[i])
        results.append(mk.group_norm_silu(x + 3, weight, bias, 2, backend="triton"))
    for got in results:
        torch.testing.assert_close(got.double(), exact(x + 3, weight, bias, 2), rtol=0, atol=4e-6)


@TRITON
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_slices_than_are_read_at_once(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """34 or 61 slices of different means."""
    block_l = 8 if channels_last else 128

    def chosen(kernel: str, name: str, tiles: Sequence[Tile], device: torch.device) -> Tile:
        return replace(tiles[0], sizes={**tiles[0].sizes, "BLOCK_L": block_l})

    monkeypatch.setattr(tiling, "chosen", chosen)
    x, weight, bias = inputs(1, 18, 13, 37, channels_last=channels_last)
    x += torch.linspace(0, 20, 13 * 37).view(13, 37).to(DEVICE)
    got = mk.group_norm_silu(x, weight, bias, 2, backend="triton")
    torch.testing.assert_close(got.double(), exact(x, weight, bias, 2), rtol=0, atol=4e-6)


@TRITON
def test_slab_length() -> None:
    from mvar_kernels.ops.group_norm_silu.triton import AT_WORK, MOST_SLABS, slab_length

    assert slab_length(AT_WORK, 1000) == 1000
    assert slab_length(25, 8192) == 196  # 42 slabs of each sample: 1,050 programs
    for programs, tiles in ((1, 1), (1, 7), (3, 100000), (10**6, 3)):
        slabs = -(-tiles // slab_length(programs, tiles))
        assert 1 <= slabs <= min(tiles, MOST_SLABS)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients(channels_last: bool) -> None:
    """Of first and second order, which is the reference's, against PyTorch's."""
    leaves = [t.requires_grad_() for t in inputs(2, 6, 3, 4, channels_last=channels_last)]
    grads = []
    for function in (
        lambda *t: mk.group_norm_silu(*t, 3),
        lambda *t: F.silu(torch.group_norm(t[0], 3, t[1], t[2], EPS)),
    ):
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        grads.append((*first, *torch.autograd.grad(sum(t.sin().sum() for t in first), leaves)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@CPU
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_and_blocks(batch: int, channels_last: bool) -> None:
    """Threads that share a sample, or take whole ones, with the same bits; samples of several blocks of positions, each
    with another mean."""
    x, weight, bias = (t.cpu() for t in inputs(batch, 20, 43, 41, channels_last=channels_last))
    x += torch.linspace(0, 20, 43 * 41).view(43, 41)
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def run(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(lambda *t: mk.group_norm_silu(*t, 5, backend="cpu"), x, weight, bias))
    want = run(lambda *t: exact(*t, 5), x.double(), weight.double(), bias.double())
    for *got, right in zip(*results, want, strict=True):
        assert all(torch.equal(t, got[0]) for t in got)
        torch.testing.assert_close(got[0].double(), right, rtol=0, atol=4e-6 * float(right.abs().max()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"groups": 4}, ValueError, "groups: expected a positive divisor of C=6, got 4"),
        (lambda a: a | {"groups": 0}, ValueError, "groups: expected a positive divisor of C=6, got 0"),
        (lambda a: a | {"x": a["x"][0]}, ValueError, "x: expected shape"),
        (lambda a: a | {"bias": a["bias"][:3]}, ValueError, "bias: expected shape"),
        (lambda a: a | {"weight": a["weight"].double()}, TypeError, "weight: expected dtype"),
        (lambda a: a | {"x": a["x"].half(), "bias": a["bias"].half()}, TypeError, "bias: expected dtype float32"),
        (lambda a: a | {"eps": 0.0}, ValueError, "eps: expected a number above 0"),
        (lambda a: a | {"backend": "cuda"}, mk.BackendError, "backend 'cuda' requested, but: has no group_norm_silu"),
    ],
)
def test_errors(change: Callable[[dict[str, object]], dict[str, object]], error: type[Exception], message: str) -> None:
    x, weight, bias = (t.cpu() for t in inputs(2, 6, 2, 2, channels_last=False))
    arguments = {"x": x, "weight": weight, "bias": bias, "groups": 3}
    with pytest.raises(error, match=f"^group_norm_silu: {message}"):
        mk.group_norm_silu(**change(arguments))  # type: ignore[arg-type]
