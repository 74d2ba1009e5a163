"""Mamba-2 in C++ and, mamba2_mixer's forward, in CUDA (csrc/mamba2): inputs are read in place wherever their last
dimension is contiguous (on a GPU: and their rows are aligned).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import aligned, dtype_objection, empty, pointers, view, where
from mvar_kernels.ops.mamba2.steps import steps_of

CUDA_HEAD_SIZES = (64, 64)  # P, N
CUDA_TAPS = 4


def _why_not_cpu(inputs: Tensor | Sequence[Tensor], *rest: Any) -> str | None:
    """The first input says the dtype of all but dt and the parameters, which are converted to float32."""
    first = inputs if isinstance(inputs, Tensor) else inputs[0]
    if first.device.type != "cpu":
        return f"inputs are on {first.device.type}"
    return dtype_objection(first, (torch.float32, torch.bfloat16))


def _why_not_mixer_cuda(
    inputs: Sequence[Tensor], params: Sequence[Tensor], state: Sequence[Tensor], *rest: Any
) -> str | None:
    conv_weight, A_log, (_, H, P, N) = params[0], params[3], state[1].shape
    if A_log.dim() == 2:
        return "A_log: has two directions, the CUDA kernel scans forward only"
    if (P, N) != CUDA_HEAD_SIZES or H % 2:
        return f"state: heads H={H} of P={P}, N={N}: the CUDA kernel takes an even number of P=64, N=64"
    if conv_weight.shape[1] != CUDA_TAPS:
        return f"conv_weight: {conv_weight.shape[1]} taps, the CUDA kernel has {CUDA_TAPS}"
    return dtype_objection(inputs[0], (torch.float16, torch.bfloat16))


def _parameter(t: Tensor) -> Tensor:
    return t.float().contiguous()


def _scan_inputs(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors as the kernel takes them, and their sizes."""
    x, dt, A, B, C, D, state = tensors
    ready = [view(x), view(dt.float()), _parameter(A), view(B), view(C), _parameter(D), view(state)]
    return ready, (*x.shape, B.shape[-1], A.dim(), 1)


def _ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, scales: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    inputs, sizes = _scan_inputs((x, dt, A, B, C, D, state))
    y, last = empty(x), empty(state)
    bf16 = x.dtype is torch.bfloat16
    extension(x).ssd_scan_forward(bf16, sizes, scales, pointers(*inputs), pointers(y, last))
    return y, last


def _ssd_scan_backward(grads: list[Tensor], tensors: list[Tensor], scales: tuple[int, ...]) -> list[Tensor]:
    """In float32 whatever the dtype of the inputs; each gradient is then rounded to that of its input."""
    inputs, sizes = _scan_inputs([t.float() for t in tensors])
    given = [view(g.float()) for g in grads]
    outputs = [empty(t) for t in inputs]
    extension(tensors[0]).ssd_scan_backward(sizes, scales, pointers(*given), pointers(*inputs), pointers(*outputs))
    return [out.to(t.dtype) for out, t in zip(outputs, tensors, strict=True)]


def _mixer_inputs(
    inputs: Sequence[Tensor], params: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors as the kernel takes them, A in place of A_log, and their sizes."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = map(_parameter, params)
    parameters = [conv_weight, conv_bias, dt_bias, -A_log.exp(), D, norm_weight]
    sizes = (*inputs[0].shape[:2], *state[1].shape[1:], dt_bias.dim(), conv_weight.shape[1])
    dt = steps_of(inputs, params).float()
    return [view(inputs[0]), view(state[0]), view(state[1]), *parameters, view(dt)], sizes


def _mamba2_mixer(
    inputs: list[Tensor], params: list[Tensor], state: list[Tensor], scales: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    ready, sizes = _mixer_inputs(inputs, params, state)
    first = inputs[0]
    y = first.new_empty(*first.shape[:2], params[-1].shape[0])
    conv, ssm = empty(state[0]), empty(state[1])
    bf16 = first.dtype is torch.bfloat16
    extension(first).mamba2_mixer_forward(bf16, sizes, scales, eps, pointers(*ready), pointers(y, conv, ssm))
    return y, conv, ssm


def _mamba2_mixer_on_cuda(
    inputs: list[Tensor], params: list[Tensor], state: list[Tensor], scales: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    first, dt = inputs[0], steps_of(inputs, params)
    pair = 2 * first.itemsize
    conv_state, ssm = state
    ready = [aligned(first, pair), aligned(conv_state, pair), aligned(ssm)]
    ready += [*(aligned(_parameter(p)) for p in params), view(dt)]
    sizes = (*first.shape[:2], *ssm.shape[1:], 1, CUDA_TAPS)
    kernels, at = extension(first), (*where(first), dt.itemsize)
    y = first.new_empty(*first.shape[:2], params[-1].shape[0])
    last_conv, last_ssm = empty(conv_state), empty(ssm)
    workspace = y.new_empty(kernels.mamba2_mixer_workspace(at, sizes), dtype=torch.uint8)
    outputs = pointers(y, last_conv, last_ssm, workspace)
    kernels.mamba2_mixer_forward(at, sizes, eps, pointers(*ready), outputs)
    return y, last_conv, last_ssm


def _mamba2_mixer_backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    params: list[Tensor],
    state: list[Tensor],
    scales: tuple[int, ...],
    eps: float,
) -> list[Tensor]:
    """In float32 whatever the dtype of the inputs; each gradient is then rounded to that of its input."""
    single = [t.float() for t in inputs]
    ready, sizes = _mixer_inputs(single, params, [t.float() for t in state])
    given = [view(g.float()) for g in grads]
    dinputs, (dconv, dssm, *dparams) = [empty(t) for t in single], [empty(t) for t in ready[1:-1]]
    outputs = (dinputs[0], dconv, dssm, *dparams, steps_of(dinputs, params))
    extension(inputs[0]).mamba2_mixer_backward(
        sizes, scales, eps, pointers(*given), pointers(*ready), pointers(*outputs)
    )
    found = [*dinputs, *dparams, dconv, dssm]
    return [d.to(t.dtype) for d, t in zip(found, [*inputs, *params, *state], strict=True)]


ssd_scan_cpu = Kernel(_why_not_cpu, _ssd_scan, _ssd_scan_backward)
mamba2_mixer_cpu = Kernel(_why_not_cpu, _mamba2_mixer, _mamba2_mixer_backward)
mamba2_mixer_cuda = Kernel(_why_not_mixer_cuda, _mamba2_mixer_on_cuda, None)
