"""Scale attention in C++ and CUDA (csrc/scale_attention): q, k, v are read in place wherever D is contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import (
    as_aligned,
    dtype_and_stream,
    empty_contiguous,
    last_dim_contiguous,
    pointers,
    unsupported_dtype,
)
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.plan import plan

CUDA_BLOCK = 64  # queries of a tile, and keys of a block of them: kTile in cuda.cu
CUDA_HEAD_DIMS = (64, 128)


def _unsupported_cpu(call: Attention) -> str | None:
    # k and v share its dtype and device: the public function has checked.
    if call.q.device.type != "cpu":
        return f"inputs are on {call.q.device.type}"
    return unsupported_dtype(call.q, (torch.float32, torch.bfloat16))


def _unsupported_cuda(call: Attention) -> str | None:
    B, _, H, D = call.q.shape
    if call.causal:
        return "pattern 'causal' is not 'diagonal'"
    if D not in CUDA_HEAD_DIMS:
        return f"head dimension D={D} is not {' or '.join(map(str, CUDA_HEAD_DIMS))}"
    if max(B, H) > 65535:
        return f"batch B={B} or heads H={H} is more than the 65535 that a launch may have"
    return unsupported_dtype(call.q, (torch.float16, torch.bfloat16))


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _shape(call: Attention) -> tuple[int, ...]:
    """(B, Lq, L, H, D)"""
    B, Lq, H, D = call.q.shape
    return B, Lq, call.k.shape[1], H, D


def _forward_cuda(call: Attention) -> tuple[Tensor, Tensor]:
    q, k, v, temperature = as_aligned(call.q), as_aligned(call.k), as_aligned(call.v), _floats(call.log_temperature)
    B, Lq, H, _ = q.shape
    made = plan(call.scales, Lq, call.causal, False, CUDA_BLOCK, CUDA_BLOCK, q.device)
    out, lse = empty_contiguous(q), torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    inputs = pointers(q, k, v, temperature, made.tiles, made.spans)
    shape, outputs = _shape(call), pointers(out, lse)
    extension(q).scale_attention_forward(dtype_and_stream(q), shape, call.scale, inputs, len(made.tiles), outputs)
    return out, lse


def _how(call: Attention) -> tuple[object, ...]:
    """What a call on the CPU says of its tensors: dtype, sizes and options."""
    return call.q.dtype is torch.bfloat16, _shape(call), call.scales, call.causal, call.scale


def _forward_cpu(call: Attention) -> tuple[Tensor, Tensor]:
    q, k, v, log_temperature = call.readable()[:4]
    temperature = _floats(log_temperature)
    B, Lq, H, _ = q.shape
    out, lse = empty_contiguous(q), torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    extension(q).scale_attention_forward(*_how(call), pointers(q, k, v, temperature), pointers(out, lse))
    return out, lse


def _backward_cpu(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    q, k, v, log_temperature = call.readable()[:4]
    temperature = _floats(log_temperature)
    grad_out = last_dim_contiguous(grads[0])
    found = [empty_contiguous(q), empty_contiguous(k), empty_contiguous(v)]
    dtemperature = None if temperature is None else torch.empty_like(temperature)
    inputs, outputs = pointers(q, k, v, temperature), pointers(*found, dtemperature)
    extension(q).scale_attention_backward(*_how(call), pointers(grad_out), inputs, outputs)
    if log_temperature is not None and dtemperature is not None:
        found.append(dtemperature.to(log_temperature.dtype))
    return found


scale_attention_cpu = Implementation(_unsupported_cpu, _forward_cpu, _backward_cpu, own_arithmetic=True)
scale_attention_cuda = Implementation(_unsupported_cuda, _forward_cuda, None, own_arithmetic=True)
