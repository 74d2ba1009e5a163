"""Cases, bytes and FLOPs of adaln and gated_adaln."""

import torch
from torch import Tensor

from mvar_kernels.ops.adaln import reference
from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.specs import Case, Inputs, Spec

EPS = 1e-6

CASES = (
    Case("one_value", {"B": 1, "L": 1, "C": 1}),
    Case("one_token", {"B": 2, "L": 1, "C": 64}),
    Case("odd", {"B": 3, "L": 7, "C": 67}),
    Case("wide_row", {"B": 1, "L": 3, "C": 4096}),
    Case("d16_256", {"B": 2, "L": 680, "C": 1024}),
)
BENCH = CASES[-1:]


def _inputs(case: Case, generator: torch.Generator, *, gated: bool) -> Inputs:
    B, L, C = (case.sizes[d] for d in "BLC")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # A mean far from zero shows a variance that cancels.
    inputs = {"x": normal(B, L, C) * 1.5 + 3.0, "scale": 0.5 * normal(B, C), "shift": normal(B, C)}
    if gated:
        inputs |= {"branch": normal(B, L, C), "gate": normal(B, C)}
    return inputs


def _work(case: Case, itemsize: int, *, tensors: int, flops: int) -> tuple[int, int]:
    B, L, C = (case.sizes[d] for d in "BLC")
    return tensors * B * L * C * itemsize, flops * B * L * C


ADALN = Spec(
    op="adaln",
    cases=CASES,
    inputs=lambda case, generator: _inputs(case, generator, gated=False),
    call=lambda t, case, backend: (adaln(t["x"], t["scale"], t["shift"], eps=EPS, backend=backend),),
    reference=lambda t, case: (reference.adaln(t["x"], t["scale"], t["shift"], EPS),),
    outputs=("out",),
    grads=("x", "scale", "shift"),
    bench=BENCH,
    work=lambda case, itemsize: _work(case, itemsize, tensors=2, flops=8),
)

GATED_ADALN = Spec(
    op="gated_adaln",
    cases=CASES,
    inputs=lambda case, generator: _inputs(case, generator, gated=True),
    call=lambda t, case, backend: gated_adaln(
        t["x"], t["branch"], t["gate"], t["scale"], t["shift"], eps=EPS, backend=backend
    ),
    reference=lambda t, case: reference.gated_adaln(t["x"], t["branch"], t["gate"], t["scale"], t["shift"], EPS),
    outputs=("x_new", "out"),
    grads=("x", "branch", "gate", "scale", "shift"),
    bench=BENCH,
    work=lambda case, itemsize: _work(case, itemsize, tensors=4, flops=10),
)

SPECS = (ADALN, GATED_ADALN)
