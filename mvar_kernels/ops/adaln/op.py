"""adaln and gated_adaln: the formulas, the public functions, their checks and autograd.

    adaln:        out = (N(x)·w + b)·(1+s) + t
    gated_adaln:  x'  = x + g·branch ;  out = (N(x')·w + b)·(1+s) + t

N is over C: a layer norm with the biased variance, or x / √(mean(x²) + eps). Its weight w and bias b, and s and t, are
optional. g, s, t are shared by all tokens of a sample, or of all samples, or are a token's own. A block of M-VAR
(arXiv 2411.10433; adaLN from DiT, arXiv 2212.09748) is a chain of gated_adaln: each adds the last branch to the
residual stream and prepares the next one's input, so that x is read and written once per branch instead of eight to ten
times.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN

_MODULES = {"cpu": "native", "cuda": "native", "triton": "triton", "reference": "reference"}
_ADALN = Op("adaln", __package__, _MODULES)
_GATED = Op("gated_adaln", __package__, _MODULES)
Norm = Literal["layer", "rms"]


def adaln(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: Norm = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """(norm(x)·weight + bias)·(1+scale) + shift.

    Args:
        x: (B, L, C), float16, bfloat16, float32 or float64.
        scale, shift: (B, C), (1, C) for all samples, or (B, L, C); one dtype: that of x, or float32 (float64 for
            float64). Rows may be expanded (stride 0). None: 0. Read in place and with the smallest gradients where they
            have one shape.
        norm: "layer", or "rms", which subtracts no mean: x / √(mean(x²) + eps).
        weight, bias: (C,), in any floating dtype, used in float32 (float64 for float64). None: 1 and 0.
        eps: added to the variance, or to the mean square.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, L, C), the dtype of x; statistics and arithmetic in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        BackendError: the named backend cannot run on these inputs.
    """
    sizes: dict[str, int] = {}
    validation.tensor("adaln", "x", x, "B L C", sizes)
    if not _per_sample(x, scale, shift):
        given = _modulation("adaln", x, sizes, scale=scale, shift=shift)
        scale, shift = given.get("scale"), given.get("shift")
    weight, bias, eps = _check_norm("adaln", x, sizes, norm, weight, bias, eps, backend)
    return _adaln(AdaLN(x, scale, shift, eps, weight, bias, norm == "rms"), backend)[0]


def gated_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None = None,
    *,
    norm: Norm = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·branch, and adaLN of x', in one pass.

    Args:
        x: (B, L, C), float16, bfloat16, float32 or float64.
        branch: (B, L, C), the dtype of x; or float16 or bfloat16 beside a residual stream x in float32.
        gate, scale, shift: as scale and shift in :func:`adaln`, in the dtype of the branch, or float32 (float64 for
            float64). Stochastic depth is folded into the gate by the caller.
        norm, weight, bias, eps, backend: as in :func:`adaln`.

    Returns:
        (x', out), both (B, L, C): x' in the dtype of x, out in that of the branch, which the next layer has, too. x' is
        rounded before it is normalized, so out is adaln of the very x' that is returned. The backward keeps x', not x.

    Raises:
        as :func:`adaln`.
    """
    sizes: dict[str, int] = {}
    validation.tensor("gated_adaln", "x", x, "B L C", sizes)
    dtypes = _BRANCHES.get(x.dtype, (x.dtype,))
    validation.tensor("gated_adaln", "branch", branch, "B L C", sizes, like=x, dtypes=dtypes)
    if not _per_sample(branch, gate, scale, shift):
        given = _modulation("gated_adaln", branch, sizes, gate=gate, scale=scale, shift=shift)
        gate, scale, shift = given["gate"], given.get("scale"), given.get("shift")
    weight, bias, eps = _check_norm("gated_adaln", x, sizes, norm, weight, bias, eps, backend)
    x_new, out = _gated_adaln(GatedAdaLN(x, branch, gate, scale, shift, eps, weight, bias, norm == "rms"), backend)
    return x_new, out


_BRANCHES = {torch.float32: (torch.float32, torch.bfloat16, torch.float16)}  # beside x of that dtype


def _per_sample(like: Tensor, *modulation: Tensor | None) -> bool:
    """Whether these are (B, C) beside `like` (B, L, C), of its dtype, which is all that there is to check."""
    B, _, C = like.shape
    dtype, device = like.dtype, like.device
    for t in modulation:
        if not isinstance(t, Tensor) or t.dtype != dtype or t.shape != (B, C) or t.device != device:
            return False
    return True


def _modulation(op: str, like: Tensor, sizes: dict[str, int], **tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that there are, checked, in one shape; shift never without scale, in whose place the backward keeps it."""
    given: dict[str, Any] = {name: t for name, t in tensors.items() if t is not None or name == "gate"}
    dtypes = _beside(like.dtype)
    for name, t in given.items():
        shape: Sequence[int] = getattr(t, "shape", ())
        dims = "B L C" if len(shape) == 3 else "1 C" if len(shape) == 2 and shape[0] == 1 else "B C"
        validation.tensor(op, name, t, dims, sizes, like=like, dtypes=dtypes)
    if not given:
        return {}
    first = next(iter(given))
    validation.same_dtype(op, first, **given)
    if any([t.shape != given[first].shape for t in given.values()]):
        B, L, C = (sizes[dim] for dim in "BLC")
        if any([t.dim() == 3 for t in given.values()]):
            given = {name: (t if t.dim() == 3 else t[:, None]).expand(B, L, C) for name, t in given.items()}
        else:
            given = {name: t.expand(B, C) for name, t in given.items()}
    if "shift" in given and "scale" not in given:
        given["scale"] = torch.zeros_like(given["shift"])
    return given


def _check_norm(
    op: str,
    x: Tensor,
    sizes: dict[str, int],
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, float]:
    """Everything about the norm checked; weight and bias as kernels take them, eps as a Python number."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"{op}: norm: expected 'layer' or 'rms', got {norm!r}")
    if weight is not None or bias is not None:
        weight, bias = _affine(op, x, sizes, weight, bias)
    check_name(backend)
    return weight, bias, validation.positive(op, "eps", eps)


def _affine(
    op: str, x: Tensor, sizes: dict[str, int], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias, checked, as they are if they share the dtype of x or float32, else in float32."""
    given = {name: t for name, t in (("weight", weight), ("bias", bias)) if t is not None}
    for name, t in given.items():
        validation.tensor(op, name, t, "C", sizes, like=x)
    dtypes = {t.dtype for t in given.values()}
    if len(dtypes) > 1 or not dtypes.issubset(_beside(x.dtype)):
        wide = validation.accumulator(x.dtype)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return weight, bias


def _beside(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that kernels take modulation, weight and bias in beside tensors (B, L, C) of this one."""
    wide = validation.accumulator(dtype)
    return (dtype,) if dtype == wide else (dtype, wide)


def _fake(call: AdaLN) -> tuple[Tensor]:
    return (call.x.new_empty(call.x.shape),)


def _gated_fake(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    return call.x.new_empty(call.x.shape), call.branch.new_empty(call.x.shape)


_adaln = RegisteredOp(_ADALN, AdaLN, _fake, outputs=1, saved_as={"shift": "scale"})
_gated_adaln = RegisteredOp(_GATED, GatedAdaLN, _gated_fake, outputs=2, saved_as={"x": 0, "shift": "scale"})
