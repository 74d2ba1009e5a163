"""A training step from images and from tokens that `mvar tokenize` wrote: `python -m benchmarks.bench_data_loading`.

The published tokenizer's sizes and a model at 256×256, random weights, float32, AdamW. Synthetic images of 500×375
pixels and about 110 KB of JPEG, usual sizes in ImageNet; images and tokens are read from the page cache. One process
reads, encodes and trains: worker processes would hide the reading, but not the encoding.
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mvar
from benchmarks.common.environment import DEVICE, argument_parser, set_allocator
from benchmarks.common.results import save
from benchmarks.common.timing import interleaved
from mvar.data import Batch, ImageFolder, Source, TokenStore
from mvar.data.encode import write_tokens
from mvar_kernels.precision import float32_matmuls

IMAGES = 16


@float32_matmuls(DEVICE, fast=True)
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    set_allocator()
    model, tokenizer = mvar.build(options.depth, num_classes=1)
    model.to(DEVICE).train()
    tokenizer.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(labels: Tensor, tokens: Tensor) -> None:
        logits = model(labels.to(DEVICE), tokenizer.teacher_forcing_inputs(tokens))
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as root:
        size_kb = make_images(Path(root, "train", "class"))
        folder = ImageFolder(Path(root, "train"), tokenizer.resolution)
        write_tokens(folder, tokenizer, Path(root, "tokens"), crops=1, batch=options.batch)
        images, tokens = reader(folder, options.batch), reader(TokenStore(Path(root, "tokens")), options.batch)

        def encoded(batch: Batch) -> Tensor:
            assert batch.images is not None
            return tokenizer.encode(batch.images.to(DEVICE))

        def from_images() -> None:
            batch = images()
            step(batch.labels, encoded(batch))

        def from_tokens() -> None:
            batch = tokens()
            assert batch.tokens is not None
            step(batch.labels, batch.tokens.to(DEVICE))

        read = images()
        implementations: dict[str, Callable[[], object]] = {
            "step from pictures": from_images,
            "step from tokens": from_tokens,
            "reading pictures": images,
            "encoding": lambda: encoded(read),
            "reading tokens": tokens,
        }
        ms = interleaved(implementations, rounds=options.rounds, seconds=0)
    row = {"batch": options.batch, "dtype": "float32", "picture_kb": size_kb, "median_ms": ms}
    print(row)
    print(save(f"data_d{options.depth}", [row]))


def reader(source: Source, batch: int) -> Callable[[], Batch]:
    """Returns the next batch at every call, epoch after epoch."""

    def batches() -> Iterator[Batch]:
        for epoch in count():
            yield from source.batches(batch=batch, seed=0, epoch=epoch)

    return batches().__next__


def make_images(folder: Path) -> float:
    """Write `IMAGES` JPEGs of smooth colours and some noise; returns their mean size in KB."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        colours = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
        noisy = smooth + rng.normal(scale=10, size=smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=94)
    return float(np.mean([path.stat().st_size for path in folder.iterdir()])) / 1e3


if __name__ == "__main__":
    main()
