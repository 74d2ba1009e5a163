"""The backward of ssd_scan in Triton: its launches. The formulas is in backward_kernels.py."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import empty_contiguous, last_dim_contiguous
from mvar_kernels.ops.mamba2.inputs import Scan
from mvar_kernels.ops.mamba2.triton.backward_kernels import _ssd_scan_bwd_grads_kernel, _ssd_scan_bwd_sweep_kernel
from mvar_kernels.ops.mamba2.triton.common import scale_of_tokens
from mvar_kernels.tiling import Tile

# Tokens. With 64 the tiles of `grads` do not fit in the registers. Nor do 32 where matmuls take float32's operands, or
# both parts of three tf32 matmuls: with 32, `grads` spilled 176 to 280 bytes a thread in float16 and 760 to 848 in
# float32 (sm_90, Triton 3.6 and 3.7); with 16, none and at most 32, while the states in memory are twice as many.
CHUNKS = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 32}
# Heads that one program adds dB and dC of: more leave fewer partials, fewer leave more programs. The most of
# these that still makes this many programs, so that small batches fill a GPU, too.
HEAD_GROUPS = (8, 4, 2, 1)
PROGRAMS = 512

PRECISE = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}  # see backward_kernels.py

# With 4 warps float32's matmuls take up to all 255 registers of a thread (sm_90, Triton 3.6).
SWEEP_TILES = {
    dtype: (
        Tile({"BLOCK_P": 64}, warps, stages=2),
        Tile({"BLOCK_P": 32}, warps, stages=2),
        Tile({"BLOCK_P": 32}, warps, stages=1),
    )
    for dtype, warps in {torch.float32: 8, torch.float16: 4, torch.bfloat16: 4}.items()
}
GRADS_TILES = (Tile({}, warps=8, stages=1),)  # with 4 warps the registers spill


def rows_of(t: Tensor, leading: int = 2) -> Tensor:
    """`t` as (rows, width) with a contiguous width: a view wherever its strides allow it."""
    return last_dim_contiguous(t.flatten(0, leading - 1).flatten(1))


class ScanGradients:
    """Launches the two kernels on (B·L, width) views; the mixer runs more of its own in between.

    x, B, C: as they are, or for the mixer (`bias` given) float32, after SiLU. dt, A and bias: by columns of heads.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        initial: Tensor,
        scales: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.batch, self.H, self.P, self.N = initial.shape
        self.L = x.shape[0] // max(self.batch, 1)
        self.chunks = triton.cdiv(self.L, CHUNKS[dtype])
        self.programs = self.batch * self.chunks
        self.heads = next((n for n in HEAD_GROUPS if self.programs * triton.cdiv(self.H, n) >= PROGRAMS), 1)
        self.groups = triton.cdiv(self.H, self.heads)
        self.directions = A.numel() // self.H
        self.x, self.dt, self.bias, self.A, self.B, self.C, self.D = x, dt, bias, A.contiguous(), B, C, D.contiguous()
        self.scale = scale_of_tokens(scales, x.device) if self.directions == 2 else None
        self.operand = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
        self.coarse = "ieee" if dtype == torch.float32 else "tf32"
        self.dtype = dtype
        self.shape_class = f"P{self.P} N{self.N} {str(dtype).removeprefix('torch.')}" + " mixer" * (bias is not None)
        self.options: dict[str, Any] = {
            "H": self.H,
            "P": self.P,
            "N": self.N,
            "BOTH": self.directions == 2,
            "MIXER": bias is not None,
            "PRECISE": PRECISE[dtype],
            "CHUNK": CHUNKS[dtype],
            "BLOCK_N": tiling.dot_block(self.N),
        }

    def sweep(self, came: Tensor, went: Tensor, first: Tensor, last: Tensor | None) -> Tensor:
        """What enters each chunk, (directions, batch, chunks, H, P, N); `last` given: of gradients, and filled."""
        states = torch.empty(
            self.directions, self.batch, self.chunks, *first.shape[1:], dtype=torch.float32, device=first.device
        )
        tile = tiling.chosen("ssd_scan_bwd_sweep", self.shape_class, SWEEP_TILES[self.dtype], first.device).arguments()
        tile["BLOCK_P"] = min(tile["BLOCK_P"], tiling.dot_block(self.P))
        grid = (self.batch * self.H, triton.cdiv(self.P, tile["BLOCK_P"]), self.directions)
        _ssd_scan_bwd_sweep_kernel[grid](
            came,
            went,
            self.dt,
            self.bias,
            self.A,
            self.scale,
            first.contiguous(),
            last,
            states,
            came.stride(0),
            went.stride(0),
            self.dt.stride(0),
            self.L,
            ADJOINT=int(last is not None),
            **self.options,
            **tile,
        )
        return states

    def grads(self, dy: Tensor, states: Tensor, adjoints: Tensor, dx: Tensor, ddt: Tensor) -> tuple[Tensor, Tensor]:
        """Fills dx and ddt; returns partials of [dB, dC] (groups, B·L, 2N) and of sums (chunks of B, kinds, H)."""
        kinds = 1 + self.directions * (1 if self.bias is None else 2)
        dbc = states.new_empty(self.groups, self.batch * self.L, 2 * self.N)
        sums = dbc.new_empty(self.programs, kinds, self.H)
        tile = tiling.chosen("ssd_scan_bwd_grads", self.shape_class, GRADS_TILES, states.device)
        _ssd_scan_bwd_grads_kernel[self.programs, self.groups](
            self.x,
            self.dt,
            self.bias,
            self.A,
            self.B,
            self.C,
            self.D,
            dy,
            self.scale,
            states,
            adjoints,
            dx,
            ddt,
            dbc,
            sums,
            self.x.stride(0),
            self.dt.stride(0),
            self.B.stride(0),
            self.C.stride(0),
            dy.stride(0),
            ddt.stride(0),
            self.L,
            self.heads,
            OPERAND=self.operand,
            COARSE=self.coarse,
            BLOCK_P=tiling.dot_block(self.P),
            **self.options,
            **tile.arguments(),
        )
        return dbc, sums


def ssd_scan_backward(grads: Sequence[Tensor], call: Scan) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state from those of y and of the last state."""
    x, dt, A, B, C, D, initial, scales = call
    dy = rows_of(grads[0])
    flat_x, flat_B, flat_C = rows_of(x), rows_of(B), rows_of(C)
    scan = ScanGradients(flat_x, rows_of(dt), None, A, flat_B, flat_C, D, initial, scales, x.dtype)
    dx, ddt, dinitial = map(empty_contiguous, (x, dt, initial))
    states = scan.sweep(flat_x, flat_B, initial, None)
    adjoints = scan.sweep(dy, flat_C, grads[1], dinitial)
    dbc, sums = scan.grads(dy, states, adjoints, dx, rows_of(ddt))
    dB, dC = (part.sum(0).view(B.shape).to(B.dtype) for part in dbc.chunk(2, -1))
    dA, dD = (part.sum(0) for part in sums.split([scan.directions, 1], 1))
    return [dx, ddt, dA.view(A.shape).to(A.dtype), dB, dC, dD.view(D.shape).to(D.dtype), dinitial]
