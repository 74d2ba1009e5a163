"""M-VAR (arXiv 2411.10433) and VAR (arXiv 2404.02905): embeddings, blocks, head.

They differ in their blocks only (blocks.py). Module and parameter names are those of the published files.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.models.blocks import LN_EPS, AfterBranch, Block, HeadNorm, MVARBlock, VARBlock
from mvar.models.config import ModelConfig
from mvar.models.hub import HubMixin
from mvar.models.layers import State
from mvar.models.modulation import Modulation, modulation_layer


class ScaleTransformer(nn.Module):
    """Embeddings, blocks and head, run scale by scale with carried states. Base class of :class:`Model` and
    :class:`mvar.inference.model.InferenceModel`."""

    config: ModelConfig
    class_emb: nn.Embedding
    word_embed: nn.Linear
    pos_start: Tensor
    pos_1LC: Tensor
    lvl_embed: nn.Embedding
    lvl_1L: Tensor
    shared_ada_lin: nn.Module
    blocks: nn.ModuleList
    head_nm: HeadNorm
    head: nn.Linear

    def forward(self, labels: Tensor, inputs: Tensor, *, backend: str = "auto") -> Tensor:
        """Logits of all tokens, each given the true tokens of all coarser scales: (B, L, V) float32.

        Arguments as in :meth:`features`.
        """
        return self.head(self.features(labels, inputs, backend=backend)).float()

    def features(self, labels: Tensor, inputs: Tensor, *, draws: Tensor | None = None, backend: str = "auto") -> Tensor:
        """The head's input for all tokens, each given the true tokens of all coarser scales: (B, L, C).

        Args:
            labels: (B,) int64 in [0, num_classes]; num_classes is the unconditional class, which in training mode
                replaces a label with probability `config.label_drop`.
            inputs: (B, L − first scale, code_dim), floating point, from `tokenizer.teacher_forcing_inputs`, or for the
                first scales only its rows up to the end of a scale.
            draws: (B, `draws_per_image`) uniform numbers in [0, 1) for label dropout and stochastic depth in training
                mode; None to use torch's global generator.
            backend: for all ops; "auto" or a name of :func:`mvar_kernels.backends`.
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
        modulation = self.modulation(labels, cond)
        if self.training:
            assert draws is not None
            modulation = self._with_stochastic_depth(modulation, draws[:, 1:])
        return self.hidden(x, modulation, scales, backend=backend)[0]

    @property
    def draws_per_image(self) -> int:
        """Random numbers per training image: one for its label and one per branch."""
        return 1 + sum(len(block.mixers()) + 1 for block in self.typed_blocks())

    def typed_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def start(self, cond: Tensor) -> Tensor:
        """Input of the first scale without position embedding: (B, C) → (B, first scale, C)."""
        return cond[:, None] + self.pos_start

    def positions(self) -> Tensor:
        """Level plus position embedding: (1, L, C)."""
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def modulation(
        self, labels: Tensor, cond: Tensor, expand: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> Modulation:
        """Compute the modulation of classes, which is the same at all scales.

        Args:
            labels: (B,) int64 in [0, num_classes].
            cond: their embeddings (B, C).
            expand: applied to all vectors, for a batch that repeats rows.
        """
        *blocks, head = map(expand, self.modulation_vectors(labels, cond))
        return Modulation.of(blocks, head)

    def modulation_vectors(self, labels: Tensor, cond: Tensor) -> Sequence[Tensor]:
        """Outputs of the modulation layers of all blocks and of the head, see :meth:`Modulation.of`."""
        shared = self.shared_ada_lin(cond)
        return [*(block.modulation(shared) for block in self.typed_blocks()), self.head_nm.ada_lin(cond)]

    def empty_states(self, batch: int) -> list[State]:
        """States before the first scale, one per block, for :meth:`hidden` at inference.

        They have a fixed size: VAR's are buffers for the keys and values of the complete sequence, which :meth:`hidden`
        writes in place.
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
        """Run the blocks on the tokens of one or more complete scales.

        Args:
            x: (B, L, C), the embedded tokens.
            scales: tokens of each scale in x.
            states: states of the blocks after all coarser scales; None for the first scales, without carried states.

        Returns:
            The head's input (B, L, C) and one state per block.
        """
        gates, s, t = ([vector.to(x.dtype) for vector in vectors] for vectors in modulation)
        blocks = self.typed_blocks()
        after = [AfterBranch(*vectors) for vectors in zip(gates, s[1:], t[1:], strict=True)]
        h = mk.adaln(x, s[0], t[0], eps=LN_EPS, backend=backend)
        new_states, n = [], len(gates) // len(blocks)
        for i, (block, state) in enumerate(zip(blocks, states or [None] * len(blocks), strict=True)):
            x, h, state = block(x, h, after[n * i : n * (i + 1)], scales, state, backend)
            new_states.append(state)
        return h, new_states

    def _with_stochastic_depth(self, modulation: Modulation, draws: Tensor) -> Modulation:
        """Zero the gates of randomly dropped branches and rescale the others (Huang et al., arXiv 1603.09382)."""
        assert self.config.drop_path is not None
        last = max(self.config.depth - 1, 1)
        gates = []
        for i, gate in enumerate(modulation.gates):
            keep = 1 - self.config.drop_path * (i * self.config.depth // len(modulation.gates)) / last
            gates.append(gate * (draws[:, i, None] < keep).to(gate.dtype) / keep if keep < 1 else gate)
        return modulation._replace(gates=gates)

    def _check(self, labels: Tensor, inputs: Tensor) -> tuple[int, ...]:
        """Validate the arguments; returns the scales that the inputs cover."""
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


class Model(ScaleTransformer, HubMixin):
    """`model(labels, inputs)` computes logits under teacher forcing; :func:`mvar.generate` samples images.

    `from_pretrained`, `save_pretrained` and `push_to_hub` are those of :class:`mvar.models.hub.HubMixin`.

    The subclasses are :class:`MVAR` and :class:`VAR`; :func:`from_config` builds the one named by a configuration.
    """

    architecture: ClassVar[str]
    block: ClassVar[type[Block]]

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
        # fill_, as torch.cat on the meta device imports torch._dynamo (see weights.without_storage).
        levels = torch.empty(1, config.num_tokens, dtype=torch.int64)
        for k, level in enumerate(levels.split(scales, 1)):
            level.fill_(k)
        self.register_buffer("lvl_1L", levels)
        self.shared_ada_lin = modulation_layer(C, 3 * self.block.branches) if config.shared_adaln else nn.Identity()
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(C)
        self.head = nn.Linear(C, config.num_codes, dtype=torch.float32)
        self.class_names: tuple[str, ...] | None = None  # saved by mvar.save

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The published mask follows from the configuration; as a buffer it would take L² (357 MB at 1024×1024).
        state_dict.pop(prefix + "attn_bias_for_masking", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MVAR(Model):
    """M-VAR: attention within each scale and a Mamba-2 mixer over all scales."""

    architecture, block = "mvar", MVARBlock


class VAR(Model):
    """VAR: attention over the same scale and all coarser ones."""

    architecture, block = "var", VARBlock


_MODELS: Mapping[str, type[Model]] = {model.architecture: model for model in (MVAR, VAR)}


def from_config(config: ModelConfig) -> Model:
    """Build the model named by `config.architecture`, with torch's default initialization."""
    return _MODELS[config.architecture](config)
