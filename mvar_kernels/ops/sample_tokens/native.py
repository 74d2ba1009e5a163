"""Token sampling in C++ and CUDA (csrc/sample_tokens): logits with a contiguous last dimension are read in place."""

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import DTYPES, dtype_and_stream, last_dim_contiguous, pointers, unsupported_dtype
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling

MAX_CODES = 2**30
CUDA_MAX_CODES = 2**14  # of a row in the shared memory of a block
CUDA_MAX_ROWS = 2**31 - 1  # of a grid


# All else shares the device of cond, and the other logits its dtype: the public functions have checked.
def _unsupported_cpu(call: Sampling | SoftSampling) -> str | None:
    if call.cond.device.type != "cpu":
        return f"inputs are on {call.cond.device.type}"
    codes = call.cond.shape[-1]
    if codes > MAX_CODES:
        return f"{codes} codes are not 1 to 2³⁰"
    known = (torch.float32, torch.bfloat16)
    return unsupported_dtype(call.cond, known) or (
        unsupported_dtype(call.codebook, known) if isinstance(call, SoftSampling) else None
    )


def _unsupported_cuda(call: Sampling) -> str | None:
    B, positions, codes = call.cond.shape
    if codes > CUDA_MAX_CODES:
        return f"{codes} codes are not 1 to {CUDA_MAX_CODES}"
    if B * positions > CUDA_MAX_ROWS:
        return f"{B}·{positions} rows are more than {CUDA_MAX_ROWS}"
    return unsupported_dtype(call.cond, (torch.float32, torch.float16, torch.bfloat16))


def _contiguous(call: Sampling | SoftSampling) -> tuple[Tensor, Tensor | None]:
    return last_dim_contiguous(call.cond), None if call.uncond is None else last_dim_contiguous(call.uncond)


def _options(call: Sampling) -> tuple[float, ...]:
    top_k = min(call.top_k, call.cond.shape[-1])
    return call.guidance, top_k, call.top_p, call.temperature, call.scale_index, call.num_samples


def _sample_tokens(call: Sampling) -> tuple[Tensor]:
    cond, uncond = _contiguous(call)
    B, length = cond.shape[:2]
    tokens = torch.empty(B, length * call.num_samples, dtype=torch.int64, device=cond.device)
    inputs = pointers(cond, uncond, call.image_index, call.seed, call.per_image)
    extension(cond).sample_tokens(dtype_and_stream(cond), cond.shape, _options(call), inputs, pointers(tokens))
    return (tokens if call.num_samples == 1 else tokens.view(B, length, call.num_samples),)


def _soft_embedding(call: SoftSampling) -> tuple[Tensor]:
    (cond, uncond), codebook = _contiguous(call), last_dim_contiguous(call.codebook)
    mean = torch.empty((*cond.shape[:2], codebook.shape[1]), dtype=codebook.dtype, device=cond.device)
    options = *_options(call.sampling), DTYPES[codebook.dtype], codebook.shape[1], call.sharpness, call.temperature
    inputs = pointers(cond, uncond, call.image_index, call.seed, call.per_image, codebook)
    extension(cond).soft_embedding(dtype_and_stream(cond), cond.shape, options, inputs, pointers(mean))
    return (mean,)


sample_tokens_cpu = Implementation(_unsupported_cpu, _sample_tokens, None, own_arithmetic=True)
sample_tokens_cuda = Implementation(_unsupported_cuda, _sample_tokens, None, own_arithmetic=True)
soft_embedding_cpu = Implementation(_unsupported_cpu, _soft_embedding, None, own_arithmetic=True)
