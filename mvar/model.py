"""M-VAR (arXiv 2411.10433) and VAR (arXiv 2404.02905): embeddings, a chain of blocks, a head.

The two differ in their blocks alone (blocks.py). Module and parameter names are those of the published files.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.blocks import LN_EPS, AfterBranch, Block, HeadNorm, MVARBlock, VARBlock
from mvar.config import ModelConfig
from mvar.layers import State
from mvar.modulation import JoinedModulation, Modulation, modulation_layer


class Model(nn.Module):
    """`model(labels, inputs)` under teacher forcing; :func:`mvar.generate` draws images.

    :class:`MVAR` and :class:`VAR` are the two there are; :func:`from_config` makes the one that a configuration names.
    """

    architecture: ClassVar[str]
    block: ClassVar[type[Block]]
    lvl_1L: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.architecture != self.architecture:
            raise ValueError(f"config.architecture: expected {self.architecture!r}, got {config.architecture!r}")
        self.config = config
        C, scales = config.channels, config.scales
        self.class_emb = nn.Embedding(config.num_classes + 1, C, dtype=torch.float32)  # the last row: unconditional
        self.word_embed = nn.Linear(config.code_dim, C, dtype=torch.float32)
        self.pos_start = nn.Parameter(torch.empty(1, scales[0], C, dtype=torch.float32))
        self.pos_1LC = nn.Parameter(torch.empty(1, config.num_tokens, C, dtype=torch.float32))
        self.lvl_embed = nn.Embedding(len(scales), C, dtype=torch.float32)
        # By fill_, as torch.cat without storage would import torch._dynamo (weights.without_storage).
        levels = torch.empty(1, config.num_tokens, dtype=torch.int64)
        for k, level in enumerate(levels.split(scales, 1)):
            level.fill_(k)
        self.register_buffer("lvl_1L", levels)
        self.shared_ada_lin = modulation_layer(C, 3 * self.block.branches) if config.shared_adaln else nn.Identity()
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(C)
        self.head = nn.Linear(C, config.num_codes, dtype=torch.float32)
        self.class_names: tuple[str, ...] | None = None  # where they are known; a file has them, too
        self.joined_modulation: JoinedModulation | None = None  # in a copy for inference, instead of the layers

    def forward(self, labels: Tensor, inputs: Tensor, *, backend: str = "auto") -> Tensor:
        """Logits of every token, given the true tokens of all coarser scales: (B, L, V) float32.

        Arguments as of :meth:`features`.
        """
        return self.head(self.features(labels, inputs, backend=backend)).float()

    def features(self, labels: Tensor, inputs: Tensor, *, draws: Tensor | None = None, backend: str = "auto") -> Tensor:
        """The head's input for every token, given the true tokens of all coarser scales: (B, L, C).

        Args:
            labels: (B,) int64 in [0, num_classes]; num_classes is the unconditional class. In training mode a
                share `label_drop` of them is replaced by it.
            inputs: (B, L − first scale, code_dim), floating point, from `tokenizer.teacher_forcing_inputs`. Its first
                rows alone, up to a scale's end, give the first scales alone.
            draws: in training mode, (B, `draws_per_image`) numbers from [0, 1) that decide whether an image's label
                and branches are dropped; None: torch's global generator draws them.
            backend: of every op; "auto" or a name of :func:`mvar_kernels.backends`.
        """
        scales = self._check(labels, inputs)
        if self.training:
            if draws is None:
                draws = torch.rand(labels.shape[0], self.draws_per_image, dtype=torch.float32, device=labels.device)
            labels = torch.where(draws[:, 0] < self.config.label_drop, self.config.num_classes, labels)
        cond = self.class_emb(labels)  # (B, C)
        rows = torch.cat([self.start(cond), self.word_embed(inputs.to(cond.dtype))], 1)  # (B, L, C)
        x = rows + self.positions()[:, : rows.shape[1]]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream in 16 bits, as in VAR's trainer
        modulation = self.modulation(cond)
        if self.training:
            assert draws is not None
            modulation = self._with_stochastic_depth(modulation, draws[:, 1:])
        return self.hidden(x, modulation, scales, backend=backend)[0]

    @property
    def draws_per_image(self) -> int:
        """Random numbers that a training image needs: one for its label, one for each branch."""
        return 1 + self.block.branches * self.config.depth

    def typed_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def start(self, cond: Tensor) -> Tensor:
        """The first scale's input without its position: (B, C) → (B, first scale, C)."""
        return cond[:, None] + self.pos_start

    def positions(self) -> Tensor:
        """Level plus position embedding: (1, L, C)."""
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def modulation(self, cond: Tensor, expand: Callable[[Tensor], Tensor] = lambda rows: rows) -> Modulation:
        """The modulation of class embeddings (B, C). It is the same at every scale: once per image is enough.

        expand: makes rows of the batch of their rows.
        """
        if self.joined_modulation is not None:
            joined: Modulation = self.joined_modulation(cond, expand)
            return joined
        gates: list[Tensor] = []
        scales: list[Tensor] = []
        shifts: list[Tensor] = []
        shared, n = self.shared_ada_lin(cond), self.block.branches
        for block in self.typed_blocks():
            of_block = block.modulation(shared)
            gates += of_block[:n]
            scales += of_block[n : 2 * n]
            shifts += of_block[2 * n :]
        scale, shift = self.head_nm.ada_lin(cond).chunk(2, -1)
        lists = (gates, [*scales, scale], [*shifts, shift])
        return Modulation(*([expand(rows) for rows in vectors] for vectors in lists))

    def empty_states(self, batch: int) -> list[State]:
        """What the blocks remember of coarser scales before the first one, for :meth:`hidden`: one state a block.

        Constant in size, made once a generation. Not for training: VAR's hold keys and values in buffers for the
        whole sequence, which :meth:`hidden` writes in place.
        """
        return [block.empty_state(batch) for block in self.typed_blocks()]

    def hidden(
        self,
        x: Tensor,
        modulation: Modulation,
        scales: tuple[int, ...],
        states: Sequence[State | None] | None = None,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, list[State | None]]:
        """Run the blocks over new tokens, whole scales, from the blocks' states after all coarser ones.

        x (B, L, C) → the head's input (B, L, C) and one state a block. `states` None: start of the sequence, of
        which nothing need be remembered.
        """
        gates, s, t = ([vector.to(x.dtype) for vector in vectors] for vectors in modulation)
        after = [AfterBranch(*vectors) for vectors in zip(gates, s[1:], t[1:], strict=True)]
        h = mk.adaln(x, s[0], t[0], eps=LN_EPS, backend=backend)
        new_states, n = [], self.block.branches
        for i, (block, state) in enumerate(zip(self.typed_blocks(), states or [None] * self.config.depth, strict=True)):
            x, h, state = block(x, h, after[n * i : n * (i + 1)], scales, state, backend)
            new_states.append(state)
        return h, new_states

    def _with_stochastic_depth(self, modulation: Modulation, draws: Tensor) -> Modulation:
        """Switch whole branches off for some samples by their gates (Huang et al., arXiv 1603.09382)."""
        assert self.config.drop_path is not None
        last = max(self.config.depth - 1, 1)
        gates = []
        for i, gate in enumerate(modulation.gates):
            keep = 1 - self.config.drop_path * (i // self.block.branches) / last
            gates.append(gate * (draws[:, i, None] < keep).to(gate.dtype) / keep if keep < 1 else gate)
        return modulation._replace(gates=gates)

    def _check(self, labels: Tensor, inputs: Tensor) -> tuple[int, ...]:
        """The scales that the inputs are of."""
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise ValueError(f"labels: expected (B,) int64, got {tuple(labels.shape)} {labels.dtype}")
        first, ends = self.config.scales[0], list(accumulate(self.config.scales))
        end = first + inputs.shape[1] if inputs.dim() == 3 else 0
        if (
            not inputs.is_floating_point()
            or end not in ends
            or inputs.shape[::2] != (labels.shape[0], self.config.code_dim)
        ):
            expected = (labels.shape[0], self.config.num_tokens - first, self.config.code_dim)
            raise ValueError(f"inputs: expected {expected} floating point, got {tuple(inputs.shape)} {inputs.dtype}")
        return self.config.scales[: ends.index(end) + 1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The published mask follows from the schedule; as a buffer it would cost L² (357 MB at 1024×1024).
        state_dict.pop(prefix + "attn_bias_for_masking", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MVAR(Model):
    """M-VAR: attention inside each scale, a Mamba-2 mixer over all of them."""

    architecture, block = "mvar", MVARBlock


class VAR(Model):
    """VAR: attention over the own scale and all coarser ones."""

    architecture, block = "var", VARBlock


_MODELS: Mapping[str, type[Model]] = {model.architecture: model for model in (MVAR, VAR)}


def from_config(config: ModelConfig) -> Model:
    """The model that `config.architecture` names, with weights as torch leaves them (:func:`mvar.initialise`)."""
    return _MODELS[config.architecture](config)
