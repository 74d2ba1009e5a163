"""Does a replacement compute what the part of a model computes? Tried on random weights and inputs, side by side."""

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.patching.modules import Replacement
from mvar_kernels.precision import true_float32

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
        with (
            true_float32(device),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(False),
            _untouched(part) as touched,
        ):
            try:
                stand_in = self._stand_in(part)
                original = type(stand_in)
                for training in (False,) if kind in self._trained else (False, True):
                    stand_in.train(training)
                    results = []
                    for stand_in.__class__ in (original, replaced):
                        assert stand_in.__class__ is original or stand_in.as_tried(), "it would be tried with itself"
                        results.append(_results(stand_in, replacement, device, with_grads=training))
                    if not _close(*results):
                        mode = "training" if training else "evaluation"
                        return f"it does not compute what {replacement.what} does, in {mode}"
            except Exception as error:  # somebody else's code: whatever it raises is a reason to leave it
                words = (str(error).strip() or "no message").splitlines()[0]
                return f"it could not be tried on {device}: {type(error).__name__}: {words}"
        if touched:
            return f"it could not be tried: a copy of it writes to the model itself, to {' and '.join(touched)}"
        self._trained.add(kind)
        return None

    def _stand_in(self, part: nn.Module) -> Any:
        """A copy of the part with random float32 weights, and without hooks; nothing of it is the part's."""
        instead: dict[int, Any] = {id(p): self._random(name, p) for name, p in part.named_parameters()}
        for module in part.modules():
            for name, value in vars(module).items():
                if "_hooks" in name and isinstance(value, dict):
                    instead[id(value)] = OrderedDict()
                elif isinstance(value, Tensor):
                    instead.setdefault(id(value), _own(value))
        instead |= {id(b): _own(b) for b in part.buffers()}
        stand_in = copy.deepcopy(part, instead)
        theirs = {id(module) for module in part.modules()}
        if any(id(module) in theirs for module in stand_in.modules()):
            raise RuntimeError("its deepcopy is not a copy")
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


def _own(t: Tensor) -> Tensor:
    """The same values in memory of their own, in float32 as the random weights are."""
    return t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)


def _normal(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """On the CPU in float32, whatever the program's default device and dtype are."""
    generator = generator or torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@contextmanager
def _untouched(part: nn.Module) -> Iterator[list[str]]:
    """Puts back the random states and the part's buffers; the list then names buffers that had to be.

    A copy's forward can reach the live model through a function that closes over it.
    """
    buffers = {name: (b, b.clone()) for name, b in part.named_buffers()}
    changed: list[str] = []
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy.get_state() if numpy else None
    devices = {p.device for p in part.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield changed
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.set_state(states[1])
        for name, (buffer, before) in buffers.items():
            if not torch.equal(buffer, before):
                changed.append(name)
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before)


def _seed(device: torch.device) -> None:
    """The same random numbers for both sides: of this device alone, torch.manual_seed would reset those of all GPUs."""
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(0)


def _results(part: Any, replacement: type[Replacement], device: torch.device, *, with_grads: bool) -> list[Tensor]:
    """Outputs of all trials and, if asked for, gradients of all inputs and parameters; each time the same inputs."""
    generator = torch.Generator("cpu").manual_seed(0)
    inputs: list[Tensor] = []

    def draw(*shape: int) -> Tensor:
        inputs.append(_normal(*shape, generator=generator).to(device).requires_grad_(with_grads))
        return inputs[-1]

    with torch.set_grad_enabled(with_grads):
        _seed(device)
        outputs = list(replacement.trials(part, draw))
        if not with_grads:
            return outputs
        loss = torch.stack([(out * _normal(*out.shape, generator=generator).to(device)).sum() for out in outputs])
        grads = torch.autograd.grad(loss.sum(), [*inputs, *part.parameters()], allow_unused=True)
    return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]


def _close(expected: list[Tensor], got: list[Tensor]) -> bool:
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        return False
    tolerance = EXACT_TOLERANCE if expected[0].device.type == "cpu" else TOLERANCE
    largest = [float(e.abs().max()) for e in expected]
    least = 1e-3 * max(largest)  # a gradient far below the others may be nothing but rounding
    errors = [float((g - e).abs().max()) for g, e in zip(got, expected, strict=True)]
    return all(error <= tolerance * max(size, least) for error, size in zip(errors, largest, strict=True))
