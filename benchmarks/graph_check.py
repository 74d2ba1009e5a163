"""One d16 generation in bfloat16, from a CUDA graph and without: the same tokens, and the seconds of each.

`python -m benchmarks.graph_check --batch 25`; exits with 1 where they differ. Without a GPU: a small model, no graph.
"""

import argparse
import sys
import time
from functools import partial

import torch

import mvar
from benchmarks.measure import DEVICE
from benchmarks.sides import random_pair


def seconds(run: partial[mvar.Generated]) -> tuple[mvar.Generated, float]:
    """What it gives, and the time of its third call."""
    for _ in range(2):
        run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    generated = run()
    generated.images.sum().item()
    return generated, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=25)
    options = parser.parse_args()
    on_gpu = DEVICE.type == "cuda"
    model, tokenizer = random_pair(16, 256, "mvar") if on_gpu else mvar.build(1, patch_nums=(1, 2))
    labels = [i % 1000 for i in range(options.batch)]
    drawn = partial(mvar.generate, model, tokenizer, labels, dtype=torch.bfloat16 if on_gpu else torch.float32)
    plain, of_plain = seconds(partial(drawn, graph=False))
    replayed, of_graph = seconds(partial(drawn, graph=True if on_gpu else None))
    same = torch.equal(plain.tokens, replayed.tokens) and torch.equal(plain.images, replayed.images)
    print(
        f"batch {options.batch}: {of_plain:.3f} s, {of_graph:.3f} s from a CUDA graph; "
        + ("the same tokens and images" if same else "DIFFERENT tokens or images")
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
