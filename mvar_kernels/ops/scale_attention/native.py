"""Scale attention in C++ and CUDA (csrc/scale_attention): q, k, v are read in place wherever D is contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import (
    dtype_and_stream,
    empty_contiguous,
    last_dim_contiguous,
    pointers,
    unsupported_dtype,
    with_aligned_rows,
)
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.plan import Plan, plan

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
    if call.k.shape[2] != H:
        return f"k has {call.k.shape[2]} heads, not the H={H} of q"
    for option, given in (("rotary", call.cos), ("key_lengths", call.key_lengths)):
        if given is not None:
            return f"{option} is not None"
    if D not in CUDA_HEAD_DIMS:
        return f"head dimension D={D} is not {' or '.join(map(str, CUDA_HEAD_DIMS))}"
    if max(B, H) > 65535:
        return f"batch B={B} or heads H={H} is more than the 65535 that a launch may have"
    return unsupported_dtype(call.q, (torch.float16, torch.bfloat16))


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _forward(call: Attention, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """plan: of the CUDA kernel."""
    q, k, v, log_temperature, _, causal, scale, cos, sin, interleaved, key_lengths = call.readable()
    temperature, cos, sin = _floats(log_temperature), _floats(cos), _floats(sin)
    key_lengths = None if key_lengths is None else key_lengths.long()
    B, Lq, H, D = q.shape
    out, lse = empty_contiguous(q), torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    tiles, spans = (None, None) if plan is None else (plan.tiles, plan.spans)
    shape = B, Lq, k.shape[1], H, D, 0 if tiles is None else len(tiles), 0 if cos is None else cos.shape[1], k.shape[2]
    options = call.lengths(), causal, scale, interleaved
    inputs = pointers(q, k, v, temperature, tiles, spans, cos, sin, key_lengths)
    extension(q).scale_attention_forward(dtype_and_stream(q), shape, *options, inputs, pointers(out, lse))
    return out, lse


@with_aligned_rows
def _forward_cuda(call: Attention) -> tuple[Tensor, Tensor]:
    lengths = call.q.shape[1], call.causal, False, CUDA_BLOCK, CUDA_BLOCK
    return _forward(call, plan(call.lengths(), *lengths, call.q.device))


def _backward(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    q, k, v, log_temperature, _, causal, scale, cos, sin, interleaved, key_lengths = call.readable()
    temperature, cos, sin = _floats(log_temperature), _floats(cos), _floats(sin)
    key_lengths = None if key_lengths is None else key_lengths.long()
    B, Lq, H, D = q.shape
    found = [empty_contiguous(q), empty_contiguous(k), empty_contiguous(v)]
    dtemperature = None if temperature is None else torch.empty_like(temperature)
    grad_out = last_dim_contiguous(grads[0])
    shape, options = (
        (B, Lq, k.shape[1], H, D, 0, 0 if cos is None else cos.shape[1], k.shape[2]),
        (call.lengths(), causal, scale, interleaved),
    )
    inputs, outputs = pointers(q, k, v, temperature, None, None, cos, sin, key_lengths), pointers(*found, dtemperature)
    extension(q).scale_attention_backward(dtype_and_stream(q), shape, *options, pointers(grad_out), inputs, outputs)
    if log_temperature is not None and dtemperature is not None:
        found.append(dtemperature.to(log_temperature.dtype))
    return found


scale_attention_cpu = Implementation(_unsupported_cpu, _forward, _backward, own_arithmetic=True)
scale_attention_cuda = Implementation(_unsupported_cuda, _forward_cuda, None, own_arithmetic=True)
