"""Tests of scale_attention's argument errors, and of its results against equivalent PyTorch code."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels.dispatch import interpreted

SCALES = (1, 4, 9, 16)
STARTS = (0, 1, 5, 14, 30)
# Float32 arithmetic in a different order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BACKENDS = [name for name in ("reference", "cpu") if mk.backends()[name] is None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
# Triton is included if it is interpreted, so that it runs on the CPU.
WITH_TRITON = [*BACKENDS, *(["triton"] if interpreted() else [])]
each_or_triton = pytest.mark.parametrize("backend", WITH_TRITON)


def qkv(L: int = 30, B: int = 2, H: int = 3, D: int = 16) -> tuple[Tensor, ...]:
    """Return views of a packed projection."""
    return torch.randn(B, L, 3, H, D, generator=torch.Generator().manual_seed(0)).unbind(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    ).transpose(1, 2)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"q": "not a tensor"}, TypeError, "q"),
        ({"q": torch.zeros(2, 30, 3)}, ValueError, "q"),
        ({"q": torch.zeros(2, 30, 3, 16, dtype=torch.int32)}, TypeError, "q"),
        ({"q": torch.zeros(2, 28, 3, 16)}, ValueError, "q"),
        ({"q": torch.zeros(2, 15, 3, 16)}, ValueError, "q"),
        ({"k": torch.zeros(2, 30, 4, 16)}, ValueError, "k"),
        ({"k": torch.zeros(2, 30, 0, 16), "v": torch.zeros(2, 30, 0, 16)}, ValueError, "k"),
        ({"k": torch.zeros(2, 30, 2, 16), "v": torch.zeros(2, 30, 2, 16)}, ValueError, "k"),
        ({"k": torch.zeros(2, 30, 1, 16)}, ValueError, "v"),
        ({"k": torch.zeros(2, 30, 3, 16, dtype=torch.float64)}, TypeError, "k"),
        ({"v": torch.zeros(2, 30, 3, 8)}, ValueError, "v"),
        ({"v": torch.zeros(2, 31, 3, 16)}, ValueError, "v"),
        ({"scales": (1, 4, 9)}, ValueError, "scales"),
        ({"scales": (1, 4, 9, 0, 16)}, ValueError, "scales"),
        ({"scales": (1.0, 4, 9, 16)}, ValueError, "scales"),
        ({"scales": ()}, ValueError, "scales"),
        ({"scales": None}, ValueError, "scales"),
        ({"pattern": "whole"}, ValueError, "pattern"),
        ({"pattern": "full", "scales": (1, 4)}, ValueError, "scales"),
        ({"key_lengths": torch.tensor([3, 4])}, ValueError, "key_lengths"),
        ({"pattern": "full", "key_lengths": torch.tensor([3])}, ValueError, "key_lengths"),
        ({"pattern": "full", "key_lengths": torch.tensor([3.0, 4.0])}, TypeError, "key_lengths"),
        ({"pattern": "full", "key_lengths": [3, 4]}, TypeError, "key_lengths"),
        ({"pattern": "full", "q": torch.zeros(2, 0, 3, 16)}, ValueError, "q and k"),
        (
            {"pattern": "full", "q": torch.zeros(2, 7, 3, 16), "rotary": (torch.zeros(30, 8), torch.zeros(30, 8))},
            ValueError,
            "rotary",
        ),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"log_temperature": torch.zeros(2)}, ValueError, "log_temperature"),
        ({"log_temperature": torch.zeros(3, dtype=torch.int64)}, TypeError, "log_temperature"),
        ({"log_temperature": 1.0}, TypeError, "log_temperature"),
        ({"rotary": torch.zeros(2, 30, 8)}, TypeError, "rotary"),
        ({"rotary": (torch.zeros(30, 8),)}, TypeError, "rotary"),
        ({"rotary": (torch.zeros(30, 8), None)}, TypeError, "sin of rotary"),
        ({"rotary": (torch.zeros(25, 8), torch.zeros(25, 8))}, ValueError, "cos of rotary"),
        ({"rotary": (torch.zeros(30, 4), torch.zeros(30, 4))}, ValueError, "cos of rotary"),
        ({"rotary": (torch.zeros(30, 8), torch.zeros(30, 16))}, ValueError, "sin of rotary"),
        ({"rotary": (torch.zeros(30, 8).half(), torch.zeros(30, 8).half())}, TypeError, "cos of rotary"),
        ({"rotary": (torch.zeros(30, 8), torch.zeros(30, 8, requires_grad=True))}, ValueError, "sin of rotary"),
        ({"backend": "fastest"}, ValueError, "backend"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], named: str) -> None:
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v, "scales": SCALES} | change
    with pytest.raises(error, match=rf"\b{named}: expected"):
        mk.scale_attention(**arguments)


@each_backend
def test_causal_matches_dense_mask(backend: str) -> None:
    q, k, v = qkv()
    level = torch.repeat_interleave(torch.arange(len(SCALES)), torch.tensor(SCALES))
    want = sdpa(q, k, v, 0.3, level[:, None] >= level)
    got = mk.scale_attention(q, k, v, SCALES, pattern="causal", scale=0.3, backend=backend)
    torch.testing.assert_close(got, want, **CLOSE)


@each_backend
def test_diagonal_matches_loop_over_scales(backend: str) -> None:
    q, k, v = qkv()
    want = [sdpa(q[:, a:b], k[:, a:b], v[:, a:b], 0.25 / 4) for a, b in zip(STARTS, STARTS[1:], strict=False)]
    torch.testing.assert_close(mk.scale_attention(q, k, v, SCALES, backend=backend), torch.cat(want, 1), **CLOSE)


@each_backend
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_queries_of_last_scales(backend: str, pattern: str) -> None:
    q, k, v = qkv()
    whole = mk.scale_attention(q, k, v, SCALES, pattern=pattern, backend=backend)
    last = mk.scale_attention(q[:, 5:], k, v, SCALES, pattern=pattern, backend=backend)
    torch.testing.assert_close(last, whole[:, 5:], **CLOSE)


@each_backend
def test_log_temperature_matches_cosine_attention(backend: str) -> None:
    """Compares outputs and gradients; the middle head's temperature exceeds the bound of 100 and gets no gradient."""
    q, k, v = qkv()
    log_temperature = torch.tensor([0.3, 5.0, 2.0])
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    def cosine(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        q = F.normalize(q, dim=-1) * t.clamp_max(torch.tensor(100.0).log()).exp()[:, None]
        return mk.scale_attention(q, F.normalize(k, dim=-1), v, SCALES, scale=1.0, backend="reference")

    def fused(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return mk.scale_attention(q, k, v, SCALES, log_temperature=t, backend=backend)

    results = []
    for attention in (cosine, fused):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, log_temperature)]
        out = attention(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for want, got in zip(*results, strict=True):
        # Scores of up to 100 are exponentiated, so their rounding error is multiplied by up to 100.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert results[1][-1][1] == 0


@each_or_triton
@pytest.mark.parametrize("queries", [3, 30, 47])
def test_full_matches_sdpa(backend: str, queries: int) -> None:
    """Fewer queries than keys, as many and more; padding holds NaN and changes nothing."""
    q, (_, k, v) = qkv(queries)[0], qkv()
    got = mk.scale_attention(q, k, v, pattern="full", scale=0.3, backend=backend)
    torch.testing.assert_close(got, sdpa(q, k, v, 0.3), **CLOSE)
    lengths = torch.tensor([17, 0])
    k, v = k.clone(), v.clone()
    k[0, 17:], v[0, 17:], k[1], v[1] = torch.nan, torch.nan, torch.nan, torch.nan
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = mk.scale_attention(*leaves, pattern="full", scale=0.3, key_lengths=lengths, backend=backend)
    torch.testing.assert_close(out[:1], sdpa(q[:1], k[:1, :17], v[:1, :17], 0.3), **CLOSE)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert not out[1].any() and not any(t[1].any() for t in grads)
    options = {"key_lengths": lengths, "log_temperature": torch.zeros(q.shape[2]), "backend": backend}
    normalized = mk.scale_attention(*leaves, pattern="full", **options)
    for found in (grads, torch.autograd.grad(normalized.square().sum(), leaves)):
        assert all(t.isfinite().all() for t in found) and not any(t[0, 17:].any() for t in found[1:])


@each_or_triton
@pytest.mark.parametrize("pattern", ["diagonal", "causal", "full"])
def test_grouped_keys_match_repeated_ones(backend: str, pattern: str) -> None:
    q, k, v = qkv(H=6)
    temperature = torch.linspace(0.0, 2.0, 6)
    results = []
    for repeat in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k[:, :, :2], v[:, :, :2], temperature)]
        keys, values = (t.repeat_interleave(3, 2) if repeat else t for t in leaves[1:3])
        out = mk.scale_attention(
            leaves[0], keys, values, SCALES, pattern=pattern, log_temperature=leaves[3], backend=backend
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@each_backend
def test_options_under_compile_with_dynamic_lengths(backend: str) -> None:
    """One graph for rotary, and one for all lengths of the keys."""
    torch.compiler.reset()
    graphs = []

    def count(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    def attend(q: Tensor, k: Tensor, lengths: Tensor, cos: Tensor) -> Tensor:
        out = mk.scale_attention(q, k, k, pattern="full", key_lengths=lengths, backend=backend)
        return mk.scale_attention(out, out, out, pattern="full", rotary=(cos, cos), backend=backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for keys in (30, 19, 25):
        given = qkv(13)[0], qkv(keys)[1], torch.tensor([keys - 3, 2]), torch.ones(13, 8)
        assert torch.equal(compiled(*given), attend(*given))
    assert len(graphs) == 1


def test_rotary_needs_pairs_of_channels() -> None:
    q, k, v = qkv(D=7)
    with pytest.raises(ValueError, match="rotary: expected an even head dimension, got D=7"):
        mk.scale_attention(q, k, v, SCALES, rotary=(torch.zeros(30, 3), torch.zeros(30, 3)))


@each_backend
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("queries", [30, 25])
def test_rotary_matches_complex_rotation(backend: str, interleaved: bool, normed: bool, queries: int) -> None:
    """RoPE as a product of complex numbers, and (L, D) tables equal to their (L, D/2) ones."""
    q, k, v = qkv()
    q = q[:, 30 - queries :]
    angles = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))

    def turned(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1) if normed else x
        pairs = x.unflatten(-1, (8, 2) if interleaved else (2, 8))
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angles)[-x.shape[1] :, None]
        pairs = torch.view_as_real(z)
        return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)

    options = {"pattern": "causal", "scale": 0.3, "backend": backend}
    want = mk.scale_attention(turned(q), turned(k), v, SCALES, **options)  # type: ignore[arg-type]
    rotary = angles.cos(), angles.sin()
    temperature = torch.zeros(3) if normed else None
    wide = tuple(t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in rotary)
    for tables in (rotary, wide):
        got = mk.scale_attention(
            *(q, k, v, SCALES),
            rotary=tables,  # type: ignore[arg-type]
            rotary_interleaved=interleaved,
            log_temperature=temperature,
            **options,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(got, want, **CLOSE)


@each_backend
def test_1024_schedule(backend: str) -> None:
    """Compares 9,451 tokens, 4,096 of them in the last scale, with attention of sampled queries of each scale."""
    scales = tuple(n * n for n in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
    L = sum(scales)
    assert L == 9451
    q, k, v = qkv(L, B=1, H=1, D=8)
    for pattern in ("diagonal", "causal"):
        got = mk.scale_attention(q, k, v, scales, pattern=pattern, scale=1.0, backend=backend)
        start = 0
        for n in scales:
            rows = torch.arange(start, start + n, max(1, n // 7))
            keys = slice(0 if pattern == "causal" else start, start + n)
            torch.testing.assert_close(got[:, rows], sdpa(q[:, rows], k[:, keys], v[:, keys], 1.0), **CLOSE)
            start += n


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_has_no_effect(backend: str) -> None:
    """Sums are computed in float32 under autocast too."""
    q, k, v = torch.randn(3, 1, 14, 2, 64, generator=torch.Generator().manual_seed(0))
    plain = mk.scale_attention(q, k, v, (5, 9), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mk.scale_attention(q, k, v, (5, 9), backend=backend), plain)


@each_or_triton
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
@pytest.mark.parametrize(("size", "value"), [(6e4, 1.0), (1.0, 3e38), (6e4, 1e30), (1e-19, 1.0)])
def test_extreme_values(backend: str, pattern: str, size: float, value: float) -> None:
    """Outputs and gradients match float64 for scores of 1e10 and 1e-38, and for values near the largest float."""
    q, k, _ = (size * t for t in qkv(D=64))
    signs = qkv(D=64)[2].sign()
    leaves = [q.requires_grad_(), k.requires_grad_(), (value * signs).requires_grad_()]
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)) / value
    results = []
    for tensors, dtype, name in ((leaves, torch.float32, backend), (leaves, torch.float64, "reference")):
        cast = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = mk.scale_attention(*cast, SCALES, pattern=pattern, scale=1.0, backend=name)
        results.append([out.detach(), *torch.autograd.grad(out, cast, grad.to(dtype))])
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        error = (got.double() - want).abs().max()
        assert error <= 1e-5 * want.abs().max()


@each_or_triton
def test_zero_temperature(backend: str) -> None:
    """exp underflows, so all keys of a scale have equal weights and only v has a nonzero gradient."""
    q, k, v = (t.clone().requires_grad_() for t in qkv())
    cold = torch.tensor([-104.0, -1e3, -torch.inf])
    out = mk.scale_attention(q, k, v, SCALES, log_temperature=cold, backend=backend)
    means = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in v.split(SCALES, 1)], 1)
    torch.testing.assert_close(out, means, **CLOSE)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq.any() and not dk.any()
    torch.testing.assert_close(dv, torch.ones_like(dv), **CLOSE)


@each_or_triton
def test_temperature_is_clamped(backend: str) -> None:
    """Temperatures above log 100 act as log 100 and get no gradient; norms of zero rows are clamped to 1e-12."""
    q, k, v = qkv()
    q, k = q.clone(), k.clone()
    q[:, 3], k[:, 7] = 0.0, 0.0
    bound = torch.full((3,), 100.0).log()
    want = mk.scale_attention(q, k, v, SCALES, log_temperature=bound, backend="reference")
    temperature = torch.tensor([4.7, 1e3, torch.inf], requires_grad=True)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = mk.scale_attention(*leaves, SCALES, log_temperature=temperature, backend=backend)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    *grads, dtemperature = torch.autograd.grad(out.sum(), (*leaves, temperature))
    assert not dtemperature.any() and all(t.isfinite().all() for t in grads)
