"""Replace the modules of a live model by the kernels, in place: `accelerate` and `restore`."""

from mvar_kernels.patching.api import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
