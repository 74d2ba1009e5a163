"""Contract test of Triton kernels with emulated errors of GPU instructions (gpu_arithmetic.py).

The cases of each op are those that come closest to the tolerance, or that exceeded it with the hardware's exponential
and division.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import interpreted, unavailable
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec
from tests.kernels.test_contract import compare, evaluate, prepared, scattered

if unavailable("triton") is not None or not interpreted():
    pytest.skip("Triton's interpreter is not in use", allow_module_level=True)

import triton
import triton.language as tl

from mvar_kernels import tiling, triton_math
from mvar_kernels.ops.mamba2.triton import backward as triton_backward
from mvar_kernels.ops.mamba2.triton import backward_kernels, grads_kernel, mixer_backward_kernels, mixer_forward
from tests.helpers.gpu_arithmetic import gpu_arithmetic

pytestmark = pytest.mark.slow

FLOAT32 = {
    "adaln": ("one_token", "odd"),
    "gated_adaln": ("odd",),
    "scale_attention": ("causal_norm", "d16_256", "equal_keys_norm", "saturated_causal_norm", "large_scores"),
    "ssd_scan": ("odd", "one_sign", "float32_steps_both", "instant_decay_both", "channel_D_groups_both"),
    "mamba2_mixer": (
        *("odd", "nine_tokens", "float32_steps_both", "large_short", "instant_decay_both"),
        "norm_before_gate_groups",
    ),
    "sample_tokens": ("top_k", "ties"),
    "soft_embedding": ("one_code", "arg_max", "ties"),
    "group_norm_silu": ("odd", "odd_last", "one_channel", "slices_last"),
}
# In these ops some outputs and gradients are float32 in any dtype: states, and those with one value per head.
FLOAT16 = {
    # Not equal_keys_norm: its gradient of q is 0 but for subnormal roundings, and a CPU's reference may have fewer.
    "scale_attention": ("saturated_causal_norm", "169_tokens"),
    "ssd_scan": ("odd", "float32_steps_both"),
    "mamba2_mixer": ("odd", "float32_steps_both", "large_short", "instant_decay_both"),
}
BFLOAT16 = {
    "ssd_scan": ("odd", "chunks", "float32_steps_both", "large_states", "channel_D_groups_both"),
    "mamba2_mixer": (
        "channel_D_groups_both",
        "no_norm",
        "nine_tokens",
        "chunks",
        "float32_steps_chunks",
        "large_short",
        "large_both",
        "instant_decay_chunks",
        "instant_decay_both",
    ),
}


def params(names: dict[str, tuple[str, ...]]) -> list[object]:
    cases = [(SPECS[op], case) for op in names for case in SPECS[op].cases if case.name in names[op]]
    assert len(cases) == sum(map(len, names.values()))
    return [pytest.param(spec, case, id=f"{spec.op}-{case.name}") for spec, case in cases]


def assert_within_contract(spec: Spec, case: Case, inputs: Inputs) -> None:
    same = evaluate(spec, case, inputs, None)
    exact = evaluate(spec, case, {n: t.double() for n, t in inputs.items()}, None)
    with gpu_arithmetic():
        compare(spec, case, evaluate(spec, case, inputs, "triton"), same, exact)


@pytest.mark.parametrize(("spec", "case"), params(FLOAT32))
def test_float32(spec: Spec, case: Case, poisoned: None) -> None:
    assert_within_contract(spec, case, {n: scattered(t) for n, t in prepared(spec, case, torch.float32).items()})


@pytest.mark.parametrize(("spec", "case"), params(FLOAT16))
def test_float16(spec: Spec, case: Case, poisoned: None) -> None:
    assert_within_contract(spec, case, prepared(spec, case, torch.float16))


@triton.jit
def _rounded_operand(v, OPERAND: tl.constexpr):
    """v rounded to bfloat16, in float32."""
    return triton_math.as_bfloat16(v.to(tl.float32))


@pytest.mark.parametrize("scheme", [triton_backward.SCHEMES[torch.bfloat16], triton_backward.HOPPER_BFLOAT16])
@pytest.mark.parametrize(("spec", "case"), params(BFLOAT16))
def test_float32_gradients_of_bfloat16(
    spec: Spec, case: Case, scheme: triton_backward.Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward of bfloat16 rounds what it multiplies, and what it keeps between kernels, to bfloat16.

    Triton's interpreter has no bfloat16: float16 tensors hold the bfloat16 values, incoming gradients included, and
    float32 ones those of operands and states, rounded where the kernels round them.
    """
    emulated = dataclasses.replace(scheme, operand=tl.float32, stored=torch.float32)
    monkeypatch.setitem(triton_backward.SCHEMES, torch.float16, emulated)
    # As in a large batch, a program adds up the gradients of several heads: of two, and of three with one left over.
    monkeypatch.setattr(triton_backward, "HEAD_GROUPS", (2,))
    monkeypatch.setattr(triton_backward, "PROGRAMS", 1)
    for module in (backward_kernels, grads_kernel, mixer_backward_kernels):
        monkeypatch.setattr(module, "operand", _rounded_operand)
    inputs = prepared(spec, case, torch.bfloat16)
    kept = [f"grad of {n}" for n in spec.grads if n in inputs and inputs[n].dtype == torch.float32]

    def gradients(backend: str | None, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        call = dataclasses.replace(
            spec,
            call=lambda t, case, backend: tuple(map(RoundedGradient.apply, spec.call(t, case, backend))),
            reference=lambda t, case: tuple(map(RoundedGradient.apply, spec.reference(t, case))),
        )
        results = evaluate(call, case, {n: convert(t) for n, t in inputs.items()}, backend)
        return {n: results[n] for n in kept}

    same = gradients(None, lambda t: t)
    exact = gradients(None, Tensor.double)
    with gpu_arithmetic():
        got = gradients("triton", lambda t: t.half() if t.dtype == torch.bfloat16 else t)
    compare(dataclasses.replace(spec, outputs=()), case, got, same, exact, torch.bfloat16)


@pytest.mark.parametrize("op", ["mamba2_mixer", "ssd_scan"])
@pytest.mark.parametrize("name", ["odd", "chunks", "bidirectional", "float32_steps_both", "instant_decay_both"])
def test_mamba2_forward_of_bfloat16(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward rounds operands itself, so that the interpreter computes what tensor cores do. tanh.approx has an
    error of 2⁻¹¹: here it is always too small by that."""
    exact_tanh = mixer_forward.tanh
    monkeypatch.setattr(mixer_forward, "tanh", lambda v: exact_tanh(v) * (1 - 2.0**-11))
    monkeypatch.setattr(tiling, "interpreted", lambda: False)  # or bfloat16 is refused
    spec = dataclasses.replace(SPECS[op], grads=())
    (case,) = (case for case in spec.cases if case.name == name)
    assert_within_contract(spec, case, prepared(spec, case, torch.bfloat16))


class RoundedGradient(torch.autograd.Function):
    """The identity, which rounds the gradient of 16-bit tensors to bfloat16."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.bfloat16().to(grad.dtype) if grad.itemsize == 2 else grad


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {  # exact, bound in ulps, relative bound
    "exp2": (torch.exp2, 0.0, 2.0**-22),
    "log2": (torch.log2, 1.0, 0.0),
    "log": (torch.log, 1.0, 0.0),
    "sqrt": (torch.sqrt, 0.0, 2.0**-23),
    "rsqrt": (torch.rsqrt, 0.0, 2.0**-22.9),
    "reciprocal": (torch.reciprocal, 2.0, 0.0),
    "exact_exp": (torch.exp, 1.1, 0.0),
    "exact_exp2": (torch.exp2, 1.1, 0.0),
}


@triton.jit
def _apply_kernel(x_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if NAME == "exp2":
        x = tl.exp2(x)
    elif NAME == "log2":
        x = tl.log2(x)
    elif NAME == "log":
        x = tl.log(x)
    elif NAME == "sqrt":
        x = tl.sqrt(x)
    elif NAME == "rsqrt":
        x = tl.rsqrt(x)
    elif NAME == "reciprocal":
        x = 1.0 / x
    elif NAME == "exact_exp":
        x = triton_math.exp(x)
    else:
        x = triton_math.exp2(x, True)
    tl.store(out_ptr + offs, x)


def apply(name: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _apply_kernel[(1,)](x, out, NAME=name, BLOCK=x.numel())
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_errors(name: str) -> None:
    """The maximum error is close to the documented one, reproducible, and absent outside gpu_arithmetic."""
    function, ulps, part = FUNCTIONS[name]
    x = torch.empty(2**15).uniform_(0.5, 80.0, generator=torch.Generator().manual_seed(0))
    if "exp" in name:
        x -= 80
    exact = function(x.double())
    _, exponent = torch.frexp(exact)
    bound = ulps * torch.ldexp(torch.ones_like(exact), exponent - 24) + part * exact.abs()
    with gpu_arithmetic():
        errors, again = (apply(name, x).double() - exact for _ in range(2))
    assert 0.8 < (errors.abs() / bound).max() <= 1
    assert torch.equal(errors, again)
    assert name.startswith("exact") or not torch.equal(errors, apply(name, x).double() - exact), "it did not end"


def test_special_values() -> None:
    with gpu_arithmetic():
        assert apply("exp2", torch.zeros(1)) == 1 and apply("log2", torch.ones(1)) == 0
        for name in ("exact_exp", "exact_exp2"):
            ends = torch.tensor([0.0, -0.0, -130.0, -1e30, -math.inf, 130.0, math.inf, math.nan])
            want = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, math.inf, math.inf, math.nan])
            torch.testing.assert_close(apply(name, ends), want, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _product_kernel(x_ptr, y_ptr, out_ptr, PRECISION: tl.constexpr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(x_ptr + offs), tl.load(y_ptr + offs), input_precision=PRECISION))


@pytest.mark.parametrize(("precision", "error"), [("tf32", 2.0**-10), ("tf32x3", 2.0**-22), ("ieee", 0.0)])
def test_dot_precision(precision: str, error: float) -> None:
    """Multiplies positive numbers by the identity, so that truncation to tf32 makes every result smaller."""
    x = torch.empty(16, 16).uniform_(1.0, 2.0, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    with gpu_arithmetic():
        _product_kernel[(1,)](x, torch.eye(16), out, PRECISION=precision)
    lost = (x.double() - out) / x
    assert error / 4 <= lost.max() <= error
    assert precision != "tf32" or (lost >= 0).all()
