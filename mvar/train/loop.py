"""The loop of a training run: batches, optimizer steps, logging, validation, checkpoints, signals."""

import json
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from mvar.data import Batch, Source
from mvar.train.checkpoint import Checkpoints
from mvar.train.distributed import TrainContext
from mvar.train.metrics import MetricLogger, Throughput, peak_flops
from mvar.train.optimizer import OptimizerStep, StepResult
from mvar.train.run_flags import RunFlags
from mvar.train.schedule import RunSchedule
from mvar.utils.signals import handling

VALIDATION_EPOCHS = 10  # between two validations, as in VAR
GRACE_SECONDS = 2.0  # a launcher may forward within this time a signal that the process group received as well


AnyFlags = TypeVar("AnyFlags", bound=RunFlags)
AnySchedule = TypeVar("AnySchedule", bound=RunSchedule)


class Interrupted(Exception):
    """Training stopped on a signal, after it saved a checkpoint."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def exit_when_interrupted() -> Iterator[None]:
    """Turn Interrupted into its message and the exit status of a process that the signal ended."""
    try:
        yield
    except Interrupted as error:
        print(error, flush=True)
        sys.exit(128 + error.signal)


def local_batch(flags: RunFlags, context: TrainContext) -> int:
    """Images per iteration of one process."""
    return round(flags.bs / flags.ac / context.world_size)


class Loop(ABC, Generic[AnyFlags, AnySchedule]):
    """One training run: :meth:`resume` loads the newest checkpoint, :meth:`run` trains to the end.

    Args:
        source, validation: of images or tokens.
        seed: seed of the data order and of all other random numbers of the training.
        optimizer: of the trained network.
        kind: "model" or "tokenizer", see :class:`mvar.train.checkpoint.Checkpoints`.

    Attributes:
        iteration: completed iterations. An iteration is one forward and backward pass.
        saved_iteration: the one of the last checkpoint, 0 without one.
    """

    def __init__(
        self,
        flags: AnyFlags,
        source: Source,
        validation: Source | None,
        context: TrainContext,
        *,
        seed: int,
        schedule: AnySchedule,
        optimizer: OptimizerStep,
        kind: str,
        peak_tflops: float | None = None,
    ) -> None:
        self.flags, self.source, self.validation, self.context, self.seed = flags, source, validation, context, seed
        self.schedule, self.optimizer = schedule, optimizer
        self.digest = source.digest()
        self.local_batch = local_batch(flags, context)
        self.checkpoints = Checkpoints(Path(flags.out), context, kind)
        peak = 1e12 * peak_tflops if peak_tflops else peak_flops(context.device)
        self.throughput = Throughput(peak and peak * context.world_size)
        self.iteration = self.saved_iteration = 0
        self.stop_signal: int | None = None

    @abstractmethod
    def _forward_backward(self, batch: Batch) -> None:
        """The forward and backward pass of iteration `self.iteration`."""

    @abstractmethod
    def _metrics(self, logger: MetricLogger) -> Mapping[str, Any]:
        """Metrics since the last log line, which begin anew. Collective: every process calls it."""

    @abstractmethod
    def _validate(self, logger: MetricLogger) -> None:
        """Evaluate the validation set, if there is one, and log the result. Collective: every process calls it."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint contains besides tensors and the common state, serializable as JSON."""

    @abstractmethod
    def _identity(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """What a resumed run must have in common with its checkpoint besides flags and data: name, saved, now."""

    @abstractmethod
    def _logger_options(self) -> dict[str, Any]:
        """Optional arguments of MetricLogger."""

    def _step(self, learning_rate: float, weight_decay: float) -> StepResult:
        """The optimizer's step. Raises FloatingPointError after too many skipped steps."""
        result = self.optimizer.step(learning_rate, weight_decay)
        self._check_skips(self.optimizer)
        return result

    def run(self) -> None:
        """Train to the end. Raises Interrupted after SIGTERM or SIGINT, FloatingPointError after too many skips."""
        flags, schedule = self.flags, self.schedule
        logger = MetricLogger(
            Path(flags.out),
            self.context.is_main_process,
            tensorboard=flags.tb,
            name=flags.exp_name,
            iteration=self.iteration,
            total=schedule.iterations,
            **self._logger_options(),
        )
        self.throughput.start(self.iteration)
        last_save_attempt = self.iteration
        with closing(logger), self._stop_on_signals():
            if self.iteration and self._validates() and not self.context.any(logger.has_validation(self.iteration)):
                self._validate(logger)  # which was due after the last checkpoint, and interrupted
            for batch in self._batches():
                iteration = self.iteration
                self._forward_backward(batch)
                self.iteration += 1
                logger.advance()
                if schedule.steps(iteration):
                    rate, decay = schedule.learning_rate(iteration), schedule.weight_decay(iteration)
                    step = self._step(rate, decay)
                    last = self.iteration == schedule.iterations
                    logged = self.throughput.iteration
                    if last or logged == 0 or self.iteration - logged >= flags.log_every:
                        self._log(logger, step, rate, decay)
                    stopping = self.context.any(self.stop_signal is not None)
                    if last or stopping or self.iteration - last_save_attempt >= flags.save_every:
                        last_save_attempt = self.iteration
                        self._save_or_warn(logger, required=last or stopping)
                    if stopping and not last:
                        message = f"stopped after iteration {self.iteration} of {schedule.iterations}, and saved"
                        raise Interrupted(message, self.stop_signal or signal.SIGTERM)
                if self._validates():
                    self._validate(logger)
            for name, source in (("training", self.source), ("validation", self.validation)):
                if source is not None and (unreadable := len(self.context.union(source.unreadable))):
                    logger.print(f"warning: {unreadable} of {len(source)} {name} images could not be read")

    def resume(self) -> bool:
        """Load the newest checkpoint that can be read. Returns False if there is no checkpoint.

        Raises ValueError if it belongs to a run with other flags or data, OSError if there are checkpoints but none can
        be read.
        """
        tensors, paths = self._tensors(), self.checkpoints.paths()
        for path in paths:
            try:
                state = self._saved_state(path)
                self._require_same(state)
                self.checkpoints.read(path, tensors)
            except OSError as error:
                if path == paths[-1]:
                    raise OSError(
                        f"{error}; no other checkpoint: delete {path.parent}, or choose another --out"
                    ) from error
                if self.context.is_main_process:
                    print(f"warning: {error}; trying the previous one", flush=True)
                continue
            self._load_state(state)
            return True
        return False

    def _saved_state(self, path: Path) -> dict[str, Any]:
        try:
            return self.checkpoints.state(path)
        except ValueError as error:
            raise ValueError(f"--out: {error}; choose another folder") from error

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint's state, other than its tensors."""
        self.iteration = self.saved_iteration = state["iteration"]
        self.seed = state["seed"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _batches(self) -> Iterator[Batch]:
        for epoch in range(self.iteration // self.schedule.per_epoch, self.schedule.epochs):
            yield from self.source.batches(
                batch=self.local_batch,
                seed=self.seed,
                epoch=epoch,
                rank=self.context.rank,
                world_size=self.context.world_size,
                start=self.iteration % self.schedule.per_epoch,
                workers=self.flags.workers,
            )

    def _check_skips(self, optimizer: OptimizerStep) -> None:
        if optimizer.consecutive_skips >= self.flags.skips:
            raise FloatingPointError(
                f"iteration {self.iteration}: {optimizer.consecutive_skips} consecutive steps without a finite "
                f"gradient; the last checkpoint is of iteration {self.saved_iteration}"
            )

    def _log(self, logger: MetricLogger, step: StepResult, rate: float, decay: float) -> None:
        remaining = self.throughput.remaining_seconds(self.iteration, self.schedule.iterations)
        speed = self.throughput.since_last(self.iteration, self.schedule.images)
        values: dict[str, Any] = {
            **self._metrics(logger),
            "gradient_norm": step.gradient_norm,
            "learning_rate": rate,
            "weight_decay": decay,
            "epoch": self.iteration / self.schedule.per_epoch,
            **speed,
            "skipped": self.optimizer.skipped,
            "unreadable": len(self.context.union(self.source.unreadable)),
            "loss_scale": self.optimizer.scaler.get_scale() if self.flags.fp16 == 1 else None,
        }
        logger.log(self.iteration, values, remaining)

    def _validates(self) -> bool:
        """Whether validation is due after this iteration: at the end of every tenth epoch, and of the last one."""
        epoch, rest = divmod(self.iteration, self.schedule.per_epoch)
        return rest == 0 and (epoch % VALIDATION_EPOCHS == 0 or self.iteration == self.schedule.iterations)

    def _save(self) -> None:
        if self.saved_iteration == self.iteration:
            return
        state = {
            "iteration": self.iteration,
            "seed": self.seed,
            "items": len(self.source),
            "images": self.schedule.images,
            "data": self.digest,
            "optimizer": self.optimizer.state_dict(),
            "flags": asdict(self.flags),
            **self._state(),
        }
        self.checkpoints.write(self.iteration, self._tensors(), state)
        self.saved_iteration = self.iteration

    def _save_or_warn(self, logger: MetricLogger, *, required: bool) -> None:
        try:
            self._save()
        except OSError as error:
            saved = self.saved_iteration
            if required:
                raise OSError(f"{error}; the same command resumes after iteration {saved}") from error
            logger.print(f"warning: {error}; training continues, the last checkpoint is of iteration {saved}")

    def _require_same(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless the checkpoint belongs to a run with these flags and data."""
        flags = self.flags
        current = json.loads(json.dumps(asdict(flags)))
        decided = [item.name for item in fields(flags) if not item.metadata["free"] and item.name != "seed"]
        pairs = [(f"--{name}", state["flags"].get(name), current[name]) for name in decided]
        started_from = state["flags"].get("init_from")
        if started_from is None and flags.init_from is not None:
            raise ValueError(f"--init_from: the run in {flags.out} started without it; leave it out")
        if started_from is not None and flags.init_from is None:
            raise ValueError(f"--init_from: the run in {flags.out} started from {started_from}; give it again")
        if flags.seed is not None:  # otherwise the saved one is used
            pairs.append(("--seed", state["seed"], flags.seed))
        pairs.append(("the number of training items", state["items"], len(self.source)))
        pairs.append(("the images per iteration", state["images"], self.schedule.images))
        pairs.extend(self._identity(state))
        pairs.append(("the digest of the training items' names", state["data"], self.digest))
        for name, saved, now in pairs:
            if saved != now:
                raise ValueError(
                    f"{name}: the run in {flags.out} has {saved}, not {now}; keep it, or choose another --out"
                )

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """On SIGTERM or SIGINT finish the step, save and stop; a second Ctrl-C, seconds later, stops at once."""
        received_at = 0.0

        def handle(number: int, _: object) -> None:
            nonlocal received_at
            if self.stop_signal is None:
                self.stop_signal, received_at = number, time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - received_at > GRACE_SECONDS:
                raise KeyboardInterrupt

        with handling({signal.SIGTERM: handle, signal.SIGINT: handle}):
            yield
