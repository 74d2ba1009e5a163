"""Tests of argument validation: NumPy scalars are accepted as numbers, booleans are not."""

from typing import Any

import numpy as np
import pytest
import torch

import mvar_kernels as mk
from mvar_kernels import validation


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_integers(value: object) -> None:
    known = validation.integer(value)
    assert known == 3 and type(known) is int
    assert validation.number(value) == 3


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), torch.tensor(0.5)], ids=repr)
def test_real_numbers(value: object) -> None:
    known = validation.positive("op", "eps", value)
    assert known == 0.5 and validation.integer(value) is None


NOT_NUMBERS = [True, np.True_, torch.tensor(True), "1", None, 1j, np.array([1]), torch.tensor([1.0]), [1]]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_not_a_number(value: object) -> None:
    assert validation.number(value) is None and validation.integer(value) is None
    with pytest.raises(ValueError, match="op: eps: expected a number above 0, got "):
        validation.positive("op", "eps", value)


def test_scale_lengths() -> None:
    for scales in ((1, 4), [1, 4], np.array([1, 4]), torch.tensor([1, 4]), (np.int64(1), np.int32(4))):
        known = validation.scale_lengths("op", scales, 5)
        assert known == (1, 4) and all(type(n) is int for n in known)
    for wrong in ((), (0, 5), (1.0, 4), (True, 4), 5, np.array(5), np.array([[1, 4]]), "14", None):
        with pytest.raises(ValueError, match="op: scales: expected positive integers, got "):
            validation.scale_lengths("op", wrong, 5)


def test_ops_accept_numpy_scalars() -> None:
    cond, uncond, codebook = torch.randn(2, 3, 20), torch.randn(2, 3, 20), torch.randn(20, 4)
    how: dict[str, Any] = {"guidance": 1.5, "top_k": 7, "top_p": 0.5, "seed": 5, "scale_index": 2}
    same: dict[str, Any] = {
        "guidance": np.float32(1.5),
        "top_k": np.int64(7),
        "top_p": torch.tensor(0.5),
        "seed": np.int64(5),
        "scale_index": np.uint8(2),
    }
    assert torch.equal(mk.sample_tokens(cond, uncond, **same), mk.sample_tokens(cond, uncond, **how))
    soft = mk.soft_embedding(cond, uncond, codebook, **same, sharpness=np.float32(1.5), temperature=np.array(0.25))
    assert torch.equal(soft, mk.soft_embedding(cond, uncond, codebook, **how, sharpness=1.5, temperature=0.25))
    x, s = torch.randn(2, 5, 8), torch.randn(2, 8)
    assert torch.equal(mk.adaln(x, s, s, eps=np.float32(0.5)), mk.adaln(x, s, s, eps=0.5))  # type: ignore[arg-type]
    q = torch.randn(1, 5, 2, 8)
    got = mk.scale_attention(q, q, q, np.array([1, 4]), scale=np.float32(0.5))  # type: ignore[arg-type]
    assert torch.equal(got, mk.scale_attention(q, q, q, (1, 4), scale=0.5))
