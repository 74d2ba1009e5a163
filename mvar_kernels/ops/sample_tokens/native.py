"""Token drawing in C++ (csrc/sample_tokens): logits are read in place wherever their last dimension is contiguous."""

from typing import Any

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import dtype_objection, view

MAX_CODES = 2**30


def _why_not(*inputs: Any) -> str | None:
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
    tokens = torch.empty(cond.shape[:2], dtype=torch.int64)
    extension(cond).sample_tokens(
        cond.dtype is torch.bfloat16,
        cond.shape,
        *(cond.data_ptr(), cond.stride()),
        *((0, (0, 0)) if uncond is None else (uncond.data_ptr(), uncond.stride())),
        *(image_index.data_ptr(), image_index.stride(0)),
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
        cond.dtype is torch.bfloat16,
        cond.shape,
        *(cond.data_ptr(), cond.stride()),
        *((0, (0, 0)) if uncond is None else (uncond.data_ptr(), uncond.stride())),
        *(image_index.data_ptr(), image_index.stride(0)),
        (guidance, min(top_k, cond.shape[-1]), top_p, seed.data_ptr(), scale_index),
        codebook.dtype is torch.bfloat16,
        *(codebook.data_ptr(), codebook.stride(0), codebook.shape[1]),
        *(sharpness, temperature),
        mean.data_ptr(),
    )
    return mean


sample_tokens_cpu = Kernel(_why_not, _sample_tokens, None)
soft_embedding_cpu = Kernel(_why_not, _soft_embedding, None)
