"""Tests that fakes and kernels return the same shape, strides and dtype for inputs of any strides.

A compiled graph asserts the metadata that the fakes return.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mvar_kernels as mk
from mvar_kernels.dispatch import OPS
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Spec
from tests.helpers.dispatched import dispatched


def permuted(t: Tensor) -> Tensor:
    """The same values in reversed memory order, as in a channels-first feature map."""
    return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])


def sliced(t: Tensor) -> Tensor:
    """The same values as every other element of a larger tensor, starting at its second row."""
    wide = t.new_zeros([2 * s for s in t.shape])
    view = wide[tuple(slice(1 if d == 0 else 0, None, 2) for d in range(t.dim()))]
    return view.copy_(t)


def expanded(t: Tensor) -> Tensor:
    """The first row expanded to all rows with stride 0."""
    return t[:1].expand(t.shape) if t.dim() else t


def calls(spec: Spec, layout: Callable[[Tensor], Tensor], backend: str, dtype: torch.dtype) -> dict[str, Sequence[Any]]:
    """Return the operators that a call and its backward run, with their arguments."""
    case, generator = spec.cases[1], torch.Generator().manual_seed(1)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        name: layout(t.to(kept if name in spec.keeps_dtype else dtype))
        for name, t in spec.inputs(case, generator).items()
    }

    def run() -> None:
        leaves = {name: t.detach().requires_grad_(name in spec.grads) for name, t in inputs.items()}
        outs = spec.call(leaves, case, backend)
        if spec.grads:
            wanted = [leaves[name] for name in spec.grads if name in leaves]
            torch.autograd.grad(outs, wanted, [layout(torch.ones_like(out)) for out in outs])

    found = dispatched(spec.op, run)
    assert spec.op in found and (f"{spec.op}_backward" in found) == bool(spec.grads)
    return found


CASES = (
    (permuted, "reference", torch.float16),
    (permuted, "reference", torch.float64),
    (expanded, "reference", torch.float16),
    (permuted, "cpu", torch.float32),
    (sliced, "cpu", torch.float32),
)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize(("layout", "backend", "dtype"), CASES)
def test_fake_strides_match_kernel(
    spec: Spec, layout: Callable[[Tensor], Tensor], backend: str, dtype: torch.dtype
) -> None:
    if mk.backends()[backend] is not None or backend not in OPS[spec.op].modules:
        pytest.skip(f"{backend} is not available")
    for name, arguments in calls(spec, layout, backend, dtype).items():
        operator = getattr(torch.ops.mvar, name).default
        arguments = tree_map_only(Tensor, Tensor.detach, arguments)
        outs = tree_leaves(operator(*arguments))
        with FakeTensorMode() as mode:
            fakes = tree_leaves(operator(*tree_map_only(Tensor, mode.from_tensor, arguments)))
        for out, fake in zip(outs, fakes, strict=True):
            assert (out.shape, out.stride(), out.dtype) == (fake.shape, fake.stride(), fake.dtype), name
        # Below the dispatcher, the reference's backward uses torch.func, which opcheck does not support.
        if name == spec.op:
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
