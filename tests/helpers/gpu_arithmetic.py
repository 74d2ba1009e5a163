"""Simulates the documented rounding errors of GPU arithmetic in Triton's interpreter.

The interpreter rounds every float32 operation once; compiled kernels on sm_80 to sm_100 do not. Instructions are
those that Triton 3.7.1 generates, with maximum errors from the PTX ISA and, for libdevice, the CUDA C++ programming
guide:

    tl.exp2             ex2.approx.ftz.f32          2⁻²² of the result; 1 at 0
    tl.exp              ex2.approx.f32 of v·log₂e   the same, after the product's rounding
    tl.log, tl.log2     libdevice                   1 ulp; 0 at 1
    x / y               div.full.f32                2 ulp
    tl.sqrt             sqrt.approx.ftz.f32         2⁻²³
    tl.rsqrt            rsqrt.approx.ftz.f32        2⁻²²·⁹
    tl.fma              fma.rn.f32                  rounded once; the interpreter rounds twice
    tl.dot "tf32"       mma, wgmma                  the last 13 bits of both operands are ignored
    tl.dot "tf32x3"     cvt.rna.tf32, three mma     x = big + small; the product of the small parts is omitted

tl.div_rn, tl.sqrt_rn, sums, products and matrix products in "ieee" are unchanged. The distribution of errors within
their bounds is not documented: here it is uniform, determined by the bits of the arguments, and the bounds are reduced
by the rounding of the result.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = NDArray[Any]
LOG2_E = np.float32(math.log2(math.e))
TF32_UNREAD = np.uint32(0x1FFF)


@contextmanager
def gpu_arithmetic(salt: int = 0) -> Iterator[None]:
    """Interpreted kernels compute with the errors that a GPU may have; `salt` selects the errors."""

    def unary(
        function: Callable[[Array], Array], exact_at: float, relative: float = 0.0, ulps: float = 0.0
    ) -> Callable[..., TensorHandle]:
        def create(builder: InterpreterBuilder, arg: TensorHandle) -> TensorHandle:
            if arg.data.dtype != np.float32:
                return builder.unary_op(arg, function)
            with np.errstate(all="ignore"):
                exact = function(arg.data.astype(np.float64))
                value = _with_error(exact, relative, ulps, _uniform(arg.data, salt=salt))
            return TensorHandle(np.where(arg.data == exact_at, exact, value).astype(np.float32), arg.dtype.scalar)

        return create

    exp2 = unary(np.exp2, 0.0, relative=2.0**-22)

    def exp(builder: InterpreterBuilder, arg: TensorHandle) -> TensorHandle:
        return exp2(builder, TensorHandle(arg.data * LOG2_E, arg.dtype))

    def divide(builder: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        if lhs.data.dtype != np.float32:
            return builder.binary_op(lhs, rhs, np.divide)
        with np.errstate(all="ignore"):
            exact = np.divide(lhs.data, rhs.data, dtype=np.float64)
            quotient = _with_error(exact, 0.0, 2.0, _uniform(lhs.data, rhs.data, salt=salt))
        return TensorHandle(quotient, lhs.dtype.scalar)

    with mock.patch.multiple(
        InterpreterBuilder,
        create_exp2=exp2,
        create_exp=exp,
        create_log=unary(np.log, 1.0, ulps=1.0),
        create_log2=unary(np.log2, 1.0, ulps=1.0),
        create_fdiv=divide,
        create_sqrt=unary(np.sqrt, 0.0, relative=2.0**-23),
        create_rsqrt=unary(lambda v: 1 / np.sqrt(v), math.inf, relative=2.0**-22.9),
        create_fma=_fma,
        create_dot=_dot,
    ):
        yield


def _uniform(*args: Array, salt: int) -> Array:
    """Numbers from −1 to 1 hashed from the arguments' bits, so that equal arguments give equal results."""
    mixed: Array = np.asarray(salt, np.uint32)
    for arg in args:
        mixed = (mixed ^ np.ascontiguousarray(arg).view(np.uint32).reshape(arg.shape)) * np.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
        mixed = mixed ^ (mixed >> np.uint32(13))
    return mixed * 2.0**-31 - 1.0


def _with_error(exact: Array, relative: float, ulps: float, evenly: Array) -> Array:
    """`exact` in float32 with errors of at most `relative` times the result plus `ulps` ulps."""
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.maximum(relative * np.abs(exact) + (ulps - 0.5) * ulp, 0.0) * evenly
    return np.where(np.isfinite(error), exact + error, exact).astype(np.float32)


def _fma(builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    total = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)


def _dot(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, imprecise: int
) -> TensorHandle:
    parts = [(a.data, b.data)]
    if a.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
        parts = [(_tensor_core_input(a.data), _tensor_core_input(b.data))]
    elif a.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32x3:
        (big_a, small_a), (big_b, small_b) = _split(a.data), _split(b.data)
        parts = [(small_a, big_b), (big_a, small_b), (big_a, big_b)]
    products = [np.matmul(x, y, dtype=acc.data.dtype) for x, y in parts]
    return TensorHandle(sum(products[1:], products[0]) + acc.data, acc.dtype.scalar)


def _tensor_core_input(x: Array) -> Array:
    """float32 values as tensor cores read them."""
    return (np.ascontiguousarray(x).view(np.uint32) & ~TF32_UNREAD).view(np.float32)


def _split(x: Array) -> tuple[Array, Array]:
    """x rounded to tf32 (cvt.rna: halves away from zero), and the remainder as tensor cores read it."""
    big = _tensor_core_input((np.ascontiguousarray(x).view(np.uint32) + (TF32_UNREAD + 1) // 2).view(np.float32))
    return big, _tensor_core_input(x - big)
