"""How kernels with options take a call: per-sample vectors and tensors per token, and gradients from those of these.

    out = (N(x)·(plus + factor) + offset)·(1 + token_scale) + token_shift

(1+scale) and shift of a sample multiply with weight and bias to one vector each: of the tensors that are small beside x
there are two, however a call came by them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mvar_kernels.ffi import last_dim_contiguous
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN


class Options(NamedTuple):
    """gate, factor and offset (B, C), of one dtype; token_gate, token_scale and token_shift (B, L, C), of one dtype.

    A missing one is 0. Either dtype is float32 or that of the output. In the backward, offset is read only beside
    token_scale, and token_shift never.
    """

    gate: Tensor | None
    factor: Tensor | None
    offset: Tensor | None
    token_gate: Tensor | None
    token_scale: Tensor | None
    token_shift: Tensor | None
    plus: float
    rms: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:6]


def options(call: AdaLN | GatedAdaLN) -> Options:
    """Every tensor's last dimension is contiguous."""
    of_branch = call.gate if isinstance(call, GatedAdaLN) else None
    scale, shift, _, weight, bias, rms = call[-6:]
    per_token = _is_per_token(call)
    offset: Tensor | None
    if per_token or scale is None:
        factor, offset, plus = weight, bias, 1.0 if weight is None else 0.0
    elif weight is None and bias is None:
        factor, offset, plus = scale, shift, 1.0
    else:
        one_plus_scale = 1 + scale.float()
        factor, plus = one_plus_scale if weight is None else weight.float() * one_plus_scale, 0.0
        offset = None if shift is None else shift.float()
        if bias is not None:
            scaled = bias.float() * one_plus_scale
            offset = scaled if offset is None else scaled + offset
    vectors = [None if per_token else of_branch, factor, offset]
    if len({t.dtype for t in vectors if t is not None}) > 1:
        vectors = [None if t is None else t.float() for t in vectors]
    B, C = call.x.shape[0], call.x.shape[2]
    gate, factor, offset = (None if t is None else last_dim_contiguous(t).expand(B, C) for t in vectors)
    if not per_token:
        return Options(gate, factor, offset, None, None, None, plus, rms)
    tokens = [None if t is None else last_dim_contiguous(t) for t in (of_branch, scale, shift)]
    return Options(gate, factor, offset, tokens[0], tokens[1], tokens[2], plus, rms)


def gradients(call: AdaLN | GatedAdaLN, vectors: Sequence[Tensor], per_token: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of gate, scale, shift, weight and bias, those that there are.

    Args:
        vectors: of gate, factor and offset, (B, C) in float32; that of the gate is not read if it is per token.
        per_token: of gate, scale and shift, (B, L, C) in their dtype; those that there are.
    """
    scale, shift, _, weight, bias, _ = call[-6:]
    dgate, dfactor, doffset = vectors
    found = [t for t in per_token if t is not None]
    if not found:
        if isinstance(call, GatedAdaLN):
            found.append(_as(dgate, call.gate))
        if scale is not None:
            of_scale = dfactor if weight is None else dfactor * weight.float()
            found.append(_as(of_scale if bias is None else of_scale + doffset * bias.float(), scale))
            if shift is not None:
                found.append(_as(doffset, shift))
            if weight is not None or bias is not None:
                one_plus_scale = 1 + scale.float()
                dfactor, doffset = dfactor * one_plus_scale, doffset * one_plus_scale
    if weight is not None:
        found.append(_as(dfactor, weight))
    if bias is not None:
        found.append(_as(doffset, bias))
    return found


def _is_per_token(call: AdaLN | GatedAdaLN) -> bool:
    modulation = call.gate if isinstance(call, GatedAdaLN) else call.scale
    return modulation is not None and modulation.dim() == 3


def _as(grad: Tensor, like: Tensor) -> Tensor:
    """Summed over the samples that share a number of `like`; in its dtype."""
    return grad.sum_to_size(like.shape).to(like.dtype)
