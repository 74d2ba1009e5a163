"""Branches of a block, (B, L, C) → (B, L, C), and the states that they carry from scale to scale.

Module and parameter names are those of the published files.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar_kernels as mk


class KeyValues(NamedTuple):
    """KV cache: keys and values of all tokens so far, in a buffer for the complete sequence that is written in place.

    buffer: (B, L, 2, H, D), keys before q/k norm. scales: tokens of each scale in the buffer.
    """

    buffer: Tensor
    scales: tuple[int, ...]


State = mk.Mamba2State | KeyValues
"""A block's state after all coarser scales."""


def first_rows(state: State, batch: int) -> State:
    """The state of the first `batch` rows."""
    if isinstance(state, KeyValues):
        return state._replace(buffer=state.buffer[:batch])
    return mk.Mamba2State(state.conv[:batch], state.ssm[:batch])


class Linear(nn.Linear):
    """Linear layer with an optional bias argument in forward."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias if bias is None else bias)


class Attention(nn.Module):
    """Base class of M-VAR's and VAR's attention: projections and the temperature of q/k norm."""

    zero_k_bias: Tensor

    def __init__(self, channels: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        C, self.heads = channels, heads
        self.mat_qkv: nn.Module = Linear(C, 3 * C, bias=False, dtype=torch.float32)
        self.q_bias = nn.Parameter(torch.zeros(C, dtype=torch.float32))
        self.v_bias = nn.Parameter(torch.zeros(C, dtype=torch.float32))
        self.register_buffer("zero_k_bias", torch.zeros(C, dtype=torch.float32))
        self.proj = nn.Linear(C, C, dtype=torch.float32)
        if qk_norm:
            temperatures = torch.full((1, self.heads, 1, 1), math.log(4), dtype=torch.float32)
            self.scale_mul_1H11 = nn.Parameter(temperatures)

    def qkv(self, x: Tensor) -> Tensor:
        """(B, L, C) → (B, L, 3, H, D)."""
        if isinstance(self.mat_qkv, Linear):
            qkv = self.mat_qkv(x, self.qkv_bias())
        else:  # replaced by a user, for example by an adapter
            qkv = self.mat_qkv(x) + self.qkv_bias().to(x.dtype)
        return qkv.unflatten(-1, (3, self.heads, -1))

    def qkv_bias(self) -> Tensor:
        return torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])

    def log_temperature(self) -> Tensor | None:
        return self.scale_mul_1H11.flatten() if hasattr(self, "scale_mul_1H11") else None


class IntraScaleAttention(Attention):
    """M-VAR's attention: bidirectional softmax attention within each scale."""

    def __init__(self, channels: int, heads: int, scales: Sequence[int], *, qk_norm: bool) -> None:
        super().__init__(channels, heads, qk_norm=qk_norm)
        self.register_buffer("patch_nums", torch.tensor(scales, dtype=torch.int32))  # published name

    def forward(
        self, x: Tensor, scales: tuple[int, ...], state: State | None, backend: str
    ) -> tuple[Tensor, State | None]:
        """`state` belongs to the Mamba-2 mixer and is returned unchanged."""
        q, k, v = self.qkv(x).unbind(2)
        out = mk.scale_attention(q, k, v, scales, log_temperature=self.log_temperature(), backend=backend)
        return self.proj(out.flatten(2)), state


