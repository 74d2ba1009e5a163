"""Token sampling in Triton: one launch from two rows of logits to a token.

One program samples at one position of one image. It reads its rows of V logits once, guides them, and keeps the
guided row in registers (16 codes a thread at V = 4096) for everything after: the two threshold searches go over it
again and again, with nothing moved but a number or two a round between the warps; a dropped code becomes −∞.
The arg-max of logits and noise is found by a race of all codes with a rough noise, and the exact noise of those
near to winning (common.sample). Nothing is written but the token.

Tokens are bit for bit those of reference.py: top-k counts, top-p sums integers, and guidance, weights and noise
are float32 operations rounded one by one (enable_fp_fusion=False). A NaN counts as +∞, which counts as the largest
finite number.

The soft embedding writes its weights, and a matmul averages the codebook with them: 2·4·V bytes a position
to write and read, where a program that multiplied for itself would read the codebook, 4·V·width, at every
position.

What changes from scale to scale or call to call is a run-time argument, and unspecialised. Whether there is a
second row, a top-k, a top-p, a temperature and parameters of each image is compiled in, as what is not there would
take registers all the same.
"""

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ffi import last_dim_contiguous
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling
from mvar_kernels.ops.sample_tokens.triton.common import (
    INFINITY,
    below_infinity,
    keep_top_k,
    keep_top_p,
    largest_logit,
    row_noise,
    sample,
)
from mvar_kernels.tiling import Tile
from mvar_kernels.triton_math import divide, exp

MAX_CODES = 2**15
LEAST_BLOCK = 128

# A thread has BLOCK_V / (32·warps) codes in registers, and top-p a weight to each. `maxnreg` bounds its registers: the
# compiler would take more to overlap a thread's own codes, and leave no room for a third row to hide the reductions.
CANDIDATES = (Tile({"maxnreg": 80}, warps=8), Tile({}, warps=8), Tile({"maxnreg": 192}, warps=4))
WIDE_CANDIDATES = (Tile({}, warps=16), Tile({}, warps=32))  # of more than 4,096 codes
UNSPECIALISED = (
    "seed_ptr",
    "per_image_ptr",
    "image_stride",
    "positions",
    "guidance",
    "top_k",
    "share_bits",
    "scale_index",
)


