"""The optimizer step: AdamW as VAR configures it, gradient clipping, loss scaling, skipped steps, moving averages."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

NO_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss", "A_log")
"""Parameters with one of these in their names have no weight decay; neither have vectors and biases."""
INIT_SCALE, MAX_SCALE, GROWTH_INTERVAL = 2.0**11, 2.0**15, 1000
"""Loss scale in float16, VAR's values; the largest float16 is 65,504."""


def adamw(module: nn.Module, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW(β 0.9, 0.95) with a parameter group with weight decay and one without.

    :meth:`OptimizerStep.step` sets learning rate and weight decay.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.dim() <= 1 or n.endswith("bias") or any(part in n for part in NO_DECAY)}
    groups = [
        {"params": [p for n, p in named if n not in plain], "decays": True},
        {"params": [p for n, p in named if n in plain], "decays": False},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95), weight_decay=0, fused=fused)


class StepResult(NamedTuple):
    gradient_norm: float
    """norm over all processes, before clipping"""
    taken: bool
    """False if the norm is not finite and the step was skipped"""


class OptimizerStep:
    """Backward passes and the optimizer's steps.

    A step whose gradient is not finite is skipped. `skipped` counts these steps, `consecutive_skips` those since the
    last step that was taken. In float16 a few are normal: they lower the loss scale until it fits.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, clip: float, float16: bool, average: float
    ) -> None:
        self.optimizer, self.clip, self.decay = optimizer, clip, average
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL, enabled=float16
        )
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters] if average else []
        self.skipped = self.consecutive_skips = self.taken = 0

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float, weight_decay: float) -> StepResult:
        """Unscale and clip the gradients, step, and clear the gradients. Synchronizes with the device."""
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
            self.taken, self.consecutive_skips = self.taken + 1, 0
            self._update_average()
        else:
            self.skipped, self.consecutive_skips = self.skipped + 1, self.consecutive_skips + 1
        self.scaler.update(MAX_SCALE if self.scaler.get_scale() > MAX_SCALE else None)
        self.optimizer.zero_grad()
        return StepResult(norm, finite)

    def tensors(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Every parameter, with its value, AdamW's moments and step count, and its moving average by name."""
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            if not moments:  # before the first step: AdamW's initial state
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            average = {"average": self.average[i]} if self.average else {}
            yield parameter, {"model": parameter, **moments, **average}

    def named_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """:meth:`tensors` of the module's parameters as "kind.name", the names of a checkpoint."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        return {
            f"{kind}.{names[parameter]}": tensor.detach()
            for parameter, tensors in self.tensors()
            for kind, tensor in tensors.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The state other than :meth:`tensors`, serializable as JSON."""
        return {
            "skipped": self.skipped,
            "consecutive_skips": self.consecutive_skips,
            "taken": self.taken,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.taken = state["skipped"], state["taken"]
        self.consecutive_skips = state["consecutive_skips"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def _update_average(self) -> None:
        if self.average:
            weight = 1 - min(self.decay, self.taken / (self.taken + 9))
            for mean, parameter in zip(self.average, self.parameters, strict=True):
                _local(mean).lerp_(_local(parameter.detach()), weight)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
