"""The training of a tokenizer: reconstruction, codebook and adversarial losses; unused codes; validation."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvar.data import Batch, Source, num_batches
from mvar.models.tokenizer import Tokenizer
from mvar.train.distributed import TrainContext, gradient_sync, parallelize
from mvar.train.loop import Loop, local_batch
from mvar.train.metrics import MetricLogger
from mvar.train.objective import autocast
from mvar.train.optimizer import OptimizerStep, StepResult, adamw
from mvar.train.schedule import RunSchedule
from mvar.train_tokenizer.codebook import CodebookHealth
from mvar.train_tokenizer.discriminator import Discriminator, adaptive_weight, discriminator_loss, generator_loss
from mvar.train_tokenizer.flags import TokenizerFlags
from mvar.train_tokenizer.objective import psnr, reconstruction_losses
from mvar.utils.images import grid, save_image

RECONSTRUCTIONS = "reconstructions.png"
TRAINING_METRICS = (
    "loss",
    "psnr",
    "perceptual",
    "codebook_loss",
    "generator_loss",
    "discriminator_loss",
    "code_usage",
    "revived",
    "gradient_norm",
    "learning_rate",
    "images_per_s",
    "skipped",
    "unreadable",
)
VALIDATION_METRICS = ("psnr", "l1", "perceptual", "code_usage")


class TokenizerTrainer(Loop[TokenizerFlags, RunSchedule]):
    """The training of a tokenizer.

    Each optimizer step updates the tokenizer; after --disc_start it then updates the discriminator, with the
    reconstructions that the tokenizer was trained with.

    Args:
        tokenizer: initialized, on the context's device.
        source, validation: of images.
        lpips: the perceptual loss, see :func:`mvar.train_tokenizer.perceptual.load_lpips`; None to leave it out.
        seed: see :class:`Loop`.
    """

    def __init__(
        self,
        flags: TokenizerFlags,
        tokenizer: Tokenizer,
        source: Source,
        context: TrainContext,
        *,
        seed: int,
        validation: Source | None = None,
        lpips: nn.Module | None = None,
    ) -> None:
        self.tokenizer, self.lpips = tokenizer, lpips
        self.losses = ("l1", "l2") if lpips is None else ("l1", "l2", "perceptual")
        batch = local_batch(flags, context)
        schedule = RunSchedule(flags, num_batches(len(source), batch, context.world_size), batch * context.world_size)
        # A step at 64×64 in bfloat16 takes 1.7 s of CPU time instead of 2.2 s (AMD EPYC family 25 model 17); on a GPU
        # neither format has been measured.
        self.memory_format = torch.channels_last if context.device.type == "cpu" else torch.contiguous_format
        _freeze(tokenizer, flags.freeze)
        self.module = parallelize(tokenizer.train(), (), context, fsdp=False)
        optimizer = OptimizerStep(
            adamw(tokenizer), context.device, clip=flags.tclip, float16=flags.fp16 == 1, average=flags.average
        )
        self.discriminator: Discriminator | None = None
        if flags.disc:
            self.discriminator = Discriminator(
                flags.disc_channels, flags.disc_layers, resolution=tokenizer.resolution, seed=seed
            ).to(context.device)
            self.discriminator_module = parallelize(self.discriminator, (), context, fsdp=False)
            self.discriminator_optimizer = OptimizerStep(
                adamw(self.discriminator), context.device, clip=flags.tclip, float16=flags.fp16 == 1, average=0.0
            )
        self.health = CodebookHealth(tokenizer.patch_nums, tokenizer.num_codes, context)
        self.sums: dict[str, Tensor] = {}
        self.collapsed: set[int] = set()
        self.revived = 0
        self.discriminated = False  # whether the discriminator has gradients
        super().__init__(
            flags, source, validation, context, seed=seed, schedule=schedule, optimizer=optimizer, kind="tokenizer"
        )

    def weights(self) -> dict[str, Tensor]:
        """The weights for inference by name, on the CPU: the moving averages with --average."""
        averages = dict(zip(self.optimizer.parameters, self.optimizer.average, strict=False))
        return {
            name: averages.get(value, value).detach().cpu().contiguous()
            for name, value in self.tokenizer.state_dict(keep_vars=True).items()
        }

    @property
    def _adversarial(self) -> bool:
        """Whether the discriminator takes part in this iteration."""
        return self.discriminator is not None and self._progress >= self.flags.disc_start

    @property
    def _progress(self) -> float:
        """Fraction of the training at the begin of the optimizer step of this iteration."""
        iteration = self.iteration - self.iteration % self.flags.ac
        return iteration / self.schedule.iterations

    def _forward_backward(self, batch: Batch) -> None:
        images = self._to_device(batch)
        self._revive(images)
        flags, steps, share = self.flags, self.schedule.steps(self.iteration), 1 / self.flags.ac
        with gradient_sync(self.module, steps):
            with autocast(flags.fp16, self.context.device):
                out = self.module(images)
                parts = reconstruction_losses(images, out.images, self.lpips)
            reconstruction = parts.total(flags)
            loss = reconstruction + out.vq_loss
            if self._adversarial:
                loss = loss + self._generator_loss(out.images, reconstruction)
            self.optimizer.backward(loss * share)
        if self._adversarial:
            self._discriminate(images, out.images.detach(), steps, share)
        self.health.add(out.hits)
        logged = {name: getattr(parts, name) for name in self.losses}
        self._add(loss=loss, codebook_loss=out.vq_loss, psnr=psnr(images, out.images.detach()), **logged)

    def _generator_loss(self, reconstructions: Tensor, reconstruction_loss: Tensor) -> Tensor:
        assert self.discriminator is not None
        with autocast(self.flags.fp16, self.context.device):
            adversarial = generator_loss(self.discriminator.frozen(reconstructions))
        weight = adaptive_weight(
            reconstruction_loss,
            adversarial,
            self.tokenizer.decoder.conv_out.weight,
            self.context.all_reduce_sum,
            loss_scale=self.optimizer.scaler.get_scale(),
        )
        self._add(generator_loss=adversarial, adaptive_weight=weight)
        return self.flags.disc * weight * adversarial

    def _discriminate(self, images: Tensor, reconstructions: Tensor, steps: bool, share: float) -> None:
        with gradient_sync(self.discriminator_module, steps):
            with autocast(self.flags.fp16, self.context.device):
                logits = self.discriminator_module(torch.cat([images, reconstructions]))
            loss = discriminator_loss(*logits.chunk(2))
            self.discriminator_optimizer.backward(loss * share)
        self.discriminated = True
        self._add(discriminator_loss=loss)

    def _step(self, learning_rate: float, weight_decay: float) -> StepResult:
        result = super()._step(learning_rate, weight_decay)
        if self.discriminated:
            self.discriminator_optimizer.step(learning_rate, weight_decay)
            self._check_skips(self.discriminator_optimizer)
            self.discriminated = False
        return result

    @torch.no_grad()
    def _revive(self, images: Tensor) -> None:
        """Replace unused codes, before the first forward pass of every --revive-th optimizer step."""
        flags = self.flags
        step, accumulated = divmod(self.iteration, flags.ac)
        due = flags.revive and not accumulated and step % flags.revive == 0 and self._progress < flags.revive_until
        if step == 0 and flags.init_from is not None:
            due = False  # its codes are to be kept, although a file may be without statistics
        if not due or flags.freeze == "tokens":
            return
        key = hashlib.blake2b(f"revive {self.seed} {self.iteration}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        replaced = self.tokenizer.revive_dead_codes(images, flags.revive_below, generator)
        codebook = self.tokenizer.quantize.embedding.weight
        for parameter, tensors in self.optimizer.tensors():
            if parameter is codebook:
                tensors["exp_avg"][replaced] = tensors["exp_avg_sq"][replaced] = 0
                if "average" in tensors:
                    tensors["average"][replaced] = codebook[replaced]
        self.revived += int(replaced.sum())

    def _to_device(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise ValueError("source: expected images, got tokens")
        return batch.images.to(self.context.device, non_blocking=True, memory_format=self.memory_format)

    @torch.no_grad()
    def _add(self, **values: Tensor) -> None:
        """Add the mean of each value, a scalar or (B,), to the metrics until the next log line, if it is finite."""
        for name, value in values.items():
            mean = value.detach().mean().float()
            row = torch.stack([mean.nan_to_num(0.0, 0.0, 0.0), mean.isfinite().float()])
            self.sums[name] = self.sums[name] + row if name in self.sums else row

    def _metrics(self, logger: MetricLogger) -> Mapping[str, Any]:
        names = sorted(self.sums)
        sums = self.context.all_reduce_sum(torch.stack([self.sums[name] for name in names])).cpu()
        means = {
            name: float(total / count) if count else None for name, (total, count) in zip(names, sums, strict=True)
        }
        self.sums = {}
        usage, collapsed = self.health.report()
        if collapsed.keys() - self.collapsed:
            maps = ", ".join(collapsed.values())
            logger.print(f"warning: iteration {self.iteration}: codebook collapse in the token maps {maps}")
        revived, self.revived, self.collapsed = self.revived, 0, set(collapsed)
        values = {**means, **usage, "revived": revived, "collapsed": len(collapsed)}
        if self.discriminator is not None:
            values["discriminator_skipped"] = self.discriminator_optimizer.skipped
        return values

    @torch.no_grad()
    def _validate(self, logger: MetricLogger) -> None:
        """Metrics of the validation set with the moving averages, and images of reconstructions."""
        with self._weights_for_inference():
            if self.validation is not None:
                self._log_validation(logger, self.validation)
            if self.flags.samples and self.context.is_main_process:
                self._show(logger)

    def _log_validation(self, logger: MetricLogger, validation: Source) -> None:
        health = CodebookHealth(self.tokenizer.patch_nums, self.tokenizer.num_codes, self.context)
        names = ("psnr", *self.losses)
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device="cpu")  # and the number of images
        for batch in validation.once(
            batch=self.local_batch,
            rank=self.context.rank,
            world_size=self.context.world_size,
            workers=self.flags.workers,
        ):
            if not len(batch.labels):
                continue
            images = self._to_device(batch)
            with autocast(self.flags.fp16, self.context.device):
                out = self.tokenizer(images)
            losses, ratio = reconstruction_losses(images, out.images, self.lpips), psnr(images, out.images)
            rows = [ratio, *(getattr(losses, name) for name in self.losses), torch.ones_like(ratio)]
            sums += torch.stack(rows).double().sum(1).cpu()
            health.add(out.hits)
        *totals, count = self.context.all_reduce_sum(sums).tolist()
        means = {name: total / count for name, total in zip(names, totals, strict=True)}
        logger.log_validation(self.iteration, {**means, **health.report()[0]})

    def _show(self, logger: MetricLogger) -> None:
        """Images and, in the row below, their reconstructions: in a file and in TensorBoard."""
        source = self.validation or self.source
        images = self._to_device(next(source.once(batch=self.flags.samples)))
        with autocast(self.flags.fp16, self.context.device):
            pairs = torch.cat([images, self.tokenizer(images).images])
        image = grid((pairs.clamp(-1, 1).cpu() + 1) / 2, len(images))
        logger.image(self.iteration, "reconstructions", image)
        try:
            save_image(Path(self.flags.out) / RECONSTRUCTIONS, image)
        except OSError as error:
            logger.print(f"warning: {error}; training continues without {RECONSTRUCTIONS}")

    @contextmanager
    def _weights_for_inference(self) -> Iterator[None]:
        """Evaluation mode, with the moving averages in place of the weights, which are restored bit for bit."""
        averaged = list(zip(self.optimizer.parameters, self.optimizer.average, strict=False))
        current = [parameter.detach().clone() for parameter, _ in averaged]
        self.tokenizer.eval()
        try:
            for parameter, average in averaged:
                parameter.detach().copy_(average)
            yield
        finally:
            for (parameter, _), value in zip(averaged, current, strict=True):
                parameter.detach().copy_(value)
            self.tokenizer.train()

    def _tensors(self) -> dict[str, Tensor]:
        """Weights (also frozen ones), code statistics, optimizer state, moving averages; those of the discriminator."""
        tensors = self.optimizer.named_tensors(self.tokenizer)
        tensors |= {f"model.{name}": tensor for name, tensor in self.tokenizer.state_dict().items()}
        if self.discriminator is not None:
            found = self.discriminator_optimizer.named_tensors(self.discriminator)
            tensors |= {f"discriminator.{name}": tensor for name, tensor in found.items()}
        return tensors

    def _state(self) -> dict[str, Any]:
        discriminator = self.discriminator_optimizer.state_dict() if self.discriminator is not None else None
        return {"tokenizer": asdict(self.tokenizer.config), "discriminator": discriminator}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        if self.discriminator is not None:
            self.discriminator_optimizer.load_state_dict(state["discriminator"])

    def _identity(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        yield "--lpips", state["flags"].get("lpips") is not None, self.flags.lpips is not None
        config = json.loads(json.dumps(asdict(self.tokenizer.config)))
        for name, value in config.items():
            yield f"the tokenizer's {name}", state["tokenizer"].get(name), value

    def _logger_options(self) -> dict[str, Any]:
        return {"training": TRAINING_METRICS, "validation": VALIDATION_METRICS}


def _freeze(tokenizer: Tokenizer, freeze: str) -> None:
    """Exclude from training what --freeze names, and convolutions φ that no scale uses, which DDP requires."""
    quantizer = tokenizer.quantize
    frozen: list[nn.Module] = [
        phi for i, phi in enumerate(quantizer.quant_resi.qresi_ls) if i not in quantizer.quant_resi.phi_of_scale
    ]
    if freeze != "nothing":
        frozen += [tokenizer.encoder, tokenizer.quant_conv]
    if freeze == "tokens":
        frozen.append(quantizer)
    for module in frozen:
        module.requires_grad_(False)
