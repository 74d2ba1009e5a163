"""How a generation's cost grows with its tokens, counted: 680, 2,240 and 9,451 (256, 512 and 1024), per image with
guidance, three ways to remember the coarser scales:

- mvar: a Mamba-2 state of constant size; every token passes every layer once;
- the public algorithm: the inputs of every Mamba layer, which runs again over all of them at every scale;
- VAR: keys and values of all tokens, which every new token attends to.

FLOPs of all products and scans of blocks and head, without decoder and drawing; bytes in bfloat16.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from benchmarks.states import carried_bytes, public_bytes
from mvar.config import HEAD_DIM, SCHEDULES, ModelConfig
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case

OURS, PUBLIC, VAR = "mvar", "public algorithm", "VAR"
ITEMSIZE = 2
ROWS = 2  # an image with its class and without
DEPTH = 16


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
    """A row for each resolution and side, of d16."""
    for resolution, maps in SCHEDULES.items():
        for side in (OURS, PUBLIC, VAR):
            config = ModelConfig(depth=DEPTH, patch_nums=maps, architecture="var" if side == VAR else "mvar")
            yield {
                "side": side,
                "depth": DEPTH,
                "resolution": resolution,
                "tokens": config.num_tokens,
                "flops": flops(side, config),
                "state_bytes": public_bytes(DEPTH, resolution)
                if side == PUBLIC
                else carried_bytes(DEPTH, resolution, config.architecture),
            }
