"""adaln and gated_adaln: the formulas, the public functions, their checks and autograd.

    adaln:        out = LN(x)·(1+s) + t
    gated_adaln:  x'  = x + g·b ;  out = LN(x')·(1+s) + t

g, s, t are shared by all tokens of a sample. LN is without affine, over C, with the biased
variance. A block of M-VAR (arXiv 2411.10433; adaLN from DiT, arXiv 2212.09748) is a chain of
gated_adaln: each adds the last branch to the residual stream and prepares the next one's input, so
that x is read and written once per branch instead of eight to ten times.
"""

from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN

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
    return _adaln(AdaLN(x, scale, shift, eps), backend)[0]


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
        (x', out), both (B, L, C) in the dtype of x. x' is rounded before it is normalized, so out
        is adaln of the very x' that is returned. The backward keeps x', not x.

    Raises:
        as :func:`adaln`.
    """
    eps = _check("gated_adaln", eps, backend, x=x, branch=branch, gate=gate, scale=scale, shift=shift)
    x_new, out = _gated_adaln(GatedAdaLN(x, branch, gate, scale, shift, eps), backend)
    return x_new, out


def _check(op: str, eps: float, backend: str, **tensors: Tensor) -> float:
    """Everything checked; eps as a Python number."""
    sizes: dict[str, int] = {}
    for name, value in tensors.items():
        dims = "B L C" if name in ("x", "branch") else "B C"
        validation.tensor(op, name, value, dims, sizes, like=tensors["x"])
    validation.same_dtype(op, "x", **tensors)
    check_name(backend)
    return validation.positive(op, "eps", eps)


def _fake(call: AdaLN) -> tuple[Tensor]:
    return (call.x.new_empty(call.x.shape),)


def _gated_fake(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    return call.x.new_empty(call.x.shape), call.x.new_empty(call.x.shape)


_adaln = RegisteredOp(_ADALN, AdaLN, _fake, outputs=1, saved_as={"shift": "scale"})
_gated_adaln = RegisteredOp(_GATED, GatedAdaLN, _gated_fake, outputs=2, saved_as={"x": 0, "shift": "scale"})
