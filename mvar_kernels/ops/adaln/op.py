"""adaln and gated_adaln: the maths, the public functions, their checks and autograd.

    adaln:        out = LN(x)·(1+s) + t
    gated_adaln:  x'  = x + g·b ;  out = LN(x')·(1+s) + t

g, s, t are shared by all tokens of a sample. LN is without affine, over C, with the biased
variance. A block of M-VAR (arXiv 2411.10433; adaLN from DiT, arXiv 2212.09748) is a chain of
gated_adaln: each adds the last branch to the residual stream and prepares the next one's input, so
that x is read and written once per branch instead of eight to ten times.
"""

import torch
from torch import Tensor

from mvar_kernels import checks
from mvar_kernels.backends import Op, check_name
from mvar_kernels.custom_op import custom_op

_MODULES = {"cpu": "native", "cuda": "native", "triton": "triton", "reference": "reference"}
_ADALN = Op("adaln", __package__, _MODULES)
_GATED = Op("gated_adaln", __package__, _MODULES)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """LN(x)·(1+scale) + shift.

    Args:
        x: (B, L, C), float16, bfloat16, float32 or float64.
        scale, shift: (B, C), the dtype of x; rows may be expanded (stride 0).
        eps: added to the variance.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, L, C), the dtype of x; statistics and arithmetic in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        BackendError: the named backend cannot run on these inputs.
    """
    eps = _check("adaln", eps, backend, x=x, scale=scale, shift=shift)
    out: Tensor = torch.ops.mvar.adaln(x, scale, shift, eps, backend)
    return out


def gated_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·branch, and adaLN of x', in one pass.

    Args:
        x, branch: (B, L, C), float16, bfloat16, float32 or float64.
        gate, scale, shift: (B, C), the dtype of x; rows may be expanded (stride 0). Stochastic depth
            is folded into the gate by the caller.
        eps, backend: as in :func:`adaln`.

    Returns:
        (x', out), both (B, L, C) in the dtype of x. x' is rounded before it is normalised, so out
        is adaln of the very x' that is returned. The backward keeps x', not x.

    Raises:
        as :func:`adaln`.
    """
    eps = _check("gated_adaln", eps, backend, x=x, branch=branch, gate=gate, scale=scale, shift=shift)
    x_new, out = torch.ops.mvar.gated_adaln(x, branch, gate, scale, shift, eps, backend)
    return x_new, out


def _check(op: str, eps: float, backend: str, **tensors: Tensor) -> float:
    """Everything checked; eps as a Python number."""
    sizes: dict[str, int] = {}
    for name, value in tensors.items():
        dims = "B L C" if name in ("x", "branch") else "B C"
        checks.tensor(op, name, value, dims, sizes, like=tensors["x"])
    checks.same_dtype(op, "x", **tensors)
    check_name(backend)
    return checks.positive(op, "eps", eps)


@custom_op("mvar::adaln")
def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str) -> Tensor:
    out: Tensor = _ADALN.choose(backend, x.device, x, scale, shift, eps).forward(x, scale, shift, eps)
    return out


@_adaln.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("mvar::adaln_backward", reference_gradients=True)
def _adaln_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _ADALN.choose(backend, x.device, x, scale, eps, backward=True)
    assert kernel.backward is not None
    dx, dscale, dshift = kernel.backward(grad_out, x, scale, eps)
    return dx, dscale, dshift


@_adaln_backward.register_fake
def _(grad_out: Tensor, x: Tensor, scale: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _adaln_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, _, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, scale)


def _adaln_autograd(ctx, grad_out):  # type: ignore[no-untyped-def]
    grads = torch.ops.mvar.adaln_backward(grad_out, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return *grads, None, None


_adaln.register_autograd(_adaln_autograd, setup_context=_adaln_setup)


@custom_op("mvar::gated_adaln")
def _gated_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    kernel = _GATED.choose(backend, x.device, x, branch, gate, scale, shift, eps)
    x_new, out = kernel.forward(x, branch, gate, scale, shift, eps)
    return x_new, out


@_gated_adaln.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@custom_op("mvar::gated_adaln_backward", reference_gradients=True)
def _gated_adaln_backward(
    grads: list[Tensor], x_new: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = _GATED.choose(backend, x_new.device, x_new, branch, gate, scale, eps, backward=True)
    assert kernel.backward is not None
    dx, dbranch, dgate, dscale, dshift = kernel.backward(*grads, x_new, branch, gate, scale, eps)
    return dx, dbranch, dgate, dscale, dshift


@_gated_adaln_backward.register_fake
def _(
    grads: list[Tensor], x_new: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like_x, like_gate = x_new.new_empty(x_new.shape), gate.new_empty(gate.shape)
    return like_x, torch.empty_like(like_x), like_gate, torch.empty_like(like_gate), torch.empty_like(like_gate)


def _gated_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, branch, gate, scale, _, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(output[0], branch, gate, scale)


def _gated_autograd(ctx, grad_x_new, grad_out):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grads = torch.ops.mvar.gated_adaln_backward([grad_x_new, grad_out], *saved, ctx.eps, ctx.backend)
    return *grads, None, None


_gated_adaln.register_autograd(_gated_autograd, setup_context=_gated_setup)
