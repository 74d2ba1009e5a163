"""Tests that kernels are not called with tensors whose storage is too small."""

import importlib
from typing import Any

import pytest
import torch

import mvar_kernels as mk
from mvar_kernels import ffi
from mvar_kernels.dispatch import OPS, native
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Spec
from tests.kernels.test_contract import evaluate, prepared

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built")
CASES = (
    ("adaln", "odd"),
    ("adaln", "per_token_odd"),
    ("gated_adaln", "odd"),
    ("gated_adaln", "affine"),
    ("gated_adaln", "per_token_odd"),
    ("group_norm_silu", "odd"),
    ("group_norm_silu", "odd_last"),
    ("scale_attention", "diagonal_norm"),
    ("ssd_scan", "bidirectional_odd"),
    ("mamba2_mixer", "odd"),
    ("sample_tokens", "per_image"),
    ("soft_embedding", "per_image"),
)
# Bytes at the end of the first input that no kernel reads: dt, three float32 numbers, is passed as a separate tensor.
UNREAD = {"mamba2_mixer": 12}


def run_with_short_tensor(monkeypatch: pytest.MonkeyPatch, spec: Spec, name: str, backend: str, index: int) -> int:
    """Run forward and backward with one of the tensors passed to the extension one byte too small.

    Returns the number of tensors that were passed.
    """
    module: Any = importlib.import_module(spec.call.__module__.removesuffix("spec") + "native")
    count = 0

    def pointers(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
        nonlocal count
        given = list(ffi.pointers(*tensors))
        for i, t in enumerate(tensors):
            if t is None:
                continue
            if count == index:
                address, strides, _ = given[i]  # type: ignore[misc]
                last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
                given[i] = (address, strides, max((last + 1) * t.itemsize - 1 - UNREAD.get(spec.op, 0), 0))
            count += 1
        return tuple(given)

    case = next(c for c in spec.cases if c.name == name)
    dtype = torch.float32 if backend == "cpu" else torch.bfloat16
    inputs = prepared(spec, case, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(module, "pointers", pointers)
        evaluate(spec, case, inputs, backend)
    return count


def test_cases_cover_every_op() -> None:
    assert {op for op, _ in CASES} == {op for op in SPECS if "cpu" in OPS[op].modules}


@pytest.mark.parametrize(("op", "case"), CASES)
def test_storage_one_byte_too_small(op: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = run_with_short_tensor(monkeypatch, SPECS[op], case, "cpu", -1)
    assert tensors >= 4
    for index in range(tensors):
        with pytest.raises(ValueError, match=r"^[\w ]+: sizes .* do not fit its \d+ bytes"):
            run_with_short_tensor(monkeypatch, SPECS[op], case, "cpu", index)


def test_freed_storage() -> None:
    """FSDP frees the storage of weights between uses."""
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 8)
    scale.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=r"scale: sizes \(2, 8\) and strides \(8, 1\) of 4 bytes do not fit its 0 bytes"
    ):
        mk.adaln(x, scale, scale, backend="cpu")


def test_invalid_scales() -> None:
    extension = native()
    assert extension is not None
    q = torch.randn(1, 4, 1, 8)
    given = (
        ffi.pointers(q, q, q, None, None, None, None, None, None),
        ffi.pointers(q, torch.empty(1, 1, 4, dtype=torch.float32)),
    )
    for scales in ((1, 2), (1, 4), (5, -1)):
        with pytest.raises(ValueError, match="scales: expected to add up"):
            extension.scale_attention_forward((0, 0), (1, 4, 4, 1, 8, 0, 0, 1), scales, False, 1.0, False, *given)


def test_empty_tensor_with_any_strides() -> None:
    """torch considers an empty tensor contiguous, so contiguous() does not change its strides."""
    x = torch.zeros(2, 4, 16)[:, :0, ::2]
    assert x.stride(-1) == 2 and mk.adaln(x, torch.zeros(2, 8), torch.zeros(2, 8), backend="cpu").shape == (2, 0, 8)
