"""How well a tokenizer reconstructs the images of a folder: PSNR, SSIM, code usage and rFID."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from mvar.data.folder import CropDataset, ImageFolder
from mvar.data.order import in_order
from mvar.evaluate.features import MomentAccumulator, frechet
from mvar.evaluate.inception import FEATURES, Inception
from mvar.evaluate.similarity import WINDOW, decibels, mse, ssim
from mvar.models.tokenizer import Tokenizer
from mvar.utils.images import to_bytes

SHOWN = 8


class Reconstruction(NamedTuple):
    """Results of :func:`reconstruct`."""

    images: int
    """images read"""
    sha256: str
    """of the pixels of all preprocessed images, (images, R, R, 3) uint8: equal if the preprocessing is"""
    metrics: dict[str, Any]
    """psnr: mean over the images, in dB, without images that are reconstructed exactly (`exact_images`), of which it is
    infinite; None if all are. psnr_of_mean_mse: that of the mean squared error of all images. ssim: mean over the
    images. rfid: with a network, the Fréchet distance of its features"""
    usage: dict[str, Any]
    """per scale and in `total`: tokens, the fraction of the codes that are used, and the perplexity of their
    distribution"""
    shown: tuple[Tensor, Tensor]
    """the first originals and their reconstructions, (≤ 8, 3, R, R) float32 in [0, 1]"""


def preprocessing(folder: ImageFolder) -> dict[str, Any]:
    """All that determines the pixels which are compared."""
    R = folder.resolution
    return {
        "color": "Pillow's convert('RGB'); EXIF rotation and color profiles are ignored",
        "resize": f"the shorter side to {folder.side} pixels, Pillow's Lanczos filter, on 8-bit values",
        "crop": f"the center {R}×{R} pixels",
        "input of the encoder": "pixel / 127.5 − 1",
        "reconstruction": "clamped to [−1, 1], then rounded to the nearest of 256 values, before every metric",
        "psnr": "of each image over its pixels and channels with a peak of 255, then the mean",
        "ssim": "11×11 Gaussian window, σ = 1.5, K1 = 0.01, K2 = 0.03; per RGB channel, windows inside the image only",
        "rfid": "Fréchet distance between the Inception features of the preprocessed and the reconstructed images",
        "resolution": R,
        "shorter_side": folder.side,
        "pillow": PIL.__version__,
    }


@torch.no_grad()
def reconstruct(
    folder: ImageFolder,
    tokenizer: Tokenizer,
    *,
    batch: int = 50,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    network: Inception | None = None,
) -> Reconstruction:
    """Encode and decode every image of a folder once, on the tokenizer's device, in constant memory.

    Args:
        dtype: autocast dtype of encoder and decoder; the quantizer stays in float32.
        workers: processes that read images.
        network: for rFID.

    Raises:
        UnreadableImages: more than 1 % of the images cannot be read. Fewer are left out.
        ValueError: the images are smaller than the window of SSIM, another size than the tokenizer's, or none
            can be read (with a network fewer than two).
    """
    if not WINDOW <= folder.resolution == tokenizer.resolution:
        expected = f"{tokenizer.resolution} pixels, the tokenizer's, and at least {WINDOW}, the window of SSIM"
        raise ValueError(f"folder: expected a resolution of {expected}; got {folder.resolution}")
    device = tokenizer.quant_conv.weight.device
    hits = torch.zeros(len(tokenizer.scales), tokenizer.num_codes, dtype=torch.int64, device=device)
    moments = MomentAccumulator(), MomentAccumulator()
    digest = hashlib.sha256()
    errors: list[Tensor] = []
    similarities: list[Tensor] = []
    shown: list[Tensor] = []
    order = in_order(len(folder), batch=batch, rank=0, world_size=1)
    with tqdm(total=len(folder), desc="images", unit="image", disable=None) as progress:
        for crop_batch in folder.read(CropDataset(folder, replace=False), order, workers):
            progress.update(len(crop_batch.indices) + len(crop_batch.failures))
            if not len(crop_batch.indices):
                continue
            images = crop_batch.images[:, 0].to(device, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                tokens = tokenizer.encode(images)
                decoded = tokenizer.decode(tokens)
            for row, scale in zip(hits, tokens.split(tokenizer.scales, dim=1), strict=True):
                row += scale.flatten().bincount(minlength=tokenizer.num_codes)
            pairs = to_bytes((images + 1) / 2), to_bytes((decoded + 1) / 2)  # (B, R, R, 3) uint8 each
            errors.append(mse(*pairs).cpu())
            similarities.append(ssim(*pairs).cpu())
            on_cpu = [pixels.cpu().numpy() for pixels in pairs]
            digest.update(np.ascontiguousarray(on_cpu[0]).data)
            if network is not None:
                for accumulator, pixels in zip(moments, on_cpu, strict=True):
                    accumulator.update(network(pixels)[FEATURES])
            if sum(map(len, shown[::2])) < SHOWN:
                shown += [torch.from_numpy(pixels[:SHOWN]).permute(0, 3, 1, 2).float() / 255 for pixels in on_cpu]
    count = sum(map(len, errors))
    needed = 1 if network is None else 2
    if count < needed:
        raise ValueError(f"{folder.path}: expected at least {needed} images that can be read, got {count}")
    error = torch.cat(errors)
    metrics: dict[str, Any] = {
        "psnr": _finite(decibels(error[error > 0]).mean()),
        "psnr_of_mean_mse": _finite(decibels(error.mean())),
        "exact_images": int((error == 0).sum()),
        "ssim": float(torch.cat(similarities).mean()),
    }
    if network is not None:
        metrics["rfid"] = frechet(*(accumulator.result() for accumulator in moments))
    usage = {
        "scales": [{"side": p, **_usage(row)} for p, row in zip(tokenizer.patch_nums, hits.cpu(), strict=True)],
        "total": _usage(hits.sum(0).cpu()),
    }
    originals, reconstructions = (torch.cat(shown[i::2])[:SHOWN] for i in range(2))
    return Reconstruction(count, digest.hexdigest(), metrics, usage, (originals, reconstructions))


def _usage(hits: Tensor) -> dict[str, Any]:
    """Usage of the codes with these numbers of tokens, (V,) int64."""
    shares = hits.double() / hits.sum()
    return {
        "tokens": int(hits.sum()),
        "used": float((hits > 0).double().mean()),
        "perplexity": float(torch.xlogy(shares, shares).sum().neg().exp()),
    }


def _finite(value: Tensor) -> float | None:
    """None for infinity and for the mean of nothing, which JSON does not have."""
    return float(value) if bool(value.isfinite()) else None
