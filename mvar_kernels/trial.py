"""Does a replacement compute what the part of a model computes? Tried on random weights and inputs, side by side."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.precision import true_float32
from mvar_kernels.replacements import Replacement

# Relative to the largest value: products in TF32, on a GPU, keep few bits, and another computation is farther off.
TOLERANCE = 1e-2
EXACT_TOLERANCE = 1e-4  # on a CPU, where the products of a trial are true float32


class Trials:
    """The trials of one model's parts, which share their random weights.

    Every part is tried in evaluation mode; the first of its kind (class, classes inside, shapes) also in training
    mode, where random numbers must fall alike, and with all gradients.
    """

    def __init__(self) -> None:
        self._weights: dict[tuple[str, torch.Size, torch.device], nn.Parameter] = {}
        self._trained: set[Any] = set()

    def difference(self, part: nn.Module, replacement: type[Replacement], replaced: type) -> str | None:
        """How the part would differ if `replaced`, made of the replacement and its class, were its class; or None."""
        device = next(part.parameters()).device
        kind = (tuple(map(type, part.modules())), tuple((name, p.shape) for name, p in part.named_parameters()))
        try:
            stand_in = self._stand_in(part)
            original = type(stand_in)
            with true_float32(device), torch.autocast(device.type, enabled=False), torch.inference_mode(False):
                for training in (False,) if kind in self._trained else (False, True):
                    stand_in.train(training)
                    results = []
                    for stand_in.__class__ in (original, replaced):
                        results.append(_results(stand_in, replacement, device, with_grads=training))
                    if not _close(*results):
                        mode = "training" if training else "evaluation"
                        return f"it does not compute what {replacement.what} does, in {mode}"
        except Exception as error:  # somebody else's code: whatever it raises is a reason to leave it
            return f"it could not be tried on {device}: {type(error).__name__}: {str(error).split(chr(10))[0]}"
        self._trained.add(kind)
        return None

    def _stand_in(self, part: nn.Module) -> Any:
        """A copy of the part with random float32 weights, and without hooks."""
        instead: dict[int, Any] = {id(p): self._random(name, p) for name, p in part.named_parameters()}
        instead |= {id(b): b.float() if b.is_floating_point() else b.clone() for b in part.buffers()}
        stand_in = copy.deepcopy(part, instead)
        for module in stand_in.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
        return stand_in

    def _random(self, name: str, like: nn.Parameter) -> nn.Parameter:
        key = (name, like.shape, like.device)
        if key not in self._weights:
            values = torch.empty(like.shape, dtype=torch.float32, device=like.device)
            if like.dim() > 1 and like.shape[-1] == 1:
                # temperatures on both sides of their bound
                values.view(-1).copy_(torch.linspace(0, 5, like.numel(), dtype=torch.float32, device=like.device))
            else:
                generator = torch.Generator(like.device).manual_seed(len(self._weights))
                values.uniform_(-1, 1, generator=generator).mul_((3 / max(like.shape[-1], 4)) ** 0.5)
            self._weights[key] = nn.Parameter(values)
        return self._weights[key]


def _results(part: Any, replacement: type[Replacement], device: torch.device, *, with_grads: bool) -> list[Tensor]:
    """Outputs of all trials and, if asked for, gradients of all inputs and parameters; each time the same inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Tensor] = []

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    def draw(*shape: int) -> Tensor:
        inputs.append(normal(shape).requires_grad_(with_grads))
        return inputs[-1]

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.set_grad_enabled(with_grads):
        # Of this device alone: torch.manual_seed would reset those of all GPUs.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ].manual_seed(0)
        outputs = list(replacement.trials(part, draw))
        if not with_grads:
            return outputs
        loss = torch.stack([(out * normal(out.shape)).sum() for out in outputs])
        grads = torch.autograd.grad(loss.sum(), [*inputs, *part.parameters()], allow_unused=True)
    return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]


def _close(expected: list[Tensor], got: list[Tensor]) -> bool:
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        return False
    tolerance = EXACT_TOLERANCE if expected[0].device.type == "cpu" else TOLERANCE
    return all(bool((g - e).abs().max() <= tolerance * e.abs().max()) for g, e in zip(got, expected, strict=True))
