"""Mamba-2 in C++ and, mamba2_mixer's forward, in CUDA (csrc/mamba2): inputs are read in place wherever their last
dimension is contiguous (on a GPU: and their rows are aligned).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import (
    DTYPES,
    as_aligned,
    dtype_and_stream,
    empty_contiguous,
    last_dim_contiguous,
    pointers,
    unsupported_dtype,
)
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan

CUDA_HEAD_SIZES = (64, 64)  # P, N
CUDA_TAPS = 4


def _unsupported_scan_cpu(call: Scan) -> str | None:
    return _unsupported_cpu(call.x)


def _unsupported_mixer_cpu(call: Mixer) -> str | None:
    return _unsupported_cpu(call.zxbcdt)


def _unsupported_cpu(first: Tensor) -> str | None:
    """The first input says the dtype of all but dt and the parameters, which are converted to float32."""
    if first.device.type != "cpu":
        return f"inputs are on {first.device.type}"
    return unsupported_dtype(first, (torch.float32, torch.bfloat16))


def _unsupported_mixer_cuda(call: Mixer) -> str | None:
    _, H, P, N = call.ssm.shape
    if call.groups > 1:
        return f"zxbcdt: {call.groups} groups, the CUDA kernel has one"
    if call.D.dim() == 2:
        return "D: of each channel, the CUDA kernel has one of a head"
    if call.limits_dt:
        return "dt_limit: the CUDA kernel has none"
    if call.norm_weight is None or call.norm_before_gate:
        return "norm_weight: the CUDA kernel has RMSNorm, after the gate"
    if call.A_log.dim() == 2:
        return "A_log: has two directions, the CUDA kernel scans forward only"
    if (P, N) != CUDA_HEAD_SIZES or H % 2:
        return f"state: heads H={H} of P={P}, N={N}: the CUDA kernel takes an even number of P=64, N=64"
    if call.conv_weight.shape[1] != CUDA_TAPS:
        return f"conv_weight: {call.conv_weight.shape[1]} taps, the CUDA kernel has {CUDA_TAPS}"
    return unsupported_dtype(call.zxbcdt, (torch.float16, torch.bfloat16))


def _parameter(t: Tensor) -> Tensor:
    return t.float().contiguous()


def _scan_inputs(call: Scan) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors as the kernel takes them, and their sizes: as _sizes gives them, with one tap."""
    x, dt, A, B, C, D, state, _ = call
    ready = [
        last_dim_contiguous(x),
        last_dim_contiguous(dt.float()),
        _parameter(A),
        last_dim_contiguous(B),
        last_dim_contiguous(C),
        _parameter(D),
        last_dim_contiguous(state),
    ]
    return ready, (*x.shape, state.shape[-1], A.dim(), 1, call.groups, D.dim())


def _ssd_scan(call: Scan) -> tuple[Tensor, Tensor]:
    x, inputs, sizes = call.x, *_scan_inputs(call)
    y, last = empty_contiguous(x), empty_contiguous(call.state)
    extension(x).ssd_scan_forward(dtype_and_stream(x), sizes, call.scales, pointers(*inputs), pointers(y, last))
    return y, last


def _ssd_scan_backward(grads: Sequence[Tensor], call: Scan) -> list[Tensor]:
    """In float32 whatever the dtype of the inputs; each gradient is then rounded to that of its input."""
    tensors = call[:-1]
    inputs, sizes = _scan_inputs(Scan._make([*(t.float() for t in tensors), call.scales]))
    given = [last_dim_contiguous(g.float()) for g in grads]
    outputs = [empty_contiguous(t) for t in inputs]
    extension(call.x).ssd_scan_backward(
        dtype_and_stream(inputs[0]), sizes, call.scales, pointers(*given), pointers(*inputs), pointers(*outputs)
    )
    return [out.to(t.dtype) for out, t in zip(outputs, tensors, strict=True)]


def _sizes(call: Mixer) -> tuple[int, ...]:
    """B, L, H, P, N, directions, taps, groups, dimensions of D"""
    taps = call.conv_weight.shape[1]
    return *call.zxbcdt.shape[:2], *call.ssm.shape[1:], call.dt_bias.dim(), taps, call.groups, call.D.dim()


