"""`edit`: in-painting, out-painting, class-conditional editing and variations of images, without further training.

Generation and encoding are both sums over the scales, so that at every scale each token can come from either. The
tokens of the image are chosen by the encoder's residual, as in :meth:`Quantizer.quantize`, but the residual of what has
been generated so far: where a coarse token was sampled, the finer tokens of the image correct it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.inference.api import check_cfg, check_fit, evaluation_mode, launch
from mvar.inference.labels import class_rows
from mvar.inference.model import InferenceModel
from mvar.inference.results import Generated
from mvar.inference.sampling import SamplingParams, SourceImages
from mvar.models.config import checked_int, unboxed
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar.models.weights import unwrapped
from mvar_kernels.precision import true_float32


@torch.inference_mode(False)
@torch.no_grad()
def edit(
    model: Model | InferenceModel,
    tokenizer: Tokenizer,
    images: Tensor,
    mask: Tensor | None,
    labels: Sequence[int] | Tensor | int | None = None,
    *,
    keep_scales: int = 0,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    first_index: int = 0,
    more_smooth: bool = False,
    refiner: Model | InferenceModel | None = None,
    refine_from: int | None = None,
    guidance_until: int | None = None,
    blend: bool = True,
    fill: bool = False,
    reencode: bool = True,
    return_scales: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    graph: bool | None = None,
    compile_decoder: bool = False,
) -> Generated:
    """Generate the masked part of images anew, given the rest of them and a class.

    At every scale, tokens whose cell overlaps the mask are sampled, and all others encode the image. With a mask that
    is False everywhere the tokens are those of `tokenizer.encode`; with one that is True everywhere and the same class,
    seed and index they are those of :func:`mvar.generate`.

    Args:
        model, tokenizer: as for :func:`mvar.generate`.
        images: (B, 3, R, R) floating point in [0, 1].
        mask: (B, 1, R, R), (1, 1, R, R) or (R, R) bool, True where the image is generated anew; None for everywhere,
            which with `keep_scales` makes variations.
        labels: (B,) classes, or one class for all images; None, or num_classes for an image, for the unconditional
            class. For images that are all unconditional guidance has no effect and is not computed.
        keep_scales: number of coarsest scales that encode the image completely, in [0, number of scales].
        blend: the result outside of the mask is exactly the input. Otherwise it is the decoder's reconstruction.
        fill: replace masked pixels by their surroundings before the image is encoded, so that they have no influence.
            Otherwise the encoder sees them, also in cells next to the mask. For masked pixels that are blank or show
            what should disappear; not with `keep_scales`, which are to encode them.
        reencode: encode the residual of what has been generated so far. False: keep the tokens of the image's own
            encoding, as VAR's zero-shot editing does (arXiv 2404.02905); finer tokens then do not correct the coarser
            ones that were sampled.
        cfg, top_k, top_p, seed, first_index, more_smooth, refiner, refine_from, guidance_until, return_scales, dtype,
            backend, graph, compile_decoder: as for :func:`mvar.generate`. One CUDA graph serves all images, masks and
            values of `keep_scales`.

    Returns:
        The edited images and their tokens; with `return_scales` also the images after each scale, blended as well.

    Raises:
        ValueError, TypeError, FloatingPointError, RuntimeError: as for :func:`mvar.generate`, and for images and masks
            of other shapes, dtypes or values.
    """
    model, tokenizer = unwrapped(model, Model, InferenceModel), unwrapped(tokenizer, Tokenizer)
    check_fit(model, tokenizer)
    device, config = model.lvl_1L.device, model.config
    pixels = checked_images(images, tokenizer.resolution).to(device)
    hidden = _mask(mask, pixels)
    kept = checked_int("keep_scales", keep_scales, 0, len(config.scales))
    rows = _class_rows(labels, len(pixels), config.num_classes, device)
    generated = [
        F.adaptive_max_pool2d(hidden.float(), side).flatten(1).bool() & (k >= kept)
        for k, side in enumerate(config.patch_nums)
    ]
    with evaluation_mode([tokenizer]), true_float32(device), torch.autocast(device.type, enabled=False):
        features = tokenizer.features((filled(pixels, hidden) if fill else pixels) * 2 - 1)
    check_cfg(cfg)
    unconditional = bool((rows == config.num_classes).all())
    guidance = 0.0 if unconditional else cfg
    result = launch(
        model,
        tokenizer,
        rows,
        SamplingParams(guidance, top_k, top_p, more_smooth, return_scales, backend, guidance_until, reencode=reencode),
        refiner=refiner,
        refine_from=refine_from,
        seed=seed,
        first_index=first_index,
        dtype=dtype,
        graph=graph,
        compile_decoder=compile_decoder,
        source=SourceImages(features, torch.cat(generated, 1)),
    ).result()
    if not blend:
        return result
    scales = result.scales and tuple(torch.where(hidden, image, pixels) for image in result.scales)
    return replace(result, images=torch.where(hidden, result.images, pixels), scales=scales)


def filled(images: Tensor, mask: Tensor) -> Tensor:
    """Replace masked pixels from the edge of the mask inward, each by the mean of its neighbors that are known by then.

    Args:
        images: (B, 3, R, R) float32.
        mask: (B, 1, R, R) bool. An image that is masked completely becomes 0.
    """
    known = (~mask).to(images.dtype)
    images = images * known
    for _ in range(max(images.shape[2:])):
        share = F.avg_pool2d(known, 3, stride=1, padding=1)
        edge = (share > 0) & (known == 0)
        if not bool(edge.any()):
            break
        mean = F.avg_pool2d(images, 3, stride=1, padding=1) / share.clamp_min(1 / 18)  # a known neighbor: at least 1/9
        images, known = torch.where(edge, mean, images), (share > 0).to(images.dtype)
    return images


def checked_images(images: Tensor, resolution: int) -> Tensor:
    """Return images as float32. Raises TypeError or ValueError unless they are (B, 3, R, R) in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, got {got}")
    if images.dim() != 4 or images.shape[1:] != (3, resolution, resolution) or not len(images):
        raise ValueError(f"images: expected shape (B, 3, {resolution}, {resolution}), got {tuple(images.shape)}")
    lowest, highest = (float(value) for value in images.detach().aminmax())
    if not (lowest >= 0 and highest <= 1):  # also for NaN
        raise ValueError(f"images: expected values in [0, 1], got {lowest:g} to {highest:g}")
    return images.detach().float()


def _mask(mask: Tensor | None, images: Tensor) -> Tensor:
    """(B, 1, R, R) bool on the device of the images."""
    B, _, R, _ = images.shape
    if mask is None:
        return torch.ones(B, 1, R, R, dtype=torch.bool, device=images.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, True where the image is generated anew, got {got}")
    if tuple(mask.shape) not in ((B, 1, R, R), (1, 1, R, R), (R, R)):
        raise ValueError(
            f"mask: expected shape ({B}, 1, {R}, {R}), (1, 1, {R}, {R}) or ({R}, {R}), got {tuple(mask.shape)}"
        )
    return mask.to(images.device).expand(B, 1, R, R)


def _class_rows(
    labels: Sequence[int] | Tensor | int | None, count: int, num_classes: int, device: torch.device
) -> Tensor:
    """A class for each image, (count,) int64; one class, or None for the unconditional one, is repeated."""
    label = num_classes if labels is None else unboxed(labels)
    if isinstance(label, int) and not isinstance(label, bool):
        label = [label] * count
    rows = class_rows(label, num_classes + 1, device)
    if len(rows) != count:
        raise ValueError(f"labels: expected one class, or one for each of {count} images, got {len(rows)}")
    return rows
