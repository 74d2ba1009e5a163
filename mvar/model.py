"""M-VAR (arXiv 2411.10433): intra-scale attention, an inter-scale Mamba-2 mixer, adaLN.

One block, on x (B, L, C), with nine vectors a sample from the class embedding:

    x = x + g1 · Attention(LN(x)·(1+s1) + t1)      bidirectional, inside each scale
    x = x + g2 · Mamba2(LN(x)·(1+s2) + t2)         over the whole sequence, coarse to fine
    x = x + g3 · FFN(LN(x)·(1+s3) + t3)

computed as a chain: each gated_adaln adds a branch to x and prepares the next branch's input. Module and
parameter names are those of the published files.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.config import ModelConfig

LN_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer that can be given its bias at the call."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias if bias is None else bias)


class Attention(nn.Module):
    """Multi-head softmax attention inside each scale, (B, L, C) → (B, L, C)."""

    zero_k_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.channels
        self.heads = config.heads
        self.mat_qkv = Linear(C, 3 * C, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("zero_k_bias", torch.zeros(C))
        self.register_buffer("patch_nums", torch.tensor(config.scales, dtype=torch.int32))  # the published name
        self.proj = nn.Linear(C, C)
        if config.qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4)))

    def forward(self, x: Tensor, scales: tuple[int, ...], backend: str) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = self.mat_qkv(x, bias).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, H, D)
        temperature = self.scale_mul_1H11.flatten() if hasattr(self, "scale_mul_1H11") else None
        q, k, v = qkv.unbind(2)
        out = mk.scale_attention(q, k, v, scales, log_temperature=temperature, backend=backend)
        return self.proj(out.flatten(2))


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060), (B, L, C) → (B, L, C), with the state carried in and out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, E, H = config.channels, config.inner_width, config.mixer_heads
        directions = 2 if config.bidirectional else 1
        xbc = E + 2 * config.state_dim
        heads = (2, H) if config.bidirectional else (H,)
        self.in_proj = nn.Linear(C, E + xbc + directions * H, bias=False)  # z, [x, B, C], dt
        self.conv1d = nn.Conv1d(xbc, xbc, config.conv_width, groups=xbc)  # holds the parameters; not called
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(H))
        self.norm = nn.RMSNorm(E, eps=1e-5)  # holds the parameter; not called
        self.out_proj = nn.Linear(E, C, bias=False)

    def forward(
        self, x: Tensor, scales: tuple[int, ...], state: mk.Mamba2State | None, backend: str
    ) -> tuple[Tensor, mk.Mamba2State]:
        assert self.conv1d.bias is not None
        y, state = mk.mamba2_mixer(
            self.in_proj(x),
            self.conv1d.weight.flatten(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            state=state,
            scales=scales,
            backend=backend,
        )
        return self.out_proj(y), state


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = round(config.channels * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(config.channels, hidden), nn.Linear(hidden, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """The three branches of a block and the layer that makes their modulation; :class:`MVAR` chains them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mamba = Mamba2(config)
        self.ffn = FeedForward(config)
        self.ada_lin = _modulation_layer(config.channels, 9)


