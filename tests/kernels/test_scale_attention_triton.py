"""Tests of scale_attention's tile plan, Triton kernels and flash-attn backend."""

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels import tiling
from mvar_kernels.ops.scale_attention import flash_attn, plan, reference
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.tiling import Tile

pytestmark = pytest.mark.slow

VAR_256 = tuple(n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(mk.backends()["triton"] is not None, reason="no Triton")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [680, 425, 256])
@pytest.mark.parametrize("rows_are_keys", [False, True])
def test_tiles_cover_the_pattern(causal: bool, queries: int, rows_are_keys: bool) -> None:
    """Each row is in one tile, whose blocks contain all its keys, and all rows attend to all keys of full blocks."""
    spans = (plan.key_spans if rows_are_keys else plan.query_spans)(VAR_256, queries, causal)
    by_row = [(lo, hi) for n, lo, hi in spans for _ in range(n)]
    covered: list[int] = []
    for row, rows, lo, full_lo, full_hi, hi in plan.tiles(spans, 64, 32):
        covered += range(row, row + rows)
        assert rows <= 64 and (full_lo - lo) % 32 == (full_hi - full_lo) % 32 == 0 <= hi - full_hi
        assert rows_are_keys or full_lo == lo, "the kernels over queries take whole blocks first"
        for row_lo, row_hi in by_row[row : row + rows]:
            assert row_lo >= row_hi or (lo <= row_lo and row_hi <= hi)
            assert full_lo == full_hi or (row_lo <= full_lo and full_hi <= row_hi)
    assert sorted(covered) == list(range(len(by_row)))


@pytest.mark.parametrize("longest", [0, 64, 256, 680])
def test_whole_scales(longest: int) -> None:
    """Each scale is in one tile with its rows and columns: of whole scales, or of those that are cut."""
    spans = plan.query_spans(VAR_256, 680, False)
    whole = plan.tiles(spans, 64, 32, range(1, longest + 1), cut=False)
    shared = plan.tiles(spans, 64, 32, range(longest + 1, 681))
    assert sorted(row for first, rows, *_ in whole + shared for row in range(first, first + rows)) == list(range(680))
    for first, rows, lo, _, _, hi in whole:
        assert (lo, hi) == (first, first + rows) and (rows <= 64 or rows in VAR_256) and rows <= max(64, longest)
    assert all(hi - lo > longest for _, _, lo, _, _, hi in shared)


def test_tile_efficiency() -> None:
    tiles = plan.tiles(plan.query_spans(VAR_256, 680, False), 64, 64)
    assert len(tiles) == 12 and tiles[0][-1] - tiles[0][2] == 256
    assert sum(n * n for n in VAR_256) / sum(64 * -(-(t[5] - t[2]) // 64) * 64 for t in tiles) > 0.84


def results(backend: str, scales: tuple[int, ...], queries: int, inputs: list[Tensor], pattern: str) -> list[Tensor]:
    q, k, v, t = (x.clone().to(DEVICE).requires_grad_() for x in inputs)
    out = mk.scale_attention(q[:, -queries:], k, v, scales, pattern=pattern, log_temperature=t, backend=backend)
    cotangent = torch.ones(out.shape).cumsum(1).to(out)  # cumsum is not deterministic on CUDA
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, t), cotangent)]


@needs_triton
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_cached_keys_and_zero_rows(pattern: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers keys that no query attends to, zero rows, and blocks smaller than a scale."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 46, 1, 16, generator=generator) for _ in range(3)] + [torch.tensor([1.0])]
    inputs[0][:, 20], inputs[1][:, 21] = 0.0, 0.0
    monkeypatch.setattr(tiling, "chosen", lambda *_: Tile({"BLOCK_M": 32, "BLOCK_N": 16}))
    got, want = (results(b, (1, 2, 4, 9, 30), 39, inputs, pattern) for b in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        # A gradient through a norm clamped to 1e-12 is 1e12 times the others.
        assert ((a - b).abs() <= 1e-4 + 1e-4 * b.abs()).all()


@needs_triton
def test_whole_scales_agree_with_shared_ones(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program a scale, and two kernels with a program a tile: scales of several tiles and packed ones, and both."""
    generator = torch.Generator().manual_seed(0)
    module = import_module("mvar_kernels.ops.scale_attention.triton.backward")  # beside a function of its name
    inputs = [torch.randn(2, 83, 2, 16, generator=generator).half() for _ in range(3)] + [torch.tensor([1.0, 4.0])]
    monkeypatch.setattr(tiling, "chosen", lambda *_: Tile({"BLOCK_M": 32, "BLOCK_N": 16}))
    for longest in (0, 50, 256):
        monkeypatch.setattr(module, "_longest_whole", lambda call, longest=longest: longest)
        got = results("triton", (1, 2, 9, 30, 41), 83, inputs, "diagonal")
        want = results("reference", (1, 2, 9, 30, 41), 83, [t.double() for t in inputs], "diagonal")
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 2e-3 * b.abs().max()


def test_flash_attn_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls a fake flash_attn_varlen_func of the same signature, and compares outputs and gradients."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, return_attn_probs):  # type: ignore[no-untyped-def]
        assert return_attn_probs and torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max())
        lengths = tuple(cu_q.diff().tolist())
        out, lse = reference.scale_attention(Attention(q[None], k[None], v[None], None, lengths, False, softmax_scale))
        return out[0], lse[0], None

    fake_module = ModuleType("flash_attn")
    fake_module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", fake_module)
    q, k, v = torch.randn(2, 30, 3, 2, 16, generator=torch.Generator().manual_seed(0)).unbind(2)
    call = Attention(q[:, 5:], k, v, torch.tensor([1.0, 5.0]), (1, 4, 9, 16), False, 1.0)
    peer, own = flash_attn.scale_attention_flash_attn, reference.scale_attention_reference
    out, lse = peer.forward(call)
    want = own.forward(call)
    torch.testing.assert_close((out, lse), want)
    assert peer.backward is not None and own.backward is not None
    grad_out = [torch.ones_like(out).cumsum(1)]
    torch.testing.assert_close(peer.backward(grad_out, call), own.backward(grad_out, call), rtol=1e-4, atol=1e-3)
    assert peer.unsupported_reason(call) == "inputs are on cpu"
