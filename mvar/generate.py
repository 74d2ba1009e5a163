"""Drawing images: every token passes every layer once, because the blocks' states are carried."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mvar_kernels as mk
from mvar.engine import prepared_decoder, prepared_model
from mvar.layers import State
from mvar.model import Model, Modulation
from mvar.tokenizer import Tokenizer
from mvar_kernels.backends import fastest_dtype

MAX_CFG = 1e6  # far beyond use, and far from overflow in float32


@dataclass(frozen=True)
class Generated:
    """images (B, 3, R, R) in [0, 1] float32; tokens (B, L) int64; scales: one (B, 3, R, R) a scale, if asked for."""

    images: Tensor
    tokens: Tensor
    scales: tuple[Tensor, ...] | None = None


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    labels: Sequence[int] | Tensor,
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    first_index: int = 0,
    more_smooth: bool = False,
    return_scales: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Generated:
    """Generate one image a label.

    Args:
        model, tokenizer: that fit together, on one device.
        labels: classes in [0, num_classes).
        cfg: classifier-free guidance; at scale k of K the weight is cfg·k/(K−1). 0 switches it off.
        top_k: 0 keeps all codes, 1 is the arg-max. top_p: in (0, 1], 1 keeps all codes.
        seed, first_index: image i has the random numbers of (seed, first_index + i) and no others, whatever the
            batch. (The model's own rounding can depend on the batch: in 16-bit dtypes a token may then differ.)
        more_smooth: Gumbel-softmax means of codes instead of codes; nicer pictures, not for FID.
        return_scales: also the picture after each scale, coarse to fine.
        dtype: float32, bfloat16, float16, or None for the device's fastest. The quantizer and the draw stay
            in float32.
        backend: of every op; "auto" or a name of :func:`mvar_kernels.backends`, which then must take all ops.

    Raises:
        ValueError, TypeError: an argument out of range, or a model and a tokenizer that do not fit together.
        FloatingPointError: logits or images are not finite (NaN in the weights, or overflow).
    """
    config = model.config
    check_fit(model, tokenizer)
    label_rows = _labels(labels, config.num_classes, model.lvl_1L.device)
    if isinstance(cfg, bool) or not isinstance(cfg, int | float) or not 0 <= cfg <= MAX_CFG:
        raise ValueError(f"cfg: expected a number from 0 to {MAX_CFG:g}, got {cfg!r}")
    if isinstance(first_index, bool) or not isinstance(first_index, int) or not 0 <= first_index < 2**32:
        raise ValueError(f"first_index: expected a whole number from 0 to 2³²−1, got {first_index}")
    dtype = dtype or fastest_dtype(label_rows.device)
    model, decode = prepared_model(model, dtype), prepared_decoder(tokenizer, dtype)

    B, last = len(label_rows), len(config.scales) - 1
    rows = _Rows(B, guided=cfg > 0)
    image_index = torch.arange(first_index, first_index + B, device=label_rows.device)
    cond = model.class_emb(torch.cat([label_rows, label_rows.new_tensor([config.num_classes] * rows.guided)]))
    modulation = rows.expand_modulation(model.modulation(cond))
    positions = model.positions().split(config.scales, 1)
    x = rows.expand(model.start(cond)) + positions[0]

    codebook = tokenizer.quantize.embedding.weight
    f_hat = codebook.new_zeros(B, config.code_dim, *2 * config.patch_nums[-1:], dtype=torch.float32)
    states: Sequence[State | None] = model.empty_states(len(x))
    tokens, pictures = [], []
    finite = torch.ones(
        (), dtype=torch.bool, device=label_rows.device
    )  # read once, at the end: no waiting between scales
    for k, length in enumerate(config.scales):
        hidden, states = model.hidden(x, modulation, (length,), states, backend=backend)
        progress = k / last if last else 0.0
        logits = model.head(rows.guide(hidden, cfg * progress)).float()  # (B, l, V)
        finite &= logits.isfinite().all()
        draw: dict[str, Any] = {
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "image_index": image_index,
            "scale_index": k,
            "backend": backend,
        }
        tokens.append(mk.sample_tokens(logits, **draw))
        if more_smooth:
            temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
            embedded = mk.soft_embedding(
                logits, None, codebook, sharpness=1 + progress, temperature=temperature, **draw
            )
        else:
            embedded = tokenizer.embed(tokens[-1])
        f_hat = f_hat + tokenizer.scale_features(k, embedded)
        if return_scales:
            pictures.append(_to_unit(decode(f_hat)))
        if k < last:
            step = model.word_embed(tokenizer.next_input(k + 1, f_hat).to(x.dtype)) + positions[k + 1]
            x = rows.repeat(step)
    images = pictures[-1] if return_scales else _to_unit(decode(f_hat))
    if not bool(finite & images.isfinite().all()):
        raise FloatingPointError(f"logits or images in {dtype} are not finite: NaN in the weights, or overflow")
    return Generated(images, torch.cat(tokens, 1), tuple(pictures) if return_scales else None)


class _Rows(NamedTuple):
    """Rows of the batch: B conditional ones and, when guided, the same B images without a class."""

    batch: int
    guided: bool

    def expand(self, t: Tensor) -> Tensor:
        """B rows and one unconditional row → 2B rows; the unconditional one was computed once."""
        return torch.cat([t[:-1], t[-1:].expand(self.batch, *t.shape[1:])]) if self.guided else t

    def expand_modulation(self, modulation: Modulation) -> Modulation:
        return Modulation(*([self.expand(t) for t in vectors] for vectors in modulation))

    def repeat(self, t: Tensor) -> Tensor:
        return t.repeat(2, 1, 1) if self.guided else t

    def guide(self, hidden: Tensor, c: float) -> Tensor:
        """(1+c)·cond − c·uncond on the head's input: the head is affine, so this equals guidance of its logits."""
        return (1 + c) * hidden[: self.batch] - c * hidden[self.batch :] if self.guided else hidden


def check_fit(model: Model, tokenizer: Tokenizer) -> None:
    """ValueError unless model and tokenizer agree on codes, code width, token maps and device."""
    for name in ("num_codes", "code_dim", "patch_nums"):
        of_model, of_tokenizer = getattr(model.config, name), getattr(tokenizer, name)
        if of_model != of_tokenizer:
            raise ValueError(f"model and tokenizer do not fit together: {name} {of_model} against {of_tokenizer}")
    devices = model.lvl_1L.device, tokenizer.quantize.embedding.weight.device
    if devices[0] != devices[1]:
        raise ValueError(f"model and tokenizer do not fit together: on devices {devices[0]} and {devices[1]}")


def _labels(labels: Sequence[int] | Tensor, num_classes: int, device: torch.device) -> Tensor:
    try:
        rows = torch.as_tensor(labels)
        whole = rows.dim() == 1 and len(rows) > 0 and not (rows.is_floating_point() or rows.is_complex())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        whole = False
    if not whole or rows.dtype == torch.bool:
        raise ValueError(f"labels: expected at least one whole number in a row, got {labels!r}")
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, got {lowest} to {highest}")
    return rows.to(device, torch.int64)


def _to_unit(images: Tensor) -> Tensor:
    return (images + 1) * 0.5
