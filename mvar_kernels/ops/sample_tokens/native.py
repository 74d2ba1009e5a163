"""Token drawing in C++ and CUDA (csrc/sample_tokens): logits with a contiguous last dimension are read in place."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import DTYPES, dtype_objection, pointers, view, where
from mvar_kernels.ops.sample_tokens.inputs import Draw, SoftDraw

MAX_CODES = 2**30
CUDA_MAX_CODES = 2**14  # of a row in the shared memory of a block
CUDA_MAX_ROWS = 2**31 - 1  # of a grid


# All else shares the device of cond, and the other logits its dtype: the public functions have checked.
def _why_not_cpu(call: Draw | SoftDraw) -> str | None:
    if call.cond.device.type != "cpu":
        return f"inputs are on {call.cond.device.type}"
    codes = call.cond.shape[-1]
    if codes > MAX_CODES:
        return f"{codes} codes are not 1 to 2³⁰"
    known = (torch.float32, torch.bfloat16)
    return dtype_objection(call.cond, known) or (
        dtype_objection(call.codebook, known) if isinstance(call, SoftDraw) else None
    )


def _why_not_cuda(call: Draw) -> str | None:
    B, positions, codes = call.cond.shape
    if codes > CUDA_MAX_CODES:
        return f"{codes} codes are not 1 to {CUDA_MAX_CODES}"
    if B * positions > CUDA_MAX_ROWS:
        return f"{B}·{positions} rows are more than {CUDA_MAX_ROWS}"
    return dtype_objection(call.cond, (torch.float32, torch.float16, torch.bfloat16))


def _sample_tokens(call: Draw) -> tuple[Tensor]:
    cond, uncond = view(call.cond), None if call.uncond is None else view(call.uncond)
    tokens = torch.empty(cond.shape[:2], dtype=torch.int64, device=cond.device)
    extension(cond).sample_tokens(
        where(cond),
        cond.shape,
        pointers(cond, uncond, call.image_index, call.seed),
        (call.guidance, min(call.top_k, cond.shape[-1]), call.top_p, call.scale_index),
        pointers(tokens),
    )
    return (tokens,)


def _soft_embedding(call: SoftDraw) -> tuple[Tensor]:
    cond, uncond, codebook = view(call.cond), None if call.uncond is None else view(call.uncond), view(call.codebook)
    mean = torch.empty((*cond.shape[:2], codebook.shape[1]), dtype=codebook.dtype, device=cond.device)
    extension(cond).soft_embedding(
        where(cond),
        cond.shape,
        pointers(cond, uncond, call.image_index, call.seed, codebook),
        (call.guidance, min(call.top_k, cond.shape[-1]), call.top_p, call.scale_index),
        DTYPES[codebook.dtype],
        *(codebook.shape[1], call.sharpness, call.temperature),
        pointers(mean),
    )
    return (mean,)


sample_tokens_cpu = Kernel(_why_not_cpu, _sample_tokens, None, own_arithmetic=True)
sample_tokens_cuda = Kernel(_why_not_cuda, _sample_tokens, None, own_arithmetic=True)
soft_embedding_cpu = Kernel(_why_not_cpu, _soft_embedding, None, own_arithmetic=True)
