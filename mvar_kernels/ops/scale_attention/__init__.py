"""Softmax attention over a pyramid of token maps: within each scale, or over all coarser ones."""
