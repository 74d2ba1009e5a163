"""The training of a model: batches to tokens, losses, validation."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from mvar.data import Batch, Source, num_batches
from mvar.data.tokens import fingerprint
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar.train.distributed import TrainContext, checkpoint_activations, full_tensor, gradient_sync, parallelize
from mvar.train.flags import COMPILE_MODES, Flags
from mvar.train.loop import Loop, local_batch
from mvar.train.metrics import MetricAccumulator, MetricLogger, flops_per_image
from mvar.train.objective import Objective, autocast
from mvar.train.optimizer import OptimizerStep, adamw, adamw8bit
from mvar.train.schedule import Schedule
from mvar.train.tensorboard import tags


class Trainer(Loop[Flags, Schedule]):
    """The training of a model.

    Args:
        model: initialized, on the context's device.
        tokenizer: in evaluation mode, on the context's device.
        source, validation, seed: see :class:`Loop`.
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
        self.model, self.tokenizer = model, tokenizer
        self.fingerprint = fingerprint(tokenizer)
        batch = local_batch(flags, context)
        per_epoch = num_batches(len(source), batch, context.world_size)
        scales = len(model.config.scales)
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
        optimizer = OptimizerStep(
            adamw8bit(self.objective) if flags.opt == "adamw8bit" else adamw(self.objective, fused=flags.afuse),
            context.device,
            clip=flags.tclip,
            float16=flags.fp16 == 1,
            average=flags.average,
        )
        self.metrics = MetricAccumulator(model.config.scales, model.config.num_codes, context)
        self.flops_per_image = [flops_per_image(model, k + 1) for k in range(scales)]  # by the scales in training
        super().__init__(
            flags,
            source,
            validation,
            context,
            seed=seed,
            schedule=Schedule(flags, per_epoch, batch * context.world_size, scales),
            optimizer=optimizer,
            kind="model",
            peak_tflops=flags.peak_tflops,
        )

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

    def _forward_backward(self, batch: Batch) -> None:
        stage = self.schedule.stage(self.iteration)
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

    def _metrics(self, logger: MetricLogger) -> Mapping[str, Any]:
        means = self.metrics.means()
        self.metrics.reset()
        return {**means, "scales": self.schedule.stage(self.iteration - 1).scales}

    @torch.no_grad()
    def _validate(self, logger: MetricLogger) -> None:
        """Means over the validation set, without dropout and label smoothing."""
        if self.validation is None:
            return
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
        logger.log_validation(self.iteration, metrics.means())

    def _tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state, moving averages."""
        return self.optimizer.named_tensors(self.model)

    def _state(self) -> dict[str, Any]:
        return {
            "tokenizer": self.fingerprint,
            "model": asdict(self.model.config),
            "class_names": self.model.class_names,
        }

    def _identity(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        yield "the token maps", state["model"].get("patch_nums"), list(self.model.config.patch_nums)
        yield "the digest of the tokenizer's weights", state["tokenizer"], self.fingerprint

    def _logger_options(self) -> dict[str, Any]:
        return {"tags": tags(tuple(n * self.tokenizer.downsampling for n in self.model.config.patch_nums))}
