"""`log_likelihood` and `classify`: probabilities of an image's tokens under a model, given a class.

    log p(tokens | class) = Σ_k log p(tokens of scale k | tokens of coarser scales, class)

with the logits of teacher forcing, without guidance, temperature, top-k and top-p. It is the likelihood of the tokens,
not of the pixels: it can be compared between models and classes of one tokenizer only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.inference.api import check_fit, evaluation_mode
from mvar.inference.edit import checked_images
from mvar.inference.labels import class_rows
from mvar.inference.model import InferenceModel
from mvar.inference.prepare import prepared_model
from mvar.models.config import checked_int
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, ScaleTransformer
from mvar.models.weights import unwrapped
from mvar_kernels.precision import true_float32

TOKENS_PER_PASS = 2**14
"""24 images at 256×256; the largest activations of d16 in float32, 4·1024 wide, are 268 MB."""
LOGITS_PER_CHUNK = 2**22  # 1,024 tokens of 4,096 codes, 17 MB in float32


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of tokens by scale.

    by_scale: (B, S), or (B, num_classes, S), float64, in nats, of all tokens of a scale. tokens: (S,) of each scale.
    """

    by_scale: Tensor
    tokens: tuple[int, ...]

    @property
    def total(self) -> Tensor:
        """Nats per image, summed over the scales: (B,) or (B, num_classes)."""
        return self.by_scale.sum(-1)

    @property
    def bits_per_token(self) -> Tensor:
        """−log₂ p per token of each scale: (B, S) or (B, num_classes, S)."""
        return -self.by_scale / (math.log(2) * self.by_scale.new_tensor(self.tokens))

    @property
    def bits_per_image(self) -> Tensor:
        """−log₂ p per image, summed over the scales: (B,) or (B, num_classes)."""
        return -self.total / math.log(2)


