"""Mamba-2's scan and mixer in plain PyTorch: the specification. Arithmetic in float32, or float64 for float64.

The scan is computed chunk by chunk: inside a chunk as a masked matmul, between chunks through
the state. The token-by-token recurrence it must equal is in the tests.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan
from mvar_kernels.validation import accumulator

CHUNK = 32  # the fastest of 32, 64, 128 on an AMD Zen 5 core


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    *,
    own: bool = True,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t and y_t = h_t C_t, from `state`; None: from zero.

    x (B, L, H, P), dt = Δ (B, L, H), A (H), B and C (B, L, N), state (B, H, P, N), all in one dtype.
    Returns y (B, L, H, P) and the last state. own=False leaves each token's own term out of y, not out of h.
    """
    outs = []
    for start in range(0, x.shape[1], chunk):
        span = slice(start, start + chunk)
        xdt = x[:, span] * dt[:, span, :, None]  # (B, q, H, P)
        log_a = (dt[:, span] * A).transpose(1, 2)  # (B, H, q)
        products = _segment_sums(log_a).exp()  # (B, H, t, s): product of a over s+1 … t
        decay = products if own else products.tril(-1)
        scores = torch.einsum("btn,bsn->bts", C[:, span], B[:, span])
        out = torch.einsum("bhts,bshp->bthp", scores[:, None] * decay, xdt)
        added = torch.einsum("bshp,bsn->bhpn", xdt * _per_token(products[:, :, -1]), B[:, span])
        if state is not None:
            since_start = log_a.cumsum(-1).exp()  # (B, H, t): product of a over the chunk up to t
            out = out + torch.einsum("btn,bhpn->bthp", C[:, span], state) * _per_token(since_start)
            added = since_start[:, :, -1, None, None] * state + added
        state = added
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 1), state


def _per_token(factors: Tensor) -> Tensor:
    """(B, H, L) → (B, L, H, 1)"""
    return factors.transpose(1, 2)[..., None]


def _segment_sums(log_a: Tensor) -> Tensor:
    """S[t, s] = log_a[s+1] + … + log_a[t] for t ≥ s, else −inf. (…, q) → (…, q, q)

    Summed along each column; the difference of two prefix sums would cancel.
    """
    q = log_a.shape[-1]
    ones = torch.ones(q, q, dtype=torch.bool, device=log_a.device)
    columns = log_a[..., :, None].expand(*log_a.shape, q).masked_fill(~ones.tril(-1), 0)
    return columns.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def backward_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, scales: tuple[int, ...]) -> Tensor:
    """r_t C_t with r_t = a_t (r_{t+1} + Δ_{t+1} x_{t+1} ⊗ B_{t+1}) inside each scale: flip, scan, flip."""
    outs = []
    for pieces in zip(*(t.split(scales, 1) for t in (x, dt, B, C)), strict=True):
        x_k, dt_k, B_k, C_k = (piece.flip(1) for piece in pieces)
        y, _ = scan(x_k, dt_k, A, B_k, C_k, None, own=False)
        outs.append(y.flip(1))
    return torch.cat(outs, 1)


def ssd_scan(call: Scan) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) in x's dtype and the last state (B, H, P, N). dt (B, L, 2, H) and A (2, H): bidirectional."""
    if call.groups > 1:
        ys, states = zip(*map(ssd_scan, _by_group(call)), strict=True)
        return torch.cat(ys, 2), torch.cat(states, 1)
    x, dt, A, B, C, D, state, scales = call
    acc = accumulator(x.dtype)
    x_acc, dt, A, B, C, D = (t.to(acc) for t in (x, dt, A, B, C, D))
    A = A.clamp(min=torch.finfo(acc).min)  # finite: where Δ is 0, so is Δ·A
    both = A.dim() == 2
    y, last = scan(x_acc, dt[:, :, 0] if both else dt, A[0] if both else A, B, C, state.to(acc))
    if both:
        y = y + backward_scan(x_acc, dt[:, :, 1], A[1], B, C, scales)
    skip = D if D.dim() == 2 else D[:, None]
    return (y + skip * x_acc).to(x.dtype), last


