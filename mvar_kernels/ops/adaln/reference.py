"""adaLN in plain PyTorch: the specification. Arithmetic in float32, or float64 for float64 inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.validation import accumulator


def adaln(call: AdaLN) -> tuple[Tensor]:
    """norm(x)·(1+scale) + shift over the last dimension, rounded once, to x's dtype."""
    return (_modulated(call, call.x.dtype),)


def gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    """x' = x + gate·branch, rounded to x's dtype, and adaLN of that x', rounded to the branch's."""
    x, branch, gate = call[:3]
    acc = accumulator(x.dtype)
    x_new = (x.to(acc) + _per_token(gate, acc) * branch.to(acc)).to(x.dtype)
    return x_new, _modulated(call.norm()._replace(x=x_new), branch.dtype)


def _modulated(call: AdaLN, dtype: torch.dtype) -> Tensor:
    acc = accumulator(call.x.dtype)
    out = _affine(_normed(call)[0], call)
    if call.scale is not None:
        out = out * (1 + _per_token(call.scale, acc))
    if call.shift is not None:
        out = out + _per_token(call.shift, acc)
    return out.to(dtype)


def _normed(call: AdaLN) -> tuple[Tensor, Tensor]:
    """(n = norm(x), r = 1/σ), σ of the mean square where no mean is subtracted."""
    x = call.x.to(accumulator(call.x.dtype))
    centred = x if call.rms else _centred(x)
    rstd = (centred.square().mean(-1, keepdim=True) + call.eps).rsqrt()
    return centred * rstd, rstd


def _centred(x: Tensor) -> Tensor:
    """x minus its mean. That is rounded: of a row of 12345.678 it leaves an ulp, 10⁻³, which 1/√eps would make 1."""
    centred = x - x.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)


def _affine(normed: Tensor, call: AdaLN) -> Tensor:
    if call.weight is not None:
        normed = normed * call.weight.to(normed.dtype)
    return normed if call.bias is None else normed + call.bias.to(normed.dtype)


def _per_token(modulation: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L or 1, C)"""
    return modulation.to(dtype) if modulation.dim() == 3 else modulation.to(dtype)[:, None]


def adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    dx, *others = _norm_vjp(grads[0], call)
    return dx.to(call.x.dtype), *others


def gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    """The gradient d at x' reaches x as it is, the branch times the gate, and the gate summed over tokens."""
    grad_x_new, grad_out = grads
    x_new, branch, gate = call[:3]
    acc = accumulator(x_new.dtype)
    dx_norm, *others = _norm_vjp(grad_out, call.norm())
    d = grad_x_new.to(acc) + dx_norm  # (B, L, C)
    dbranch = _per_token(gate, acc) * d
    dgate = _summed(branch.to(acc) * d, gate)
    return d.to(x_new.dtype), dbranch.to(branch.dtype), dgate, *others


def _norm_vjp(grad_out: Tensor, call: AdaLN) -> list[Tensor]:
    """Gradients of x, not rounded yet, and of those of scale, shift, weight and bias that there are.

    With n = norm(x), r = 1/σ and w the gradient at n: dx = r·(w − mean(w) − n·mean(w·n)), and without subtraction of
    the mean r·(w − n·mean(w·n)).
    """
    acc = accumulator(call.x.dtype)
    normed, rstd = _normed(call)
    grad = grad_out.to(acc)
    at_affine = grad if call.scale is None else grad * (1 + _per_token(call.scale, acc))
    w = at_affine if call.weight is None else at_affine * call.weight.to(acc)
    less_mean = w if call.rms else w - w.mean(-1, keepdim=True)
    found = [rstd * (less_mean - normed * (w * normed).mean(-1, keepdim=True))]
    if call.scale is not None:
        found.append(_summed(grad * _affine(normed, call), call.scale))
    if call.shift is not None:
        found.append(_summed(grad, call.shift))
    if call.weight is not None:
        found.append(_summed(at_affine * normed, call.weight))
    if call.bias is not None:
        found.append(_summed(at_affine, call.bias))
    return found


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """(B, L, C) summed over the tokens, or the tokens of all samples, that share a number of `like`; in its dtype."""
    if like.dim() < 3:
        grad = grad.sum(1).sum_to_size(like.shape)
    return grad.to(like.dtype)


adaln_reference = Implementation(lambda call: None, adaln, adaln_backward)
gated_adaln_reference = Implementation(lambda call: None, gated_adaln, gated_adaln_backward)
