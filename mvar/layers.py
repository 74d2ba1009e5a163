"""The branches of a block, (B, L, C) → (B, L, C), and what they carry from scale to scale.

Module and parameter names are those of the published files.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.config import HEAD_DIM, ModelConfig


class KeyValues(NamedTuple):
    """Keys and values of all tokens so far, in a buffer for the whole sequence that is written in place.

    buffer: (B, L, 2, H, D), keys as they are before their norm. scales: tokens of each scale that is in there.
    """

    buffer: Tensor
    scales: tuple[int, ...]


State = mk.Mamba2State | KeyValues
"""What one block remembers of all coarser scales."""


class Linear(nn.Linear):
    """A linear layer that can be given its bias at the call."""

    takes_bias = True

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias if bias is None else bias)


class Attention(nn.Module):
    """The projections of multi-head attention, and q/k norm's temperature: what M-VAR's and VAR's share."""

    zero_k_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.channels
        self.heads = config.heads
        self.mat_qkv = Linear(C, 3 * C, bias=False, dtype=torch.float32)
        self.q_bias = nn.Parameter(torch.zeros(C, dtype=torch.float32))
        self.v_bias = nn.Parameter(torch.zeros(C, dtype=torch.float32))
        self.register_buffer("zero_k_bias", torch.zeros(C, dtype=torch.float32))
        self.proj = nn.Linear(C, C, dtype=torch.float32)
        if config.qk_norm:
            temperatures = torch.full((1, self.heads, 1, 1), math.log(4), dtype=torch.float32)
            self.scale_mul_1H11 = nn.Parameter(temperatures)

    def qkv(self, x: Tensor) -> Tensor:
        """(B, L, C) → (B, L, 3, H, D)."""
        layer: nn.Module = self.mat_qkv
        if not getattr(layer, "takes_bias", False):  # another class in its place, such as an adapter
            qkv = layer(x) + self.joined_bias().to(x.dtype)
        else:
            qkv = layer(x, None if layer.bias is not None else self.joined_bias())
        return qkv.unflatten(-1, (3, self.heads, -1))

    def joined_bias(self) -> Tensor:
        """Of q, k and v; a copy for inference has it in mat_qkv."""
        return torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])

    def log_temperature(self) -> Tensor | None:
        return self.scale_mul_1H11.flatten() if hasattr(self, "scale_mul_1H11") else None


class IntraScaleAttention(Attention):
    """M-VAR's: softmax attention inside each scale, both ways."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("patch_nums", torch.tensor(config.scales, dtype=torch.int32))  # the published name

    def forward(
        self, x: Tensor, scales: tuple[int, ...], state: State | None, backend: str
    ) -> tuple[Tensor, State | None]:
        """The state is handed on: it is the mixer's."""
        q, k, v = self.qkv(x).unbind(2)
        out = mk.scale_attention(q, k, v, scales, log_temperature=self.log_temperature(), backend=backend)
        return self.proj(out.flatten(2)), state


class CausalAttention(Attention):
    """VAR's: softmax attention over the own scale and all coarser ones, whose keys and values are carried."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.num_tokens = config.num_tokens

    def empty_state(self, batch: int) -> KeyValues:
        return KeyValues(self.q_bias.new_zeros(batch, self.num_tokens, 2, self.heads, HEAD_DIM), ())

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


def steps_apart(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a mixer's dt is the result of a product of its own, in float32 at least.

    In 16 bits, as its rounding moves every decay. On a GPU in all dtypes: a row [z, x, B, C] has a multiple of 64
    elements at every depth, while with dt behind it, at d12, d20, d30 and d36, rows begin at no multiple of 16 bytes.
    """
    return device.type == "cuda" or dtype.itemsize == 2


class Mamba2(nn.Module):
    """M-VAR's mixer over the whole sequence: Mamba-2 (arXiv 2405.21060), with its state carried."""

    dt_proj: nn.Linear | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, E, H = config.channels, config.inner_width, config.mixer_heads
        directions = 2 if config.bidirectional else 1
        xbc = E + 2 * config.state_dim
        heads = (2, H) if config.bidirectional else (H,)
        self.state_sizes = (H, config.mixer_head_dim, config.state_dim)
        self.in_proj = nn.Linear(C, E + xbc + directions * H, bias=False, dtype=torch.float32)  # z, [x, B, C], dt
        # The rows of dt in a copy for inference (engine.py) with steps_apart, whose in_proj is without them.
        self.register_module("dt_proj", None)
        # conv1d and norm hold parameters; they are not called.
        self.conv1d = nn.Conv1d(xbc, xbc, config.conv_width, groups=xbc, dtype=torch.float32)
        self.dt_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
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
        projected, dt = self._projected(x)
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

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[z, x, B, C, dt] and None; with dt_proj or :func:`steps_apart` [z, x, B, C], and dt.

        An in_proj that is wrapped, hooked or packed is called as the module it is.
        """
        if self.dt_proj is not None:
            return self.in_proj(x), self.dt_proj(x.float()).unflatten(-1, self.dt_bias.shape)
        layer, device = self.in_proj, x.device.type
        plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks) if plain else 0
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if not steps_apart(x.device, dtype) or not plain or hooks:
            return layer(x), None
        columns = self.dt_bias.numel()
        weight, of_steps = layer.weight.split([layer.out_features - columns, columns])
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            dt = F.linear(x.to(wide), of_steps.to(wide))
        return F.linear(x, weight), dt.unflatten(-1, self.dt_bias.shape)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = round(config.channels * config.mlp_ratio)
        self.fc1 = nn.Linear(config.channels, hidden, dtype=torch.float32)
        self.fc2 = nn.Linear(hidden, config.channels, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
