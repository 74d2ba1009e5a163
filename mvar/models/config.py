"""Model configuration and the published schedules of token maps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULES: Mapping[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Side lengths of the token maps, by image resolution (VAR's trainer, `--pn`)."""

HEAD_DIM = 64
ARCHITECTURES = ("mvar", "var")
QK_NORM_FROM_DEPTH = 24  # published M-VAR: d12, d16, d20 without q/k norm, d24, d32 with it; VAR: always


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of an M-VAR or VAR model; defaults are those of the published models.

    patch_nums: side lengths of the token maps, strictly increasing.
    width: C; None for 64·depth. Attention heads are width / 64.
    num_codes, code_dim: size V and width of the tokenizer's codebook.
    qk_norm: normalize queries and keys, with a learned temperature per head; None for the published choice (M-VAR
        from depth 24, VAR always).
    bidirectional: add a backward direction to the mixer, within each scale.
    state_dim, expand, conv_width, mixer_head_dim: Mamba-2's N, E/C, taps and P. VAR has no mixer.
    label_drop: probability of replacing a label by the unconditional class in training.
    drop_path: stochastic depth rate of the last block, increasing linearly from 0; None for VAR's 0.1·depth/24.
    architecture: "mvar" or "var".
    shared_adaln: one modulation layer for all blocks, with an offset per block (VAR's d36-s).

    Raises:
        ValueError: a field is out of range.
    """

    depth: int
    patch_nums: tuple[int, ...]
    width: int | None = None
    num_classes: int = 1000
    num_codes: int = 4096
    code_dim: int = 32
    qk_norm: bool | None = None
    bidirectional: bool = False
    state_dim: int = 64
    expand: int = 2
    conv_width: int = 4
    mixer_head_dim: int = 64
    mlp_ratio: float = 4.0
    label_drop: float = 0.1
    drop_path: float | None = None
    architecture: str = "mvar"
    shared_adaln: bool = False

    def __post_init__(self) -> None:
        unbox(self)
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}; got {self.architecture!r}")
        if self.bidirectional and self.architecture == "var":
            raise ValueError("bidirectional: VAR has no mixer; expected False, got True")
        sizes = ("depth", "num_classes", "num_codes", "code_dim", "state_dim", "expand", "conv_width", "mixer_head_dim")
        for name in sizes:
            if not is_positive_int(getattr(self, name)):
                raise ValueError(f"{name}: expected a positive whole number, got {getattr(self, name)!r}")
        defaults = {
            "width": HEAD_DIM * self.depth,
            "qk_norm": self.architecture == "var" or self.depth >= QK_NORM_FROM_DEPTH,
            "drop_path": 0.1 * self.depth / 24,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.channels < 1 or self.channels % HEAD_DIM:
            raise ValueError(f"width: expected a multiple of {HEAD_DIM}, got {self.width}")
        if self.inner_width % self.mixer_head_dim:
            raise ValueError(f"mixer_head_dim: expected a divisor of {self.inner_width}, got {self.mixer_head_dim}")
        for name in ("label_drop", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {getattr(self, name)}")
        if not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio: expected a number above 0, got {self.mlp_ratio}")

    @property
    def channels(self) -> int:
        """C."""
        assert self.width is not None
        return self.width

    @property
    def heads(self) -> int:
        return self.channels // HEAD_DIM

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward layers."""
        return round(self.channels * self.mlp_ratio)

    @property
    def inner_width(self) -> int:
        """E, the inner width of the mixer."""
        return self.expand * self.channels

    @property
    def mixer_heads(self) -> int:
        return self.inner_width // self.mixer_head_dim

    @property
    def scales(self) -> tuple[int, ...]:
        """Tokens per scale."""
        return tuple(n * n for n in self.patch_nums)

    @property
    def num_tokens(self) -> int:
        return sum(self.scales)

    @classmethod
    def from_state_dict(cls, state: "Mapping[str, Tensor]") -> "ModelConfig":
        """Infer the configuration from an official state dict; it does not determine label_drop and drop_path.

        Raises:
            ValueError: a weight is missing or has an invalid shape.
        """

        def shape(name: str, dims: int) -> list[int]:
            if name not in state:
                raise ValueError(f"not the weights of an M-VAR or VAR model: {name!r} is missing")
            if state[name].dim() != dims:
                raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(state[name].shape)}")
            return list(state[name].shape)

        width, code_dim = shape("word_embed.weight", 2)
        sizes: dict[str, Any] = {
            "depth": next(i for i in range(len(state) + 1) if f"blocks.{i}.attn.proj.weight" not in state),
            "width": width,
            "num_classes": shape("class_emb.weight", 2)[0] - 1,
            "num_codes": shape("head.weight", 2)[0],
            "code_dim": code_dim,
            "qk_norm": "blocks.0.attn.scale_mul_1H11" in state,
            "mlp_ratio": shape("blocks.0.ffn.fc1.weight", 2)[0] / width,
            "shared_adaln": "blocks.0.ada_gss" in state,
        }
        if not any(".mamba." in name for name in state):
            shape("lvl_1L", 2)
            squares = state["lvl_1L"].flatten().unique_consecutive(return_counts=True)[1].tolist()
            return cls(**sizes, architecture="var", patch_nums=_sides("lvl_1L", squares))
        inner, xbc = shape("blocks.0.mamba.norm.weight", 1)[0], shape("blocks.0.mamba.conv1d.weight", 3)[0]
        shape("blocks.0.attn.patch_nums", 1)
        return cls(
            **sizes,
            patch_nums=_sides("blocks.0.attn.patch_nums", [int(n) for n in state["blocks.0.attn.patch_nums"]]),
            bidirectional=state["blocks.0.mamba.dt_bias"].dim() == 2 if "blocks.0.mamba.dt_bias" in state else False,
            state_dim=(xbc - inner) // 2,
            expand=inner // width,
            conv_width=shape("blocks.0.mamba.conv1d.weight", 3)[2],
            mixer_head_dim=inner // shape("blocks.0.mamba.D", 1)[0],
        )


