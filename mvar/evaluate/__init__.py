"""Comparing sets of images: by features at hand, and `mvar evaluate`, which draws a set and measures it."""

from mvar.evaluate.features import Moments, PrecisionRecall, frechet, frechet_distance, moments, precision_recall

__all__ = ["Moments", "PrecisionRecall", "frechet", "frechet_distance", "moments", "precision_recall"]
