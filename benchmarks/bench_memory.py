"""Memory and time of a generation from a file: `python -m benchmarks.bench_memory`.

Loads random weights from a file in a process of its own, by `mvar.load_model` and `load_tokenizer` with a dtype, or in
float32 for `mvar.generate` to convert, and generates one image with guidance. The peaks are those of resident memory
above that of the process after its imports; pages of the memory-mapped file count.
"""

import json
import struct
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import mvar
from benchmarks.common.environment import DEVICE, argument_parser
from benchmarks.common.memory import held_gib, in_subprocess, peak_gib
from benchmarks.common.results import load as load_rows
from benchmarks.common.results import save
from benchmarks.generation.plan import DTYPES
from mvar.checkpoint import load_packaged
from mvar.models.weights import without_storage
from mvar.stored import CONFIG_KEY

INFERENCE, TABULATED, FLOAT32 = WAYS = ("inference", "inference, known labels", "float32 model")
"""`load_model(..., dtype)`, also with `labels`, and `load_model(...)`."""
STORAGE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}
Row = dict[str, Any]


def write_random(path: Path, config: mvar.ModelConfig, dtype: torch.dtype) -> None:
    """Write a model with random weights tensor by tensor: those of d30 in float32 need not fit into memory.

    Args:
        dtype: of floating-point weights.
    """
    with without_storage():
        state = mvar.from_config(config).state_dict()
    dtypes = {name: dtype if t.is_floating_point() else t.dtype for name, t in state.items()}
    header: dict[str, Any] = {"__metadata__": {CONFIG_KEY: json.dumps(asdict(config))}}
    end = 0
    for name, t in state.items():
        start, end = end, end + t.numel() * dtypes[name].itemsize
        header[name] = {"dtype": STORAGE_NAMES[dtypes[name]], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, t in state.items():
            values = random_values(name, t.shape, config, generator).to(dtypes[name]).contiguous()
            file.write(values.flatten().view(torch.uint8).numpy().data)


def random_values(name: str, shape: torch.Size, config: mvar.ModelConfig, generator: torch.Generator) -> Tensor:
    """Values of a weight, with decays of the mixer as in Mamba-2."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "patch_nums":
        return torch.tensor(config.scales)
    if kind == "lvl_1L":
        return torch.arange(len(config.scales)).repeat_interleave(torch.tensor(config.scales))[None]
    low, high = {"A_log": (0.0, 2.7), "dt_bias": (-7.0, -2.0), "D": (1.0, 1.0)}.get(kind, (-0.03, 0.03))
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.empty(shape).uniform_(low, high, generator=generator)


def measure(way: str, model_file: Path, tokenizer_file: Path, dtype: torch.dtype, batch: int) -> Row:
    """Load and generate in this process. GiB above what it holds now; seconds."""
    labels = list(range(0, 37 * batch, 37))
    digits = [load_packaged("digits", "digits_tokenizer")]
    mvar.generate(*digits.pop(), [1], dtype=dtype)  # for the memory of imports and thread pools
    before = held_gib()
    pair: list[Any] = []

    def load() -> None:
        if way == FLOAT32:
            pair[:] = mvar.load_model(model_file, device=DEVICE), mvar.load_tokenizer(tokenizer_file, device=DEVICE)
            return
        classes = labels if way == TABULATED else None
        model = mvar.load_model(model_file, device=DEVICE, dtype=dtype, labels=classes)
        pair[:] = model, mvar.load_tokenizer(tokenizer_file, device=DEVICE, dtype=dtype, encoder=False)

    def generate() -> None:
        mvar.generate(pair[0], pair[1], labels, dtype=dtype)

    start = time.perf_counter()
    loading = peak_gib(load)
    loaded = time.perf_counter()
    held = held_gib()
    generating = peak_gib(generate)
    first = time.perf_counter()
    generate()
    return {
        "loading_peak_gib": loading - before,
        "held_gib": held - before,
        "generation_peak_gib": generating - before,
        "load_s": loaded - start,
        "first_generation_s": first - loaded,
        "generation_s": time.perf_counter() - first,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[16])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--stored", choices=DTYPES, default="fp32", help="dtype in the file (default: fp32)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the files of weights (default: a temporary one)")
    options = parser.parse_args()
    stored = getattr(torch, DTYPES[options.stored])
    with TemporaryDirectory(dir=options.folder) as folder:
        tokenizer_file = Path(folder) / "tokenizer.safetensors"
        mvar.save(tokenizer_file, mvar.build(1)[1])
        for depth in options.depths:
            config = mvar.ModelConfig(depth, mvar.SCHEDULES[256])
            rows: list[Row] = load_rows(f"loading_d{depth}") or []
            file = Path(folder) / "model.safetensors"
            write_random(file, config, stored)
            with without_storage():
                sizes = {name: p.numel() for name, p in mvar.from_config(config).named_parameters()}
            for name, way in product(options.dtypes, options.ways):
                dtype = getattr(torch, DTYPES[name])
                weights = sum(n for weight, n in sizes.items() if way != TABULATED or "ada_" not in weight)
                case = {"depth": depth, "batch": options.batch, "dtype": name, "stored": options.stored, "way": way}
                found = in_subprocess(measure, way, file, tokenizer_file, dtype, options.batch)
                rows = [row for row in rows if not row.items() >= case.items()]
                rows.append(case | {"weights_gib": weights * dtype.itemsize / 2**30} | found)
                print(rows[-1], flush=True)
                print(save(f"loading_d{depth}", rows), flush=True)


if __name__ == "__main__":
    main()