def _sides(name: str, squares: list[int]) -> tuple[int, ...]:
    """Side lengths of square token maps, from their numbers of tokens."""
    sides = tuple(math.isqrt(max(n, 0)) for n in squares)
    if [n * n for n in sides] != squares:
        raise ValueError(f"{name}: expected squares of patch numbers, got {squares}")
    return sides


def check_patch_nums(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """Return the side lengths as a tuple. Raises ValueError unless they are strictly increasing positive integers."""
    values = tuple(unboxed(n) for n in patch_nums)
    increasing = all(coarse < fine for coarse, fine in zip(values, values[1:], strict=False))
    if not values or not all(is_positive_int(n) for n in values) or not increasing:
        raise ValueError(f"patch_nums: expected increasing positive whole numbers, got {values}")
    return values


def unboxed(value: Any) -> Any:
    """Convert a NumPy scalar, 0-d array or 0-d tensor to a Python number; return other values unchanged."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    value = value.item()
    return float(value) if hasattr(value, "item") else value  # item() of a NumPy longdouble returns a longdouble


def unbox(config: Any) -> None:
    """Apply :func:`unboxed` to all fields of a frozen dataclass, so that it can be serialized as JSON."""
    for field in fields(config):
        object.__setattr__(config, field.name, unboxed(getattr(config, field.name)))


def checked_int(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """Return a whole number as int. Raises ValueError unless it is one from `lowest` to `highest`."""
    number = unboxed(value)
    valid = isinstance(number, int) and not isinstance(number, bool) and number >= lowest
    if not valid or (highest is not None and number > highest):
        expected = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name}: expected a whole number {expected}, got {number!r}")
    return int(number)


def is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