class CausalAttention(Attention):
    """VAR's attention: softmax attention over the same scale and all coarser ones, with a KV cache."""

    def __init__(self, channels: int, heads: int, num_tokens: int, *, qk_norm: bool) -> None:
        super().__init__(channels, heads, qk_norm=qk_norm)
        self.num_tokens = num_tokens

    def empty_state(self, batch: int) -> KeyValues:
        bias = self.proj.bias
        return KeyValues(bias.new_zeros(batch, self.num_tokens, 2, self.heads, len(bias) // self.heads), ())

    def forward(
        self, x: Tensor, scales: tuple[int, ...], state: KeyValues | None, backend: str
    ) -> tuple[Tensor, KeyValues | None]:
        q, k, v = self.qkv(x).unbind(2)
        if state is not None:
            start, end = sum(state.scales), sum(state.scales) + sum(scales)
            state.buffer[:, start:end, 0] = k
            state.buffer[:, start:end, 1] = v
            k, v = state.buffer[:, :end].unbind(2)
            scales = state.scales + scales
            state = KeyValues(state.buffer, scales)
        temperature = self.log_temperature()
        out = mk.scale_attention(q, k, v, scales, pattern="causal", log_temperature=temperature, backend=backend)
        return self.proj(out.flatten(2)), state


def separate_dt(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether dt is computed by a separate matmul, in float32 or wider.

    In 16-bit dtypes, because rounding dt changes every decay. On a GPU in all dtypes, for alignment: rows [z, x, B, C]
    have a multiple of 64 elements at every depth, while rows with dt appended are not 16-byte aligned at d12, d20, d30
    and d36.
    """
    return device.type == "cuda" or dtype.itemsize == 2


class Mamba2(nn.Module):
    """M-VAR's mixer over the complete sequence: Mamba-2 (arXiv 2405.21060), with a carried state."""

    def __init__(
        self, channels: int, inner_width: int, heads: int, *, state_dim: int, conv_width: int, bidirectional: bool
    ) -> None:
        super().__init__()
        C, E, H = channels, inner_width, heads
        directions = 2 if bidirectional else 1
        xbc = E + 2 * state_dim
        per_head = (2, H) if bidirectional else (H,)
        self.state_sizes = (H, E // H, state_dim)
        self.in_proj = nn.Linear(C, E + xbc + directions * H, bias=False, dtype=torch.float32)  # z, [x, B, C], dt
        # conv1d and norm only hold parameters; the fused op reads them.
        self.conv1d = nn.Conv1d(xbc, xbc, conv_width, groups=xbc, dtype=torch.float32)
        self.dt_bias = nn.Parameter(torch.zeros(per_head, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(per_head, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(H, dtype=torch.float32))
        self.norm = nn.RMSNorm(E, eps=1e-5, dtype=torch.float32)
        self.out_proj = nn.Linear(E, C, bias=False, dtype=torch.float32)

    def empty_state(self, batch: int) -> mk.Mamba2State:
        channels, _, taps = self.conv1d.weight.shape
        conv = self.conv1d.weight.new_zeros(batch, taps - 1, channels)
        return mk.Mamba2State(
            conv, conv.new_zeros(batch, *self.state_sizes, dtype=torch.promote_types(conv.dtype, torch.float32))
        )

    def forward(
        self, x: Tensor, scales: tuple[int, ...], state: mk.Mamba2State | None, backend: str
    ) -> tuple[Tensor, mk.Mamba2State]:
        assert self.conv1d.bias is not None
        projected, dt = self.project(x)
        y, state = mk.mamba2_mixer(
            projected,
            self.conv1d.weight.flatten(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            dt=dt,
            state=state,
            scales=scales,
            backend=backend,
        )
        return self.out_proj(y), state

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input projection: ([z, x, B, C, dt], None) or, with :func:`separate_dt`, ([z, x, B, C], dt).

        An in_proj that a user wrapped, hooked or replaced is called as a module.
        """
        layer, device = self.in_proj, x.device.type
        plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks) if plain else 0
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if not separate_dt(x.device, dtype) or not plain or hooks:
            return layer(x), None
        columns = self.dt_bias.numel()
        weight, dt_weight = layer.weight.split([layer.out_features - columns, columns])
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            dt = F.linear(x.to(wide), dt_weight.to(wide))
        return F.linear(x, weight), dt.unflatten(-1, self.dt_bias.shape)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, dtype=torch.float32)
        self.fc2 = nn.Linear(hidden, channels, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
