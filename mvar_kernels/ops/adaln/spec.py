"""Cases, bytes and FLOPs of adaln and gated_adaln."""

from typing import Any

import torch
from torch import Tensor

from mvar_kernels.ops.adaln import reference
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.testing.spec import Case, Inputs, Spec

EPS = 1e-6
MODULATION = ("gate", "scale", "shift")
SIZES = {"B": 3, "L": 7, "C": 72}
PER_TOKEN = {"norm": "rms", "modulation": "B L C", "with": ("scale", "shift", "weight", "bias")}

CASES = (
    Case("one_value", {"B": 1, "L": 1, "C": 1}),
    Case("one_token", {"B": 2, "L": 1, "C": 64}),
    Case("odd", {"B": 3, "L": 7, "C": 67}),
    Case("wide_row", {"B": 1, "L": 3, "C": 4096}),
    Case("long_and_narrow", {"B": 1, "L": 300, "C": 64}),
    Case("d30", {"B": 2, "L": 9, "C": 1920}),
    # The mean of such rows, rounded to float32, is off by what 1/√eps makes a sizeable number.
    Case("constant", {"B": 2, "L": 5, "C": 1000}, {"spread": 0.0, "mean": 12345.678}),
    Case("constant_odd", {"B": 1, "L": 3, "C": 67}, {"spread": 0.0, "mean": -1000.1}),
    Case("far_from_zero", {"B": 1, "L": 6, "C": 264}, {"spread": 1e-2, "mean": 1e4}),
    Case("d16_scale", {"B": 1, "L": 169, "C": 1024}),
    Case("rms", SIZES, {"norm": "rms"}),
    Case("rms_norm", SIZES, {"norm": "rms", "with": ("weight",)}, ("weight",)),
    Case("affine", SIZES, {"with": ("scale", "shift", "weight", "bias")}, ("weight", "bias")),
    Case("layer_norm", SIZES, {"with": ("weight", "bias")}),
    Case("no_affine", SIZES, {"with": ()}),
    Case("no_shift", SIZES, {"with": ("scale",)}),
    Case("float32_modulation", SIZES, {}, MODULATION),
    Case("all_samples", SIZES, {"modulation": "1 C"}),
    Case("all_samples_affine", SIZES, {"modulation": "1 C", "with": ("scale", "weight")}, MODULATION),
    Case("per_token", SIZES, {"modulation": "B L C"}),
    Case("per_token_no_shift", SIZES, {"modulation": "B L C", "with": ("scale", "bias")}, ("bias",)),
    Case("per_token_odd", {"B": 2, "L": 35, "C": 67}, PER_TOKEN, MODULATION),
    Case("per_token_wide", {"B": 1, "L": 3, "C": 1032}, PER_TOKEN),
)
RESIDUAL = (
    Case("float32_residual", SIZES, {}, ("x",)),
    Case("float32_residual_modulation", {"B": 2, "L": 35, "C": 136}, {"norm": "rms"}, ("x", *MODULATION)),
    Case("float32_residual_affine", SIZES, {"with": ("weight", "bias")}, ("x", "weight", "bias")),
    Case("float32_residual_per_token", SIZES, {"modulation": "B L C"}, ("x",)),
    Case("float32_residual_wide", {"B": 1, "L": 3, "C": 1032}, PER_TOKEN, ("x", "weight", "bias", *MODULATION)),
)
BENCH = (Case("d16_256", {"B": 2, "L": 680, "C": 1024}),)
BENCH_CUDA = (
    Case("d16_training", {"B": 32, "L": 680, "C": 1024}),
    Case("d30_training", {"B": 32, "L": 680, "C": 1920}),
    Case("d16_last_scale", {"B": 16, "L": 256, "C": 1024}),
)


def _inputs(case: Case, generator: torch.Generator, *, gated: bool) -> Inputs:
    B, L, C = (case.sizes[d] for d in "BLC")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)

    # A mean far from zero shows a variance that cancels.
    spread, mean = case.options.get("spread", 1.5), case.options.get("mean", 3.0)
    shape = {"B C": (B, C), "1 C": (1, C), "B L C": (B, L, C)}[case.options.get("modulation", "B C")]
    inputs = {"x": normal(B, L, C) * spread + mean, "scale": 0.5 * normal(*shape), "shift": normal(*shape)}
    constant = spread == 0  # then x' is, too
    if gated:
        branch = normal(B, L, 1 if constant else C).expand(B, L, C)
        inputs |= {"branch": branch, "gate": normal(*shape[:-1], 1 if constant else C).expand(shape)}
    given = {"x", "branch", "gate", *case.options.get("with", ("scale", "shift"))}
    inputs |= {"weight": 1 + 0.5 * normal(C), "bias": normal(C)} if given & {"weight", "bias"} else {}
    return {name: t for name, t in inputs.items() if name in given}


def _options(t: Inputs, case: Case) -> dict[str, Any]:
    """Keyword arguments of the public functions."""
    modulation = {name: t.get(name) for name in ("scale", "shift", "weight", "bias")}
    return {**modulation, "norm": case.options.get("norm", "layer"), "eps": EPS}


def _record(t: Inputs, case: Case) -> tuple[Any, ...]:
    """The fields of the inputs' records from scale on."""
    norm = (EPS, t.get("weight"), t.get("bias"), case.options.get("norm") == "rms")
    return (t.get("scale"), t.get("shift"), *norm)


def _work(case: Case, itemsize: int, *, tensors: int, vectors: int, flops: int) -> tuple[int, int]:
    """`tensors` of (B, L, C) and `vectors` of modulation; of few tokens the vectors are a sizeable share."""
    B, L, C = (case.sizes[d] for d in "BLC")
    rows = {"B C": B, "1 C": 1, "B L C": B * L}[case.options.get("modulation", "B C")]
    return (tensors * B * L + vectors * rows) * C * itemsize, flops * B * L * C


ADALN = Spec(
    op="adaln",
    cases=CASES,
    inputs=lambda case, generator: _inputs(case, generator, gated=False),
    call=lambda t, case, backend: (adaln(t["x"], **_options(t, case), backend=backend),),
    reference=lambda t, case: reference.adaln(AdaLN(t["x"], *_record(t, case))),
    outputs=("out",),
    grads=("x", "scale", "shift", "weight", "bias"),
    bench=BENCH,
    bench_cuda=BENCH_CUDA,
    work=lambda case, itemsize: _work(case, itemsize, tensors=2, vectors=2, flops=8),
    work_backward=lambda case, itemsize: _work(case, itemsize, tensors=3, vectors=3, flops=16),
)

GATED_ADALN = Spec(
    op="gated_adaln",
    cases=CASES + RESIDUAL,
    inputs=lambda case, generator: _inputs(case, generator, gated=True),
    call=lambda t, case, backend: gated_adaln(t["x"], t["branch"], t["gate"], **_options(t, case), backend=backend),
    reference=lambda t, case: reference.gated_adaln(GatedAdaLN(t["x"], t["branch"], t["gate"], *_record(t, case))),
    outputs=("x_new", "out"),
    grads=("x", "branch", "gate", "scale", "shift", "weight", "bias"),
    bench=BENCH,
    bench_cuda=BENCH_CUDA,
    work=lambda case, itemsize: _work(case, itemsize, tensors=4, vectors=3, flops=10),
    work_backward=lambda case, itemsize: _work(case, itemsize, tensors=6, vectors=5, flops=20),
)

SPECS = (ADALN, GATED_ADALN)
