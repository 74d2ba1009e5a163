"""FID, Inception score, precision and recall by torch-fidelity, with local weights (nothing is downloaded).

torch-fidelity's network is TensorFlow's Inception of 2015 with its resizing, the network of ADM's evaluator. With ADM's
reference file the metrics follow ADM's protocol: FID to the file's moments of the complete training set, precision and
recall (3 neighbors) against its 10,000 images, Inception score as the mean of 10 parts.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar.utils.errors import message
from mvar.utils.files import is_environmental
from mvar.utils.images import read_npz
from mvar_kernels.precision import true_float32

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
REFERENCE_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
NEIGHBORS = 3  # for precision and recall
FEATURES, LOGITS = "2048", "logits_unbiased"  # torch-fidelity's names of the outputs


@dataclass(frozen=True)
class Sources:
    """The files of the network and of the reference."""

    weights: Path
    reference: Path | None
    missing: tuple[str, ...]
    """requirements of all metrics that have to be installed or downloaded, one line each"""
    no_reference: str | None
    """how to get the reference, if it is missing and only the Inception score can be computed"""

    @property
    def all_missing(self) -> list[str]:
        return [*self.missing, *([self.no_reference] if self.no_reference else [])]


def find_sources(weights: Path | None, reference: Path | None) -> Sources:
    """Find torch-fidelity, the weights of the network and the reference.

    Args:
        weights: None for the file in torch.hub's folder, if it exists.
        reference: npz with moments or images; None computes only the Inception score.

    Raises:
        FileNotFoundError: a given file does not exist.
        ValueError: the weights cannot be read.
    """
    missing = []
    try:
        import torch_fidelity.metric_prc  # noqa: F401  (not in versions before 0.4)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        missing.append(f"torch-fidelity 0.4 with torchvision: pip install 'torch-fidelity>=0.4' ({message(error)})")
    for name, path in (("--inception", weights), ("--reference", reference)):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{name}: {path}: no such file")
    if weights is None:
        weights = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        if not weights.is_file():
            missing.append(f"the Inception network's weights: fetch {WEIGHTS_URL} and give --inception {WEIGHTS}")
    if weights.is_file():
        _check_weights(weights)
    no_reference = None
    if not reference:
        no_reference = f"ADM's reference: fetch {REFERENCE_URL} (for 256×256) and give it to --reference"
    return Sources(weights, reference, tuple(missing), no_reference)


def check(sources: Sources, device: torch.device, resolution: int) -> None:
    """Run the network on a blank image and read the reference, before hours of generation.

    Raises:
        ValueError: the weights are of another network, or the reference is damaged or incomplete.
    """
    width = None
    if not sources.missing:
        blank = np.zeros((1, resolution, resolution, 3), np.uint8)
        width = Inception(sources.weights, device)(blank)[FEATURES].shape[1]
    if sources.reference is not None:
        try:
            _check_reference(sources.reference, width)
        except ValueError as error:
            raise ValueError(f"--reference: {error}") from error


def metrics(images: Path, sources: Sources, device: torch.device, batch: int = 64) -> dict[str, Any]:
    """Compute the metrics of an npz of images.

    Returns:
        inception_score_mean, inception_score_std and inception_sha256 (of the weights); with a reference also fid and
        reference_sha256; with images in the reference also precision and recall.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    network = Inception(sources.weights, device)
    generated = network.features(images, batch)
    results: dict[str, Any] = dict(isc_features_to_metric(generated[LOGITS]))
    if sources.reference is not None:
        with np.load(sources.reference) as stored:
            statistics = {name: stored[name].astype(np.float64) for name in ("mu", "sigma") if name in stored}
            has_images = "arr_0" in stored
        real = network.features(sources.reference, batch)[FEATURES] if has_images else None
        if not statistics:
            statistics = _in_float64(fid_features_to_statistics(real))
        distance = fid_statistics_to_metric(
            _in_float64(fid_features_to_statistics(generated[FEATURES])), statistics, verbose=False
        )
        results["fid"] = distance[KEY_METRIC_FID]
        if real is not None:
            prc = prc_features_to_metric(generated[FEATURES], real, save_cpu_ram=True, verbose=False)
            results |= {name: prc[name] for name in ("precision", "recall")}
        results["reference_sha256"] = sha256(sources.reference)
    return results | {"inception_sha256": sha256(sources.weights)}


class Inception:
    """torch-fidelity's InceptionV3 on one device."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        from torch_fidelity import FeatureExtractorInceptionV3

        _check_weights(weights)
        self.device = device
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [FEATURES, LOGITS], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:  # missing keys, wrong shapes, no state dict
            if is_environmental(error):
                raise
            raise ValueError(f"--inception: {weights}: expected the weights of the network, {WEIGHTS}") from error
        self.network = network.to(device)

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Features (B, 2048) and logits (B, 1008) of pixels (B, H, W, 3), on the CPU."""
        rows = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).to(self.device)
        with true_float32(self.device):
            return dict(zip((FEATURES, LOGITS), (t.cpu() for t in self.network(rows)), strict=True))

    def features(self, images: Path, batch: int) -> dict[str, Tensor]:
        """Features and logits of all images of an npz."""
        outputs = [self(pixels) for pixels in read_npz(images, batch)]
        return {name: torch.cat([output[name] for output in outputs]) for name in (FEATURES, LOGITS)}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _in_float64(statistics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value, np.float64) for name, value in statistics.items()}


def _check_weights(path: Path) -> None:
    """Raise ValueError unless the file contains only weights, since torch-fidelity loads arbitrary pickles."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for corrupted files
        if is_environmental(error):
            raise
        raise ValueError(f"--inception: {path}: not a file of weights: {message(error)}") from error


def _check_reference(path: Path, width: int | None) -> None:
    """Read the complete file and check it. width: number of features, None if the network is not available."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an npz, or truncated")
    try:
        with np.load(path) as stored:
            names = set(stored.files)
            moments = {name: stored[name] for name in ("mu", "sigma") if name in names}
    except Exception as error:  # from NumPy, zipfile or zlib
        if is_environmental(error):
            raise
        raise ValueError(f"{path}: damaged: {message(error)}") from error
    if len(moments) == 1 or not (moments or "arr_0" in names):
        raise ValueError(f"{path}: expected mu and sigma, or images as arr_0; got {sorted(names)}")
    if moments:
        width = width or moments["mu"].size
        for name, shape in (("mu", (width,)), ("sigma", (width, width))):
            found = moments[name]
            if found.shape != shape or found.dtype.kind not in "fiu":
                raise ValueError(f"{path}: {name}: expected real numbers {shape}, got {found.dtype} {found.shape}")
            if not np.isfinite(found).all():
                raise ValueError(f"{path}: {name}: not all values are finite")
    if "arr_0" in names and (images := sum(len(pixels) for pixels in read_npz(path, 256))) <= NEIGHBORS:
        raise ValueError(f"{path}: arr_0: expected more than {NEIGHBORS} images, got {images}")
