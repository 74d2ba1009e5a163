"""The contract of every op, backend, case and dtype.

Against the reference in float64, a kernel's error is at most twice that of the reference in its own dtype plus one
rounding at the largest value of the tensor, for every output and every gradient; slack is a number in spec.py with its
reason, which has the gradients whose rounding is of bfloat16, and those whose terms cancel, too. Integer outputs equal
the reference's. Used by the tests and by `mvar check`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import OPS, THIRD_PARTY
from mvar_kernels.testing.spec import Case, Inputs, Spec

Results = Mapping[str, Tensor]


def device_of(backend: str) -> torch.device:
    """Where a backend's kernels run on this machine: Triton's and other packages' on the CPU if there is no GPU."""
    gpu = backend == "cuda" or (backend in ("triton", *THIRD_PARTY) and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def differentiable(spec: Spec, backend: str) -> tuple[str, ...]:
    """The inputs that get gradients from a backend: none where its kernel has no backward."""
    op = OPS[spec.op]
    return () if backend in op.modules and op.kernel(backend).backward is None else spec.grads


def _seeded(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def prepared(
    spec: Spec, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", *, made_on: str = "cpu"
) -> Inputs:
    """The case's inputs in `dtype`, strides kept; those of `keeps_dtype` in float32 (float64 for float64).

    made_on: the device of the generator; the CPU's gives the same numbers on every machine.
    """
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    keeps, made = {*spec.keeps_dtype, *case.keeps_dtype}, spec.inputs(case, _seeded(made_on))
    return {n: t.to(device, kept if n in keeps else dtype) for n, t in made.items()}


def cotangents(case: Case, outs: Sequence[Tensor]) -> list[Tensor]:
    """Seeded gradients of the outputs, in their dtypes."""
    generator = _seeded()
    normal = (torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu") for o in outs)
    return [(case.cotangents * t).to(o) for t, o in zip(normal, outs, strict=True)]


def evaluate(
    spec: Spec, case: Case, inputs: Inputs, backend: str | None, given: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs by name and, with gradients of the outputs, "grad of" inputs; backend None is the reference.

    given: these gradients; None for :func:`cotangents`.
    """
    grads = spec.grads if backend is None else differentiable(spec, backend)
    wanted = [name for name in grads if name in inputs]
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    outs = spec.reference(leaves, case) if backend is None else spec.call(leaves, case, backend)
    results = dict(zip(spec.outputs, (o.detach() for o in outs), strict=True))
    if wanted:
        found = torch.autograd.grad(outs, [leaves[n] for n in wanted], given or cotangents(case, outs))
        results |= {f"grad of {n}": g for n, g in zip(wanted, found, strict=True)}
    return results


def error_ratios(
    spec: Spec, case: Case, got: Results, same: Results, exact: Results, inputs: torch.dtype | None = None
) -> dict[str, float]:
    """error / tolerance of each output and gradient, at most 1 if it is right.

    same, exact: the reference's, in the dtype of `got` and in float64, on one device. inputs: their dtype, or None for
    that of the first output. Infinite for values that are not finite, another shape or dtype, and integers that differ.
    """
    found, inputs = {}, inputs or same[spec.outputs[0]].dtype
    slack = dict(spec.slack)
    if inputs in (torch.float16, torch.bfloat16):
        slack |= spec.slack_16_bits
    for name, value in got.items():
        value, expected = value.to(exact[name].device), exact[name]
        if value.shape != expected.shape or value.dtype != same[name].dtype:
            found[name] = math.inf
        elif not value.dtype.is_floating_point:
            found[name] = 0.0 if torch.equal(value, same[name]) else math.inf
        elif not bool(value.isfinite().all()):
            found[name] = math.inf
        elif value.numel() == 0:
            found[name] = 0.0
        else:
            error, of_reference = (float((t.double() - expected).abs().max()) for t in (value, same[name]))
            of_operands = inputs == torch.bfloat16 and name in spec.bfloat16_operands
            rounding = torch.finfo(inputs if of_operands else value.dtype).eps * float(expected.abs().max())
            rounding += torch.finfo(torch.float32).eps * case.cancelled.get(name, 0.0)
            tolerance = slack.get(name, (1.0, ""))[0] * (2 * of_reference + rounding)
            found[name] = error / tolerance if tolerance else (math.inf if error else 0.0)
    return found


def every_other(t: Tensor) -> Tensor:
    """The same values with every stride doubled."""
    wide = t.new_full([2 * s for s in t.shape], torch.nan if t.is_floating_point() else 0)
    view = wide[(slice(None, None, 2),) * t.dim()]
    view.copy_(t)
    return view


def transposed(t: Tensor) -> Tensor:
    """The same values with the memory order reversed."""
    return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])


LAYOUTS = (every_other, transposed)
