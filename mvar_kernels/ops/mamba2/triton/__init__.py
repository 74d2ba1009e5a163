"""Mamba-2 in Triton: the kernels are in forward.py, which says what one program does.

mamba2_mixer takes three launches:

1. prepare: conv + SiLU of B and C and C·B of each token, once for all heads, and Δ, laid out along the tokens.
2. the scan: conv + SiLU of x, scan, skip, gate, both states. It writes y · SiLU(z) and, per token and program, the
   sum of its squares. With PREPARED = 0 it does 1. as well.
3. norm: adds the partial sums of a token in a fixed order and scales its row. RMSNorm is over all heads, and
   programs of one launch cannot wait for one another.

Why not 1. inside 2. Counted in the machine code for sm_90 (P = N = 64, chunks of 16, a program for each head): a
chunk of a head takes 4 warps · 1,067 instructions with B and C prepared, and 8 · 1,296 where each head convolves them
for itself (with 4 warps the registers spill): 6,100 more. An H200 issues at most 132 · 4 · 1.75 GHz = 0.92·10¹² a
second, so that at d16 (32 heads) each row's chunk costs at least 0.2 µs more. The launch moves 836 bytes a token and
takes perhaps 3 µs, hidden by nothing. Batch 8 with guidance, 16 rows: 3.3 µs more against 3 at up to 16 tokens, 52 µs
against 4 at 256; batch 50: 20 against 3, and 330 against 8. So one launch is ahead only for a few rows of few tokens,
and is a candidate there, for `benchmarks.tune_triton` to find. Nothing of this has been timed.

Why not 3. inside 2., or its row factor in what follows. The factor 1/σ of a token could multiply the rows of the
next matmul's result. That would save 4·E of the 10·E bytes a token that 2. and 3. move (bfloat16): 41 µs of
a training step's layer at d16 and batch 32, at 4.3 TB/s; in generation, where y · SiLU(z) is still in L2, little
more than a launch. But that matmul is torch's, whose epilogue takes no such factor, and the op promises the
normalized row. It stays a launch until there is a matmul of our own.

y · SiLU(z) goes through memory between 2. and 3. In bfloat16 it is rounded once more; simulated at d16's sizes, y's
error is then at most 0.4 of the tolerance. float32 would move 4 bytes more a value, where all else is 10. In
float16, whose range y · SiLU(z) can leave though the normalized row cannot, it is float32, and so are C and the
backward direction's states in memory.

Tiles are chosen by how many tokens there are (one short chunk, or more) and whether there is one direction or two,
so that sums are taken in the same order whatever the batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ffi import last_dim_contiguous
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan
from mvar_kernels.ops.mamba2.triton.backward import ssd_scan_backward
from mvar_kernels.ops.mamba2.triton.common import scale_of_tokens
from mvar_kernels.ops.mamba2.triton.forward import (
    _mamba2_mixer_fwd_kernel,
    _mamba2_mixer_norm_kernel,
    _mamba2_mixer_prepare_kernel,
    _ssd_scan_fwd_kernel,
)
from mvar_kernels.ops.mamba2.triton.mixer_backward import mamba2_mixer_backward
from mvar_kernels.tiling import Tile

SHORT = 16  # tokens: one chunk
# First what takes the fewest instructions for all heads together and spills on no architecture: of bfloat16. Where the
# same tile spills in float16 or float32 (8 to 56 bytes a thread, Triton 3.6 and 3.7), a tile of that dtype goes first.
SCAN = {
    "short": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1), Tile({"CHUNK": 16, "BLOCK_P": 32}, 4, 1)),
    "forward": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1), Tile({"CHUNK": 32, "BLOCK_P": 32}, 4, 1)),
    "both": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1), Tile({"CHUNK": 32, "BLOCK_P": 32}, 4, 1)),
    "both float16": (Tile({"CHUNK": 16, "BLOCK_P": 32}, 4, 1),),
    "both float32": (Tile({"CHUNK": 16, "BLOCK_P": 32}, 4, 1),),
}
MIXER = {
    "short": (
        Tile({"CHUNK": 16, "BLOCK_P": 64, "PREPARED": 1}, 4, 1),
        Tile({"CHUNK": 16, "BLOCK_P": 64, "PREPARED": 0}, 8, 1),
    ),
    "forward": (
        Tile({"CHUNK": 16, "BLOCK_P": 64, "PREPARED": 1}, 4, 1),
        Tile({"CHUNK": 32, "BLOCK_P": 32, "PREPARED": 1}, 8, 1),
    ),
    "both": (
        Tile({"CHUNK": 32, "BLOCK_P": 32, "PREPARED": 1}, 8, 1),
        Tile({"CHUNK": 16, "BLOCK_P": 32, "PREPARED": 1}, 4, 1),
    ),
    "forward float16": (Tile({"CHUNK": 16, "BLOCK_P": 32, "PREPARED": 1}, 4, 1),),
    "both float16": (Tile({"CHUNK": 16, "BLOCK_P": 32, "PREPARED": 1}, 8, 1),),
    "both float32": (Tile({"CHUNK": 16, "BLOCK_P": 32, "PREPARED": 1}, 8, 1),),
}
PREPARE = (Tile({"CHUNK": 32}, 4, 1), Tile({"CHUNK": 16}, 4, 1))
NORM = (Tile({"BLOCK_L": 2, "BLOCK_E": 1024}, 4, 1), Tile({"BLOCK_L": 4, "BLOCK_E": 1024}, 4, 1))
LARGEST_N = 256


def _unsupported(first: Tensor, state: Tensor) -> str | None:
    reason = tiling.unsupported_dtype(first)
    if reason is not None:
        return reason
    N = state.shape[-1]
    return f"state: N={N} is above {LARGEST_N}, what a program's registers hold" if N > LARGEST_N else None


def _unsupported_scan(call: Scan) -> str | None:
    return _unsupported(call.x, call.state)


def _unsupported_mixer(call: Mixer) -> str | None:
    return _unsupported(call.zxbcdt, call.ssm)


def _plan(
    kernel: str, tiles: Mapping[str, tuple[Tile, ...]], L: int, P: int, N: int, both: bool, like: Tensor
) -> dict[str, Any]:
    """The launch's keyword arguments: tile, padded sizes, precision of the matmul that gives h."""
    kind = "both" if both else "short" if L <= SHORT else "forward"
    dtype = str(like.dtype).removeprefix("torch.")
    candidates = tiles.get(f"{kind} {dtype}", tiles[kind])
    arguments = tiling.chosen(kernel, f"{kind} P{P} N{N} {dtype}", candidates, like.device).arguments()
    arguments["BLOCK_P"] = min(arguments["BLOCK_P"], tiling.dot_block(P))
    precision = "ieee" if like.dtype == torch.float32 else "tf32x3"
    return arguments | {"P": P, "N": N, "BOTH": both, "PRECISION": precision, "BLOCK_N": tiling.dot_block(N)}