@dataclass(frozen=True)
class Classification:
    """Classes of highest likelihood.

    labels: (B,) int64. log_likelihood: (B, num_classes) float64, in nats; of all scales for the classes in `complete`,
    of the first scales for the others. complete: (B, num_classes) bool. exact: (B,) bool, whether no other class can
    have a higher likelihood of all scales than the one in `labels`.
    """

    labels: Tensor
    log_likelihood: Tensor
    complete: Tensor
    exact: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def log_likelihood(
    model: Model | InferenceModel,
    tokenizer: Tokenizer,
    images: Tensor,
    labels: Sequence[int] | Tensor | None = None,
    *,
    scales: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> LogLikelihood:
    """Log-likelihood of the tokens of images, by scale, given their classes or each of all classes.

    Every class takes one forward pass of all scales with teacher forcing. Logits are computed for a few tokens at a
    time.

    Args:
        model, tokenizer: as for :func:`mvar.generate`.
        images: (B, 3, R, R) floating point in [0, 1]; or tokens (B, L) int64, from `tokenizer.encode`.
        labels: (B,) classes in [0, num_classes], where num_classes is the unconditional class. None: all classes
            except the unconditional one, B·num_classes passes.
        scales: number of coarsest scales to compute; None for all.
        batch: rows per forward pass; None for as many as have :data:`TOKENS_PER_PASS` tokens.
        dtype: of the model, as for :func:`mvar.generate`. Likelihoods of classes can differ by less than the rounding
            of 16-bit dtypes.
        backend: for all ops.

    Raises:
        ValueError, TypeError: an argument out of range or of another shape.
        FloatingPointError: a log-likelihood is NaN.
    """
    scorer = _Scorer(model, tokenizer, images, batch, dtype, backend)
    kept = scorer.checked_scales(scales)
    B, classes = len(scorer.tokens), scorer.config.num_classes
    if labels is None:
        rows, index = _pairs(B, classes, scorer.tokens.device)
        by_scale = scorer.score(index, rows, kept).unflatten(0, (B, classes))
    else:
        rows = class_rows(labels, classes + 1, scorer.tokens.device)
        if len(rows) != B:
            raise ValueError(f"labels: expected one class for each of {B} images, got {len(rows)}")
        by_scale = scorer.score(torch.arange(B, dtype=torch.int64, device=rows.device), rows, kept)
    return LogLikelihood(by_scale, scorer.config.scales[:kept])


@torch.inference_mode(False)
@torch.no_grad()
def classify(
    model: Model | InferenceModel,
    tokenizer: Tokenizer,
    images: Tensor,
    *,
    scales: int | None = None,
    keep: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> Classification:
    """Class of highest likelihood of each image, with all classes equally probable.

    With `scales` and `keep` coarse scales prune the classes: all classes are compared on the first scales, and the
    `keep` best of them on all scales. As a log-likelihood only decreases with every scale, the result is the exact
    arg-max if no pruned class is better on the first scales than the best one on all; `exact` says where it is.

    Args:
        model, tokenizer, images, batch, dtype, backend: as for :func:`log_likelihood`.
        scales: number of coarsest scales on which all classes are compared; None for all.
        keep: number of classes to compare on all scales; None for none, so that the first scales decide.

    Raises:
        ValueError, TypeError, FloatingPointError: as for :func:`log_likelihood`.
    """
    scorer = _Scorer(model, tokenizer, images, batch, dtype, backend)
    first, B, classes = scorer.checked_scales(scales), len(scorer.tokens), scorer.config.num_classes
    if keep is not None:
        keep = checked_int("keep", keep, 1, classes)
    rows, index = _pairs(B, classes, scorer.tokens.device)
    likelihood = scorer.score(index, rows, first).sum(-1).view(B, classes)
    complete = torch.full_like(likelihood, first == len(scorer.config.scales), dtype=torch.bool)
    if keep is not None and not complete.all():
        kept = likelihood.topk(keep, -1).indices
        index = torch.arange(B, dtype=torch.int64, device=kept.device).repeat_interleave(keep)
        scored = scorer.score(index, kept.flatten(), len(scorer.config.scales)).sum(-1)
        likelihood.scatter_(1, kept, scored.view(B, keep))
        complete.scatter_(1, kept, True)
    candidates = likelihood.masked_fill(~complete, -math.inf) if complete.any() else likelihood
    best, labels = candidates.max(-1)
    others = likelihood.masked_fill(complete, -math.inf).amax(-1)
    return Classification(labels, likelihood, complete, complete.any(-1) & (others <= best))


class _Scorer:
    """Checked arguments, and the tokens and teacher-forcing inputs of the images."""

    def __init__(
        self,
        model: Model | InferenceModel,
        tokenizer: Tokenizer,
        images: Tensor,
        batch: int | None,
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        model, tokenizer = unwrapped(model, Model, InferenceModel), unwrapped(tokenizer, Tokenizer)
        check_fit(model, tokenizer)
        self.config, self.original, self.backend = model.config, model, backend
        device = model.lvl_1L.device
        default = max(TOKENS_PER_PASS // model.config.num_tokens, 1)
        self.batch = default if batch is None else checked_int("batch", batch, 1)
        if isinstance(images, Tensor) and images.dtype == torch.int64:
            self.tokens = images.to(device)
        else:
            pixels = checked_images(images, tokenizer.resolution)
            with evaluation_mode([tokenizer]), torch.autocast(device.type, enabled=False):
                chunks = [tokenizer.encode(chunk.to(device) * 2 - 1) for chunk in pixels.split(self.batch)]
            self.tokens = torch.cat(chunks)
        if not len(self.tokens):
            raise ValueError("images: expected at least one, got none")
        self.inputs = tokenizer.teacher_forcing_inputs(self.tokens)
        with true_float32(device), torch.autocast(device.type, enabled=False):
            self.model: ScaleTransformer = prepared_model(model, dtype)

    def checked_scales(self, scales: int | None) -> int:
        count = len(self.config.scales)
        return count if scales is None else checked_int("scales", scales, 1, count)

    def score(self, index: Tensor, labels: Tensor, scales: int) -> Tensor:
        """Log-likelihood of the first scales of pairs of image index and label, both (n,): (n, scales) float64."""
        device = self.tokens.device
        if isinstance(self.model, InferenceModel):
            self.model.check_labels(labels)
        unprepared = [self.original] if isinstance(self.original, Model) and self.model is self.original else []
        with evaluation_mode(unprepared), true_float32(device), torch.autocast(device.type, enabled=False):
            chunks = zip(index.split(self.batch), labels.split(self.batch), strict=True)
            result = torch.cat([self._score(*chunk, self.config.scales[:scales]) for chunk in chunks])
        if bool(result.isnan().any()):
            raise FloatingPointError("the log-likelihood is NaN: NaN in the weights, or overflow")
        return result

    def _score(self, index: Tensor, labels: Tensor, scales: tuple[int, ...]) -> Tensor:
        length = sum(scales)
        tokens, inputs = self.tokens[index, :length], self.inputs[index, : length - scales[0]]
        hidden = self.model.features(labels, inputs, backend=self.backend).flatten(0, 1)
        rows = max(LOGITS_PER_CHUNK // self.config.num_codes, 1)
        chunks = zip(hidden.split(rows), tokens.flatten().split(rows), strict=True)
        nll = [F.cross_entropy(self.model.head(h).float(), t, reduction="none") for h, t in chunks]
        by_scale = torch.cat(nll).view_as(tokens).double().split(scales, 1)
        return -torch.stack([part.sum(1) for part in by_scale], 1)


def _pairs(count: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All classes of every image: labels and image indices, (count·classes,) int64."""
    labels = torch.arange(classes, dtype=torch.int64, device=device).repeat(count)
    return labels, torch.arange(count, dtype=torch.int64, device=device).repeat_interleave(classes)
