"""adaLN in C++ and CUDA (csrc/adaln): inputs are read in place wherever their last dimension is contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import (
    DTYPES,
    dtype_and_stream,
    empty_contiguous,
    last_dim_contiguous,
    pointers,
    unsupported_dtype,
    with_aligned_rows,
)
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.options import Options, gradients, options

CUDA_MAX_CHANNELS = 4096  # of a row in the registers of a block
CUDA_MAX_BATCH = 65535  # of a grid's second dimension


# The other inputs are on the first one's device, and of dtypes that go with its own and the branch's: the public
# function has checked.
def _unsupported_cpu(call: AdaLN | GatedAdaLN) -> str | None:
    if call.x.device.type != "cpu":
        return f"inputs are on {call.x.device.type}"
    reason = unsupported_dtype(call.x, (torch.float32, torch.bfloat16))
    if reason is None and isinstance(call, GatedAdaLN):
        reason = unsupported_dtype(call.branch, (torch.float32, torch.bfloat16))
    return reason


def _unsupported_cuda(call: AdaLN | GatedAdaLN) -> str | None:
    if call.plain() is None:
        return "options of the norm, of the modulation's shape and mixed dtypes are not supported"
    B, _, C = call.x.shape
    if C > CUDA_MAX_CHANNELS or C * call.x.itemsize % 16:
        return f"rows of {C} channels are wider than {CUDA_MAX_CHANNELS}, or not multiples of 16 bytes"
    if B > CUDA_MAX_BATCH:
        return f"a batch of {B} is larger than {CUDA_MAX_BATCH}"
    return unsupported_dtype(call.x, (torch.float32, torch.float16, torch.bfloat16))


def _adaln(call: AdaLN) -> tuple[Tensor]:
    plain = call.plain()
    if plain is None:
        return (_forward_with_options(call)[1],)
    x, scale, shift = plain
    out = empty_contiguous(x)
    extension(x).adaln_forward(dtype_and_stream(x), x.shape, call.eps, pointers(x, scale, shift), pointers(out))
    return (out,)


def _gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    plain = call.plain()
    if plain is None:
        return _forward_with_options(call)
    x, branch, gate, scale, shift = plain
    x_new, out = empty_contiguous(x), empty_contiguous(x)
    inputs = pointers(x, branch, gate, scale, shift)
    extension(x).gated_adaln_forward(dtype_and_stream(x), x.shape, call.eps, inputs, pointers(x_new, out))
    return x_new, out


def _forward_with_options(call: AdaLN | GatedAdaLN) -> tuple[Tensor, Tensor]:
    """x', which is x where there is no branch, and out."""
    x, given = last_dim_contiguous(call.x), options(call)
    branch, x_new, out = None, x, empty_contiguous(x)
    if isinstance(call, GatedAdaLN):
        branch = last_dim_contiguous(call.branch)
        x_new, out = out, empty_contiguous(branch)
    extension(x).adaln_options_forward(
        dtype_and_stream(x),
        x.shape,
        call.eps,
        _dtypes_and_rms(out, given),
        given.plus,
        pointers(x, branch, *given.tensors),
        pointers(None if branch is None else x_new, out),
    )
    return x_new, out


def _dtypes_and_rms(out: Tensor, given: Options) -> tuple[int, int, int, bool]:
    """The dtypes of the output, of vectors and of tensors per token, by their index."""
    groups = ((given.gate, given.factor, given.offset), (given.token_gate, given.token_scale, given.token_shift))
    vectors, tokens = (next((t.dtype for t in group if t is not None), torch.float32) for group in groups)
    return DTYPES[out.dtype], DTYPES[vectors], DTYPES[tokens], given.rms


def _workspace(x: Tensor) -> Tensor:
    return torch.empty(extension(x).adaln_backward_workspace(x.shape), dtype=torch.float32, device=x.device)


def _adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    plain = call.plain()
    if plain is None:
        return _backward_with_options(None, grads[0], call)
    x, scale, _ = plain
    grad_out = last_dim_contiguous(grads[0])
    dx, dscale, dshift, workspace = empty_contiguous(x), empty_contiguous(scale), empty_contiguous(scale), _workspace(x)
    inputs, outputs = pointers(x, scale), pointers(dx, dscale, dshift, workspace)
    extension(x).adaln_backward(dtype_and_stream(x), x.shape, call.eps, pointers(grad_out), inputs, outputs)
    return dx, dscale, dshift


def _gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    plain = call.plain()
    if plain is None:
        return _backward_with_options(grads[0], grads[1], call)
    x_new, branch, gate, scale, _ = plain
    grad_x_new, grad_out = map(last_dim_contiguous, grads)
    dx, dbranch = empty_contiguous(x_new), empty_contiguous(x_new)
    dgate, dscale, dshift, workspace = (
        empty_contiguous(scale),
        empty_contiguous(scale),
        empty_contiguous(scale),
        _workspace(x_new),
    )
    inputs = pointers(x_new, branch, gate, scale)
    outputs = pointers(dx, dbranch, dgate, dscale, dshift, workspace)
    extension(x_new).gated_adaln_backward(
        dtype_and_stream(x_new), x_new.shape, call.eps, pointers(grad_x_new, grad_out), inputs, outputs
    )
    return dx, dbranch, dgate, dscale, dshift


def _backward_with_options(grad_x_new: Tensor | None, grad_out: Tensor, call: AdaLN | GatedAdaLN) -> tuple[Tensor, ...]:
    x, grad_out = last_dim_contiguous(call.x), last_dim_contiguous(grad_out)
    dx, given = empty_contiguous(x), options(call)
    branch = dbranch = None
    if isinstance(call, GatedAdaLN):
        assert grad_x_new is not None
        branch, grad_x_new = last_dim_contiguous(call.branch), last_dim_contiguous(grad_x_new)
        dbranch = empty_contiguous(branch)
    vectors = torch.empty((3, x.shape[0], x.shape[2]), dtype=torch.float32, device=x.device).unbind()
    per_token = [None if t is None else empty_contiguous(t) for t in given.tensors[3:]]
    written = (None if given.gate is None else vectors[0], *vectors[1:], *per_token, _workspace(x))
    extension(x).adaln_options_backward(
        dtype_and_stream(x),
        x.shape,
        call.eps,
        _dtypes_and_rms(grad_out, given),
        given.plus,
        pointers(grad_x_new, grad_out),
        pointers(x, branch, *given.tensors[:5]),
        pointers(dx, dbranch, *written),
    )
    return dx, *([] if dbranch is None else [dbranch]), *gradients(call, vectors, per_token)


adaln_cpu = Implementation(_unsupported_cpu, _adaln, _adaln_backward, own_arithmetic=True)
gated_adaln_cpu = Implementation(_unsupported_cpu, _gated_adaln, _gated_adaln_backward, own_arithmetic=True)
adaln_cuda = Implementation(
    _unsupported_cuda,
    with_aligned_rows(_adaln),
    with_aligned_rows(_adaln_backward),
    own_arithmetic=True,
)
gated_adaln_cuda = Implementation(
    _unsupported_cuda,
    with_aligned_rows(_gated_adaln),
    with_aligned_rows(_gated_adaln_backward),
    own_arithmetic=True,
)
