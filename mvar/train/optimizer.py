"""The optimizer step: AdamW as VAR configures it, gradient clipping, loss scaling, skipped steps, moving averages."""

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

NO_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss", "A_log")
"""Parameters with one of these in their names have no weight decay; neither have vectors and biases."""
INIT_SCALE, MAX_SCALE, GROWTH_INTERVAL = 2.0**11, 2.0**15, 1000
"""Loss scale in float16, VAR's values; the largest float16 is 65,504."""
BETAS = (0.9, 0.95)


def adamw(module: nn.Module, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW(β 0.9, 0.95) with a parameter group with weight decay and one without.

    :meth:`OptimizerStep.step` sets learning rate and weight decay.
    """
    return torch.optim.AdamW(parameter_groups(module), lr=0.0, betas=BETAS, weight_decay=0, fused=fused)


def adamw8bit(module: nn.Module) -> torch.optim.Optimizer:
    """:func:`adamw` with moments in 8 bits and a float32 scale for every 256 of them (arXiv 2110.02861).

    The moments of tensors with fewer than 4,096 elements are float32. The parameters must be on their device, and must
    not be sharded. Raises ImportError if bitsandbytes is not installed.
    """
    optimizer = bitsandbytes().optim.AdamW8bit(parameter_groups(module), lr=0.0, betas=BETAS, weight_decay=0)
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, i, j)  # so that a checkpoint can be loaded into it
    return cast(torch.optim.Optimizer, optimizer)


def bitsandbytes() -> Any:
    """The package bitsandbytes. Raises ImportError if it is not installed."""
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError("--opt=adamw8bit requires bitsandbytes: pip install 'bitsandbytes>=0.50'") from error


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters: those with weight decay, and those without."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.dim() <= 1 or n.endswith("bias") or any(part in n for part in NO_DECAY)}
    groups = [
        {"params": [p for n, p in named if n not in plain], "decays": True},
        {"params": [p for n, p in named if n in plain], "decays": False},
    ]
    return [g for g in groups if g["params"]]


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
        """Every parameter, with its value, the optimizer's state and its moving average by name."""
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            if not moments:  # before the first step: AdamW's initial state
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            saved = {name: value for name, value in moments.items() if isinstance(value, Tensor) and "qmap" not in name}
            average = {"average": self.average[i]} if self.average else {}
            yield parameter, {"model": parameter, **saved, **average}

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
            "steps": [state["step"] for state in self._counting()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.taken = state["skipped"], state["taken"]
        self.consecutive_skips = state["consecutive_skips"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for of_parameter, step in zip(self._counting(), state.get("steps", ()), strict=True):
            of_parameter["step"] = step

    def _counting(self) -> list[dict[str, Any]]:
        """The optimizer's states with the step count as an int, those of bitsandbytes, in the order of the parameters.

        torch's optimizers count in tensors.
        """
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [state for state in states if isinstance(state.get("step"), int)]

    def _update_average(self) -> None:
        if self.average:
            weight = 1 - min(self.decay, self.taken / (self.taken + 9))
            for mean, parameter in zip(self.average, self.parameters, strict=True):
                _local(mean).lerp_(_local(parameter.detach()), weight)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
