"""`mvar train` on one side, and where its time went: `python -m benchmarks.training_run SIDE FOLDER --flag=value …`.

A side is what computes the model and its loss. Everything else is mvar's own, the same for all: pictures, tokenizer,
order, drops, autocast, optimizer, metrics, checkpoints, the grid of pictures. Seconds by part are left in
`parts.json` in the run's folder.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from mvar.cli import main as mvar_command
from mvar.model import Model
from mvar.train import run, trainer
from mvar.train.objective import Objective, TokenLosses
from mvar.train.trainer import Trainer


class EagerObjective(Objective):
    """The same numbers by :mod:`benchmarks.plain`, for runs that need no more of :class:`Objective` than the digits."""

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        tokens: Tensor,
        draws: Tensor | None = None,
        *,
        newest_weight: float = 1.0,
        share: float = 1.0,
    ) -> TokenLosses:
        if (self.smoothing, newest_weight, share) != (0, 1, 1):
            raise ValueError("--ls, --pg, --ac: expected their defaults")
        x, cond = self.features(labels, inputs, draws)
        return TokenLosses(*self.losses(self.model, x, cond, tokens))

    def features(self, labels: Tensor, inputs: Tensor, draws: Tensor | None) -> plain.Features:
        return plain.features(self.model, labels, inputs, draws)

    def losses(self, model: Model, x: Tensor, cond: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = plain.logits(model, x, cond)
        nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        return nll.mean(), nll.detach(), logits.detach().argmax(-1)


class CompiledObjective(EagerObjective):
    """One graph for all blocks and one for head and loss. Validation, of other shapes, is not worth compiling for."""

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
        self.compiled_block, self.compiled_losses = torch.compile(plain.block), torch.compile(super().losses)

    def features(self, labels: Tensor, inputs: Tensor, draws: Tensor | None) -> plain.Features:
        if not self.training:
            return super().features(labels, inputs, draws)
        return plain.features(self.model, labels, inputs, draws, self.compiled_block)

    def losses(self, model: Model, x: Tensor, cond: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super().losses(model, x, cond, tokens)
        found: tuple[Tensor, Tensor, Tensor] = self.compiled_losses(model, x, cond, tokens)
        return found


OURS, EAGER, COMPILED, EXACT = "mvar", "eager PyTorch", "torch.compile", "reference in float64"
OBJECTIVES: dict[str, type[Objective]] = {
    OURS: Objective,
    EAGER: EagerObjective,
    COMPILED: CompiledObjective,
    EXACT: Objective,
}

FIRST = "first step"
PARTS: tuple[tuple[Any, str, str], ...] = (
    (run, "train_digits_tokenizer", "tokenizer"),
    (run, "digits_data", "tokens"),
    (Trainer, "run", "steps"),
    (Trainer, "_train_on", FIRST),
    (Trainer, "_validate", "validation"),
    (Trainer, "_save", "checkpoints"),
    (run, "draw", "grid"),
)
"""Where each part is called. A part inside another counts for itself alone."""


@contextmanager
def observed() -> Iterator[dict[str, float]]:
    """Seconds by part of what is run inside; of the first step, forward and backward, which compile where one does."""
    spent: dict[str, float] = {}

    def timed(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == FIRST and FIRST in spent:
                return original(*args, **kwargs)
            start, inside = time.perf_counter(), sum(spent.values())
            try:
                return original(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start - (sum(spent.values()) - inside)
                spent[name] = spent.get(name, 0.0) + taken

        return call

    with ExitStack() as stack:
        for owner, attribute, name in PARTS:
            stack.enter_context(mock.patch.object(owner, attribute, timed(getattr(owner, attribute), name)))
        yield spent


@contextmanager
def side(name: str) -> Iterator[None]:
    """Trainers made in here compute the model as this side does."""
    new_model = run.new_model

    def exact(*args: Any) -> Model:
        return new_model(*args).double()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "Objective", OBJECTIVES[name]))
        if name == EXACT:
            stack.enter_context(mock.patch.object(run, "new_model", exact))
        yield


def main(arguments: Sequence[str]) -> None:
    name, out, *flags = arguments
    backend = ["--backend=reference"] if name == EXACT else []
    with side(name), observed() as spent:
        mvar_command(["train", f"--out={out}", *backend, *flags])
    (Path(out) / "parts.json").write_text(json.dumps(spent))


if __name__ == "__main__":
    main(sys.argv[1:])
