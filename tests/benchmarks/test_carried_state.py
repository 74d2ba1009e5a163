"""Tests the size of the state carried between scales against manual counts and an actual generation."""

import pytest
import torch

import mvar
from benchmarks.analysis import scaling
from benchmarks.analysis.flops import OURS, PUBLIC, VAR
from benchmarks.baselines import eager_generation
from benchmarks.report import pages


def test_carried_bytes() -> None:
    """In d16, a mixer carries 32 heads of 64×64 float32 and three rows of 2048 + 2·64 convolution inputs."""
    for resolution in (256, 512, 1024):
        assert scaling.carried_bytes(OURS, 16, resolution) == 2 * 16 * (4 * 32 * 64 * 64 + 2 * 3 * 2176)
    assert scaling.carried_bytes(PUBLIC, 16, 256) == 2 * 16 * 4 * 680 * 1024
    assert scaling.carried_bytes(VAR, 16, 256) == 2 * 16 * 2 * 2 * 680 * 1024


def test_carried_bytes_of_public_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the 256×256 schedule and a model of one narrow block."""
    tokenizer = mvar.TokenizerConfig(
        mvar.SCHEDULES[256], num_codes=1024, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False
    )
    model, images = mvar.build(1, num_classes=10, tokenizer=tokenizer)
    held: list[int] = []

    def run_block(*inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        x, cache = eager_generation.block(*inputs)  # type: ignore[arg-type]
        held.append(cache.nbytes)
        return x, cache

    eager_generation.generate(model, images, torch.tensor([3]), run_block=run_block)
    assert held[-1] == scaling.carried_bytes(PUBLIC, 1, 256) and held == sorted(held)


def test_committed_table_is_current() -> None:
    assert pages.CARRIED_STATE.read_text() == scaling.page()
