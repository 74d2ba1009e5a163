"""Does a patched module compute what the original computes? Compared on random weights and inputs."""

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.dispatch import error_message
from mvar_kernels.patching.patches.base import Patch
from mvar_kernels.precision import true_float32

# Relative to the largest value. TF32 matmuls on a GPU have few bits; another computation differs by more.
TOLERANCE = 1e-2
CPU_TOLERANCE = 1e-4  # where matmuls are true float32 during the check
HALF_TOLERANCE = 3e-2  # under autocast to float16, for parts that do not compute in float32, as with flash-attn
LENGTH, MOST = 1024, 9451
"""Tokens of the long calls: at least those of the largest scale at 512×512, and at most those of 1024×1024."""


class EquivalenceCheck:
    """Compares the modules of one model with their patched versions. Random weights are shared between modules.

    Every module is checked in evaluation mode; the first of its kind (class, classes of submodules, shapes) also in
    training mode, with the same random numbers, and with all gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[tuple[str, torch.Size, torch.device], nn.Parameter] = {}
        self._checked_in_training: set[Any] = set()
        self._length = min(max(LENGTH, _sequence_length(model)), MOST)

    def difference(self, module: nn.Module, patch: type[Patch], classes: Mapping[str, type]) -> str | None:
        """How the outputs would change with these classes of the module ("") and its submodules, or None."""
        device = next(module.parameters()).device
        kind = (tuple(map(type, module.modules())), tuple((name, p.shape) for name, p in module.named_parameters()))
        modes = ("evaluation",) if kind in self._checked_in_training else ("evaluation", "training")
        with (
            true_float32(device),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(False),
            _state_restored(module) as changed_buffers,
        ):
            try:
                comparison = _Comparison(self._copy(module), patch, classes, device)
                for mode in (*modes, "evaluation on long sequences"):
                    if not comparison.agrees(mode, self._length):
                        return f"it does not compute what {patch.ops} does, in {mode}"
            except Exception as error:  # of the model's own code, which may raise anything
                return f"it could not be checked on {device}: {error_message(error)}"
        if changed_buffers:
            names = " and ".join(changed_buffers)
            return f"it could not be checked: a copy of it writes to the model itself, to {names}"
        self._checked_in_training.add(kind)
        return None

    def _copy(self, module: nn.Module) -> Any:
        """A copy of the module with random float32 weights and without hooks, which shares no memory with it."""
        memo: dict[int, Any] = {id(p): self._random(name, p) for name, p in module.named_parameters()}
        for submodule in module.modules():
            for name, value in vars(submodule).items():
                if "_hooks" in name and isinstance(value, dict):
                    memo[id(value)] = OrderedDict()
                elif isinstance(value, Tensor):
                    memo.setdefault(id(value), _float32_copy(value))
        memo |= {id(b): _float32_copy(b) for b in module.buffers()}
        copied = copy.deepcopy(module, memo)
        originals = {id(submodule) for submodule in module.modules()}
        if any(id(submodule) in originals for submodule in copied.modules()):
            raise RuntimeError("its deepcopy is not a copy")
        return copied

    def _random(self, name: str, like: nn.Parameter) -> nn.Parameter:
        key = (name, like.shape, like.device)
        if key not in self._weights:
            values = torch.empty(like.shape, dtype=torch.float32, device=like.device)
            if like.dim() > 1 and like.shape[-1] == 1:
                # temperatures below and above their bound
                values.view(-1).copy_(torch.linspace(0, 5, like.numel(), dtype=torch.float32, device=like.device))
            else:
                generator = torch.Generator(like.device).manual_seed(len(self._weights))
                values.uniform_(-1, 1, generator=generator).mul_((3 / max(like.shape[-1], 4)) ** 0.5)
            self._weights[key] = nn.Parameter(values)
        return self._weights[key]


def _float32_copy(t: Tensor) -> Tensor:
    """A copy, in float32 as the random weights are."""
    return t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)


def _normal(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """On the CPU in float32, independent of the default device and dtype."""
    generator = generator or torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class _Comparison:
    """Runs a test module with its own class, and with those of its patched version."""

    def __init__(self, module: Any, patch: type[Patch], classes: Mapping[str, type], device: torch.device) -> None:
        self.module, self.patch, self.device = module, patch, device
        self.patched = {module.get_submodule(name): cls for name, cls in classes.items()}
        self.originals = {submodule: type(submodule) for submodule in self.patched}
        self.autocast = False  # to float16
        self.accumulate = False  # gradients in `.grad`: torch.autograd.grad does not support re-entrant checkpoints

    def agrees(self, mode: str, length: int) -> bool:
        """Whether both have the same outputs, and in training the same gradients."""
        training = mode == "training"
        self.module.train(training)
        calls = self.patch.example_calls
        if "long" in mode:
            calls = partial(self.patch.long_calls, length=length)
        try:
            expected = self._results(calls, training)
        except Exception as error:
            self.accumulate = training and "checkpoint" in str(error)
            self.autocast = not self.accumulate
            try:
                expected = self._results(calls, training)
            except Exception:
                raise error from None
        try:
            for submodule, cls in self.patched.items():
                submodule.__class__ = cls
            assert self.module.is_valid(), "the original forward would run"
            got = self._results(calls, training)
        finally:
            for submodule, cls in self.originals.items():
                submodule.__class__ = cls
        full_precision = CPU_TOLERANCE if self.device.type == "cpu" else TOLERANCE
        return _close(expected, got, HALF_TOLERANCE if self.autocast else full_precision)

    def _results(self, calls: Callable[..., Iterable[Tensor]], training: bool) -> list[Tensor]:
        """Outputs of the calls, with the same inputs each time, and gradients of all inputs and parameters."""
        generator = torch.Generator("cpu").manual_seed(0)
        inputs: list[Tensor] = []

        def randn(*shape: int) -> Tensor:
            values = _normal(*shape, generator=generator)
            inputs.append(values.to(self.device).requires_grad_(training))
            return inputs[-1]

        autocast = torch.autocast(self.device.type, torch.float16, enabled=self.autocast, cache_enabled=False)
        with torch.set_grad_enabled(training), autocast:
            _seed(self.device)
            outputs = list(calls(self.module, randn))
        if not training:
            return outputs
        loss = torch.stack([(out * _normal(*out.shape, generator=generator).to(self.device)).sum() for out in outputs])
        leaves = [*inputs, *self.module.parameters()]
        if self.accumulate:
            for leaf in leaves:
                leaf.grad = None
            loss.sum().backward()
            grads = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
        else:
            grads = list(torch.autograd.grad(loss.sum(), leaves, allow_unused=True))
        return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]


@contextmanager
def _state_restored(module: nn.Module) -> Iterator[list[str]]:
    """Restores random states, gradients and the module's buffers; the list then has the names of changed buffers.

    The forward of a copy can reach the model itself through a closure.
    """
    grads = [(p, p.grad) for p in module.parameters()]
    buffers = {name: (b, b.clone()) for name, b in module.named_buffers()}
    changed: list[str] = []
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy.get_state() if numpy else None
    devices = {p.device for p in module.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield changed
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.set_state(states[1])
        for parameter, grad in grads:
            parameter.grad = grad
        for name, (buffer, before) in buffers.items():
            if not torch.equal(buffer, before):
                changed.append(name)
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before)


def _seed(device: torch.device) -> None:
    """Seed the generators of the CPU and of this device; torch.manual_seed would seed those of all GPUs."""
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(0)


def _close(expected: list[Tensor], got: list[Tensor], tolerance: float) -> bool:
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        return False
    largest = [float(e.abs().max()) for e in expected]
    least = 1e-3 * max(largest)  # a much smaller gradient may be rounding errors alone
    errors = [float((g - e).abs().max()) for g, e in zip(got, expected, strict=True)]
    return all(error <= tolerance * max(size, least) for error, size in zip(errors, largest, strict=True))


def _sequence_length(model: nn.Module) -> int:
    """Tokens of the model's sequence, by the buffers and parameters that VAR and its relatives have for each token."""
    lengths = [0]
    for name, t in (*model.named_buffers(), *model.named_parameters()):
        match name.rpartition(".")[2]:
            case "attn_bias_for_masking" | "lvl_1L":
                lengths.append(t.shape[-1] if t.dim() else 0)
            case "pos_1LC":
                lengths.append(t.shape[1] if t.dim() > 1 else 0)
    return max(lengths)
