"""The least time that each op could take on an H200: `python -m benchmarks.floors`. Counted, not measured.

Bytes and FLOPs are those of the ops' specs, in bfloat16, forward; the ceilings are what a device copy and a matrix
product reach there. Writes results/floors_h200.json (everything) and docs/generated/lower_bounds.md (an excerpt);
`--show DEPTH RESOLUTION BATCH` prints other tables instead.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product

from benchmarks.measure import RESULTS
from mvar.config import HEAD_DIM, SCHEDULES, ModelConfig
from mvar.files import replacing
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case

COPY_BYTES_PER_S = 4.3e12  # read and written, by a device copy
PRODUCT_FLOPS_PER_S = 790e12  # bfloat16, dense
ITEMSIZE = 2
DEPTHS, RESOLUTIONS, BATCHES = (16, 30), (256, 512), (1, 8, 64)
SAMPLING = ("sample_tokens", "soft_embedding")
DOCUMENT = RESULTS.parent.parent / "docs" / "generated" / "lower_bounds.md"


@dataclass(frozen=True)
class Floor:
    """One op on the new tokens of one scale of a generation, or (scale None) on a training sequence.

    batch: images; with guidance a generation step has twice as many rows in all ops but drawing's.
    """

    op: str
    depth: int
    resolution: int
    batch: int
    scale: int | None
    tokens: int
    moved_bytes: int
    flops: int

    @property
    def memory_us(self) -> float:
        return 1e6 * self.moved_bytes / COPY_BYTES_PER_S

    @property
    def arithmetic_us(self) -> float:
        return 1e6 * self.flops / PRODUCT_FLOPS_PER_S

    @property
    def floor_us(self) -> float:
        return max(self.memory_us, self.arithmetic_us)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_us >= self.arithmetic_us else "arithmetic"

    def row(self) -> dict[str, object]:
        return asdict(self) | {"floor_us": float(f"{self.floor_us:.4g}"), "bound": self.bound}


def cases(config: ModelConfig, rows: int, images: int, scales: tuple[int, ...], new: int) -> Mapping[str, Case]:
    """Every op on the last `new` of these scales: the newest one in a generation, all of them in training."""
    newest = scales[-new:]
    tokens = sum(newest)
    attention = {"B": rows, "H": config.heads, "D": HEAD_DIM}
    row = {"B": rows, "L": tokens, "C": config.channels}
    scan = row | {"H": config.mixer_heads, "P": config.mixer_head_dim, "N": config.state_dim}
    draw = Case("", {"B": images, "l": tokens, "V": config.num_codes}, {"guided": False})
    return {
        "adaln": Case("", row),
        "gated_adaln": Case("", row),
        "scale_attention": Case("", attention, {"scales": newest, "pattern": "diagonal"}),
        "scale_attention (causal)": Case("", attention, {"scales": scales, "pattern": "causal", "query_scales": new}),
        "ssd_scan": Case("", scan, {"scales": None}),
        "mamba2_mixer": Case("", scan, {"scales": None}),
        **dict.fromkeys(SAMPLING, draw),
    }


def floors(depth: int, resolution: int, batch: int) -> Iterator[Floor]:
    config = ModelConfig(depth=depth, patch_nums=SCHEDULES[resolution])
    count = len(config.scales)
    for scale in (*range(1, count + 1), None):
        scales, new = (config.scales, count) if scale is None else (config.scales[:scale], 1)
        rows = batch if scale is None else 2 * batch
        for op, case in cases(config, rows, batch, scales, new).items():
            if scale is not None or op not in SAMPLING:  # training draws no tokens
                work = SPECS[op.split()[0]].work(case, ITEMSIZE)
                yield Floor(op, depth, resolution, batch, scale, sum(scales[-new:]), *work)


def tables(depth: int, resolution: int, batch: int) -> str:
    """Markdown: a table for each op."""
    found = list(floors(depth, resolution, batch))
    lines = [f"d{depth}, {resolution}×{resolution}, batch {batch}."]
    for op in dict.fromkeys(floor.op for floor in found):
        lines += [
            f"\n### {op}\n",
            "| scale | tokens | moved, MB | MFLOP | floor, µs | bound |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {'training' if f.scale is None else f.scale} | {f.tokens} | {_short(f.moved_bytes / 1e6)} "
            f"| {_short(f.flops / 1e6)} | {_short(f.floor_us)} | {f.bound} |"
            for f in found
            if f.op == op
        ]
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


INTRODUCTION = """# Lower bounds on an H200

Computed, not measured: the least time that one forward call of each op can take in bfloat16. It is the larger of two
bounds (roofline model):

- memory: the bytes that the op must read and write at least, at 4.3 TB/s, which a device copy reaches there;
- arithmetic: its FLOPs at 790 TFLOP/s, which a dense bfloat16 matmul reaches there.

Not modelled: the launch of a kernel takes microseconds; data that the previous kernel left in the L2 cache need not be
read from memory; and arithmetic outside of matrix multiplications is many times slower than the second bound.

Rows 1, 2, … are the new tokens of one scale of a generation with guidance: twice the batch size in the ops of the
model, the batch size in token sampling. The last row is the whole sequence as in training, without guidance; training
samples nothing. Causal attention is VAR's: the new queries against all keys so far. The scan and the mixer are the
published forward-only ones; the mixer's bytes leave out its weights.

This page is an excerpt. d16 and d30 at 256 and 512, with batch 1, 8 and 64, are in
`benchmarks/results/floors_h200.json`; both files are written by `python -m benchmarks.floors`, and
`python -m benchmarks.floors --show 30 512 64` prints the tables of any size.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", nargs=3, type=int, metavar=("DEPTH", "RESOLUTION", "BATCH"))
    show = parser.parse_args().show
    if show:
        if show[1] not in SCHEDULES:
            parser.error(f"RESOLUTION: expected one of {', '.join(map(str, SCHEDULES))}; got {show[1]}")
        print(tables(*show))
        return
    rows = [floor.row() for sizes in product(DEPTHS, RESOLUTIONS, BATCHES) for floor in floors(*sizes)]
    content = {
        "counted": "not measured",
        "dtype": "bfloat16",
        "copy_bytes_per_s": COPY_BYTES_PER_S,
        "product_flops_per_s": PRODUCT_FLOPS_PER_S,
    }
    one_a_line = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    texts = {
        RESULTS / "floors_h200.json": f'{json.dumps(content, indent=1)[:-2]},\n "rows": [\n{one_a_line}\n ]\n}}\n',
        DOCUMENT: INTRODUCTION + tables(depth=16, resolution=256, batch=8),
    }
    for path, text in texts.items():
        with replacing(path) as aside:
            aside.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