@triton.jit
def filtered_row(
    cond_ptr,
    uncond_ptr,
    per_image_ptr,
    cond_batch_stride,
    cond_row_stride,
    uncond_batch_stride,
    uncond_row_stride,
    positions,
    codes,
    guidance,
    top_k,
    share_bits,
    temperature,
    HAS_UNCOND: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The position's guided logits relative to the largest, −∞ where dropped and beyond the last code."""
    image = (tl.program_id(0) // positions).to(tl.int64)
    position = (tl.program_id(0) % positions).to(tl.int64)
    # Four codes to a thread at a time, those of one noise counter.
    offs_v = 4 * tl.arange(0, BLOCK_V // 4)[:, None] + tl.arange(0, 4)[None, :]  # [BLOCK_V / 4, 4]
    mask_v = offs_v < codes
    cond_ptr += image * cond_batch_stride + position * cond_row_stride
    logits = below_infinity(tl.load(cond_ptr + offs_v, mask=mask_v, other=-INFINITY).to(tl.float32))
    share = share_bits.to(tl.float64, bitcast=True)
    if per_image_ptr is not None:
        guidance = tl.load(per_image_ptr + 4 * image).to(tl.float32)
        top_k = tl.load(per_image_ptr + 4 * image + 1).to(tl.int32)
        share = 1.0 - tl.load(per_image_ptr + 4 * image + 2)
        temperature = tl.load(per_image_ptr + 4 * image + 3).to(tl.float32)
    if HAS_UNCOND:
        uncond_ptr += image * uncond_batch_stride + position * uncond_row_stride
        uncond = below_infinity(tl.load(uncond_ptr + offs_v, mask=mask_v, other=-INFINITY).to(tl.float32))
        guided = logits - largest_logit(tl.max(tl.max(logits, 1), 0))
        uncond -= largest_logit(tl.max(tl.max(uncond, 1), 0))
        in_both = (guided > -INFINITY) & (uncond > -INFINITY)
        guided = below_infinity(guided + guidance * tl.where(in_both, guided - uncond, 0.0))
        if per_image_ptr is not None:
            guided = tl.where(guidance == 0.0, logits, guided)
        logits = guided
    logits = tl.reshape(logits, (BLOCK_V,))
    highest = tl.max(logits, 0)
    if temperature is not None:
        tempered = tl.div_rn(logits - largest_logit(highest), temperature)
        logits = tl.where(temperature == 1.0, logits, tempered)  # an image's may be 1
        highest = tl.max(logits, 0)
    if TOP_K:
        logits = keep_top_k(logits, highest, top_k)
    if TOP_P:
        if per_image_ptr is None:
            logits = keep_top_p(logits, highest, share)
        else:
            if share > 0:
                logits = keep_top_p(logits, highest, share)
    return logits - largest_logit(highest)


@triton.jit
def noise_counter(image_index_ptr, seed_ptr, image_stride, positions, scale_index):
    """Position, scale, image and key of the program's noise, as uint32."""
    image_index = tl.load(image_index_ptr + (tl.program_id(0) // positions).to(tl.int64) * image_stride)
    seed = tl.load(seed_ptr)
    return (
        (tl.program_id(0) % positions).to(tl.uint32),
        scale_index.to(tl.uint32, bitcast=True),
        image_index.to(tl.uint32),  # modulo 2³²
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit(do_not_specialize=(*UNSPECIALISED, "temperature", "num_samples"))
def _sample_tokens_fwd_kernel(
    cond_ptr,
    uncond_ptr,
    image_index_ptr,
    seed_ptr,
    per_image_ptr,
    tokens_ptr,
    cond_batch_stride,
    cond_row_stride,
    uncond_batch_stride,
    uncond_row_stride,
    image_stride,
    positions,
    codes,
    guidance,
    top_k,
    share_bits,
    scale_index,
    temperature,
    num_samples,
    HAS_UNCOND: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    logits = filtered_row(
        cond_ptr,
        uncond_ptr,
        per_image_ptr,
        cond_batch_stride,
        cond_row_stride,
        uncond_batch_stride,
        uncond_row_stride,
        positions,
        codes,
        guidance,
        top_k,
        share_bits,
        temperature,
        HAS_UNCOND,
        TOP_K,
        TOP_P,
        BLOCK_V,
    )
    position, scale, image, key_low, key_high = noise_counter(
        image_index_ptr, seed_ptr, image_stride, positions, scale_index
    )
    if num_samples is None:
        token = sample(logits, position, scale, image, key_low, key_high, BLOCK_V)
        tl.store(tokens_ptr + tl.program_id(0), token.to(tl.int64))
    else:
        tokens_ptr += tl.program_id(0).to(tl.int64) * num_samples
        for s in range(num_samples):
            token = sample(logits, position, scale, image, key_low, key_high, BLOCK_V)
            tl.store(tokens_ptr + s, token.to(tl.int64))
            position += positions.to(tl.uint32)


@triton.jit(do_not_specialize=(*UNSPECIALISED, "sharpness", "temperature"))
def _soft_embedding_fwd_kernel(
    cond_ptr,
    uncond_ptr,
    image_index_ptr,
    seed_ptr,
    per_image_ptr,
    weights_ptr,
    cond_batch_stride,
    cond_row_stride,
    uncond_batch_stride,
    uncond_row_stride,
    image_stride,
    positions,
    codes,
    guidance,
    top_k,
    share_bits,
    scale_index,
    sharpness,
    temperature,
    HAS_UNCOND: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    logits = filtered_row(
        cond_ptr,
        uncond_ptr,
        per_image_ptr,
        cond_batch_stride,
        cond_row_stride,
        uncond_batch_stride,
        uncond_row_stride,
        positions,
        codes,
        guidance,
        top_k,
        share_bits,
        None,
        HAS_UNCOND,
        TOP_K,
        TOP_P,
        BLOCK_V,
    )
    position, scale, image, key_low, key_high = noise_counter(
        image_index_ptr, seed_ptr, image_stride, positions, scale_index
    )
    noise = row_noise(position, scale, image, key_low, key_high, BLOCK_V)
    scores = tl.div_rn(logits * sharpness + noise, temperature)
    EXACT: tl.constexpr = cond_ptr.dtype.element_ty == tl.float32
    weights = exp(scores - tl.max(scores, 0), EXACT)
    weights = divide(weights, tl.sum(weights, 0), EXACT)
    offs_v = tl.arange(0, BLOCK_V)
    weights_ptr += tl.program_id(0).to(tl.int64) * codes
    tl.store(weights_ptr + offs_v, weights, mask=offs_v < codes)


def _unsupported(call: Sampling | SoftSampling) -> str | None:
    codes = call.cond.shape[-1]
    return tiling.unsupported_dtype(call.cond) or (
        None if codes <= MAX_CODES else f"{codes} codes are not 1 to {MAX_CODES}"
    )


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word: large words would be int64, and another kernel to compile."""
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def _launch(kernel: Any, name: str, out: Tensor, call: Sampling, *rest: float | None) -> None:
    B, positions, codes = call.cond.shape
    cond = last_dim_contiguous(call.cond)
    second = cond if call.uncond is None else last_dim_contiguous(call.uncond)
    block = max(LEAST_BLOCK, triton.next_power_of_2(codes))
    candidates = CANDIDATES if block <= 4096 else WIDE_CANDIDATES
    per_image = call.per_image is not None
    tile = tiling.chosen(name, f"V{block}", candidates, cond.device)
    # A float argument would be a float32: the share that top-p drops goes as its bits, and never as a small int32.
    (share_bits,) = struct.unpack("<q", struct.pack("<d", 1 - call.top_p if call.top_p < 1 else 1.0))
    kernel[(B * positions,)](
        cond,
        second,
        call.image_index,
        call.seed,
        call.per_image,
        out,
        *cond.stride()[:2],
        *second.stride()[:2],
        call.image_index.stride(0),
        positions,
        codes,
        call.guidance,
        min(call.top_k, codes),
        share_bits,
        _signed(call.scale_index),
        *rest,
        HAS_UNCOND=call.uncond is not None and (per_image or call.guidance != 0),
        TOP_K=per_image or 0 < call.top_k < codes,
        TOP_P=per_image or call.top_p < 1,
        BLOCK_V=block,
        enable_fp_fusion=False,
        **tile.arguments(),
    )


def _sample_tokens(call: Sampling) -> tuple[Tensor]:
    n = call.num_samples
    shape = call.cond.shape[:2] if n == 1 else (*call.cond.shape[:2], n)
    tokens = torch.empty(shape, dtype=torch.int64, device=call.cond.device)
    options = None if call.temperature == 1 else call.temperature, None if n == 1 else n
    _launch(_sample_tokens_fwd_kernel, "sample_tokens", tokens, call, *options)
    return (tokens,)


def _soft_embedding(call: SoftSampling) -> tuple[Tensor]:
    weights = torch.empty(call.cond.shape, dtype=torch.float32, device=call.cond.device)
    _launch(_soft_embedding_fwd_kernel, "soft_embedding", weights, call.sampling, call.sharpness, call.temperature)
    return ((weights @ call.codebook.float()).to(call.codebook.dtype),)


sample_tokens_triton = Implementation(_unsupported, _sample_tokens, None)
soft_embedding_triton = Implementation(_unsupported, _soft_embedding, None)
