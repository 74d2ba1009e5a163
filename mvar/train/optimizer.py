"""AdamW as VAR sets it up, gradient clipping, loss scaling, and the steps that are skipped."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

NO_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss", "A_log")
"""Parts of the names of parameters that are not decayed, beside vectors and biases."""
FIRST_SCALE, LARGEST_SCALE, GROWTH_INTERVAL = 2.0**11, 2.0**15, 1000
"""Of the loss in float16, as VAR has them: 65,504 is the largest float16."""


def adamw(module: nn.Module, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW(β 0.9, 0.95) over two groups, one with and one without decay; the trainer sets rate and decay."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.dim() <= 1 or n.endswith("bias") or any(part in n for part in NO_DECAY)}
    groups = [
        {"params": [p for n, p in named if n not in plain], "decays": True},
        {"params": [p for n, p in named if n in plain], "decays": False},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95), weight_decay=0, fused=fused)


class Step(NamedTuple):
    """gradient_norm: before clipping, over all processes. taken: False where it was not finite."""

    gradient_norm: float
    taken: bool


class Stepper:
    """From losses to a step of the optimizer.

    A gradient that is not finite is thrown away, and the step with it. `skipped` counts those steps, `in_a_row` those
    since the last one that was taken. In float16 a few are normal: that is how the loss's scale is found.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, clip: float, float16: bool, average: float
    ) -> None:
        self.optimizer, self.clip, self.decay = optimizer, clip, average
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL, enabled=float16
        )
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters] if average else []
        self.skipped = self.in_a_row = self.taken = 0

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float, weight_decay: float) -> Step:
        """Clip, step and forget the gradients. Waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate, weight_decay * group["decays"]
        self.scaler.unscale_(self.optimizer)
        total = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        total = total.full_tensor() if isinstance(total, DTensor) else total
        norm = float(total)
        finite = math.isfinite(norm)
        if finite:
            if self.clip > 0:
                clip_grads_with_norm_(self.parameters, self.clip, total)
            self.scaler.step(self.optimizer)
            self.taken, self.in_a_row = self.taken + 1, 0
            self._follow()
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.scaler.update(LARGEST_SCALE if self.scaler.get_scale() > LARGEST_SCALE else None)
        self.optimizer.zero_grad()
        return Step(norm, finite)

    def tensors(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Every parameter with all that belongs to it: itself, the optimizer's moments and count, its average."""
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            if not moments:  # before the first step: what AdamW itself begins with
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            average = {"average": self.average[i]} if self.average else {}
            yield parameter, {"model": parameter, **moments, **average}

    def counts(self) -> dict[str, Any]:
        """What is to be saved beside the tensors, for JSON."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "taken": self.taken,
            "scaler": self.scaler.state_dict(),
        }

    def load_counts(self, counts: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.taken = counts["skipped"], counts["in_a_row"], counts["taken"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(counts["scaler"])

    def _follow(self) -> None:
        if self.average:
            share = 1 - min(self.decay, self.taken / (self.taken + 9))
            for mean, parameter in zip(self.average, self.parameters, strict=True):
                _local(mean).lerp_(_local(parameter.detach()), share)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