class HeadNorm(nn.Module):
    """The modulation of the last layer norm, before the head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ada_lin = _modulation_layer(channels, 2)


def _modulation_layer(channels: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, vectors * channels))


class Modulation(NamedTuple):
    """All that the class decides: vectors (B, C) for the 3·depth branches in order, and for the head."""

    gates: list[Tensor]
    """3·depth gates, one a branch."""
    scales: list[Tensor]
    """3·depth + 1: the scale before each branch, and before the head."""
    shifts: list[Tensor]
    """3·depth + 1, likewise."""


class MVAR(nn.Module):
    """The model: `model(labels, inputs)` under teacher forcing; :func:`mvar.generate` draws images."""

    lvl_1L: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        C, scales = config.channels, config.scales
        self.class_emb = nn.Embedding(config.num_classes + 1, C)  # the last row is the unconditional one
        self.word_embed = nn.Linear(config.code_dim, C)
        self.pos_start = nn.Parameter(torch.empty(1, scales[0], C))
        self.pos_1LC = nn.Parameter(torch.empty(1, config.num_tokens, C))
        self.lvl_embed = nn.Embedding(len(scales), C)
        levels = [torch.full((1, n), k) for k, n in enumerate(scales)]
        self.register_buffer("lvl_1L", torch.cat(levels, 1))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(C)
        self.head = nn.Linear(C, config.num_codes)

    def forward(self, labels: Tensor, inputs: Tensor, *, backend: str = "auto") -> Tensor:
        """Logits of every token, given the true tokens of all coarser scales.

        Args:
            labels: (B,) int64 in [0, num_classes]; num_classes is the unconditional class. In training mode a
                share `label_drop` of them is replaced by it.
            inputs: (B, L − first scale, code_dim), floating point, from `tokenizer.teacher_forcing_inputs`.
            backend: of every op; "auto" or a name of :func:`mvar_kernels.backends`.

        Returns:
            (B, L, V) float32.
        """
        self._check(labels, inputs)
        if self.training and self.config.label_drop > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.config.label_drop
            labels = torch.where(drop, self.config.num_classes, labels)
        cond = self.class_emb(labels)  # (B, C)
        rows = torch.cat([self.start(cond), self.word_embed(inputs.to(cond.dtype))], 1)  # (B, L, C)
        x = rows + self.positions()
        modulation = self.modulation(cond)
        if self.training:
            modulation = self._with_stochastic_depth(modulation)
        hidden, _ = self.hidden(x, modulation, self.config.scales, backend=backend)
        return self.head(hidden).float()

    def typed_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def start(self, cond: Tensor) -> Tensor:
        """The first scale's input without its position: (B, C) → (B, first scale, C)."""
        return cond[:, None] + self.pos_start

    def positions(self) -> Tensor:
        """Level plus position embedding: (1, L, C)."""
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def modulation(self, cond: Tensor) -> Modulation:
        """The modulation of class embeddings (B, C). It is the same at every scale: once per image is enough."""
        gates, scales, shifts = [], [], []
        for block in self.typed_blocks():
            nine = block.ada_lin(cond).chunk(9, -1)  # g1 g2 g3 s1 s2 s3 t1 t2 t3
            gates += nine[:3]
            scales += nine[3:6]
            shifts += nine[6:]
        scale, shift = self.head_nm.ada_lin(cond).chunk(2, -1)
        return Modulation(gates, [*scales, scale], [*shifts, shift])

    def hidden(
        self,
        x: Tensor,
        modulation: Modulation,
        scales: tuple[int, ...],
        states: Sequence[mk.Mamba2State | None] | None = None,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, list[mk.Mamba2State]]:
        """Run the blocks over new tokens, whole scales, from the mixers' states after all coarser ones.

        x (B, L, C) → the head's input (B, L, C) and one state a block. `states` None: start of the sequence.
        """
        # Under autocast layers answer in 16 bits; x and what is added to it stay in x's dtype.
        gates, s, t = ([vector.to(x.dtype) for vector in vectors] for vectors in modulation)

        def add(i: int, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
            return mk.gated_adaln(x, branch.to(x.dtype), gates[i], s[i + 1], t[i + 1], eps=LN_EPS, backend=backend)

        h = mk.adaln(x, s[0], t[0], eps=LN_EPS, backend=backend)
        new_states = []
        for i, (block, state) in enumerate(zip(self.typed_blocks(), states or [None] * self.config.depth, strict=True)):
            x, h = add(3 * i, x, block.attn(h, scales, backend))
            branch, new_state = block.mamba(h, scales, state, backend)
            x, h = add(3 * i + 1, x, branch)
            x, h = add(3 * i + 2, x, block.ffn(h))
            new_states.append(new_state)
        return h, new_states

    def _with_stochastic_depth(self, modulation: Modulation) -> Modulation:
        """Switch whole branches off for some samples by their gates (Huang et al., arXiv 1603.09382)."""
        assert self.config.drop_path is not None
        last = max(self.config.depth - 1, 1)
        gates = []
        for i, gate in enumerate(modulation.gates):
            keep = 1 - self.config.drop_path * (i // 3) / last
            kept = torch.rand(gate.shape[0], 1, device=gate.device) < keep if keep < 1 else None
            gates.append(gate if kept is None else gate * kept / keep)
        return modulation._replace(gates=gates)

    def _check(self, labels: Tensor, inputs: Tensor) -> None:
        rest = self.config.num_tokens - self.config.scales[0]
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise ValueError(f"labels: expected (B,) int64, got {tuple(labels.shape)} {labels.dtype}")
        if not inputs.is_floating_point() or inputs.shape != (len(labels), rest, self.config.code_dim):
            expected = (len(labels), rest, self.config.code_dim)
            raise ValueError(f"inputs: expected {expected} floating point, got {tuple(inputs.shape)} {inputs.dtype}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The published mask follows from the schedule; as a buffer it would cost L² (357 MB at 1024×1024).
        state_dict.pop(prefix + "attn_bias_for_masking", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
