"""FID, Inception score, precision and recall, by torch-fidelity and weights that are on this machine already.

torch-fidelity's network is TensorFlow's of 2015, which ADM's evaluator runs, its resizing included. Against ADM's
reference file the figures are those of ADM's protocol: FID to the moments of the whole training set that are in there,
precision and recall (3 neighbours) against its 10,000 images, Inception score as a mean of 10 parts.
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

from mvar.errors import message
from mvar.files import is_environmental
from mvar.pictures import read_npz
from mvar_kernels.precision import true_float32

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
REFERENCE_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
NEIGHBOURS = 3  # of precision and recall
FEATURES, LOGITS = "2048", "logits_unbiased"  # torch-fidelity's names


@dataclass(frozen=True)
class Sources:
    """Where network and reference come from; `missing` says what has to be got, one line each."""

    weights: Path
    reference: Path | None
    missing: tuple[str, ...]
    """without these there is no figure at all"""
    unreferenced: str | None
    """why there is an Inception score only"""


def sources(weights: Path | None, reference: Path | None) -> Sources:
    """Look for torch-fidelity, the network's weights (given, or where torch.hub keeps them) and the reference.

    Raises:
        FileNotFoundError: a file that is given is not there.
        ValueError: one that is given is not what it should be.
    """
    missing = []
    try:
        import torch_fidelity.metric_prc  # noqa: F401  (not in versions before 0.4)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
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
    absent = None if reference else f"ADM's reference: fetch {REFERENCE_URL} (for 256×256) and give it to --reference"
    return Sources(weights, reference, tuple(missing), absent)


def check(found: Sources, device: torch.device, resolution: int) -> None:
    """Use network and reference once, on a blank image: what they lack is told before images are drawn for hours.

    Raises ValueError where the weights are not the network's, or the reference has not what :func:`figures` needs.
    """
    width = None
    if not found.missing:
        blank = np.zeros((1, resolution, resolution, 3), np.uint8)
        width = Inception(found.weights, device)(blank)[FEATURES].shape[1]
    if found.reference is not None:
        try:
            _check_reference(found.reference, width)
        except ValueError as error:
            raise ValueError(f"--reference: {error}") from error


def figures(images: Path, found: Sources, device: torch.device, batch: int = 64) -> dict[str, Any]:
    """Measure an npz of images.

    Returns:
        inception_score_mean and inception_score_std; with a reference fid, and with images in it precision and recall;
        and the SHA-256 of weights and reference.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    network = Inception(found.weights, device)
    made = network.features(images, batch)
    measured: dict[str, Any] = dict(isc_features_to_metric(made[LOGITS]))
    if found.reference is not None:
        with np.load(found.reference) as stored:
            statistics = {name: stored[name].astype(np.float64) for name in ("mu", "sigma") if name in stored}
            has_images = "arr_0" in stored
        real = network.features(found.reference, batch)[FEATURES] if has_images else None
        if not statistics:
            statistics = _in_float64(fid_features_to_statistics(real))
        distance = fid_statistics_to_metric(
            _in_float64(fid_features_to_statistics(made[FEATURES])), statistics, verbose=False
        )
        measured["fid"] = distance[KEY_METRIC_FID]
        if real is not None:
            shares = prc_features_to_metric(made[FEATURES], real, save_cpu_ram=True, verbose=False)
            measured |= {name: shares[name] for name in ("precision", "recall")}
        measured["reference_sha256"] = sha256(found.reference)
    return measured | {"inception_sha256": sha256(found.weights)}


class Inception:
    """The network, on one device."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        from torch_fidelity import FeatureExtractorInceptionV3

        _check_weights(weights)
        self.device = device
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [FEATURES, LOGITS], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:  # a missing name, another shape, no table of weights at all
            if is_environmental(error):
                raise
            raise ValueError(
                f"--inception: {weights}: not the weights of the network, which are in {WEIGHTS}"
            ) from error
        self.network = network.to(device)

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
        """(B, H, W, 3) → (B, 2048) and (B, 1008), on the host."""
        rows = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).to(self.device)
        with true_float32(self.device):
            return dict(zip((FEATURES, LOGITS), (t.cpu() for t in self.network(rows)), strict=True))

    def features(self, images: Path, batch: int) -> dict[str, Tensor]:
        """Of all images of an npz."""
        found = [self(pixels) for pixels in read_npz(images, batch)]
        return {name: torch.cat([rows[name] for rows in found]) for name in (FEATURES, LOGITS)}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _in_float64(statistics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value, np.float64) for name, value in statistics.items()}


def _check_weights(path: Path) -> None:
    """torch-fidelity reads pickles of any kind: not before torch has found that this one is weights alone."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a corrupted byte raises inside the reader is any of a dozen types
        if is_environmental(error):
            raise
        raise ValueError(f"--inception: {path}: not a file of weights: {message(error)}") from error


def _check_reference(path: Path, width: int | None) -> None:
    """Read all of it. width: of the network's features, None where it is not there to be asked."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an npz, or only a part of one")
    try:
        with np.load(path) as stored:
            names = set(stored.files)
            moments = {name: stored[name] for name in ("mu", "sigma") if name in names}
    except Exception as error:  # of NumPy, zipfile and zlib
        if is_environmental(error):
            raise
        raise ValueError(f"{path}: damaged: {message(error)}") from error
    if len(moments) == 1 or not (moments or "arr_0" in names):
        raise ValueError(f"{path}: expected mu and sigma, or images as arr_0; found {sorted(names)}")
    if moments:
        width = width or moments["mu"].size
        for name, shape in (("mu", (width,)), ("sigma", (width, width))):
            found = moments[name]
            if found.shape != shape or found.dtype.kind not in "fiu":
                raise ValueError(f"{path}: {name}: expected real numbers {shape}, got {found.dtype} {found.shape}")
            if not np.isfinite(found).all():
                raise ValueError(f"{path}: {name}: not all values are finite")
    if "arr_0" in names and (images := sum(len(pixels) for pixels in read_npz(path, 256))) <= NEIGHBOURS:
        raise ValueError(f"{path}: arr_0: expected more than {NEIGHBOURS} images, got {images}")
