"""Schedules by iteration: learning rate, weight decay, scales in training, optimizer steps.

An iteration is one forward and backward pass; the optimizer steps every `ac` iterations, as in FoundationVision/VAR
(train.py and utils/lr_control.py).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from mvar.train.flags import Flags
from mvar.train.run_flags import RunFlags, require


class Stage(NamedTuple):
    """A stage of progressive training."""

    scales: int
    """number of scales in training"""
    newest_weight: float
    """weight of the loss of the last of these scales"""


def check_stages(flags: Flags, scales: int) -> None:
    """Raise ValueError unless --pg0 is the index of a scale."""
    if flags.pg:
        require(flags.pg0 < scales, "pg0", f"a scale from 0 to {scales - 1}", flags.pg0)


@dataclass(frozen=True)
class RunSchedule:
    """Iterations, optimizer steps, learning rate and weight decay of a run.

    Args:
        per_epoch: iterations per epoch.
        images: images per iteration, over all processes.
    """

    flags: RunFlags
    per_epoch: int
    images: int

    @property
    def decay(self) -> str:
        """The decay of the learning rate after the warm-up, a value of --sche."""
        return self.flags.sche

    @property
    def epochs(self) -> int:
        return max(round(self.flags.ep * self.flags.shorten), 1)

    @property
    def iterations(self) -> int:
        return self.epochs * self.per_epoch

    @property
    def warm_up(self) -> float:
        """Number of warm-up iterations."""
        return (self.flags.wp * self.flags.shorten or self.epochs / 50) * self.per_epoch

    @property
    def peak(self) -> float:
        """Peak learning rate: tblr · images per optimizer step / 256."""
        return self.flags.ac * self.flags.tblr * self.images / 256

    def steps(self, iteration: int) -> bool:
        """Whether the optimizer steps after this iteration; it always does after the last one."""
        return (iteration + 1) % self.flags.ac == 0 or iteration + 1 == self.iterations

    def learning_rate(self, iteration: int) -> float:
        """Linear warm-up from wp0, then decay to wpe by `sche`; wp0 and wpe are relative to the peak."""
        warm_up, last = round(self.warm_up), self.iterations - 1
        if iteration < warm_up:
            return self.peak * (self.flags.wp0 + (1 - self.flags.wp0) * iteration / warm_up)
        progress = (iteration - warm_up) / max(last - warm_up, 1)
        return self.peak * _decay_factor(self.decay, progress, self.flags.wpe)

    def weight_decay(self, iteration: int) -> float:
        """Cosine schedule from twd to twde."""
        end = self.flags.twde or self.flags.twd
        progress = iteration / max(self.iterations - 1, 1)
        return end + (self.flags.twd - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule(RunSchedule):
    """The schedules of the training of a model, and of its scales.

    Args:
        scales: number of scales of the model.

    Raises:
        ValueError: --pg0 is not the index of a scale.
    """

    flags: Flags
    scales: int

    def __post_init__(self) -> None:
        check_stages(self.flags, self.scales)

    @property
    def decay(self) -> str:
        # As in VAR, progressive training overrides `sche`: the decay is piecewise linear with its bend at pg.
        return f"lin{self.flags.pg:g}" if self.flags.pg else self.flags.sche

    def stage(self, iteration: int) -> Stage:
        """Progressive training: scales are added one by one; the loss of a new one is ramped up over `pgwp` epochs."""
        scales = self._scales(iteration)
        first = bisect_left(range(iteration + 1), scales, key=self._scales)  # the iteration that added the last scale
        if scales == self.scales or first == 0:
            return Stage(scales, 1.0)
        ramp = (self.flags.pgwp or self.flags.ep / 300) * self.per_epoch * self.flags.shorten
        return Stage(scales, max(min((iteration - first + 1) / ramp, 1.0), 0.01))

    def _scales(self, iteration: int) -> int:
        flags, end = self.flags, self.iterations * self.flags.pg
        if not flags.pg:
            return self.scales
        if iteration <= self.warm_up:
            return flags.pg0 + 1
        progress = min((iteration - self.warm_up) / (end - self.warm_up), 1.0) if iteration < end else 1.0
        return flags.pg0 + 1 + round(progress * (self.scales - 1 - flags.pg0))


def _decay_factor(kind: str, progress: float, end: float) -> float:
    """Learning rate relative to the peak; progress: 0 after the warm-up, 1 at the end."""
    if kind == "cos":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
    if kind in ("lin", "lin0", "lin00", "exp"):
        flat = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}[kind]
        if progress < flat:
            return 1.0
        if kind == "exp":
            return math.exp((progress - flat) / (1 - flat) * math.log(end))
        return end + (1 - end) * (1 - progress) / (1 - flat)
    bend = float(kind.removeprefix("lin"))
    middle = (1 + end + (1 - end) * (1 - bend)) / 2
    if progress < bend:
        return 1 + (middle - 1) * progress / bend
    return end + (middle - end) * (1 - progress) / (1 - bend)
