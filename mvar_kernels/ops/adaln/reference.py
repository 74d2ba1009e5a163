"""adaLN in plain PyTorch: the specification. Arithmetic in float32, or float64 for float64 inputs."""

from collections.abc import Sequence

from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.validation import accumulator


def adaln(call: AdaLN) -> tuple[Tensor]:
    """LN(x)·(1+scale) + shift over the last dimension, rounded once, to x's dtype."""
    x, scale, shift, eps = call
    acc = accumulator(x.dtype)
    centred = _centred(x.to(acc))  # (B, L, C)
    normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((normed * (1 + scale.to(acc))[:, None] + shift.to(acc)[:, None]).to(x.dtype),)


def _centred(x: Tensor) -> Tensor:
    """x minus its mean. That is rounded: of a row of 12345.678 it leaves an ulp, 10⁻³, which 1/√eps would make 1."""
    centred = x - x.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)


def gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    """x' = x + gate·branch, rounded to x's dtype, and adaLN of that x'."""
    x, branch, gate, scale, shift, eps = call
    acc = accumulator(x.dtype)
    x_new = (x.to(acc) + gate.to(acc)[:, None] * branch.to(acc)).to(x.dtype)
    return x_new, *adaln(AdaLN(x_new, scale, shift, eps))


def adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    """With n = LN(x), r = 1/σ and w = grad·(1+scale): dx = r·(w − mean(w) − n·mean(w·n))."""
    x, scale, _, eps = call
    dx, dscale, dshift = _layer_norm_vjp(grads[0], x, scale, eps)
    return dx.to(x.dtype), dscale.to(x.dtype), dshift.to(x.dtype)


def gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    """The gradient d at x' reaches x as it is, the branch times the gate, and the gate summed over tokens."""
    grad_x_new, grad_out = grads
    x_new, branch, gate, scale, _, eps = call
    acc = accumulator(x_new.dtype)
    dx_norm, dscale, dshift = _layer_norm_vjp(grad_out, x_new, scale, eps)
    d = grad_x_new.to(acc) + dx_norm  # (B, L, C)
    dbranch = gate.to(acc)[:, None] * d
    dgate = (branch.to(acc) * d).sum(1)
    dtype = x_new.dtype
    return d.to(dtype), dbranch.to(dtype), dgate.to(dtype), dscale.to(dtype), dshift.to(dtype)


def _layer_norm_vjp(grad_out: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    grad = grad_out.to(acc)
    centred = _centred(x.to(acc))
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * rstd
    w = grad * (1 + scale.to(acc))[:, None]
    dx = rstd * (w - w.mean(-1, keepdim=True) - normed * (w * normed).mean(-1, keepdim=True))
    return dx, (grad * normed).sum(1), grad.sum(1)


adaln_reference = Implementation(lambda call: None, adaln, adaln_backward)
gated_adaln_reference = Implementation(lambda call: None, gated_adaln, gated_adaln_backward)