def _inner(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what goes through memory between two matmuls: one with the range for it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _ssd_scan(call: Scan) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, state, scales = call
    rows, L, H, P = x.shape
    both = A.dim() == 2
    plan = _plan("ssd_scan", SCAN, L, P, B.shape[-1], both, x)
    x, dt, B, C = (last_dim_contiguous(t) for t in (x, dt, B, C))
    A, D, state = (t.contiguous() for t in (A, D, state))
    y, last = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
    chunks = triton.cdiv(L, plan["CHUNK"])
    edges = x.new_empty(rows, H, chunks, *state.shape[2:], dtype=_inner(x.dtype)) if both else None
    scale = scale_of_tokens(scales, x.device) if both else None
    strides = (*x.stride()[:3], *dt.stride()[:3], *B.stride()[:2], *C.stride()[:2])
    grid = (rows * H * triton.cdiv(P, plan["BLOCK_P"]),)
    _ssd_scan_fwd_kernel[grid](x, dt, A, B, C, D, state, scale, edges, y, last, *strides, L, H, **plan)
    return y, last


def _mamba2_mixer(call: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = (t.contiguous() for t in call.parameters)
    conv, ssm = call.conv.contiguous(), call.ssm.contiguous()
    zxbcdt, dt = last_dim_contiguous(call.zxbcdt), last_dim_contiguous(call.steps)
    (rows, L, _), (_, H, P, N) = zxbcdt.shape, ssm.shape
    E, taps, columns, both = H * P, conv_weight.shape[1], dt_bias.numel(), A_log.dim() == 2
    plan = _plan("mamba2_mixer", MIXER, L, P, N, both, zxbcdt)
    slices = triton.cdiv(P, plan["BLOCK_P"])
    strides = (*zxbcdt.stride()[:2], *dt.stride()[:2])
    y = zxbcdt.new_empty(rows, L, E)
    inner = _inner(y.dtype)
    gated = y if inner == y.dtype else y.new_empty(y.shape, dtype=inner)
    squares = ssm.new_empty(rows, L, H * slices)
    last_conv, last_ssm = torch.empty_like(conv), torch.empty_like(ssm)

    B = C = delta = own = None
    if plan["PREPARED"]:
        B, C = ssm.new_empty(rows, L, N), y.new_empty(rows, L, N, dtype=inner)
        delta, own = ssm.new_empty(rows, columns, L), ssm.new_empty(rows, L)
        tile = tiling.chosen("mamba2_mixer_prepare", f"N{N}", PREPARE, y.device)
        _mamba2_mixer_prepare_kernel[(rows * triton.cdiv(L, tile.sizes["CHUNK"]),)](
            *(zxbcdt, dt, conv, conv_weight, conv_bias, dt_bias, B, C, delta, own, *strides, L, E, columns),
            N=N,
            TAPS=taps,
            BLOCK_H=triton.next_power_of_2(columns),
            BLOCK_N=plan["BLOCK_N"],
            **tile.arguments(),
        )

    edges = y.new_empty(rows, H, triton.cdiv(L, plan["CHUNK"]), P, N, dtype=inner) if both else None
    scale = scale_of_tokens(call.scales, y.device) if both else None
    _mamba2_mixer_fwd_kernel[(rows * H * slices,)](
        *(zxbcdt, dt, conv, ssm, conv_weight, conv_bias, dt_bias, A_log, D, B, C, delta, own, scale, edges),
        *(gated, squares, last_conv, last_ssm, *strides, L, H),
        TAPS=taps,
        BLOCK_TAPS=triton.next_power_of_2(max(taps - 1, 1)),
        **plan,
    )

    tile = tiling.chosen("mamba2_mixer_norm", f"E{E}", NORM, y.device)
    grid = (triton.cdiv(rows * L, tile.sizes["BLOCK_L"]), triton.cdiv(E, tile.sizes["BLOCK_E"]))
    parts = H * slices
    _mamba2_mixer_norm_kernel[grid](
        *(gated, squares, norm_weight, y, rows * L, E, parts, call.eps),
        BLOCK_PARTS=triton.next_power_of_2(parts),
        **tile.arguments(),
    )
    return y, last_conv, last_ssm


ssd_scan_triton = Implementation(_unsupported_scan, _ssd_scan, ssd_scan_backward)
mamba2_mixer_triton = Implementation(_unsupported_mixer, _mamba2_mixer, mamba2_mixer_backward)
