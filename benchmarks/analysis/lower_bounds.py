"""Lower bounds of each op's time on an H200, counted.

Bytes and FLOPs are those of the ops' specs, in bfloat16, forward; the rates are those that a device copy and a matmul
reach there. `python -m benchmarks.report` writes results/floors_h200.json and docs/generated/lower_bounds.md, an
excerpt.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

from benchmarks.common.markdown import table, three_digits
from mvar.models.config import HEAD_DIM, SCHEDULES, ModelConfig
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case

COPY_BYTES_PER_S = 4.3e12  # read and written, by a device copy
MATMUL_FLOPS_PER_S = 790e12  # bfloat16, dense
ITEMSIZE = 2
DEPTHS, RESOLUTIONS, BATCHES = (16, 30), (256, 512), (1, 8, 64)
SAMPLING = ("sample_tokens", "soft_embedding")


class LowerBound(NamedTuple):
    """One op on the new tokens of one scale of a generation, or (scale None) on a training sequence.

    batch: images; with guidance a generation step has twice as many rows in all ops but token sampling.
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
    def limits_us(self) -> dict[str, float]:
        memory, arithmetic = self.moved_bytes / COPY_BYTES_PER_S, self.flops / MATMUL_FLOPS_PER_S
        return {"memory": 1e6 * memory, "arithmetic": 1e6 * arithmetic}

    @property
    def us(self) -> float:
        return max(self.limits_us.values())

    @property
    def bound(self) -> str:
        return max(self.limits_us, key=self.limits_us.__getitem__)


def cases(config: ModelConfig, rows: int, images: int, scales: tuple[int, ...], new: int) -> Mapping[str, Case]:
    """Every op on the last `new` of these scales: the newest one in a generation, all of them in training."""
    newest = scales[-new:]
    tokens = sum(newest)
    attention = {"B": rows, "H": config.heads, "D": HEAD_DIM}
    row = {"B": rows, "L": tokens, "C": config.channels}
    scan = row | {"H": config.mixer_heads, "P": config.mixer_head_dim, "N": config.state_dim}
    sample = Case("", {"B": images, "l": tokens, "V": config.num_codes}, {"guided": False})
    return {
        "adaln": Case("", row),
        "gated_adaln": Case("", row),
        "scale_attention": Case("", attention, {"scales": newest, "pattern": "diagonal"}),
        "scale_attention (causal)": Case("", attention, {"scales": scales, "pattern": "causal", "query_scales": new}),
        "ssd_scan": Case("", scan, {"scales": None}),
        "mamba2_mixer": Case("", scan, {"scales": None}),
        **dict.fromkeys(SAMPLING, sample),
    }


def lower_bounds(depth: int, resolution: int, batch: int) -> Iterator[LowerBound]:
    config = ModelConfig(depth=depth, patch_nums=SCHEDULES[resolution])
    count = len(config.scales)
    for scale in (*range(1, count + 1), None):
        scales, new = (config.scales, count) if scale is None else (config.scales[:scale], 1)
        rows = batch if scale is None else 2 * batch
        for op, case in cases(config, rows, batch, scales, new).items():
            if scale is not None or op not in SAMPLING:  # training samples no tokens
                work = SPECS[op.split()[0]].work(case, ITEMSIZE)
                yield LowerBound(op, depth, resolution, batch, scale, sum(scales[-new:]), *work)


def content() -> str:
    """Of results/floors_h200.json, one bound a line."""
    head = {
        "counted": "not measured",
        "dtype": "bfloat16",
        "copy_bytes_per_s": COPY_BYTES_PER_S,
        "product_flops_per_s": MATMUL_FLOPS_PER_S,
    }
    found = (each for sizes in product(DEPTHS, RESOLUTIONS, BATCHES) for each in lower_bounds(*sizes))
    rows = (each._asdict() | {"floor_us": float(f"{each.us:.4g}"), "bound": each.bound} for each in found)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


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
`benchmarks/results/floors_h200.json`; `python -m benchmarks.report` writes both files.

d16, 256×256, batch 8.
"""


def page() -> str:
    """A table for each op."""
    tables: dict[str, list[tuple[object, ...]]] = {}
    for each in lower_bounds(depth=16, resolution=256, batch=8):
        scale = "training" if each.scale is None else each.scale
        figures = map(three_digits, (each.moved_bytes / 1e6, each.flops / 1e6, each.us))
        tables.setdefault(each.op, []).append((scale, each.tokens, *figures, each.bound))
    columns = ("scale", "tokens", "moved, MB", "MFLOP", "lower bound, µs", "bound by")
    return INTRODUCTION + "".join(f"\n### {op}\n\n{table(columns, rows)}" for op, rows in tables.items())
