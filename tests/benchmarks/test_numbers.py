"""Tests NumPy numbers as arguments and sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mvar


def test_numpy_numbers(tmp_path: Path) -> None:
    """NumPy scalars, arrays and 0-dim tensors are accepted, and configurations with them can be saved as JSON."""
    sizes = mvar.TokenizerConfig(
        np.array([1, 2]), num_codes=np.int64(16), ch=np.int32(32), ch_mult=np.array([1]), num_res_blocks=np.int64(1)
    )
    model, tokenizer = mvar.build(
        np.int64(1), num_classes=np.int16(3), seed=np.int64(5), tokenizer=sizes, mlp_ratio=np.float32(2.0)
    )
    plain = mvar.build(
        1,
        num_classes=3,
        seed=5,
        tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,), num_res_blocks=1),
        mlp_ratio=2.0,
    )
    assert (model.config, tokenizer.config) == tuple(module.config for module in plain)
    mvar.save(tmp_path / "model.safetensors", model)
    assert mvar.load_model(tmp_path / "model.safetensors").config == model.config
    how: dict[str, Any] = {"cfg": 1.5, "top_k": 3, "top_p": 0.75, "seed": 7, "first_index": 2}
    right = mvar.generate(*plain, [0, 2], **how, dtype=torch.float32).tokens
    for number in (np.float64, np.longdouble, np.array, torch.tensor):
        given = {name: number(value) if isinstance(value, float) else np.int32(value) for name, value in how.items()}
        for labels in (np.array([0, 2], dtype=np.uint16), [np.int64(0), np.uint64(2)], torch.tensor([0, 2])):
            got = mvar.generate(model, tokenizer, labels, **given, dtype=torch.float32).tokens
            assert torch.equal(got, right)
    for name in how:
        with pytest.raises((ValueError, TypeError), match=name):
            mvar.generate(model, tokenizer, [0], **{name: np.True_}, dtype=torch.float32)
    with pytest.raises(ValueError, match="depth"):
        mvar.ModelConfig(np.True_, (1, 2))
    with pytest.raises(ValueError, match="patch_nums"):
        mvar.ModelConfig(1, np.array([1.0, 2.0]))
    for seed in ("1", 1.5, np.True_, 2**64):
        with pytest.raises(ValueError, match="seed: expected a whole number"):
            mvar.build(1, num_classes=3, seed=seed, tokenizer=sizes)  # type: ignore[arg-type]
