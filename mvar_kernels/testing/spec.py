"""What an op's `spec.py` defines: cases, inputs, slack, bytes and FLOPs, for tests and benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# The gradient of a number per head sums B·L or more signed terms: its error follows the sum of their
# magnitudes, while the reference's own error on so few elements is a matter of luck.
PER_HEAD_SUM = (4.0, "few elements, each a sum of many signed terms")
HALVES_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `name` is unique within the op.

    keeps_dtype: inputs that stay float32 in this case, besides the spec's.
    cotangents: factor on the seeded gradients of the outputs, for gradients that would leave float16's range.
    cancelled: "grad of" an input whose terms cancel to zero → the largest sum of the terms' magnitudes, by the float32
        rounding of which the gradient may differ from zero.
    """

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    keeps_dtype: tuple[str, ...] = ()
    cotangents: float = 1.0
    cancelled: Mapping[str, float] = field(default_factory=dict)

    def at_batch(self, batch: int) -> "Case":
        """The same case with another batch."""
        return replace(self, sizes={**self.sizes, "B": batch})


@dataclass(frozen=True)
class Spec:
    """One op, for tests and benchmarks.

    inputs: the case's input tensors in float64, from a seeded generator; those in `grads` get gradients.
    call: the public function on those inputs, as a tuple of outputs.
    reference: the specification in PyTorch on the same inputs, differentiable, in any dtype.
    keeps_dtype: inputs that stay float32 when the rest is float16 or bfloat16.
    slack: output or gradient name → (factor on the tolerance, the reason for it).
    slack_16_bits: the same where inputs are float16 or bfloat16; it goes before slack.
    bfloat16_operands: float32 gradient whose tolerance has, with bfloat16 inputs, a rounding of bfloat16, as kernels
        multiply in it what the reference multiplies in float32 → the reason for it.
    bench, bench_cuda: the cases that benchmarks time on a CPU and on a GPU, of sizes that occur in published models.
    work, work_backward: bytes moved at least and floating-point operations, for a case and bytes per element.
    """

    op: str
    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.Generator], Inputs]
    call: Callable[[Inputs, Case, str], tuple[Tensor, ...]]
    reference: Callable[[Inputs, Case], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    work: Callable[[Case, int], tuple[int, int]]
    grads: tuple[str, ...] = ()
    work_backward: Callable[[Case, int], tuple[int, int]] = lambda case, itemsize: (0, 0)
    dtypes: tuple[torch.dtype, ...] = HALVES_AND_SINGLE
    keeps_dtype: tuple[str, ...] = ()
    slack: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    slack_16_bits: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    bfloat16_operands: Mapping[str, str] = field(default_factory=dict)
    bench: tuple[Case, ...] = ()
    bench_cuda: tuple[Case, ...] = ()
