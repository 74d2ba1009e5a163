"""The backward of ssd_scan in Triton: its launches. The formulas are in backward_kernels.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import empty_contiguous, last_dim_contiguous
from mvar_kernels.ops.mamba2.inputs import Scan
from mvar_kernels.ops.mamba2.triton.backward_kernels import (
    PLANES,
    _ssd_scan_bwd_prepare_kernel,
    _ssd_scan_bwd_sweep_kernel,
)
from mvar_kernels.ops.mamba2.triton.common import NO_LIMITS, scale_of_tokens
from mvar_kernels.ops.mamba2.triton.grads_kernel import _ssd_scan_bwd_grads_kernel
from mvar_kernels.tiling import Tile

# Heads that one program adds dB and dC of: more leave fewer partials, fewer leave more programs. The most of
# these that still makes this many programs, so that small batches fill a GPU, too.
HEAD_GROUPS = (8, 4, 2, 1)
PROGRAMS = 512


@dataclass(frozen=True)
class Scheme:
    """How the kernels compute with inputs of a dtype; see backward_kernels.py.

    chunk: tokens. operand, stored: dtypes of matmuls, and of tensors between kernels. precise, coarse: the precision of
    matmuls that a float32 gradient depends on, and of the others; bfloat16 operands have but one. two_parts: of the
    second operand of a sweep. wgmma: `grads` as in _wgmma_direction_grads.
    """

    chunk: int
    operand: Any
    stored: torch.dtype
    precise: str = "ieee"
    coarse: str = "ieee"
    two_parts: bool = False
    wgmma: bool = False


# With chunks of 32 `grads` spills where matmuls take float32's operands, or both parts of three tf32 matmuls: 176 to
# 280 bytes a thread in float16 and 760 to 848 in float32 (sm_90, Triton 3.6 and 3.7); with 16, none, while states in
# memory are twice as many.
SCHEMES = {
    torch.float32: Scheme(16, tl.float32, torch.float32),
    torch.float16: Scheme(16, tl.float32, torch.float32, "tf32x3", "tf32"),
    torch.bfloat16: Scheme(32, tl.bfloat16, torch.bfloat16, two_parts=True),
}
# 64 rows are what Hopper's warp groups multiply at once; where each warp multiplies 16, as many spill 100 to 400 bytes.
HOPPER_BFLOAT16 = Scheme(64, tl.bfloat16, torch.bfloat16, two_parts=True, wgmma=True)


def scheme(dtype: torch.dtype, device: torch.device) -> Scheme:
    """What a GPU computes with best."""
    if dtype == torch.bfloat16 and tiling.matmul_instruction(device) == "wgmma":
        return HOPPER_BFLOAT16
    return SCHEMES[dtype]


PREPARE_TILES = (Tile({}, warps=8, stages=1),)  # with 4, tiles of 64 rows spill
# With 4 warps float32's matmuls take up to all 255 registers of a thread, with 64 rows of P they spill 8 bytes (sm_90).
SWEEP_TILES = {
    dtype: (
        Tile({"BLOCK_P": rows}, warps, stages=2),
        Tile({"BLOCK_P": 32}, warps, stages=2),
        Tile({"BLOCK_P": 32}, warps, stages=1),
    )
    for dtype, rows, warps in ((torch.float32, 32, 8), (torch.float16, 64, 4), (torch.bfloat16, 64, 4))
}
GRADS_TILES = {dtype: (Tile({}, warps=8, stages=1),) for dtype in SCHEMES}


def rows_of(t: Tensor, leading: int = 2) -> Tensor:
    """`t` as (rows, width) with a contiguous width: a view wherever its strides allow it."""
    return last_dim_contiguous(t.flatten(0, leading - 1).flatten(1))


class ScanGradients:
    """Launches the kernels on (B·L, width) views; the mixer runs more of its own in between.

    The mixer gives x after SiLU, xBC for B, A_log for A, and its conv state, packed weights and dt's bias.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        initial: Tensor,
        scales: tuple[int, ...],
        dtype: torch.dtype,
        mixer: tuple[Tensor, Tensor, Tensor] | None = None,
        groups: int = 1,
        limits: dict[str, float | None] = NO_LIMITS,
    ) -> None:
        device = x.device
        self.scheme = how = scheme(dtype, device)
        batch, H, self.P, self.N = initial.shape
        self.L = x.shape[0] // max(batch, 1)
        self.groups, columns = groups, A.numel() // groups
        # As the kernels count them: see backward_kernels.py.
        self.batch, self.H = batch * groups, H // groups
        conv, weights, bias = mixer or (None, None, None)
        self.mixer = mixer is not None
        self.chunks = triton.cdiv(self.L, how.chunk)
        self.programs = self.batch * self.chunks
        self.heads = next((n for n in HEAD_GROUPS if self.programs * triton.cdiv(self.H, n) >= PROGRAMS), 1)
        self.parts = triton.cdiv(self.H, self.heads)
        self.directions = columns // self.H
        self.x, self.A, self.D = x, A.contiguous(), D.contiguous()
        self.scale = scale_of_tokens(scales, device) if self.directions == 2 else None
        self.dtype = dtype
        self.shape_class = f"P{self.P} N{self.N} {str(dtype).removeprefix('torch.')}" + " mixer" * self.mixer
        self.sizes: dict[str, Any] = {
            "N": self.N,
            "GROUPS": groups,
            "EXACT": dtype == torch.float32,
            "OPERAND": how.operand,
            "CHUNK": how.chunk,
            "BLOCK_N": tiling.dot_block(self.N),
        }
        self.options = self.sizes | {
            "H": self.H,
            "P": self.P,
            "BOTH": self.directions == 2,
            "PRECISE": how.precise,
        }
        self.steps = torch.empty(
            self.programs, columns + 1, PLANES.value, how.chunk, dtype=torch.float32, device=device
        )
        # What enters each chunk, and its gradient: next to each other, so that their addresses differ by constants.
        self.states = torch.empty(
            self.batch, self.chunks, self.H, self.directions, 2, self.P, self.N, dtype=how.stored, device=device
        )
        self.bc = torch.empty(self.programs * how.chunk, 2 * self.N, dtype=how.stored, device=device)
        self.C = self.bc[:, self.N :]
        if self.mixer and how.two_parts:
            self.C = torch.empty(self.programs * how.chunk, self.N, dtype=torch.float32, device=device)
        _ssd_scan_bwd_prepare_kernel[(self.programs,)](
            B,
            C,
            conv,
            weights,
            dt,
            bias,
            self.A,
            self.steps,
            self.bc,
            self.C,
            B.stride(0),
            C.stride(0),
            dt.stride(0),
            self.L,
            H * self.P,
            columns,
            **limits,
            GROUP_HEADS=self.H if groups > 1 else None,
            TAPS=1 if weights is None else weights.shape[0] - 1,
            MIXER=self.mixer,
            TWO_PARTS=how.two_parts,
            BLOCK_H=triton.next_power_of_2(columns),
            **self.sizes,
            **tiling.chosen("ssd_scan_bwd_prepare", self.shape_class, PREPARE_TILES, device).arguments(),
        )

    def sweep(self, came: Tensor, went: Tensor, first: Tensor, last: Tensor | None) -> None:
        """Fills in what enters each chunk; `last` given: its gradient, and `last` with that of the first state."""
        tile = tiling.chosen("ssd_scan_bwd_sweep", self.shape_class, SWEEP_TILES[self.dtype], first.device).arguments()
        tile["BLOCK_P"] = min(tile["BLOCK_P"], tiling.dot_block(self.P))
        grid = (self.batch * self.H, triton.cdiv(self.P, tile["BLOCK_P"]), self.directions)
        _ssd_scan_bwd_sweep_kernel[grid](
            came,
            went,
            self.steps,
            self.scale,
            first.contiguous(),
            last,
            self.states,
            came.stride(0),
            went.stride(0),
            self.L,
            ADJOINT=int(last is not None),
            TWO_PARTS=self.scheme.two_parts,
            **self.options,
            **tile,
        )

    def grads(self, dy: Tensor, dx: Tensor, ddt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fills dx and ddt; returns dB and dC (B·L, 2GN), the sums over all tokens of dt's and A's (2, columns), and
        dD in the shape of D."""
        dbc = self.steps.new_empty(self.parts, self.x.shape[0], 2 * self.groups * self.N)
        tile = tiling.chosen("ssd_scan_bwd_grads", self.shape_class, GRADS_TILES[self.dtype], dy.device)
        _ssd_scan_bwd_grads_kernel[self.programs, self.parts](
            self.x,
            self.steps,
            self.A,
            self.bc,
            self.D,
            dy,
            self.scale,
            self.states,
            dx,
            dbc,
            self.L,
            self.heads,
            MIXER=self.mixer,
            WGMMA=self.scheme.wgmma,
            COARSE=self.scheme.coarse,
            CHANNEL_D=self.D.dim() == 2,
            BLOCK_P=tiling.dot_block(self.P),
            **self.options,
            **tile.arguments(),
        )
        batch, found = self.batch // self.groups, self.steps[:, : self.directions * self.H, 4:]
        found = found.unflatten(0, (batch, self.groups, self.chunks)).unflatten(3, (self.directions, self.H))
        by_tokens = found[..., 0, :].permute(0, 2, 5, 3, 1, 4).flatten(3).flatten(1, 2)  # (B, chunks·CHUNK, columns)
        ddt.unflatten(0, (batch, self.L)).copy_(by_tokens[:, : self.L])
        sums = found.sum((0, 2, 6)).permute(3, 1, 0, 2).flatten(1)
        if self.D.dim() == 2:  # no kernel adds it up channel by channel
            dD = (self.x.float() * dy.float()).sum(0).view(self.D.shape)
        else:
            dD = sums[2, : self.D.numel()]
        return dbc.sum(0), sums[:2], dD


def ssd_scan_backward(grads: Sequence[Tensor], call: Scan) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state from those of y and of the last state."""
    x, dt, A, B, C, D, initial, scales = call
    dy = grads[0].contiguous().view(-1, x.shape[2] * x.shape[3])
    scan = ScanGradients(
        *(x.contiguous().view(dy.shape), rows_of(dt), A, rows_of(B), rows_of(C), D, initial, scales, x.dtype),
        groups=call.groups,
    )
    dx, ddt, dinitial = map(empty_contiguous, (x, dt, initial))
    scan.sweep(scan.x, scan.bc, initial, None)
    scan.sweep(dy, scan.C, grads[1], dinitial)
    dbc, sums, dD = scan.grads(dy, dx, rows_of(ddt))
    dB, dC = (part.reshape(B.shape).to(B.dtype) for part in dbc.chunk(2, -1))
    return [dx, ddt, sums[1].view(A.shape).to(A.dtype), dB, dC, dD.to(D.dtype), dinitial]
