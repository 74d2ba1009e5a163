"""Metrics of sets of images: from given features, and for `mvar evaluate`, which generates the images as well."""

from mvar.evaluate.features import Moments, PrecisionRecall, frechet, frechet_distance, moments, precision_recall

__all__ = ["Moments", "PrecisionRecall", "frechet", "frechet_distance", "moments", "precision_recall"]
