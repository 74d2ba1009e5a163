"""The backward of mamba2_mixer in Triton: what is around the kernels of backward.py.

    v            = causal convolution of xBC, with bias
    [x, B, C]    = SiLU(v),  Δ = softplus(dt + dt_bias),  A = −exp(A_log)
    y            = ssd_scan(x, Δ, A, B, C, D)
    gated        = y · SiLU(z),  r = 1/√(mean(gated²) + eps),  out = gated · r · norm_weight

1. `prepare` of the scan: B, C and Δ, once for all heads.
2. `outputs`, one program per (batch row, head, rows of P): the state before each chunk, y, and x after SiLU, for the
   kernels that multiply it. `conv_grads` convolves again instead of reading SiLU', which is as many bytes again.
3. `norm`, one program per few tokens: with g the gradient of out, w·g = norm_weight · g and r of each token,

       dgated = r · (w·g) − r³ · mean(gated · w·g) · gated,   dz = dgated · y · SiLU'(z),   dy = dgated · SiLU(z)

   dy takes y's place. norm_weight's gradient g · gated · r leaves one partial per program.
4. `sweep` and `grads` of the scan; the latter go through softplus' to ddt.
5. `conv_grads`, of x's channels, and of those of B and C when all heads' parts are added: through SiLU' to dv. With
   `rows` = [conv state, xBC], row r has weight k in token r − k's sum, so drows_r = Σ_k weight_k dv_{r−k}; the state
   handed on is the last rows. The gradients of weights, Σ_l dv_l rows_{l+k}, and of the bias leave one partial per
   program.

Bytes in bfloat16, a token and head of P = N = 64 (d16, batch 32: 0.70 M of them): outputs 512 with a state of
2 bytes · 64 · 64 every 64 tokens, norm 640, sweep 256, grads 640, conv_grads 384, partials of dB and dC for groups of 8
heads 128: 1.8 GB, and 2.0 with what heads share (docs/generated/kernel_costs.md), where y, SiLU and SiLU' in float32
and states every 32 tokens were 4.8 GB, and zxbcdt and both gradients alone are 0.53 GB. Without x in memory they would
be 0.1 GB less: but convolving x in `grads`, too, takes 50 to 60 instructions a token and head, counted for sm_90, which
is 40 µs at half of an H100's issue rate, where writing x takes 30 µs at 3 TB/s; and it leaves `grads` no registers.
Nothing of this has been timed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import empty_contiguous
from mvar_kernels.ops.mamba2.inputs import Mixer
from mvar_kernels.ops.mamba2.triton.backward import HOPPER_BFLOAT16, SCHEMES, ScanGradients, rows_of, scheme
from mvar_kernels.ops.mamba2.triton.common import limits, norm_kind
from mvar_kernels.ops.mamba2.triton.mixer_backward_kernels import (
    _mamba2_mixer_bwd_conv_grads_kernel,
    _mamba2_mixer_bwd_norm_kernel,
    _mamba2_mixer_bwd_outputs_kernel,
)
from mvar_kernels.tiling import Tile

# By scheme and number of directions. Others spill with 64 rows of P (bfloat16 on sm_80 in both directions 8 bytes).
OUTPUTS_TILES = {
    (SCHEMES[torch.bfloat16], 1): (Tile({"BLOCK_P": 64}, warps=4, stages=1), Tile({"BLOCK_P": 64}, warps=8, stages=1)),
    (HOPPER_BFLOAT16, 1): (Tile({"BLOCK_P": 64}, warps=4, stages=1), Tile({"BLOCK_P": 64}, warps=8, stages=1)),
    (HOPPER_BFLOAT16, 2): (Tile({"BLOCK_P": 64}, warps=8, stages=1), Tile({"BLOCK_P": 32}, warps=4, stages=1)),
}
OTHER_OUTPUTS_TILES = (Tile({"BLOCK_P": 32}, warps=4, stages=1),)
CONV_GRADS_TILES = (
    Tile({"ROWS": 64, "UNROLL": 8, "BLOCK_C": 256}, warps=4, stages=1),
    Tile({"ROWS": 64, "UNROLL": 4, "BLOCK_C": 512}, warps=4, stages=1),
)


def norm_tiles(block: int) -> tuple[Tile, ...]:
    """A row stays in the registers: 16 values of it a thread take 170 of them, 32 would spill (sm_90)."""
    warps = min(max(block // 512, 4), 16)
    return Tile({"ROWS": 8}, warps, stages=1), Tile({"ROWS": 16}, warps, stages=1)


def mamba2_mixer_backward(grads: Sequence[Tensor], call: Mixer) -> list[Tensor]:
    """Gradients of the inputs, the parameters and the two states from those of y and of both states."""
    conv_weight, conv_bias, dt_bias, A_log, D = (p.contiguous() for p in call.parameters)
    norm_weight = None if call.norm_weight is None else call.norm_weight.contiguous()
    conv, initial = call.conv.contiguous(), call.ssm.contiguous()
    E, (channels, taps), G = call.y_shape[2], conv_weight.shape, call.groups
    batch, L, width = call.zxbcdt.shape
    dtype, device = call.zxbcdt.dtype, call.zxbcdt.device
    z, xbc = rows_of(call.zxbcdt)[:, : E + channels].split([E, channels], 1)
    dt = rows_of(call.steps)
    dinputs = [empty_contiguous(call.zxbcdt), *([] if call.dt is None else [empty_contiguous(call.dt)])]
    dz, dxbc = dinputs[0].view(-1, width)[:, : E + channels].split([E, channels], 1)
    ddt = rows_of(call.steps_of(dinputs[0], None if call.dt is None else dinputs[1]))
    dconv, dinitial, dlast = torch.empty_like(conv), torch.empty_like(initial), grads[1].contiguous()

    def chosen(kernel: str, candidates: tuple[Tile, ...]) -> dict[str, Any]:
        shape_class = f"E{E} {str(dtype).removeprefix('torch.')}"
        return tiling.chosen(f"mamba2_mixer_bwd_{kernel}", shape_class, candidates, device).arguments()

    # By taps, in float32: a thread's channels are then next to each other.
    weights = torch.cat([conv_weight.t(), conv_bias[None]]).float()
    exact, how = dtype == torch.float32, scheme(dtype, device)
    x = torch.empty(batch * L, E, dtype=how.stored, device=device)
    scan = ScanGradients(
        *(x, dt, A_log, xbc, xbc, D, initial, call.scales, dtype, (conv, weights, dt_bias), G), limits(call)
    )
    y = torch.empty_like(x)
    tile = chosen("outputs", OUTPUTS_TILES.get((how, scan.directions), OTHER_OUTPUTS_TILES))
    tile["BLOCK_P"] = min(tile["BLOCK_P"], tiling.dot_block(scan.P))
    _mamba2_mixer_bwd_outputs_kernel[scan.batch * scan.H, triton.cdiv(scan.P, tile["BLOCK_P"])](
        *(xbc, conv, weights, x, scan.steps, scan.bc, scan.D, scan.scale, initial, scan.states, y, xbc.stride(0), L),
        TAPS=taps,
        CHANNEL_D=D.dim() == 2,
        **scan.options,
        **tile,
    )
    block = triton.next_power_of_2(E // G)
    tile = chosen("norm", norm_tiles(block))
    programs = triton.cdiv(batch * L, tile["ROWS"])
    norm_sums = None if norm_weight is None else torch.empty(programs, E, dtype=torch.float32, device=device)
    grad = rows_of(grads[0])
    _mamba2_mixer_bwd_norm_kernel[programs, G](
        y,
        z,
        grad,
        norm_weight,
        dz,
        norm_sums,
        z.stride(0),
        grad.stride(0),
        width,
        batch * L,
        E // G,
        call.eps,
        GROUPS=G,
        NORM=norm_kind(call),
        EXACT=exact,
        OPERAND=how.operand,
        BLOCK_E=block,
        **tile,
    )
    scan.sweep(y, scan.C, grads[2], dinitial)
    dx = torch.empty_like(x)
    dbc, sums, dD = scan.grads(y, dx, ddt)
    tile = chosen("conv_grads", CONV_GRADS_TILES)
    programs = batch * triton.cdiv(L + taps - 1, tile["ROWS"])
    conv_sums = torch.empty(programs, taps + 1, channels, dtype=torch.float32, device=device)
    for grads_of, first in ((dx, 0), (dbc, E)):
        count, columns = grads_of.shape[1], slice(first, first + grads_of.shape[1])
        _mamba2_mixer_bwd_conv_grads_kernel[programs, triton.cdiv(count, tile["BLOCK_C"])](
            grads_of,
            xbc[:, columns],
            conv[..., columns],
            weights[:, columns],
            dlast[..., columns],
            dxbc[:, columns],
            dconv[..., columns],
            conv_sums[..., columns],
            grads_of.stride(0),
            xbc.stride(0),
            width,
            L,
            count,
            channels,
            TAPS=taps,
            EXACT=exact,
            **tile,
        )
    dweight, dbias = conv_sums.sum(0).split([taps, 1])
    given = [(dweight.t(), conv_weight), (dbias, conv_bias), (sums[0], dt_bias), (sums[1], A_log), (dD, D)]
    if norm_weight is not None and norm_sums is not None:
        given.append((norm_sums.sum(0), norm_weight))
    dparams = [d.reshape(p.shape).to(p.dtype).contiguous() for d, p in given]
    return [*dinputs, *dparams, dconv, dinitial]
