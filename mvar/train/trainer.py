"""The training loop: batches to tokens, losses and optimizer steps; logging, validation, checkpoints, signals."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mvar.data import Batch, Source, num_batches
from mvar.data.tokens import fingerprint
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar.train.checkpoint import Checkpoints
from mvar.train.distributed import TrainContext, checkpoint_activations, full_tensor, gradient_sync, parallelize
from mvar.train.flags import COMPILE_MODES, Flags
from mvar.train.metrics import MetricAccumulator, MetricLogger, Throughput, flops_per_image, peak_flops
from mvar.train.objective import Objective, autocast
from mvar.train.optimizer import OptimizerStep, StepResult, adamw
from mvar.train.schedule import Schedule, Stage
from mvar.utils.signals import handling

VALIDATION_EPOCHS = 10  # between two validations, as in VAR
GRACE_SECONDS = 2.0  # a launcher may forward within this time a signal that the process group received as well


class Interrupted(Exception):
    """Training stopped on a signal, after it saved a checkpoint."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Trainer:
    """One training run: :meth:`resume` loads the newest checkpoint, :meth:`run` trains to the end.

    Args:
        model: initialized, on the context's device.
        tokenizer: in evaluation mode, on the context's device.
        source, validation: of images or tokens.
        seed: seed of the data order, label dropout and stochastic depth.

    Attributes:
        iteration: completed iterations. An iteration is one forward and backward pass.
        saved_iteration: the one of the last checkpoint, 0 without one.
    """

    objective_type: ClassVar[type[Objective]] = Objective

    def __init__(
        self,
        flags: Flags,
        model: Model,
        tokenizer: Tokenizer,
        source: Source,
        context: TrainContext,
        *,
        seed: int,
        validation: Source | None = None,
    ) -> None:
        self.flags, self.model, self.tokenizer, self.context, self.seed = flags, model, tokenizer, context, seed
        self.source, self.validation = source, validation
        self.fingerprint, self.digest = fingerprint(tokenizer), source.digest()
        self.local_batch = round(flags.bs / flags.ac / context.world_size)
        per_epoch = num_batches(len(source), self.local_batch, context.world_size)
        scales = len(model.config.scales)
        self.schedule = Schedule(flags, per_epoch, self.local_batch * context.world_size, scales)
        blocks = model.typed_blocks()
        if flags.recompute:
            checkpoint_activations(blocks)
        if flags.tfast:
            for block in blocks:
                block.compile(mode=COMPILE_MODES[flags.tfast])
        if flags.vfast:
            tokenizer.encoder.compile(mode=COMPILE_MODES[flags.vfast])
        self.objective = self.objective_type(model, smoothing=flags.ls, backend=flags.backend).train()
        self.module = parallelize(self.objective, blocks, context, fsdp=flags.fsdp)
        self.optimizer = OptimizerStep(
            adamw(self.objective, fused=flags.afuse),
            context.device,
            clip=flags.tclip,
            float16=flags.fp16 == 1,
            average=flags.average,
        )
        self.checkpoints = Checkpoints(Path(flags.out), context)
        self.metrics = MetricAccumulator(model.config.scales, model.config.num_codes, context)
        self.flops_per_image = [flops_per_image(model, k + 1) for k in range(scales)]  # by the scales in training
        peak = 1e12 * flags.peak_tflops if flags.peak_tflops else peak_flops(context.device)
        self.throughput = Throughput(peak and peak * context.world_size)
        self.iteration = self.saved_iteration = 0
        self.stop_signal: int | None = None

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
            resolutions=tuple(n * self.tokenizer.downsampling for n in self.model.config.patch_nums),
        )
        self.throughput.start(self.iteration)
        last_save_attempt = self.iteration
        with closing(logger), self._stop_on_signals():
            for batch in self._batches():
                iteration, stage = self.iteration, schedule.stage(self.iteration)
                self._forward_backward(batch, stage)
                self.iteration += 1
                logger.advance()
                if schedule.steps(iteration):
                    rate, decay = schedule.learning_rate(iteration), schedule.weight_decay(iteration)
                    step = self.optimizer.step(rate, decay)
                    self._check_skips()
                    last = self.iteration == schedule.iterations
                    logged = self.throughput.iteration
                    if last or logged == 0 or self.iteration - logged >= flags.log_every:
                        self._log(logger, step, stage, rate, decay)
                    stopping = self.context.any(self.stop_signal is not None)
                    if last or stopping or self.iteration - last_save_attempt >= flags.save_every:
                        last_save_attempt = self.iteration
                        self._save_or_warn(logger, required=last or stopping)
                    if stopping and not last:
                        message = f"stopped after iteration {self.iteration} of {schedule.iterations}, and saved"
                        raise Interrupted(message, self.stop_signal or signal.SIGTERM)
                if self._validates():
                    logger.log_validation(self.iteration, self._validate())
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
                state = self.checkpoints.state(path)
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
            self.iteration = self.saved_iteration = state["iteration"]
            self.seed = state["seed"]
            self.optimizer.load_state_dict(state["optimizer"])
            return True
        return False

    def weights(self) -> dict[str, Tensor]:
        """The weights for inference by name, on the CPU: the moving averages with --average.

        Every process must call it; the result of all but the main process is empty.
        """
        averages = dict(zip(self.optimizer.parameters, self.optimizer.average, strict=False))
        state = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            value = full_tensor(averages.get(value, value))
            if self.context.is_main_process:
                state[name] = value.cpu()
        return state

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

    def _forward_backward(self, batch: Batch, stage: Stage) -> None:
        labels, inputs, tokens = self._to_device(batch, stage.scales)
        with gradient_sync(self.module, self.schedule.steps(self.iteration)):
            with autocast(self.flags.fp16, self.context.device):
                out = self.module(
                    labels,
                    inputs,
                    tokens,
                    self._drop_draws(),
                    newest_weight=stage.newest_weight,
                    share=1 / self.flags.ac,
                )
            self.optimizer.backward(out.loss)
        self.metrics.add(out, tokens)
        self.throughput.flops += self.schedule.images * self.flops_per_image[stage.scales - 1]

    def _to_device(self, batch: Batch, scales: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, and the inputs and tokens of the first scales; images are encoded."""
        device = self.context.device
        if batch.tokens is not None:
            tokens = batch.tokens.to(device, non_blocking=True)
        else:
            assert batch.images is not None
            tokens = self.tokenizer.encode(batch.images.to(device, non_blocking=True))
        inputs = self.tokenizer.teacher_forcing_inputs(tokens)
        length, first = sum(self.tokenizer.scales[:scales]), self.tokenizer.scales[0]
        return batch.labels.to(device, non_blocking=True), inputs[:, : length - first], tokens[:, :length]

    def _drop_draws(self) -> Tensor:
        """Random numbers for label dropout and stochastic depth (:meth:`Model.features`) of this process's images.

        They are a function of seed, iteration and index in the global batch, whatever the number of processes.
        """
        key = hashlib.blake2b(f"drops {self.seed} {self.iteration}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        size = (self.local_batch * self.context.world_size, self.model.draws_per_image)
        draws = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
        first = self.context.rank * self.local_batch
        return draws[first : first + self.local_batch].to(self.context.device, non_blocking=True)

    def _check_skips(self) -> None:
        if self.optimizer.consecutive_skips >= self.flags.skips:
            raise FloatingPointError(
                f"iteration {self.iteration}: {self.optimizer.consecutive_skips} consecutive steps without a finite "
                f"gradient; the last checkpoint is of iteration {self.saved_iteration}"
            )

    def _log(self, logger: MetricLogger, step: StepResult, stage: Stage, rate: float, decay: float) -> None:
        remaining = self.throughput.remaining_seconds(self.iteration, self.schedule.iterations)
        speed = self.throughput.since_last(self.iteration, self.schedule.images)
        values: dict[str, Any] = self.metrics.means() | {
            "gradient_norm": step.gradient_norm,
            "learning_rate": rate,
            "weight_decay": decay,
            "epoch": self.iteration / self.schedule.per_epoch,
            "scales": stage.scales,
            **speed,
            "skipped": self.optimizer.skipped,
            "unreadable": len(self.context.union(self.source.unreadable)),
            "loss_scale": self.optimizer.scaler.get_scale() if self.flags.fp16 == 1 else None,
        }
        logger.log(self.iteration, values, remaining)
        self.metrics.reset()

    def _validates(self) -> bool:
        """Whether validation is due after this iteration: at the end of every tenth epoch, and of the last one."""
        epoch, rest = divmod(self.iteration, self.schedule.per_epoch)
        due = epoch % VALIDATION_EPOCHS == 0 or self.iteration == self.schedule.iterations
        return self.validation is not None and rest == 0 and due

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Means over the validation set, without dropout and label smoothing."""
        assert self.validation is not None
        metrics = MetricAccumulator(self.model.config.scales, self.model.config.num_codes, self.context)
        self.objective.eval()
        for batch in self.validation.once(
            batch=self.local_batch,
            rank=self.context.rank,
            world_size=self.context.world_size,
            workers=self.flags.workers,
        ):
            rows = len(batch.labels)
            if rows == 0:  # the forward pass is collective where weights are sharded
                batch = Batch(
                    batch.labels.new_zeros(1),
                    tokens=torch.zeros(1, self.tokenizer.num_tokens, dtype=torch.int64, device="cpu"),
                )
            labels, inputs, tokens = self._to_device(batch, len(self.tokenizer.scales))
            with autocast(self.flags.fp16, self.context.device):
                out = self.module(labels, inputs, tokens)
            metrics.add(out._replace(nll=out.nll[:rows], predictions=out.predictions[:rows]), tokens[:rows])
        self.objective.train()
        return metrics.means()

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name: weights, optimizer state, moving averages."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"{kind}.{names[parameter]}": tensor.detach()
            for parameter, tensors in self.optimizer.tensors()
            for kind, tensor in tensors.items()
        }

    def _save(self) -> None:
        if self.saved_iteration == self.iteration:
            return
        state = {
            "iteration": self.iteration,
            "seed": self.seed,
            "items": len(self.source),
            "images": self.schedule.images,
            "tokenizer": self.fingerprint,
            "data": self.digest,
            "optimizer": self.optimizer.state_dict(),
            "flags": asdict(self.flags),
            "model": asdict(self.model.config),
            "class_names": self.model.class_names,
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
        current = json.loads(json.dumps(asdict(self.flags)))
        decided = [item.name for item in fields(Flags) if not item.metadata["free"] and item.name != "seed"]
        pairs = [(f"--{name}", state["flags"].get(name), current[name]) for name in decided]
        started_from = state["flags"].get("init_from")
        if started_from is None and self.flags.init_from is not None:
            raise ValueError(f"--init_from: the run in {self.flags.out} started without it; leave it out")
        if started_from is not None and self.flags.init_from is None:
            raise ValueError(f"--init_from: the run in {self.flags.out} started from {started_from}; give it again")
        if self.flags.seed is not None:  # otherwise the saved one is used
            pairs.append(("--seed", state["seed"], self.flags.seed))
        pairs.append(("the token maps", state["model"].get("patch_nums"), list(self.model.config.patch_nums)))
        pairs.append(("the number of training items", state["items"], len(self.source)))
        pairs.append(("the images per iteration", state["images"], self.schedule.images))
        pairs.append(("the digest of the tokenizer's weights", state["tokenizer"], self.fingerprint))
        pairs.append(("the digest of the training items' names", state["data"], self.digest))
        for name, saved, now in pairs:
            if saved != now:
                raise ValueError(
                    f"{name}: the run in {self.flags.out} has {saved}, not {now}; keep it, or choose another --out"
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
