"""What is told about a run: means since the last line, speed, the time left; to a log, TensorBoard and the screen."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvar.files import replacing
from mvar.model import Model
from mvar.train.distributed import World
from mvar.train.objective import TokenLosses

# Dense 16-bit products with float32 sums, TFLOP/s, from the makers' data sheets; by the name that CUDA gives.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a known GPU in 16 bits; None for any other device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * tflops for known, tflops in PEAK_TFLOPS.items() if known in name), None)


def flops_per_image(model: Model) -> int:
    """Of a training step: three times the forward's matrix products, attention and scan; what is recomputed, once."""
    config, flops = model.config, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel() * (1 if "ada_lin" in name else config.num_tokens)
    scores = sum(n * n for n in config.scales)
    mixer = 6 * config.inner_width * config.state_dim * config.num_tokens
    return 3 * (flops + config.depth * (4 * config.channels * scores + mixer * (2 if config.bidirectional else 1)))


class Window:
    """Sums over the tokens since the last line of the log, kept on the device and by place in the sequence."""

    def __init__(self, scales: tuple[int, ...], num_codes: int, world: World) -> None:
        self.scales, self.num_codes, self.world = scales, num_codes, world
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(3, sum(self.scales), device=self.world.device)  # losses, hits, images
        self.used: Tensor | None = None

    def add(self, out: TokenLosses, tokens: Tensor) -> None:
        places = tokens.shape[1]
        self.sums[0, :places] += out.nll.sum(0)
        self.sums[1, :places] += (out.predictions == tokens).sum(0)
        self.sums[2, :places] += len(tokens)
        self.used = out.predictions

    def means(self) -> dict[str, float]:
        """Over all processes; the last scale's only when it has been in training.

        code_usage: share of the codes that are predicted in the last batch of all processes (VAR's z_voc_usage).
        """
        assert self.used is not None
        counts = self.world.total(torch.bincount(self.used.flatten(), minlength=self.num_codes).float())
        losses, hits, images = self.world.total(self.sums).double().cpu()
        by_scale = zip(*(part.split(self.scales) for part in (losses, hits, images)), strict=True)
        told = {
            "loss": float(losses.sum() / images.sum()),
            "accuracy": float(hits.sum() / images.sum()),
            "code_usage": float((counts / counts.sum() > 0.001 / self.num_codes).float().mean()),
        }
        for k, (loss, hit, seen) in enumerate(by_scale):
            if seen.sum() > 0:
                told[f"loss_scale{k}"] = float(loss.sum() / seen.sum())
                told[f"accuracy_scale{k}"] = float(hit.sum() / seen.sum())
        last = len(self.scales) - 1
        for name in ("loss", "accuracy"):
            if f"{name}_scale{last}" in told:
                told[f"{name}_last"] = told[f"{name}_scale{last}"]
        return told


class Reporter:
    """Lines for people, rows for programs: `log.jsonl` in the run's folder, TensorBoard, a bar on a terminal.

    Only the first process's says anything. What cannot be written is lost, with one warning, and the run is not.
    Raises ImportError where TensorBoard is asked for and missing.
    """

    def __init__(self, out: Path, leads: bool, *, tensorboard: bool | None, name: str, done: int, total: int) -> None:
        self.leads, self.path, self.name, self.total = leads, out / "log.jsonl", name, total
        self.writer: Any = None
        self.warned = False
        if not leads:
            return
        out.mkdir(parents=True, exist_ok=True)
        if tensorboard is not False:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=done)
            except ImportError as error:
                if tensorboard:
                    raise ImportError("--tb=1 needs TensorBoard: pip install 'mvar[train]'") from error
        self.bar = tqdm(initial=done, total=total, desc=name, file=sys.stdout, disable=None, unit="it")
        with self._warning():
            self._keep(done)

    def advance(self) -> None:
        if self.leads:
            self.bar.update()

    def tell(self, iteration: int, values: dict[str, Any], remaining: float) -> None:
        """One line and one row, after so many iterations."""
        if not self.leads:
            return
        self.row(iteration, values)
        shown = {name: f"{values[name]:.4g}" for name in SHOWN if values.get(name) is not None}
        self.bar.set_postfix(shown)
        if self.bar.disable:
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            left = timedelta(seconds=round(remaining))
            print(f"{self.name}: iteration {iteration} of {self.total}, {left} left, {text}", flush=True)

    def row(self, iteration: int, values: dict[str, Any]) -> None:
        """One row; what is not finite is null, for JSON has no name for it."""
        if not self.leads:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._warning(), self.path.open("a") as stream:
            stream.write(json.dumps({"iteration": iteration, "time": time.time(), **values}) + "\n")
        with self._warning():
            for name, value in values.items():
                if self.writer is not None and value is not None:
                    self.writer.add_scalar(name, value, iteration)

    def say(self, text: str) -> None:
        if self.leads:
            self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self) -> None:
        if self.leads:
            self.bar.close()
            if self.writer is not None:
                with self._warning():
                    self.writer.close()

    def _keep(self, done: int) -> None:
        """Of an older log, the whole rows up to iteration `done`: those after it are about to come again."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _iteration(line) <= done]
        if kept != lines:
            with replacing(self.path) as aside:
                aside.write_bytes(b"".join(kept))

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Say once, rather than raise, that the log cannot be written."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                self.warned = True
                self.say(f"warning: cannot write the log in {self.path.parent}: {error}; training goes on without")


def _iteration(line: bytes) -> float:
    """Of a row; infinity for a line that is none, or not whole."""
    try:
        return int(json.loads(line)["iteration"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


SHOWN = ("accuracy", "loss_last", "gradient_norm", "learning_rate", "images_per_s", "mfu", "skipped", "loss")
