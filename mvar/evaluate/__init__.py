"""Metrics of sets of images: from given features or pixels, and for `mvar evaluate`."""

from mvar.evaluate.features import Moments, PrecisionRecall, frechet, frechet_distance, moments, precision_recall
from mvar.evaluate.similarity import psnr, ssim

__all__ = [
    "Moments",
    "PrecisionRecall",
    "frechet",
    "frechet_distance",
    "moments",
    "precision_recall",
    "psnr",
    "ssim",
]
