"""Tests lower bounds against manual counts."""

import pytest

from benchmarks.analysis.lower_bounds import LowerBound, lower_bounds


def bound_of(op: str, resolution: int, batch: int, scale: int | None) -> LowerBound:
    found = [f for f in lower_bounds(16, resolution, batch) if (f.op, f.scale) == (op, scale)]
    assert len(found) == 1
    return found[0]


def test_gated_adaln_at_last_scale() -> None:
    """d16, 8 images with guidance: 16 rows of 256 tokens with 1024 channels; x, branch, x', out and g, s, t."""
    found = bound_of("gated_adaln", 256, 8, scale=10)
    assert (found.tokens, found.bound) == (256, "memory")
    assert found.moved_bytes == 2 * (4 * 16 * 256 * 1024 + 3 * 16 * 1024)
    assert found.us == pytest.approx(33_652_736 / 4.3e6)


def test_attention_in_training_at_512() -> None:
    """One image, 16 heads: 1,522,100 pairs of tokens, 4·64 FLOPs each; q, k, v and out have 2,240 tokens."""
    found = bound_of("scale_attention", 512, 1, scale=None)
    assert (found.tokens, found.bound) == (2240, "arithmetic")
    assert found.moved_bytes == 2 * 4 * 2240 * 16 * 64
    assert found.us == pytest.approx(1e6 * 1_522_100 * 16 * 4 * 64 / 790e12)


def test_causal_attention() -> None:
    """Scale 3 has 9 queries and 1 + 4 + 9 keys."""
    found = bound_of("scale_attention (causal)", 256, 1, scale=3)
    assert found.flops == 2 * 16 * 9 * 14 * 4 * 64
    assert found.moved_bytes == 2 * 2 * 16 * 64 * (2 * 9 + 2 * 14)


def test_sample_tokens() -> None:
    assert bound_of("sample_tokens", 256, 8, scale=10).moved_bytes == 8 * 256 * (2 * 4096 + 8)
    assert not [f for f in lower_bounds(16, 256, 8) if f.op == "sample_tokens" and f.scale is None]
