"""Token drawing in C++ and CUDA (csrc/sample_tokens): logits with a contiguous last dimension are read in place."""

from typing import Any

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import DTYPES, dtype_objection, pointers, view, where

MAX_CODES = 2**30
CUDA_MAX_CODES = 2**14  # of a row in the shared memory of a block
CUDA_MAX_ROWS = 2**31 - 1  # of a grid


def _why_not_cpu(*inputs: Any) -> str | None:
    for value in inputs:
        if not isinstance(value, Tensor):
            continue
        if value.device.type != "cpu":
            return f"inputs are on {value.device.type}"
        objection = dtype_objection(value, (torch.float32, torch.bfloat16)) if value.is_floating_point() else None
        if objection is not None:
            return objection
    codes = inputs[0].shape[-1]
    return None if 1 <= codes <= MAX_CODES else f"{codes} codes are not 1 to 2³⁰"


# The other logits share the first ones' dtype and device: the public function has checked.
def _why_not_cuda(cond: Tensor, *others: Any) -> str | None:
    B, positions, codes = cond.shape
    if codes > CUDA_MAX_CODES:
        return f"{codes} codes are not 1 to {CUDA_MAX_CODES}"
    if B * positions > CUDA_MAX_ROWS:
        return f"{B}·{positions} rows are more than {CUDA_MAX_ROWS}"
    return dtype_objection(cond, (torch.float32, torch.float16, torch.bfloat16))


def _sample_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    image_index: Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    seed: Tensor,
    scale_index: int,
) -> Tensor:
    cond, uncond = view(cond), None if uncond is None else view(uncond)
    tokens = torch.empty(cond.shape[:2], dtype=torch.int64, device=cond.device)
    extension(cond).sample_tokens(
        where(cond),
        cond.shape,
        pointers(cond, uncond, image_index),
        (guidance, min(top_k, cond.shape[-1]), top_p, seed.data_ptr(), scale_index),
        tokens.data_ptr(),
    )
    return tokens


def _soft_embedding(
    cond: Tensor,
    uncond: Tensor | None,
    codebook: Tensor,
    image_index: Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    sharpness: float,
    temperature: float,
    seed: Tensor,
    scale_index: int,
) -> Tensor:
    cond, uncond, codebook = view(cond), None if uncond is None else view(uncond), view(codebook)
    mean = torch.empty((*cond.shape[:2], codebook.shape[1]), dtype=codebook.dtype)
    extension(cond).soft_embedding(
        where(cond),
        cond.shape,
        pointers(cond, uncond, image_index, codebook),
        (guidance, min(top_k, cond.shape[-1]), top_p, seed.data_ptr(), scale_index),
        DTYPES[codebook.dtype],
        *(codebook.shape[1], sharpness, temperature),
        mean.data_ptr(),
    )
    return mean


sample_tokens_cpu = Kernel(_why_not_cpu, _sample_tokens, None)
sample_tokens_cuda = Kernel(_why_not_cuda, _sample_tokens, None)
soft_embedding_cpu = Kernel(_why_not_cpu, _soft_embedding, None)
