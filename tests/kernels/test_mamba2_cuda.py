"""Tests of mamba2_mixer's CUDA kernels.

They cover lengths around the limit of the kernel for short sequences, the state carried between the kernels, large
steps Δ, more heads than a warp has lanes, and unsupported inputs.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import BackendError, unavailable
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER
from mvar_kernels.testing.spec import Case, Inputs
from tests.kernels.test_contract import CUDA_ON_CPU, compare, evaluate, named, prepared

pytestmark = pytest.mark.slow

BACKEND = "cuda" if torch.cuda.is_available() else CUDA_ON_CPU
if BACKEND == "cuda" and unavailable("cuda") is not None:
    pytest.skip(str(unavailable("cuda")), allow_module_level=True)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def case_of(L: int, B: int = 2, H: int = 2, P: int = 64, N: int = 64, **options: Any) -> Case:
    return Case(f"{L}", {"B": B, "L": L, "H": H, "P": P, "N": N}, {"scales": None, **options})


def assert_right(got: dict[str, Tensor], case: Case, inputs: Inputs) -> None:
    """Compare with the references, within the tolerance of the contract test."""
    on_cpu = {n: t.cpu() for n, t in inputs.items()}
    spec = replace(MAMBA2_MIXER, grads=())
    exact = evaluate(spec, case, {n: t.double() for n, t in on_cpu.items()}, None)
    compare(spec, case, got, evaluate(spec, case, on_cpu, None), exact)


@HALVES
@pytest.mark.parametrize("L", [2, 4, 16, 17, 32, 33, 70])
def test_sequence_lengths(L: int, dtype: torch.dtype) -> None:
    case = case_of(L)
    inputs = prepared(MAMBA2_MIXER, case, dtype, BACKEND)
    assert_right(evaluate(MAMBA2_MIXER, case, inputs, BACKEND), case, inputs)


@HALVES
@pytest.mark.parametrize("L", [16, 70])
def test_large_steps(L: int, dtype: torch.dtype) -> None:
    """Log decays are −5 to −100 per token; y is its own term plus the skip, which nearly cancel in some rows."""
    case = case_of(L)
    inputs = prepared(MAMBA2_MIXER, case, dtype, BACKEND)
    inputs["dt_bias"] += 8
    assert_right(evaluate(MAMBA2_MIXER, case, inputs, BACKEND), case, inputs)


@HALVES
def test_more_heads_than_lanes(dtype: torch.dtype) -> None:
    case = case_of(1, B=1, H=40)
    inputs = prepared(MAMBA2_MIXER, case, dtype, BACKEND)
    assert_right(evaluate(MAMBA2_MIXER, case, inputs, BACKEND), case, inputs)


@HALVES
def test_state_carries_across_scales(dtype: torch.dtype) -> None:
    """One call per scale, from one token to several chunks, equals one call over the sequence."""
    case, scales = case_of(70), (1, 2, 16, 17, 34)
    inputs = prepared(MAMBA2_MIXER, case, dtype, BACKEND)
    state, outs = {name: inputs[name] for name in ("conv", "ssm")}, []
    for piece in inputs["zxbcdt"].split(scales, 1):
        results = evaluate(MAMBA2_MIXER, case, inputs | state | {"zxbcdt": piece}, BACKEND)
        outs.append(results.pop("y"))
        state = results
    assert_right(state | {"y": torch.cat(outs, 1)}, case, inputs)


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (case_of(4, scales=(1, 3)), torch.bfloat16, "A_log: has two directions"),
        (case_of(4, P=32), torch.bfloat16, "H=2 of P=32, N=64"),
        (case_of(4, H=3), torch.bfloat16, "H=3 of P=64, N=64"),
        (case_of(4), torch.float32, "dtype float32 is not float16 or bfloat16"),
        (case_of(4, groups=2), torch.bfloat16, "2 groups, the CUDA kernel has one"),
        (case_of(4, channel_D=True), torch.bfloat16, "D: of each channel"),
        (case_of(4, dt_limit=(0.0, 0.1)), torch.bfloat16, "dt_limit: the CUDA kernel has none"),
        (case_of(4, norm_before_gate=True), torch.bfloat16, "norm_weight: the CUDA kernel has RMSNorm, after"),
        (case_of(4, without=("norm_weight",)), torch.bfloat16, "norm_weight: the CUDA kernel has RMSNorm, after"),
    ],
)
def test_unsupported_inputs(case: Case, dtype: torch.dtype, reason: str) -> None:
    inputs = prepared(MAMBA2_MIXER, case, dtype, BACKEND)
    with named(BACKEND) as name, pytest.raises(BackendError, match=reason):
        MAMBA2_MIXER.call(inputs, case, name)


def test_unsupported_conv_width() -> None:
    case = case_of(4)
    inputs = prepared(MAMBA2_MIXER, case, torch.bfloat16, BACKEND)
    inputs |= {"conv_weight": inputs["conv_weight"][:, 1:], "conv": inputs["conv"][:, 1:]}
    with named(BACKEND) as name, pytest.raises(BackendError, match="conv_weight: 3 taps"):
        MAMBA2_MIXER.call(inputs, case, name)
