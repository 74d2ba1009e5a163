"""Cases, bytes and FLOPs of group_norm_silu."""

import torch
from torch import Tensor

from mvar_kernels.ops.group_norm_silu import reference
from mvar_kernels.ops.group_norm_silu.inputs import GroupNormSiLU, flattened, unflattened
from mvar_kernels.ops.group_norm_silu.op import group_norm_silu
from mvar_kernels.testing.spec import Case, Inputs, Spec

EPS = 1e-6


def _case(name: str, shape: tuple[int, int, int, int], groups: int, *keeps_dtype: str, **options: float) -> Case:
    return Case(name, dict(zip("BCHW", shape, strict=True)), {"groups": groups, **options}, keeps_dtype)


CASES = (
    _case("one_position", (2, 8, 1, 1), 4),
    _case("odd", (2, 6, 3, 5), 3),
    _case("odd_last", (3, 21, 5, 7), 7, channels_last=True),
    _case("one_number", (1, 3, 1, 1), 3),
    _case("one_channel", (2, 1, 9, 7), 1),
    _case("groups_of_one_channel_last", (2, 12, 3, 3), 12, channels_last=True),
    _case("float32_parameters", (2, 24, 6, 6), 3, "weight", "bias"),
    _case("float32_parameters_last", (2, 24, 6, 6), 3, "weight", "bias", channels_last=True),
    _case("constant", (2, 24, 9, 9), 3, spread=0.0, mean=12345.678),
    _case("far_from_zero", (1, 24, 16, 16), 4, spread=1e-2, mean=1e4),
    _case("slices", (1, 20, 29, 23), 4),
    _case("slices_last", (1, 20, 29, 23), 4, channels_last=True),
    _case("wide_last", (1, 640, 4, 4), 32, channels_last=True),
)
BENCH = (_case("decoder_64", (1, 320, 64, 64), 32, channels_last=True),)
BENCH_CUDA = (
    _case("decoder_256", (25, 160, 256, 256), 32, channels_last=True),
    _case("decoder_128", (25, 320, 128, 128), 32, channels_last=True),
    _case("decoder_16", (25, 640, 16, 16), 32, channels_last=True),
    _case("encoder_256", (8, 160, 256, 256), 32),
)


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    B, C, H, W = (case.sizes[d] for d in "BCHW")
    # A mean far from zero shows a variance that cancels.
    spread, mean = case.options.get("spread", 1.5), case.options.get("mean", 3.0)
    format_ = torch.channels_last if case.options.get("channels_last") else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)

    x = (normal(B, C, H, W) * spread + mean).contiguous(memory_format=format_)
    return {"x": x, "weight": 1 + 0.5 * normal(C), "bias": normal(C)}


def _reference(t: Inputs, case: Case) -> tuple[Tensor]:
    x, channels_last = flattened(t["x"])
    call = GroupNormSiLU(x, t["weight"], t["bias"], case.options["groups"], EPS, channels_last)
    return (unflattened(reference.group_norm_silu(call)[0], t["x"].shape, channels_last),)


def _work(case: Case, itemsize: int) -> tuple[int, int]:
    B, C, H, W = (case.sizes[d] for d in "BCHW")
    return 2 * C * (B * H * W + 1) * itemsize, 12 * B * C * H * W


def _work_backward(case: Case, itemsize: int) -> tuple[int, int]:
    B, C, H, W = (case.sizes[d] for d in "BCHW")
    return C * (3 * B * H * W + 4) * itemsize, 28 * B * C * H * W


GROUP_NORM_SILU = Spec(
    op="group_norm_silu",
    cases=CASES,
    inputs=_inputs,
    call=lambda t, case, backend: (
        group_norm_silu(t["x"], t["weight"], t["bias"], case.options["groups"], EPS, backend=backend),
    ),
    reference=_reference,
    outputs=("out",),
    grads=("x", "weight", "bias"),
    bench=BENCH,
    bench_cuda=BENCH_CUDA,
    work=_work,
    work_backward=_work_backward,
)

SPECS = (GROUP_NORM_SILU,)
