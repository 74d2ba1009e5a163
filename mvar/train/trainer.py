"""The loop: batches to tokens, to losses, to steps; checkpoints, and an end at any moment."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar.data import Batch, Source, num_batches
from mvar.data.tokens import fingerprint
from mvar.model import Model
from mvar.signals import handling
from mvar.tokenizer import Tokenizer
from mvar.train.checkpoint import Checkpoints
from mvar.train.distributed import World, parallel, recompute_blocks, synchronised, whole
from mvar.train.flags import COMPILE_MODES, Flags
from mvar.train.metrics import Reporter, Window, flops_per_image, peak_flops
from mvar.train.objective import Objective
from mvar.train.optimizer import Step, Stepper, adamw
from mvar.train.schedule import Schedule, Stage

AUTOCAST = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}  # by --fp16
VALIDATED_EVERY = 10  # epochs, as in VAR
PATIENCE_S = 2.0  # a launcher hands on, within moments, the signal that its whole process group got already


def autocast(flags: Flags, device: torch.device) -> torch.autocast:
    """What --fp16 says."""
    dtype = AUTOCAST[flags.fp16]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Interrupted(Exception):
    """The run was told to end by `signal`, and has saved itself."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Trainer:
    """One run: `run()` trains `model` to the end, from wherever `resume()` found it.

    Args:
        model: initialised, on the world's device.
        tokenizer: in evaluation mode, on the world's device.
        source, validation: of images or tokens.
        seed: decides all that is random from here on: the order, and what is dropped.
    """

    def __init__(
        self,
        flags: Flags,
        model: Model,
        tokenizer: Tokenizer,
        source: Source,
        world: World,
        *,
        seed: int,
        validation: Source | None = None,
    ) -> None:
        self.flags, self.model, self.tokenizer, self.world, self.seed = flags, model, tokenizer, world, seed
        self.source, self.validation = source, validation
        self.fingerprint, self.digest = fingerprint(tokenizer), source.digest()
        self.rows = round(flags.bs / flags.ac / world.size)
        per_epoch = num_batches(len(source), self.rows, world.size)
        self.schedule = Schedule(flags, per_epoch, self.rows * world.size, len(model.config.patch_nums))
        if flags.recompute:
            recompute_blocks(model)
        if flags.tfast:
            for block in model.typed_blocks():
                block.compile(mode=COMPILE_MODES[flags.tfast])
        if flags.vfast:
            tokenizer.encoder.compile(mode=COMPILE_MODES[flags.vfast])
        self.objective = Objective(model, smoothing=flags.ls, backend=flags.backend).train()
        self.module = parallel(self.objective, world, fsdp=flags.fsdp)
        self.stepper = Stepper(
            adamw(self.objective, fused=flags.afuse),
            world.device,
            clip=flags.tclip,
            float16=flags.fp16 == 1,
            average=flags.average,
        )
        self.checkpoints = Checkpoints(Path(flags.out), world)
        self.window = Window(model.config.scales, model.config.num_codes, world)
        self.flops = [flops_per_image(model, k + 1) for k in range(len(model.config.scales))]  # by scales in training
        self.peak = 1e12 * flags.peak_tflops if flags.peak_tflops else peak_flops(world.device)
        self.done = self.saved = 0
        self.told_to_stop: int | None = None

    def run(self) -> None:
        """Train to the end. Raises Interrupted after SIGTERM or SIGINT, FloatingPointError after too many skips."""
        total = self.schedule.iterations
        out, flags = Path(self.flags.out), self.flags
        self.reporter = Reporter(
            out,
            self.world.leads,
            tensorboard=flags.tb,
            name=flags.exp_name,
            done=self.done,
            total=total,
            sides=tuple(n * self.tokenizer.downsampling for n in self.model.config.patch_nums),
        )
        self.told = self.tried = self.began_at = self.done
        self.flops_since_told = 0
        self.began = self.told_time = time.perf_counter()
        with closing(self.reporter), self._listening():
            for batch in self._batches():
                iteration, stage = self.done, self.schedule.stage(self.done)
                self._train_on(batch, iteration, stage)
                self.done += 1
                self.reporter.advance()
                if self.schedule.steps(iteration):
                    rate, decay = self.schedule.learning_rate(iteration), self.schedule.weight_decay(iteration)
                    self._after(self.stepper.step(rate, decay), iteration, stage)
                epoch = self.done // self.schedule.per_epoch
                if self.done % self.schedule.per_epoch == 0 and self.validation is not None:
                    if epoch % VALIDATED_EVERY == 0 or self.done == total:
                        self.reporter.tell_validation(self.done, self._validate())
            for of, source in (("training", self.source), ("validation", self.validation)):
                if source is not None and (unreadable := len(self.world.union(source.unreadable))):
                    self.reporter.say(f"warning: {unreadable} of {len(source)} {of} pictures could not be read")

    def resume(self) -> bool:
        """Go on from the newest checkpoint that can be read, if there is one.

        Raises ValueError where it is of a run that other flags or other data decided, OSError where there are
        checkpoints and none can be read.
        """
        tensors, paths = self._tensors(), self.checkpoints.paths()
        for path in paths:
            try:
                facts = self.checkpoints.facts(path)
                self._require_same(facts)
                self.checkpoints.read(path, tensors)
            except OSError as error:
                if path == paths[-1]:
                    raise OSError(
                        f"{error}; no checkpoint is left: delete {path.parent}, or choose another --out"
                    ) from error
                if self.world.leads:
                    print(f"warning: {error}; the one before it is tried", flush=True)
                continue
            self.done = self.saved = facts["iteration"]
            self.seed = facts["seed"]
            self.stepper.load_counts(facts["stepper"])
            return True
        return False

    def weights(self) -> dict[str, Tensor]:
        """All weights as they are to be used, averaged if --average says so, on the CPU, under the model's names.

        To be called by all processes; the first one's are whole, the others get nothing.
        """
        by_parameter = dict(zip(self.stepper.parameters, self.stepper.average, strict=False))
        state = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            full = whole(by_parameter.get(value, value))
            if self.world.leads:
                state[name] = full.cpu()
        return state

    def _batches(self) -> Iterator[Batch]:
        for epoch in range(self.done // self.schedule.per_epoch, self.schedule.epochs):
            yield from self.source.batches(
                batch=self.rows,
                seed=self.seed,
                epoch=epoch,
                rank=self.world.rank,
                world=self.world.size,
                start=self.done % self.schedule.per_epoch,
                workers=self.flags.workers,
            )

    def _train_on(self, batch: Batch, iteration: int, stage: Stage) -> None:
        labels, inputs, tokens = self._on_device(batch, stage.scales)
        with synchronised(self.module, self.schedule.steps(iteration)):
            with autocast(self.flags, self.world.device):
                out = self.module(
                    labels,
                    inputs,
                    tokens,
                    self._draws(iteration),
                    newest_weight=stage.newest_weight,
                    share=1 / self.flags.ac,
                )
            self.stepper.backward(out.loss)
        self.window.add(out, tokens)
        self.flops_since_told += self.schedule.images * self.flops[stage.scales - 1]

    def _on_device(self, batch: Batch, scales: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, inputs and tokens of the first scales."""
        device = self.world.device
        if batch.tokens is not None:
            tokens = batch.tokens.to(device, non_blocking=True)
        else:
            assert batch.images is not None
            tokens = self.tokenizer.encode(batch.images.to(device, non_blocking=True))
        inputs = self.tokenizer.teacher_forcing_inputs(tokens)
        length, first = sum(self.tokenizer.scales[:scales]), self.tokenizer.scales[0]
        return batch.labels.to(device, non_blocking=True), inputs[:, : length - first], tokens[:, :length]

    def _draws(self, iteration: int) -> Tensor:
        """What decides the drops of this process's images: a function of seed, iteration and place in the batch."""
        key = hashlib.blake2b(f"drops {self.seed} {iteration}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        size = (self.rows * self.world.size, self.model.draws_per_image)
        draws = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
        return draws[self.world.rank * self.rows :][: self.rows].to(self.world.device, non_blocking=True)

    def _after(self, step: Step, iteration: int, stage: Stage) -> None:
        """What comes after a step: an end, a line, a checkpoint."""
        last = self.done == self.schedule.iterations
        if self.stepper.in_a_row >= self.flags.skips:
            raise FloatingPointError(
                f"iteration {self.done}: {self.stepper.in_a_row} steps in a row without a finite gradient; "
                f"the last checkpoint is of iteration {self.saved}"
            )
        if last or self.told == 0 or self.done - self.told >= self.flags.log_every:
            self._tell(step, iteration, stage)
        stopping = self.world.any(self.told_to_stop is not None)
        if last or stopping or self.done - self.tried >= self.flags.save_every:
            self.tried = self.done
            try:
                self._save()
            except OSError as error:
                if last or stopping:
                    raise OSError(f"{error}; the same command goes on after iteration {self.saved}") from error
                self.reporter.say(f"warning: {error}; training goes on, the last checkpoint is of {self.saved}")
        if stopping and not last:
            message = f"stopped after iteration {self.done} of {self.schedule.iterations}, and saved"
            raise Interrupted(message, self.told_to_stop or signal.SIGTERM)

    def _tell(self, step: Step, iteration: int, stage: Stage) -> None:
        now = time.perf_counter()
        seconds = now - self.told_time
        values: dict[str, Any] = self.window.means() | {
            "gradient_norm": step.gradient_norm,
            "learning_rate": self.schedule.learning_rate(iteration),
            "weight_decay": self.schedule.weight_decay(iteration),
            "epoch": self.done / self.schedule.per_epoch,
            "scales": stage.scales,
            "images_per_s": (self.done - self.told) * self.schedule.images / seconds,
            "mfu": self.flops_since_told / (seconds * self.peak * self.world.size) if self.peak else None,
            "skipped": self.stepper.skipped,
            "unreadable": len(self.world.union(self.source.unreadable)),
            "loss_scale": self.stepper.scaler.get_scale() if self.flags.fp16 == 1 else None,
        }
        left = (self.schedule.iterations - self.done) * (now - self.began) / (self.done - self.began_at)
        self.reporter.tell(self.done, values, left)
        self.window.clear()
        self.told, self.told_time, self.flops_since_told = self.done, now, 0

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Means over the whole validation set, without drops and smoothing."""
        assert self.validation is not None
        window = Window(self.model.config.scales, self.model.config.num_codes, self.world)
        everything = len(self.tokenizer.scales)
        self.objective.eval()
        for batch in self.validation.once(
            batch=self.rows, rank=self.world.rank, world=self.world.size, workers=self.flags.workers
        ):
            rows = len(batch.labels)
            if rows == 0:  # a process without rows keeps step with the others, whose weights can be sharded
                batch = Batch(
                    batch.labels.new_zeros(1),
                    tokens=torch.zeros(1, self.tokenizer.num_tokens, dtype=torch.int64, device="cpu"),
                )
            labels, inputs, tokens = self._on_device(batch, everything)
            with autocast(self.flags, self.world.device):
                out = self.module(labels, inputs, tokens)
            window.add(out._replace(nll=out.nll[:rows], predictions=out.predictions[:rows]), tokens[:rows])
        self.objective.train()
        return window.means()

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"{kind}.{names[parameter]}": tensor.detach()
            for parameter, tensors in self.stepper.tensors()
            for kind, tensor in tensors.items()
        }

    def _save(self) -> None:
        if self.saved == self.done:
            return
        facts = {
            "iteration": self.done,
            "seed": self.seed,
            "items": len(self.source),
            "images": self.schedule.images,
            "tokenizer": self.fingerprint,
            "data": self.digest,
            "stepper": self.stepper.counts(),
            "flags": asdict(self.flags),
            "model": asdict(self.model.config),
            "class_names": self.model.class_names,
        }
        self.checkpoints.write(self.done, self._tensors(), facts)
        self.saved = self.done

    def _require_same(self, facts: dict[str, Any]) -> None:
        """ValueError unless the run that was saved is this one."""
        ours = json.loads(json.dumps(asdict(self.flags)))
        decided = [item.name for item in fields(Flags) if not item.metadata["free"] and item.name != "seed"]
        pairs = [(f"--{name}", facts["flags"].get(name), ours[name]) for name in decided]
        if self.flags.seed is not None:  # otherwise the saved one is taken
            pairs.append(("--seed", facts["seed"], self.flags.seed))
        pairs.append(("the token maps", facts["model"].get("patch_nums"), list(self.model.config.patch_nums)))
        pairs.append(("the number of training items", facts["items"], len(self.source)))
        pairs.append(("the images of an iteration", facts["images"], self.schedule.images))
        pairs.append(("the digest of the tokenizer's weights", facts["tokenizer"], self.fingerprint))
        pairs.append(("the digest of the training items' names", facts["data"], self.digest))
        for name, saved, now in pairs:
            if saved != now:
                raise ValueError(
                    f"{name}: the run in {self.flags.out} has {saved}, not {now}; keep it, or choose another --out"
                )

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """On SIGTERM or SIGINT finish the step, save and leave; a later Ctrl-C, of who cannot wait, ends it at once."""
        told_at = 0.0

        def handle(number: int, _: object) -> None:
            nonlocal told_at
            if self.told_to_stop is None:
                self.told_to_stop, told_at = number, time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - told_at > PATIENCE_S:
                raise KeyboardInterrupt

        with handling({signal.SIGTERM: handle, signal.SIGINT: handle}):
            yield