def _by_group(call: Scan) -> list[Scan]:
    """A scan of one group each."""
    G, heads = call.groups, {"x": 2, "dt": -1, "A": -1, "B": -1, "C": -1, "D": 0, "state": 1}
    pieces = zip(*(getattr(call, name).chunk(G, dim) for name, dim in heads.items()), strict=True)
    return [Scan._make((*tensors, call.scales)) for tensors in pieces]


def mamba2_mixer(call: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E) and the new (conv, ssm) state; shapes as in :func:`mvar_kernels.mamba2_mixer`."""
    first, dt = call.zxbcdt, call.steps
    acc = accumulator(first.dtype)
    conv_weight, conv_bias, dt_bias, A_log, D = (p.to(acc) for p in call.parameters)
    conv_state, ssm_state = call.conv, call.ssm
    (_, H, P, N), G, width = ssm_state.shape, call.groups, conv_weight.shape[1]
    E = H * P
    z, xbc = first[..., : 2 * E + 2 * G * N].split([E, E + 2 * G * N], -1)

    rows = torch.cat([conv_state, xbc], 1)  # (B, width−1+L, E+2GN)
    channels_first = rows.to(acc).transpose(1, 2).contiguous()  # four times as fast on a CPU as the view
    convolved = F.conv1d(channels_first, conv_weight[:, None], conv_bias, groups=E + 2 * G * N)
    x, B, C = F.silu(convolved.transpose(1, 2)).split([E, G * N, G * N], -1)

    delta = F.softplus(dt.to(acc).unflatten(-1, dt_bias.shape) + dt_bias)
    if call.limits_dt:
        delta = delta.clamp(call.dt_min, call.dt_max)
    heads = x.unflatten(-1, (H, P))  # (B, L, H, P)
    A = -A_log.clamp(max=math.log(torch.finfo(acc).max) - 1e-3).exp()  # finite, and so is its gradient
    y, last = ssd_scan(Scan(heads, delta, A, B, C, D, ssm_state, call.scales))

    y, gate = y.flatten(2), F.silu(z.to(acc))
    if call.norm_weight is None:
        out = y * gate
    elif call.norm_before_gate:
        out = _rms_norm(y, call.norm_weight.to(acc), G, call.eps) * gate
    else:
        out = _rms_norm(y * gate, call.norm_weight.to(acc), G, call.eps)
    return out.to(first.dtype), rows[:, rows.shape[1] - width + 1 :].clone(), last


def _rms_norm(x: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Of each token and group of channels by itself."""
    x = x.unflatten(-1, (groups, -1))
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(2) * weight


def ssd_scan_backward(grads: Sequence[Tensor], call: Scan) -> list[Tensor]:
    """Gradients of ssd_scan's tensors: the forward's own derivative."""
    return _derivative(ssd_scan, grads, call)


def mamba2_mixer_backward(grads: Sequence[Tensor], call: Mixer) -> list[Tensor]:
    """Gradients of mamba2_mixer's tensors: the forward's own derivative."""
    return _derivative(mamba2_mixer, grads, call)


def _derivative(forward: Callable[[Any], tuple[Tensor, ...]], grads: Sequence[Tensor], call: Any) -> list[Tensor]:
    names = [name for name, value in call._asdict().items() if isinstance(value, Tensor)]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return forward(call._replace(**dict(zip(names, tensors, strict=True))))

    return list(torch.func.vjp(outputs, *(getattr(call, name) for name in names))[1](tuple(grads)))


ssd_scan_reference = Implementation(lambda call: None, ssd_scan, ssd_scan_backward)
mamba2_mixer_reference = Implementation(lambda call: None, mamba2_mixer, mamba2_mixer_backward)
