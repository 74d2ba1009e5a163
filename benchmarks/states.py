"""What a generation must remember between scales, in bytes: `python -m benchmarks.states`. Counted, not measured.

Writes docs/generated/carried_state.md.
"""

from itertools import product

import torch

import mvar
from benchmarks.measure import RESULTS
from mvar.files import replacing

DEPTHS, RESOLUTIONS = (16, 24, 30), (256, 512, 1024)
ROWS = 2  # an image with guidance
DOCUMENT = RESULTS.parent.parent / "docs" / "generated" / "carried_state.md"


def carried_bytes(depth: int, resolution: int, architecture: str) -> int:
    """Of the states that the engine makes for one image with guidance, in bfloat16."""
    config = mvar.ModelConfig(depth=depth, patch_nums=mvar.SCHEDULES[resolution], architecture=architecture)
    with torch.device("meta"):
        states = mvar.from_config(config).to(torch.bfloat16).empty_states(ROWS)
    return sum(t.nbytes for state in states for t in state if isinstance(t, torch.Tensor))


def public_bytes(depth: int, resolution: int) -> int:
    """Of the public algorithm's caches before the last scale ends: each Mamba layer's input at every token.

    In float32, which autocast leaves the residual stream in.
    """
    config = mvar.ModelConfig(depth=depth, patch_nums=mvar.SCHEDULES[resolution])
    return ROWS * depth * config.num_tokens * config.channels * torch.float32.itemsize


INTRODUCTION = """# State carried between scales

Computed, not measured: megabytes for one image with guidance (two rows), in bfloat16. mvar carries the state of
Mamba-2 (the last three inputs of the convolution in bfloat16, the state of the scan in float32), of the same size at
every scale and resolution. The public M-VAR algorithm keeps the input of every Mamba layer at all tokens (float32 under
autocast) and runs the layer over them again. VAR keeps keys and values of all tokens; this engine allocates them at
full length, one buffer per layer. Written by `python -m benchmarks.states`.

| model | resolution | tokens | mvar | public algorithm, at the last scale | VAR |
|---|---|---|---|---|---|
"""


def table() -> str:
    lines = []
    for depth, resolution in product(DEPTHS, RESOLUTIONS):
        tokens = sum(side**2 for side in mvar.SCHEDULES[resolution])
        counts = (
            carried_bytes(depth, resolution, "mvar"),
            public_bytes(depth, resolution),
            carried_bytes(depth, resolution, "var"),
        )
        cells = " | ".join(f"{count / 1e6:.1f}" for count in counts)
        lines.append(f"| d{depth} | {resolution}×{resolution} | {tokens} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with replacing(DOCUMENT) as aside:
        aside.write_text(INTRODUCTION + table())
    print(DOCUMENT)


if __name__ == "__main__":
    main()
