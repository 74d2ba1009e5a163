"""mamba2_mixer: Mamba-2 between its two projections, in one op, with the state carried in and out.

    [z, xBC, dt] = zxbcdt
    [x, B, C]    = SiLU(causal depth-wise conv of xBC, width 4, with bias)
    Δ            = softplus(dt + dt_bias),  A = −exp(A_log)
    y            = ssd_scan(x, Δ, A, B, C, D)                        (see scan.py)
    out          = RMSNorm(y · SiLU(z)) · norm_weight

What mamba_ssm's Mamba2 can be told to do otherwise, options do: groups, no bias, a D of each channel, limits of Δ,
RMSNorm before the gate or none.

The state between two calls is the last width−1 rows of xBC before the convolution, and the scan's h:
constant in size, so that generation passes every token through the layer once (arXiv 2405.21060).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.mamba2.inputs import Mixer

_OP = Op("mamba2_mixer", __package__, {"cpu": "native", "cuda": "native", "triton": "triton", "reference": "reference"})


class Mamba2State(NamedTuple):
    """The state of a mixer after all tokens so far.

    conv: (B, width−1, E+2GN), the last rows of [x, B, C] before the convolution, dtype of the input.
    ssm: (B, H, P, N), the scan's state, float32 (float64 for float64).
    """

    conv: Tensor
    ssm: Tensor


def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    *,
    dt: Tensor | None = None,
    ngroups: int = 1,
    dt_limit: tuple[float, float] | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
    state: Mamba2State | None = None,
    scales: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Mamba2State]:
    """Convolution, SiLU, scan, skip, gate and RMSNorm over new tokens, from the state of all earlier ones.

    E is the inner width, H the heads, P = E/H, N the state size, G the groups of H/G heads that share B and C. RMSNorm
    is over the E/G channels of a group.

    Args:
        zxbcdt: (B, L, 2E+2GN+H): [z, x, B, C, dt], B and C group by group; bidirectional 2E+2GN+2H, the backward dt
            last. With `dt` given (B, L, 2E+2GN): [z, x, B, C].
        conv_weight, conv_bias: (E+2GN, width) and (E+2GN,); a bias of None is none.
        dt_bias, A_log: (H,), or (2, H) for both directions (forward first).
        D: (H,) or, of each channel, (H, P).
        norm_weight: (E,), or None for no RMSNorm: y · SiLU(z). All parameters in any floating dtype, used in float32.
        dt: (B, L, H), or (B, L, 2, H) for both directions (forward first), before dt_bias; dtype of zxbcdt, or
            float32 with 16-bit zxbcdt, as rounding dt moves every decay. Its gradient is of its dtype.
        ngroups: G.
        dt_limit: the least and the most that Δ may be; past them its gradient is 0.
        norm_before_gate: RMSNorm(y) · norm_weight · SiLU(z); of no effect without norm_weight.
        eps: of the RMSNorm.
        state: from the call on the tokens before; None at the start of a sequence.
        scales: tokens per scale; needed when bidirectional, not used else.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, L, E) in the dtype of zxbcdt, and the new state. Inputs are never written to. What a NaN reaches: as in
        :func:`ssd_scan`, in all heads.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        BackendError: the named backend cannot run on these inputs.
    """
    op = "mamba2_mixer"
    sizes: dict[str, int] = {}
    validation.tensor(op, "zxbcdt", zxbcdt, "B L width", sizes)
    channel_D = isinstance(D, Tensor) and D.dim() == 2
    validation.tensor(op, "D", D, "H P" if channel_D else "H", sizes, like=zxbcdt)
    if norm_weight is not None:
        validation.tensor(op, "norm_weight", norm_weight, "E", sizes, like=zxbcdt)
    validation.tensor(op, "conv_weight", conv_weight, "E+2GN taps", sizes, like=zxbcdt)
    if conv_bias is None:
        conv_bias = conv_weight.new_zeros(conv_weight.shape[0])
    validation.tensor(op, "conv_bias", conv_bias, "E+2GN", sizes, like=zxbcdt)
    both = isinstance(A_log, Tensor) and A_log.dim() == 2
    heads = "2 H" if both else "H"
    validation.tensor(op, "A_log", A_log, heads, sizes, like=zxbcdt)
    validation.tensor(op, "dt_bias", dt_bias, heads, sizes, like=zxbcdt)
    H, xbc = sizes["H"], sizes["E+2GN"]
    E = sizes.setdefault("E", sizes["width"] - xbc - (0 if dt is not None else dt_bias.numel()))
    G = 1 if ngroups == 1 else validation.groups(op, "ngroups", ngroups, H)
    if H < 1 or sizes["taps"] < 1 or E < 0 or E % H or xbc <= E or (xbc - E) % (2 * G):
        raise ValueError(f"{op}: conv_weight: expected E+2GN channels with E={E} a multiple of H={H}, G={G}, got {xbc}")
    width, columns = (E + xbc, "2E+2GN") if dt is not None else (E + xbc + dt_bias.numel(), f"2E+2GN+{'2' * both}H")
    if channel_D and sizes["P"] != E // H:
        raise ValueError(f"{op}: D: expected shape (H={H}, P={E // H}), got {tuple(D.shape)}")
    if sizes["width"] != width or sizes["L"] < 1:
        raise ValueError(f"{op}: zxbcdt: expected (B, L≥1, {columns}={width}), got {tuple(zxbcdt.shape)}")
    if state is not None and not isinstance(state, Mamba2State):
        raise TypeError(f"{op}: state: expected a Mamba2State, got {type(state).__name__}")
    acc = validation.accumulator(zxbcdt.dtype)
    if dt is not None:
        steps = (zxbcdt.dtype,) if zxbcdt.dtype == acc else (zxbcdt.dtype, acc)
        validation.tensor(op, "dt", dt, "B L 2 H" if both else "B L H", sizes, like=zxbcdt, dtypes=steps)
        dt = dt.flatten(2)
    sizes |= {"taps-1": sizes["taps"] - 1, "P": E // H, "N": (xbc - E) // (2 * G)}
    if state is None:
        state = Mamba2State(
            zxbcdt.new_zeros(sizes["B"], sizes["taps-1"], xbc),
            zxbcdt.new_zeros([sizes[d] for d in "BHPN"], dtype=acc),
        )
    validation.tensor(op, "state.conv", state.conv, "B taps-1 E+2GN", sizes, like=zxbcdt, dtypes=(zxbcdt.dtype,))
    validation.tensor(op, "state.ssm", state.ssm, "B H P N", sizes, like=zxbcdt, dtypes=(acc,))
    eps = validation.positive(op, "eps", eps)
    dt_min, dt_max = (0.0, math.inf) if dt_limit is None else _limits(op, dt_limit)
    scales = validation.directions(op, both, scales, sizes["L"])
    check_name(backend)
    call = Mixer(
        *(zxbcdt, dt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, *state, scales, eps, dt_min, dt_max),
        norm_before_gate and norm_weight is not None,
    )
    y, conv, ssm = _mamba2_mixer(call, backend)
    return y, Mamba2State(conv, ssm)


def _limits(op: str, dt_limit: object) -> tuple[float, float]:
    known = [validation.number(v) for v in dt_limit] if isinstance(dt_limit, Sequence) else []
    if len(known) == 2 and known[0] is not None and known[1] is not None and 0 <= known[0] <= known[1]:
        return float(known[0]), float(known[1])
    raise ValueError(f"{op}: dt_limit: expected two numbers, 0 ≤ least ≤ most, got {dt_limit!r}")


def _fake(call: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    y = call.zxbcdt.new_empty(call.y_shape)
    return y, call.conv.new_empty(call.conv.shape), call.ssm.new_empty(call.ssm.shape)


_mamba2_mixer = RegisteredOp(_OP, Mixer, _fake, outputs=3)
