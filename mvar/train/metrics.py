"""Metrics of a run: accumulated since the last log line; written to log.jsonl, TensorBoard and the terminal."""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvar.models.transformer import Model
from mvar.train.distributed import TrainContext
from mvar.train.objective import TokenLosses
from mvar.train.tensorboard import Tag, TensorBoardWriter
from mvar.utils.files import atomic_write, make_folder

# Dense 16-bit matmuls with float32 accumulation, TFLOP/s, from NVIDIA's data sheets; by device name without NVIDIA.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312,
    "L40S": 362,
    "L4": 121,
    "GeForce RTX 4090": 165,
}


def peak_flops(device: torch.device) -> float | None:
    """16-bit FLOP/s of a known GPU; None for any other device and for a MIG slice."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next(
        (1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.fullmatch(f"(NVIDIA )?({known})", name)), None
    )


def flops_per_image(model: Model, scales: int | None = None) -> int:
    """FLOPs of a training step per image: three times the FLOPs of matmuls, attention and scan in the forward pass.

    Args:
        scales: number of scales in training, None for all.

    Recomputation by activation checkpointing is not counted.
    """
    config, flops = model.config, 0
    tokens = config.scales[:scales]
    ends = list(accumulate(tokens))
    rows = {"ada_lin": 1, "word_embed": ends[-1] - tokens[0]}  # rows per image, by part of a layer's name
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel() * next((n for part, n in rows.items() if part in name), ends[-1])
    seen = tokens if model.architecture == "mvar" else ends
    flops += config.depth * 4 * config.channels * sum(n * m for n, m in zip(tokens, seen, strict=True))
    if model.architecture == "mvar":
        directions = 2 if config.bidirectional else 1
        flops += config.depth * directions * 6 * config.inner_width * config.state_dim * ends[-1]
    return 3 * flops


class MetricAccumulator:
    """Sums of losses and correct predictions by position in the sequence, on the device until the next log line.

    Images with a loss that is not finite are excluded and counted.
    """

    def __init__(self, scales: tuple[int, ...], num_codes: int, context: TrainContext) -> None:
        self.scales, self.num_codes, self.context = scales, num_codes, context
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(
            3, sum(self.scales), dtype=torch.float32, device=self.context.device
        )  # losses, hits, images
        self.not_finite = torch.zeros((), dtype=torch.float32, device=self.context.device)  # images
        self.last_predictions: Tensor | None = None

    def add(self, out: TokenLosses, tokens: Tensor) -> None:
        length = tokens.shape[1]
        finite = out.nll.isfinite().all(1, keepdim=True)  # (B, 1)
        self.sums[0, :length] += out.nll.where(finite, 0).sum(0)
        self.sums[1, :length] += ((out.predictions == tokens) & finite).sum(0)
        self.sums[2, :length] += finite.sum()
        self.not_finite += (~finite).sum()
        self.last_predictions = out.predictions

    def means(self) -> dict[str, float]:
        """Means over all processes by name; per-scale metrics only for scales that were in training.

        code_usage: fraction of the codes that are predicted in the last batch of all processes (VAR's z_voc_usage).
        not_finite: number of excluded images.
        """
        assert self.last_predictions is not None
        counts = torch.bincount(self.last_predictions.flatten(), minlength=self.num_codes).float()
        counts = self.context.all_reduce_sum(counts)
        losses, hits, images = self.context.all_reduce_sum(self.sums).double().cpu()
        by_scale = zip(*(part.split(self.scales) for part in (losses, hits, images)), strict=True)
        means = {
            "loss": float(losses.sum() / images.sum()),
            "accuracy": float(hits.sum() / images.sum()),
            "code_usage": float((counts / counts.sum() > 0.001 / self.num_codes).float().mean()),
            "not_finite": int(self.context.all_reduce_sum(self.not_finite)),
        }
        for k, (loss, hit, seen) in enumerate(by_scale):
            if seen.sum() > 0:
                means[f"loss_scale{k}"] = float(loss.sum() / seen.sum())
                means[f"accuracy_scale{k}"] = float(hit.sum() / seen.sum())
        last = len(self.scales) - 1
        for name in ("loss", "accuracy"):
            if f"{name}_scale{last}" in means:
                means[f"{name}_last"] = means[f"{name}_scale{last}"]
        return means


class Throughput:
    """Training speed since the last log line, and the remaining time of the run.

    Args:
        peak_flops: FLOP/s of all devices of the run, None where unknown.

    Attributes:
        iteration: of the last log line.
        flops: since the last log line, to be incremented by the trainer.
    """

    def __init__(self, peak_flops: float | None) -> None:
        self.peak_flops = peak_flops
        self.start(0)

    def start(self, iteration: int) -> None:
        """Begin a run that has completed so many iterations."""
        self.iteration = self.first_iteration = iteration
        self.time = self.first_time = time.perf_counter()
        self.flops = 0

    def since_last(self, iteration: int, images_per_iteration: int) -> dict[str, float | None]:
        """images_per_s and mfu (model FLOPs utilization) up to this iteration; the next interval begins here."""
        now = time.perf_counter()
        seconds = now - self.time
        speed = {
            "images_per_s": (iteration - self.iteration) * images_per_iteration / seconds,
            "mfu": self.flops / (seconds * self.peak_flops) if self.peak_flops else None,
        }
        self.iteration, self.time, self.flops = iteration, now, 0
        return speed

    def remaining_seconds(self, iteration: int, total: int) -> float:
        """At the mean speed of this run."""
        elapsed = time.perf_counter() - self.first_time
        return (total - iteration) * elapsed / (iteration - self.first_iteration)


TRAINING_METRICS = (  # a narrow terminal cuts off the last ones
    "loss",
    "loss_last",
    "accuracy",
    "gradient_norm",
    "learning_rate",
    "images_per_s",
    "mfu",
    "skipped",
    "not_finite",
    "unreadable",
)
VALIDATION_METRICS = ("loss", "loss_last", "accuracy", "accuracy_last")


class MetricLogger:
    """Writes metrics to `log.jsonl` in the run's folder, to TensorBoard, and to a progress bar or the terminal.

    Only the main process's logger writes. A log that cannot be written costs a warning and does not end the run.

    Args:
        tensorboard: write TensorBoard events; None if it is installed.
        iteration: completed iterations; later rows of an earlier log are removed.
        tags: TensorBoard's tags of metrics.
        training, validation: the metrics of a line for the terminal.

    Raises ImportError if `tensorboard` is True and TensorBoard is not installed.
    """

    def __init__(
        self,
        out: Path,
        is_main_process: bool,
        *,
        tensorboard: bool | None,
        name: str,
        iteration: int,
        total: int,
        tags: Mapping[str, Tag] | None = None,
        training: Sequence[str] = TRAINING_METRICS,
        validation: Sequence[str] = VALIDATION_METRICS,
    ) -> None:
        self.training, self.validation = training, validation
        self.is_main_process, self.path, self.name, self.total = is_main_process, out / "log.jsonl", name, total
        self.tensorboard: TensorBoardWriter | None = None
        self.warned = False
        if not is_main_process:
            return
        self.bar = tqdm(initial=iteration, total=total, desc=name, file=sys.stdout, disable=None, unit="it")
        with self._warning():
            make_folder(out)
            self._truncate(iteration)
        if tensorboard is not False:
            with self._warning(), suppress(*([] if tensorboard else [ImportError])):
                self.tensorboard = TensorBoardWriter(out / "tensorboard", iteration, tags or {})

    def advance(self) -> None:
        if self.is_main_process:
            self.bar.update()

    def log(self, iteration: int, values: dict[str, Any], remaining_seconds: float) -> None:
        """Write a row of training metrics, and a line for the terminal."""
        if not self.is_main_process:
            return
        self.row(iteration, values)
        formatted = _formatted(values, self.training)
        self.bar.set_postfix(formatted)
        if self.bar.disable:
            left = timedelta(seconds=round(remaining_seconds))
            self.print(f"{self.name}: iteration {iteration} of {self.total}, {left} left, {_line(formatted)}")

    def log_validation(self, iteration: int, values: dict[str, Any]) -> None:
        """Write a row of validation metrics, whose names begin with val_, and a line for the terminal."""
        if not self.is_main_process:
            return
        self.row(iteration, {f"val_{name}": value for name, value in values.items()})
        line = _line(_formatted(values, self.validation))
        self.print(f"{self.name}: validation after iteration {iteration}: {line}")

    def has_validation(self, iteration: int) -> bool:
        """Whether log.jsonl has a row of validation metrics of this iteration; False if it does not exist."""
        if not self.is_main_process or not self.path.is_file():
            return False
        with self._warning():
            lines = self.path.read_bytes().splitlines(keepends=True)
            return any(b'"val_' in line and _iteration(line) == iteration for line in lines)
        return False

    def row(self, iteration: int, values: dict[str, Any]) -> None:
        """Write a row of log.jsonl and TensorBoard; values that are not finite are null, which JSON lacks."""
        if not self.is_main_process:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._warning(), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"iteration": iteration, "time": time.time(), **values}) + "\n")
        if self.tensorboard is not None:
            with self._warning():
                self.tensorboard.add(iteration, values)

    def image(self, iteration: int, name: str, image: Tensor) -> None:
        """Write an image, (3, H, W) in [0, 1], to TensorBoard."""
        if self.is_main_process and self.tensorboard is not None:
            with self._warning():
                self.tensorboard.add_image(iteration, name, image)

    def print(self, text: str) -> None:
        if self.is_main_process:
            self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self) -> None:
        if self.is_main_process:
            self.bar.close()
            if self.tensorboard is not None:
                with self._warning():
                    self.tensorboard.close()

    def _truncate(self, iteration: int) -> None:
        """Remove incomplete rows, and rows after this iteration, from the log of an interrupted run."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _iteration(line) <= iteration]
        if kept != lines:
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Warn once instead of raising if the log cannot be written."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                self.warned = True
                self.print(f"warning: cannot write the log in {self.path.parent}: {error}; training continues without")


def _iteration(line: bytes) -> float:
    """A row's iteration; infinity for a line that is not a complete row."""
    try:
        return int(json.loads(line)["iteration"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _formatted(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Without unknown values and counts of zero."""
    given = ((name, values.get(name)) for name in names)
    return {name: f"{value:.4g}" for name, value in given if value or isinstance(value, float)}


def _line(formatted: Mapping[str, str]) -> str:
    return " ".join(f"{name} {value}" for name, value in formatted.items())