def _options(call: Mixer) -> tuple[float, float, float, int]:
    """eps, the limits of Δ, and whether there is a norm (0: none) and where (1: after the gate, 2: before it)."""
    norm = 0 if call.norm_weight is None else 1 + call.norm_before_gate
    return call.eps, call.dt_min, call.dt_max, norm


def _run_mixer(call: Mixer, options: tuple[float, ...], *workspace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """call: with dt and all tensors as the kernel takes them. workspace: of the CUDA kernel."""
    first = call.zxbcdt
    y = first.new_empty(call.y_shape)
    conv, ssm = empty_contiguous(call.conv), empty_contiguous(call.ssm)
    extension(first).mamba2_mixer_forward(
        *(dtype_and_stream(first), _sizes(call), call.scales, options, DTYPES[call.steps.dtype]),
        *(pointers(*call.tensors), pointers(y, conv, ssm, *workspace)),
    )
    return y, conv, ssm


def _cpu_inputs(call: Mixer) -> Mixer:
    first, dt, conv, ssm = map(last_dim_contiguous, (call.zxbcdt, call.steps.float(), call.conv, call.ssm))
    # Without a norm the kernel multiplies by these.
    weight = (
        torch.ones(call.y_shape[2], dtype=torch.float32, device="cpu") if call.norm_weight is None else call.norm_weight
    )
    return Mixer._make([first, dt, *map(_parameter, (*call.parameters, weight)), conv, ssm, *call[10:]])


def _cuda_inputs(call: Mixer) -> Mixer:
    pair = 2 * call.zxbcdt.itemsize
    first, dt = as_aligned(call.zxbcdt, pair), last_dim_contiguous(call.steps)
    assert call.norm_weight is not None
    parameters = [as_aligned(_parameter(p)) for p in (*call.parameters, call.norm_weight)]
    return Mixer._make([first, dt, *parameters, as_aligned(call.conv, pair), as_aligned(call.ssm), *call[10:]])


def _mamba2_mixer(call: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    return _run_mixer(_cpu_inputs(call), _options(call))


def _mamba2_mixer_cuda(call: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    call = _cuda_inputs(call)
    first = call.zxbcdt
    floats = extension(first).mamba2_mixer_workspace(dtype_and_stream(first), _sizes(call), call.scales)
    return _run_mixer(call, _options(call), first.new_empty(floats, dtype=torch.float32))


def _mamba2_mixer_backward(grads: Sequence[Tensor], call: Mixer) -> list[Tensor]:
    """In float32 whatever the dtype of the inputs; each gradient is then rounded to that of its input."""
    dt = None if call.dt is None else call.dt.float()
    single = call._replace(zxbcdt=call.zxbcdt.float(), dt=dt, conv=call.conv.float(), ssm=call.ssm.float())
    ready = _cpu_inputs(single)
    given = [last_dim_contiguous(g.float()) for g in grads]
    dzxbcdt, ddt = empty_contiguous(single.zxbcdt), None if dt is None else empty_contiguous(dt)
    rest = [empty_contiguous(t) for t in ready.tensors[2:] if t is not None]
    extension(ready.zxbcdt).mamba2_mixer_backward(
        *(dtype_and_stream(ready.zxbcdt), _sizes(ready), call.scales, _options(call)),
        *(pointers(*given), pointers(*ready.tensors), pointers(dzxbcdt, call.steps_of(dzxbcdt, ddt), *rest)),
    )
    found = zip((dzxbcdt, ddt, *rest), call.tensors, strict=True)
    return [d.to(t.dtype) for d, t in found if d is not None and t is not None]


ssd_scan_cpu = Implementation(_unsupported_scan_cpu, _ssd_scan, _ssd_scan_backward, own_arithmetic=True)
mamba2_mixer_cpu = Implementation(_unsupported_mixer_cpu, _mamba2_mixer, _mamba2_mixer_backward, own_arithmetic=True)
mamba2_mixer_cuda = Implementation(_unsupported_mixer_cuda, _mamba2_mixer_cuda, None, own_arithmetic=True)
