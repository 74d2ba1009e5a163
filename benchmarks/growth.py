"""How a generation's cost grows with its tokens: `mvar bench --suite growth`, or `python -m benchmarks.growth`.

680, 2,240 and 9,451 tokens (256, 512 and 1024), per image with guidance, three ways to remember the coarser scales:

- mvar: a Mamba-2 state of constant size; every token passes every layer once;
- the public algorithm: the inputs of every Mamba layer, which runs again over all of them at every scale;
- VAR: keys and values of all tokens, which every new token attends to.

FLOPs and bytes are counted, of d16 in bfloat16: all products and scans of blocks and head, without decoder
and drawing. Times are measured, of a small model without its decoder's weight: what grows is the same.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch

import mvar
from benchmarks import public
from benchmarks.measure import DEVICE, interleaved, write
from benchmarks.states import carried_bytes, public_bytes
from mvar.config import HEAD_DIM, SCHEDULES, ModelConfig
from mvar_kernels.catalogue import SPECS
from mvar_kernels.specs import Case

OURS, PUBLIC, VAR = "mvar", "public algorithm", "VAR"
ITEMSIZE = 2
ROWS = 2  # an image with its class and without
SMALL = mvar.TokenizerConfig(SCHEDULES[256], ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)


def flops(side: str, config: ModelConfig) -> int:
    """Of one image: linear layers by their weights, ops by their specs."""
    C, E, H, N, V = config.channels, config.inner_width, config.mixer_heads, config.state_dim, config.num_codes
    hidden = round(C * config.mlp_ratio)
    attention, feed_forward, mixer = 4 * C * C, 2 * C * hidden, C * (2 * E + 2 * N + H) + E * C
    modulation = C * (6 if side == VAR else 9) * C
    total = 0
    for k, (new, seen) in enumerate(zip(config.scales, accumulate(config.scales), strict=True), 1):
        case = Case("", {"B": ROWS, "H": config.heads, "D": HEAD_DIM}, _pattern(side, config.scales[:k]))
        block = SPECS["scale_attention"].work(case, ITEMSIZE)[1] + 2 * ROWS * new * (attention + feed_forward)
        if side != VAR:
            passed = new if side == OURS else seen
            sizes = {"B": ROWS, "L": passed, "C": C, "H": H, "P": config.mixer_head_dim, "N": N}
            block += SPECS["mamba2_mixer"].work(Case("", sizes, {"scales": None}), ITEMSIZE)[1]
            block += 2 * ROWS * passed * mixer
        if side == PUBLIC or k == 1:
            block += 2 * ROWS * modulation
        total += config.depth * block + 2 * (ROWS if side == PUBLIC else 1) * new * C * V
    return total


def _pattern(side: str, scales: tuple[int, ...]) -> dict[str, Any]:
    if side == VAR:
        return {"scales": scales, "pattern": "causal", "query_scales": 1}
    return {"scales": scales[-1:], "pattern": "diagonal"}


def counted() -> Iterator[dict[str, Any]]:
    for resolution, maps in SCHEDULES.items():
        for side in (OURS, PUBLIC, VAR):
            config = ModelConfig(depth=16, patch_nums=maps, architecture="var" if side == VAR else "mvar")
            yield {
                "side": side,
                "depth": 16,
                "resolution": resolution,
                "tokens": config.num_tokens,
                "flops": flops(side, config),
                "state_bytes": public_bytes(16, resolution)
                if side == PUBLIC
                else carried_bytes(16, resolution, config.architecture),
            }


@torch.no_grad()
def measured(depth: int, resolution: int, rounds: int) -> dict[str, Any]:
    maps = SCHEDULES[resolution]
    labels = torch.tensor([7], device=DEVICE)
    pairs = {}
    for architecture in ("mvar", "var"):
        tokenizer = mvar.TokenizerConfig(**(vars(SMALL) | {"patch_nums": maps}))
        model, images = mvar.build(depth, patch_nums=maps, architecture=architecture, tokenizer=tokenizer)
        pairs[architecture] = model.to(DEVICE), images.to(DEVICE)
    sides: dict[str, Callable[[], Any]] = {
        OURS: lambda: mvar.generate(*pairs["mvar"], labels, dtype=torch.float32),
        PUBLIC: lambda: public.generate(*pairs["mvar"], labels),
        VAR: lambda: mvar.generate(*pairs["var"], labels, dtype=torch.float32),
    }
    for side in (OURS, VAR):
        sides[side]()  # which prepares their weights
    ms = interleaved(sides, rounds=rounds, seconds=0, warm_up=False)
    tokens = sum(side * side for side in maps)
    return {"depth": depth, "resolution": resolution, "tokens": tokens, "dtype": "float32", "median_ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=2, help="of the measured model (default: 2)")
    parser.add_argument("--resolutions", type=int, nargs="*", default=list(SCHEDULES), help="to measure")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("medium")
    times = []
    for resolution in options.resolutions:
        times.append(measured(options.depth, resolution, options.rounds))
        print(json.dumps(times[-1]), flush=True)
    print(write("growth", {"counted": list(counted()), "measured": times}))


if __name__ == "__main__":
    main()
