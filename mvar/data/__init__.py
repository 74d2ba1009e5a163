"""What training reads: pictures in folders, tokens made of them once, or tensors at hand.

Every source gives the same batches for the same (seed, epoch), whatever the number of ranks and of worker processes,
and wherever in the epoch it starts.
"""

from mvar.data.folder import ImageFolder, UnreadablePictures
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
    "UnreadablePictures",
    "num_batches",
    "tensor_source",
]
