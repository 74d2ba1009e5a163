"""Data sources for training: image folders, precomputed tokens, and tensors in memory.

The batches of a source depend on (seed, epoch) alone, not on the number of ranks, the number of worker processes or
the batch at which the epoch is resumed.
"""

from mvar.data.folder import ImageFolder, UnreadableImages
from mvar.data.order import num_batches
from mvar.data.source import Batch, Source, TensorSource, tensor_source
from mvar.data.tokens import TokenStore, TokenStoreError

__all__ = [
    "Batch",
    "ImageFolder",
    "Source",
    "TensorSource",
    "TokenStore",
    "TokenStoreError",
    "UnreadableImages",
    "num_batches",
    "tensor_source",
]
