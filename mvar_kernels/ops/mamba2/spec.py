"""Cases, bytes and FLOPs of ssd_scan and mamba2_mixer."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mvar_kernels.ops.mamba2 import reference
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan
from mvar_kernels.ops.mamba2.mixer import Mamba2State, mamba2_mixer
from mvar_kernels.ops.mamba2.scan import ssd_scan
from mvar_kernels.testing.spec import PER_HEAD_SUM, Case, Inputs, Spec

EPS = 1e-5
# The reference computes the state in float32 whatever the inputs. With 16-bit ones kernels add to it products of two
# bfloat16 parts of each factor (errors of about 2⁻¹⁸ each), where three tf32 products would keep 2⁻²³: of all cases the
# largest error over the tolerance without slack is 39 in the interpreter. Rounding y to bfloat16 costs 2⁻⁹.
# What this costs in a model's logits is in docs/kernels.md (The contract).
LAST_STATE = (64.0, "computed by matmuls of two bfloat16 parts of each factor")
# The reference in bfloat16 rounds the gradient of y alone. Kernels multiply x, B, C, h, λ and dy in bfloat16 and keep
# x, dy, h and λ in it in between. Emulated on all cases (tests/kernels/test_gpu_arithmetic.py) the errors are 0.2 to 13
# times 2⁻⁹ of the largest value, the reference's 0 to 6, and 0 where the gradient comes from that of the last state.
OPERANDS = "matmuls of a training step round x, B, C, h, its adjoint and dy to bfloat16"
PARAMETERS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")
OPTIONS = ("dt_limit", "norm_before_gate")  # of the mixer, which are options of a case, too


def _case(
    name: str, B: int, L: int, H: int, P: int, N: int, scales: tuple[int, ...] | None = None, **options: Any
) -> Case:
    return Case(name, {"B": B, "L": L, "H": H, "P": P, "N": N}, {"scales": scales, **options})


FLOAT32_STEPS = (
    Case("float32_steps", {"B": 1, "L": 40, "H": 2, "P": 16, "N": 16}, {"scales": None}, keeps_dtype=("dt",)),
    Case("float32_steps_both", {"B": 1, "L": 20, "H": 3, "P": 5, "N": 7}, {"scales": (4, 16)}, keeps_dtype=("dt",)),
)
# A sum over the whole sequence: each rounding of the state is in all that follows.
ONE_SIGN = Case("one_sign", {"B": 1, "L": 256, "H": 1, "P": 8, "N": 8}, {"scales": None, "one_sign": True})
# exp(A_log) is above float32's largest number in one head; in a chunk it is 1.3·10¹⁹, which leaves nothing of the state
# either, but not so large that no step is small beside it. The gradient of dt_bias has an element a head: of three
# tokens the reference's own error on two elements is a matter of luck, of eight it is not.
INSTANT = tuple(
    Case(f"instant_decay_{name}", {"B": 1, "L": L, "H": H, "P": 64, "N": 64}, {"scales": scales, "A_log": A_log})
    for name, L, H, scales, A_log in (
        ("short", 3, 8, None, 100.0),
        ("chunks", 35, 2, None, 44.0),
        ("both", 20, 2, (3, 17), 100.0),
    )
)
# Values whose products leave float16's range where the outputs fit: factors on the inputs.
LARGE_SCAN = tuple(
    Case(
        f"large_{name}",
        {"B": 1, "L": 40, "H": 2, "P": 16, "N": 16},
        {"scales": scales, "times": factors},
        cotangents=2**-12,  # dx has C·B as a factor, dC has h
    )
    for name, factors, scales in (
        ("scores", {"x": 0.01, "B": 500.0, "C": 500.0}, None),
        ("states", {"x": 3000.0, "B": 300.0, "C": 0.01}, None),
        ("states_both", {"x": 3000.0, "B": 300.0, "C": 0.01}, (2, 38)),
    )
)
FLOAT32_STEPS_MIXER = tuple(
    Case(
        f"float32_steps_{name}",
        {"B": B, "L": L, "H": 2, "P": 64, "N": 64},
        {"scales": scales},
        keeps_dtype=("dt",),
    )
    for name, B, L, scales in (("short", 2, 5, None), ("chunks", 1, 36, None), ("both", 1, 20, (4, 16)))
)
LARGE_MIXER = tuple(
    Case(
        f"large_{name}",
        {"B": 1, "L": L, "H": 2, "P": 64, "N": 64},
        {"scales": scales, "times": {"BC": 2e4}},
        cotangents=2**-4,
    )
    for name, L, scales in (("short", 9, None), ("chunks", 40, None), ("both", 38, (5, 33)))
)
CASES = (
    _case("one_token", 2, 1, 2, 64, 64),
    _case("odd", 2, 13, 3, 5, 7),
    _case("chunks", 1, 100, 2, 64, 64),
    _case("bidirectional", 2, 30, 2, 64, 64, scales=(1, 4, 9, 16)),
    _case("bidirectional_odd", 1, 75, 2, 5, 7, scales=(2, 1, 72)),
)
GROUPS = (
    _case("groups", 1, 37, 4, 16, 16, groups=2),
    _case("groups_odd", 1, 20, 6, 5, 7, scales=(3, 17), groups=3),
)
CHANNEL_D = (
    _case("channel_D", 1, 21, 3, 16, 16, channel_D=True),
    _case("channel_D_groups_both", 1, 20, 4, 5, 7, scales=(3, 17), groups=2, channel_D=True),
)
VARIANTS = (  # of the mixer
    *(*GROUPS, *CHANNEL_D),
    _case("no_conv_bias", 1, 9, 2, 16, 16, without=("conv_bias",)),
    _case("dt_limit", 1, 21, 3, 16, 16, dt_limit=(0.03, 0.1)),
    _case("no_norm", 1, 21, 4, 5, 7, without=("norm_weight",), groups=2),
    _case("no_norm_both", 1, 20, 3, 16, 16, scales=(3, 17), without=("norm_weight", "conv_bias"), dt_limit=(0.01, 0.1)),
    _case("norm_before_gate", 1, 21, 3, 16, 16, norm_before_gate=True),
    _case("norm_before_gate_groups", 1, 20, 4, 5, 7, scales=(3, 17), groups=2, norm_before_gate=True),
)
VAR_256 = tuple(n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
BENCH = (
    _case("d16_256", 2, 680, 32, 64, 64),
    _case("d16_256_bidirectional", 2, 680, 32, 64, 64, scales=VAR_256),
)
BENCH_CUDA = (
    _case("d16_256_training", 32, 680, 32, 64, 64),
    _case("d16_256_training_bidirectional", 32, 680, 32, 64, 64, scales=VAR_256),
    _case("d16_256_last_scale", 16, 256, 32, 64, 64),
    _case("d16_256_first_scale", 16, 1, 32, 64, 64),
)
# As the model calls it in 16 bits, dt apart in float32: a row [z, x, B, C] is then a multiple of 64 elements at every
# depth. With dt behind it, it is one of 16 at d16 and d24 alone, and at others Triton loads 2 bytes at a time.
BENCH_CUDA_MIXER = tuple(
    replace(case, keeps_dtype=("dt",))
    for case in (
        *BENCH_CUDA,
        _case("d20_256_last_scale", 16, 256, 40, 64, 64),
        _case("d30_256_training", 16, 680, 60, 64, 64),
        _case("d30_256_last_scale", 16, 256, 60, 64, 64),
    )
)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def _log_decay_rates(generator: torch.Generator, *shape: int) -> Tensor:
    """A_log as mamba_ssm starts it: log of uniform in [1, 16]."""
    return (1 + 15 * torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)).log()


def _with_instant(A_log: Tensor, case: Case) -> Tensor:
    A_log[..., 0] = case.options.get("A_log", A_log[..., 0])
    return A_log


def _heads(case: Case) -> tuple[int, ...]:
    return (2, case.sizes["H"]) if case.options["scales"] else (case.sizes["H"],)


def _groups(case: Case) -> int:
    return case.options.get("groups", 1)


def _skips(case: Case) -> tuple[int, ...]:
    H, P = case.sizes["H"], case.sizes["P"]
    return (H, P) if case.options.get("channel_D") else (H,)


def _scan_inputs(case: Case, generator: torch.Generator) -> Inputs:
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    shared = (B, L, _groups(case), N) if "groups" in case.options else (B, L, N)
    if case.options.get("one_sign"):
        ones = {"x": (B, L, H, P), "dt": (B, L, H), "A": (H,), "B": (B, L, N), "C": (B, L, N), "D": (H,)}
        values = {"dt": 0.01, "A": -1e-3}
        float64: dict[str, Any] = {"dtype": torch.float64, "device": generator.device}
        inputs = {name: torch.full(shape, values.get(name, 1.0), **float64) for name, shape in ones.items()}
        return inputs | {"initial_state": torch.zeros(B, H, P, N, **float64)}
    inputs = {
        "x": _normal(generator, B, L, H, P),
        "dt": torch.nn.functional.softplus(_normal(generator, B, L, *_heads(case)) - 3),
        "A": -_with_instant(_log_decay_rates(generator, *_heads(case)), case).exp(),
        "B": _normal(generator, *shared),
        "C": _normal(generator, *shared),
        "D": 1 + 0.1 * _normal(generator, *_skips(case)),
        "initial_state": _normal(generator, B, H, P, N),
    }
    return inputs | {name: factor * inputs[name] for name, factor in case.options.get("times", {}).items()}


def _mixer_inputs(case: Case, generator: torch.Generator) -> Inputs:
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    E, heads, shared = H * P, _heads(case), 2 * _groups(case) * N
    count = len(heads) * H  # of dt columns
    times = torch.ones(E + shared, 1, dtype=torch.float64, device=generator.device)
    times[E:] = case.options.get("times", {}).get("BC", 1.0)
    inputs = {
        "zxbcdt": _normal(generator, B, L, 2 * E + shared + count),
        "conv_weight": 0.5 * times * _normal(generator, E + shared, 4),
        "conv_bias": 0.1 * _normal(generator, E + shared),
        "dt_bias": _normal(generator, *heads) - 3,
        "A_log": _with_instant(_log_decay_rates(generator, *heads), case),
        "D": 1 + 0.1 * _normal(generator, *_skips(case)),
        "norm_weight": 1 + 0.1 * _normal(generator, E),
        "conv": _normal(generator, B, 3, E + shared),
        "ssm": _normal(generator, B, H, P, N),
    }
    if "dt" in case.keeps_dtype:
        inputs["zxbcdt"], dt = inputs["zxbcdt"].split([2 * E + shared, count], -1)
        inputs["dt"] = dt.unflatten(-1, heads)
    return {name: t for name, t in inputs.items() if name not in case.options.get("without", ())}


def _call_mixer(t: Inputs, case: Case, backend: str) -> tuple[Tensor, ...]:
    parameters: list[Any] = [t.get(name) for name in PARAMETERS]
    y, state = mamba2_mixer(
        t["zxbcdt"],
        *parameters,
        dt=t.get("dt"),
        ngroups=_groups(case),
        eps=EPS,
        state=Mamba2State(t["conv"], t["ssm"]),
        scales=case.options["scales"],
        backend=backend,
        **{name: case.options[name] for name in OPTIONS if name in case.options},
    )
    return y, *state


def _mixer_reference(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    dt = t["dt"].flatten(2) if "dt" in t else None
    parameters = [t.get(name) for name in PARAMETERS]
    if parameters[1] is None:
        parameters[1] = torch.zeros_like(t["conv_weight"][:, 0])
    limits, before = case.options.get("dt_limit", (0.0, math.inf)), case.options.get("norm_before_gate", False)
    states = t["conv"], t["ssm"], _scales(case)
    return reference.mamba2_mixer(Mixer._make([t["zxbcdt"], dt, *parameters, *states, EPS, *limits, before]))


def _call_scan(t: Inputs, case: Case, backend: str) -> tuple[Tensor, ...]:
    args = (t[name] for name in ("x", "dt", "A", "B", "C", "D"))
    return ssd_scan(*args, initial_state=t["initial_state"], scales=case.options["scales"], backend=backend)


def _scan_reference(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    B, C = t["B"].flatten(2), t["C"].flatten(2)
    return reference.ssd_scan(Scan(t["x"], t["dt"], t["A"], B, C, t["D"], t["initial_state"], _scales(case)))


def _scales(case: Case) -> tuple[int, ...]:
    return case.options["scales"] or (case.sizes["L"],)


def _scan_flops(case: Case) -> int:
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    return len(_heads(case)) * 4 * B * L * H * P * N


def _scan_work(case: Case, itemsize: int) -> tuple[int, int]:
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    shared = 2 * _groups(case) * N
    moved = B * L * (2 * H * P + shared + len(_heads(case)) * H) * itemsize + 2 * 4 * B * H * P * N
    return moved, _scan_flops(case)


def _mixer_work(case: Case, itemsize: int) -> tuple[int, int]:
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    shared = 2 * _groups(case) * N
    moved = B * L * (3 * H * P + shared + len(_heads(case)) * H) * itemsize + 2 * 4 * B * H * P * N
    return moved, _scan_flops(case) + B * L * (8 * (H * P + shared) + 8 * H * P)


def _scan_work_backward(case: Case, itemsize: int) -> tuple[int, int]:
    """x, dt, B, C, dy and the states are read, their gradients written; h and its adjoint, then a product for each."""
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    shared = 2 * _groups(case) * N
    read = B * L * (2 * H * P + shared + len(_heads(case)) * H)
    written = B * L * (H * P + shared + len(_heads(case)) * H)
    return (read + written) * itemsize + 4 * 4 * B * H * P * N, 5 * _scan_flops(case) // 2


def _mixer_work_backward(case: Case, itemsize: int) -> tuple[int, int]:
    """zxbcdt and dy are read, dzxbcdt written, besides the states and their gradients."""
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    row = 2 * H * P + 2 * _groups(case) * N + len(_heads(case)) * H
    moved = B * L * (2 * row + H * P) * itemsize + 4 * 4 * B * H * P * N
    return moved, 5 * _mixer_work(case, itemsize)[1] // 2


SSD_SCAN = Spec(
    op="ssd_scan",
    cases=(*CASES, *FLOAT32_STEPS, *LARGE_SCAN, ONE_SIGN, *INSTANT, *GROUPS, *CHANNEL_D),
    inputs=_scan_inputs,
    call=_call_scan,
    reference=_scan_reference,
    outputs=("y", "state"),
    grads=("x", "dt", "A", "B", "C", "D", "initial_state"),
    keeps_dtype=("A", "D", "initial_state"),
    slack={"grad of A": PER_HEAD_SUM, "grad of D": PER_HEAD_SUM},
    slack_16_bits={"state": LAST_STATE},
    bfloat16_operands={f"grad of {name}": OPERANDS for name in ("dt", "A", "D", "initial_state")},
    bench=BENCH,
    bench_cuda=BENCH_CUDA,
    work=_scan_work,
    work_backward=_scan_work_backward,
)

MAMBA2_MIXER = Spec(
    op="mamba2_mixer",
    cases=(
        *(*CASES, _case("nine_tokens", 1, 9, 2, 64, 64), *FLOAT32_STEPS_MIXER, *LARGE_MIXER, *INSTANT),
        *VARIANTS,
    ),
    inputs=_mixer_inputs,
    call=_call_mixer,
    reference=_mixer_reference,
    outputs=("y", "conv", "ssm"),
    grads=("zxbcdt", "dt", *PARAMETERS, "conv", "ssm"),
    keeps_dtype=("dt_bias", "A_log", "D", "ssm"),
    slack={f"grad of {name}": PER_HEAD_SUM for name in ("dt_bias", "A_log", "D")},
    slack_16_bits={"ssm": LAST_STATE},
    bfloat16_operands={f"grad of {name}": OPERANDS for name in ("dt", "dt_bias", "A_log", "D", "ssm")},
    bench=BENCH,
    bench_cuda=BENCH_CUDA_MIXER,
    work=_mixer_work,
    work_backward=_mixer_work_backward,
)

SPECS = (SSD_SCAN, MAMBA2_MIXER)
