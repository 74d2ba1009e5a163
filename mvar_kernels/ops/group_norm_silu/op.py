"""group_norm_silu: the public function and its checks.

v   = (x − mean) / √(var + eps) · weight + bias     mean and biased variance of a sample's group of channels
out = v · sigmoid(v)
"""

from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.group_norm_silu.inputs import GroupNormSiLU, flattened, unflattened

_OP = Op("group_norm_silu", __package__, {"cpu": "native", "triton": "triton", "reference": "reference"})


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """SiLU(GroupNorm(x)). Gradients on a GPU are the reference's, and "triton" by name has none.

    Args:
        x: (B, C, H, W), float16, bfloat16, float32 or float64. Contiguous and channels-last samples are read in place.
        weight, bias: (C,), one dtype: that of x, or float32 (float64 for float64).
        groups: number of groups of consecutive channels, a divisor of C.
        eps: added to the variance.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, C, H, W), the dtype of x, channels last if x is, else contiguous; statistics in float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        BackendError: the named backend cannot run on these inputs.
    """
    op = "group_norm_silu"
    sizes: dict[str, int] = {}
    validation.tensor(op, "x", x, "B C H W", sizes)
    dtypes = (x.dtype, validation.accumulator(x.dtype))
    validation.tensor(op, "weight", weight, "C", sizes, like=x, dtypes=dtypes)
    validation.tensor(op, "bias", bias, "C", sizes, like=x, dtypes=dtypes)
    validation.same_dtype(op, "weight", weight=weight, bias=bias)
    known, C = validation.integer(groups), sizes["C"]
    if known is None or not 1 <= known <= C or C % known:
        raise ValueError(f"{op}: groups: expected a positive divisor of C={C}, got {groups!r}")
    check_name(backend)
    eps = validation.positive(op, "eps", eps)
    flat, channels_last = flattened(x)
    out = _group_norm_silu(GroupNormSiLU(flat, weight, bias, known, eps, channels_last), backend)[0]
    return unflattened(out, x.shape, channels_last)


def _fake(call: GroupNormSiLU) -> tuple[Tensor]:
    return (call.x.new_empty(call.x.shape),)


_group_norm_silu = RegisteredOp(_OP, GroupNormSiLU, _fake, outputs=1)
