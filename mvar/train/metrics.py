"""What is told about a run: means since the last line, speed, the time left; to a log, TensorBoard and the screen."""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvar.files import make_folder, replacing
from mvar.model import Model
from mvar.train.distributed import World
from mvar.train.objective import TokenLosses
from mvar.train.tensorboard import Board

# Dense 16-bit products with float32 sums, TFLOP/s, from the makers' data sheets; by CUDA's name without the maker's.
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
    """FLOP/s of a known GPU in 16 bits; None for any other device, also for a part of a known one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next(
        (1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.fullmatch(f"(NVIDIA )?({known})", name)), None
    )


def flops_per_image(model: Model, scales: int | None = None) -> int:
    """Of a training step with the first scales, None for all: three times the forward's matrix products, attention and
    scan; what is recomputed, once."""
    config, flops = model.config, 0
    tokens = config.scales[:scales]
    ends = list(accumulate(tokens))
    rows = {"ada_lin": 1, "word_embed": ends[-1] - tokens[0]}  # by part of a layer's name: an image, tokens with inputs
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel() * next((n for part, n in rows.items() if part in name), ends[-1])
    seen = tokens if model.architecture == "mvar" else ends
    flops += config.depth * 4 * config.channels * sum(n * m for n, m in zip(tokens, seen, strict=True))
    if model.architecture == "mvar":
        directions = 2 if config.bidirectional else 1
        flops += config.depth * directions * 6 * config.inner_width * config.state_dim * ends[-1]
    return 3 * flops


class Window:
    """Sums over the tokens since the last line of the log, kept on the device and by place in the sequence.

    Of images whose losses are all finite: the others are counted.
    """

    def __init__(self, scales: tuple[int, ...], num_codes: int, world: World) -> None:
        self.scales, self.num_codes, self.world = scales, num_codes, world
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(
            3, sum(self.scales), dtype=torch.float32, device=self.world.device
        )  # losses, hits, images
        self.not_finite = torch.zeros((), dtype=torch.float32, device=self.world.device)  # images
        self.used: Tensor | None = None

    def add(self, out: TokenLosses, tokens: Tensor) -> None:
        places = tokens.shape[1]
        finite = out.nll.isfinite().all(1, keepdim=True)  # (B, 1)
        self.sums[0, :places] += out.nll.where(finite, 0).sum(0)
        self.sums[1, :places] += ((out.predictions == tokens) & finite).sum(0)
        self.sums[2, :places] += finite.sum()
        self.not_finite += (~finite).sum()
        self.used = out.predictions

    def means(self) -> dict[str, float]:
        """Over all processes; the last scale's only when it has been in training.

        code_usage: share of the codes that are predicted in the last batch of all processes (VAR's z_voc_usage).
        not_finite: images that are left out, because a loss of theirs is infinite or no number.
        """
        assert self.used is not None
        counts = self.world.total(torch.bincount(self.used.flatten(), minlength=self.num_codes).float())
        losses, hits, images = self.world.total(self.sums).double().cpu()
        by_scale = zip(*(part.split(self.scales) for part in (losses, hits, images)), strict=True)
        told = {
            "loss": float(losses.sum() / images.sum()),
            "accuracy": float(hits.sum() / images.sum()),
            "code_usage": float((counts / counts.sum() > 0.001 / self.num_codes).float().mean()),
            "not_finite": int(self.world.total(self.not_finite)),
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

    Args:
        tensorboard: None for where it is installed.
        sides: pixels of the picture that each scale's token map stands for.

    Raises ImportError where TensorBoard is asked for and missing.
    """

    def __init__(
        self,
        out: Path,
        leads: bool,
        *,
        tensorboard: bool | None,
        name: str,
        done: int,
        total: int,
        sides: tuple[int, ...] = (),
    ) -> None:
        self.leads, self.path, self.name, self.total = leads, out / "log.jsonl", name, total
        self.board: Board | None = None
        self.warned = False
        if not leads:
            return
        self.bar = tqdm(initial=done, total=total, desc=name, file=sys.stdout, disable=None, unit="it")
        with self._warning():
            make_folder(out)
            self._keep(done)
        if tensorboard is not False:
            with self._warning(), suppress(*([] if tensorboard else [ImportError])):
                self.board = Board(out / "tensorboard", done, sides)

    def advance(self) -> None:
        if self.leads:
            self.bar.update()

    def tell(self, iteration: int, values: dict[str, Any], remaining: float) -> None:
        """One line and one row, after so many iterations."""
        if not self.leads:
            return
        self.row(iteration, values)
        shown = _shown(values, SHOWN)
        self.bar.set_postfix(shown)
        if self.bar.disable:
            left = timedelta(seconds=round(remaining))
            self.say(f"{self.name}: iteration {iteration} of {self.total}, {left} left, {_line(shown)}")

    def tell_validation(self, iteration: int, values: dict[str, Any]) -> None:
        """One line and one row; in the row the names begin with val_."""
        if not self.leads:
            return
        self.row(iteration, {f"val_{name}": value for name, value in values.items()})
        self.say(f"{self.name}: validation after iteration {iteration}: {_line(_shown(values, SHOWN_OF_VALIDATION))}")

    def row(self, iteration: int, values: dict[str, Any]) -> None:
        """One row; what is not finite is null, for JSON has no name for it."""
        if not self.leads:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._warning(), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"iteration": iteration, "time": time.time(), **values}) + "\n")
        if self.board is not None:
            with self._warning():
                self.board.show(iteration, values)

    def say(self, text: str) -> None:
        if self.leads:
            self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def close(self) -> None:
        if self.leads:
            self.bar.close()
            if self.board is not None:
                with self._warning():
                    self.board.close()

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


def _shown(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """All but what is not known, and counts of nothing."""
    given = ((name, values.get(name)) for name in names)
    return {name: f"{value:.4g}" for name, value in given if value or isinstance(value, float)}


def _line(shown: Mapping[str, str]) -> str:
    return " ".join(f"{name} {value}" for name, value in shown.items())


SHOWN = (  # the first ones are left where a terminal is narrow
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
SHOWN_OF_VALIDATION = ("loss", "loss_last", "accuracy", "accuracy_last")
