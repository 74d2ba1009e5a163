"""What follows from an iteration's number alone: learning rate, weight decay, the scales in training, when to step.

An iteration is one forward and backward; every `ac` iterations make a step (FoundationVision/VAR, train.py and
utils/lr_control.py, counts the same way).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from mvar.train.flags import Flags, require


class Stage(NamedTuple):
    """scales: how many of them are in training. newest_weight: of the loss of the last of them."""

    scales: int
    newest_weight: float


def check_stages(flags: Flags, scales: int) -> None:
    """Raise ValueError where progressive training cannot begin with --pg0."""
    if flags.pg:
        require(flags.pg0 < scales, "pg0", f"a scale from 0 to {scales - 1}", flags.pg0)


@dataclass(frozen=True)
class Schedule:
    """The course of a run of `flags`: iterations an epoch, images a batch of one iteration, the model's scales.

    Raises ValueError where --pg0 is none of the scales.
    """

    flags: Flags
    per_epoch: int
    images: int
    scales: int

    def __post_init__(self) -> None:
        check_stages(self.flags, self.scales)

    @property
    def epochs(self) -> int:
        return max(round(self.flags.ep * self.flags.shorten), 1)

    @property
    def iterations(self) -> int:
        return self.epochs * self.per_epoch

    @property
    def warm_up(self) -> float:
        """Iterations of it."""
        return (self.flags.wp * self.flags.shorten or self.epochs / 50) * self.per_epoch

    @property
    def peak(self) -> float:
        """The largest learning rate: tblr · images a step / 256."""
        return self.flags.ac * self.flags.tblr * self.images / 256

    def steps(self, iteration: int) -> bool:
        """Whether the optimizer steps after this iteration. The last one always does."""
        return (iteration + 1) % self.flags.ac == 0 or iteration + 1 == self.iterations

    def learning_rate(self, iteration: int) -> float:
        """A linear warm-up from wp0, then the shape of `sche` down to wpe; both are shares of the peak."""
        warm_up, last = round(self.warm_up), self.iterations - 1
        if iteration < warm_up:
            return self.peak * (self.flags.wp0 + (1 - self.flags.wp0) * iteration / warm_up)
        past = (iteration - warm_up) / max(last - warm_up, 1)
        # With progressive training, half the way down to the line is gone when the last scale comes in.
        kind = f"lin{self.flags.pg:g}" if self.flags.pg else self.flags.sche
        return self.peak * _share(kind, past, self.flags.wpe)

    def weight_decay(self, iteration: int) -> float:
        """A half cosine from twd to twde."""
        end = self.flags.twde or self.flags.twd
        past = iteration / max(self.iterations - 1, 1)
        return end + (self.flags.twd - end) * (0.5 + 0.5 * math.cos(math.pi * past))

    def stage(self, iteration: int) -> Stage:
        """Progressive training: the first scales only, one more at a time, whose loss comes in over `pgwp` epochs."""
        scales = self._scales(iteration)
        first = bisect_left(range(iteration + 1), scales, key=self._scales)  # the iteration that brought the last one
        if scales == self.scales or first == 0:
            return Stage(scales, 1.0)
        coming_in = (self.flags.pgwp or self.flags.ep / 300) * self.per_epoch * self.flags.shorten
        return Stage(scales, max(min((iteration - first + 1) / coming_in, 1.0), 0.01))

    def _scales(self, iteration: int) -> int:
        flags, end = self.flags, self.iterations * self.flags.pg
        if not flags.pg:
            return self.scales
        if iteration <= self.warm_up:
            return flags.pg0 + 1
        past = min((iteration - self.warm_up) / (end - self.warm_up), 1.0) if iteration < end else 1.0
        return flags.pg0 + 1 + round(past * (self.scales - 1 - flags.pg0))


def _share(kind: str, past: float, end: float) -> float:
    """Of the peak rate, at a share `past` of the way after the warm-up."""
    if kind == "cos":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * past))
    if kind in ("lin", "lin0", "lin00", "exp"):
        flat = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}[kind]
        if past < flat:
            return 1.0
        if kind == "exp":
            return math.exp((past - flat) / (1 - flat) * math.log(end))
        return end + (1 - end) * (1 - past) / (1 - flat)
    bend = float(kind.removeprefix("lin"))
    middle = (1 + end + (1 - end) * (1 - bend)) / 2
    if past < bend:
        return 1 + (middle - 1) * past / bend
    return end + (middle - end) * (1 - past) / (1 - bend)
