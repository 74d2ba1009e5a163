"""What can run on this machine, and which kernel an op uses.

The only place that looks at hardware. An op asks :meth:`Op.choose`; `auto` takes the first kernel
without an objection, in the device's order of preference; a backend asked for by name raises with
its objection instead of falling back.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mvar_kernels.precision import is_true_float32, true_float32

PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
# Where a CUDA kernel was measured to be faster than Triton's and goes first; `python -m benchmarks.prefer` writes it.
MEASURED = Path(__file__).with_name("measured.json")
# Chosen by name only: other people's packages, kept for comparison.
PEERS = ("flash_attn", "mamba_ssm")
NAMES = ("auto", "reference", "cpu", "triton", "cuda", *PEERS)


@dataclass(frozen=True)
class Kernel:
    """One op on one backend: the same three doors everywhere.

    `why_not` takes the inputs of `forward`, or those that `backward` is given again, and answers None
    or an objection ("dtype float64 is not float32 or bfloat16"). `backward` None: there is none.
    """

    why_not: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do what was asked."""


def _extension(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"mvar_kernels.{name}")
    except ImportError:
        return None


@cache
def native() -> ModuleType | None:
    """The extension of C++ kernels, or None where it was not built."""
    return _extension("_native")


@cache
def cuda() -> ModuleType | None:
    """The extension of CUDA kernels, or None where it was not built."""
    return _extension("_cuda")


def extension(t: torch.Tensor) -> ModuleType:
    """The extension whose kernels run where `t` is, one of which was chosen."""
    module = cuda() if t.is_cuda else native()
    assert module is not None, "unavailable() answers before a kernel is called"
    return module


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU: its own switch, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def architecture(device: torch.device) -> str:
    """The GPU's architecture as compilers name it ("sm_90"), or "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def measured() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Architecture → op → the passes ("forward", "backward") in which its CUDA kernel was measured to be the faster."""
    table: Mapping[str, Mapping[str, tuple[str, ...]]] = json.loads(MEASURED.read_text())
    return table


@cache
def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None."""
    match name:
        case "reference":
            return None
        case "cpu":
            return None if native() else "the C++ extension was not built (no compiler at install)"
        case "cuda":
            if cuda() is None:
                return "the CUDA extension was not built (at install: no nvcc, or neither a GPU nor CUDAARCHS)"
            return None if torch.cuda.is_available() else "no CUDA device"
        case "triton":
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed (a CUDA build of torch brings it)"
            return None if torch.cuda.is_available() or interpreted() else "no CUDA device"
        case _:
            missing = importlib.util.find_spec(name) is None
            return f"{name} is not installed" if missing else None


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where it is available here and else the reason why not."""
    return {name: unavailable(name) for name in NAMES if name != "auto"}


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is one of :data:`NAMES`."""
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {backend!r}")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype for matrix products that the device has natively.

    bfloat16 where the device multiplies it natively (GPUs from Ampere on, CPUs with avx512_bf16),
    float16 on older GPUs, else float32.
    """
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    module = native()
    if device.type == "cpu" and module is not None and module.instruction_set() == "avx512":
        return torch.bfloat16  # the extension's "avx512" stands for a CPU with avx512_bf16
    return torch.float32


def guarded(kernel: Kernel, device: torch.device) -> Kernel:
    """The kernel as an op may call it: with the inputs' GPU as the current one, and in true float32.

    Triton launches on the current GPU; autocast, and on some CPUs torch's setting of float32 products, would compute
    in 16 bits what an op promises in float32.
    """
    contexts: list[Callable[[], Any]] = []
    if torch.is_autocast_enabled(device.type):
        contexts.append(partial(torch.autocast, device.type, enabled=False))
    if device.type == "cpu" and not is_true_float32():
        contexts.append(partial(true_float32, device))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        contexts.append(partial(torch.cuda.device, device))
    if not contexts:
        return kernel

    def inside(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                return call(*inputs)

        return run

    return Kernel(kernel.why_not, inside(kernel.forward), kernel.backward and inside(kernel.backward))


class Op:
    """The kernels of one op: `modules` maps a backend to its module inside the op's package.

    The module exports the :class:`Kernel` as `<op>_<backend>` and is imported when first asked
    for, so that importing mvar_kernels never imports Triton.
    """

    def __init__(self, name: str, package: str, modules: Mapping[str, str]) -> None:
        self.name, self.package, self.modules = name, package, dict(modules)

    # Looked up at every call of an op; ops are made once, with their modules, and live as long as the process.
    @cache  # noqa: B019
    def kernel(self, backend: str) -> Kernel:
        """The op's kernel of that name; imports its module."""
        module = importlib.import_module(f".{self.modules[backend]}", self.package)
        kernel: Kernel = getattr(module, f"{self.name}_{backend}")
        return kernel

    def objection(self, backend: str, device: torch.device, *inputs: Any, backward: bool) -> str | None:
        """Why `backend` cannot run this op on these inputs, or None."""
        if backend not in self.modules:
            return f"has no {self.name} kernel"
        reason = unavailable(backend)
        if reason is not None:
            return reason
        if backend not in ("reference", *PREFERENCE.get(device.type, ()), *PEERS) and not (
            backend == "triton" and interpreted()
        ):
            return f"inputs are on {device.type}"
        kernel = self.kernel(backend)
        if backward and kernel.backward is None:
            return f"{self.name} has no backward kernel"
        return kernel.why_not(*inputs)

    @cache  # noqa: B019
    def available(self, device: torch.device, backward: bool) -> tuple[Kernel, ...]:
        """The kernels that can run a pass on this device, in order of preference."""
        names = PREFERENCE.get(device.type, ("reference",))
        one_pass = "backward" if backward else "forward"
        if one_pass in measured().get(architecture(device), {}).get(self.name, ()):
            names = ("cuda", *(name for name in names if name != "cuda"))
        here = (self.kernel(name) for name in names if name in self.modules and unavailable(name) is None)
        return tuple(kernel for kernel in here if kernel.backward or not backward)

    def choose(self, backend: str, device: torch.device, *inputs: Any, backward: bool = False) -> Kernel:
        """The kernel to use. `inputs` are what its `why_not` takes."""
        if backend != "auto":
            objection = self.objection(backend, device, *inputs, backward=backward)
            if objection is not None:
                raise BackendError(f"{self.name}: backend {backend!r} asked for, but: {objection}")
            return guarded(self.kernel(backend), device)
        for kernel in self.available(device, backward):
            if kernel.why_not(*inputs) is None:
                return guarded(kernel, device)
        raise BackendError(f"{self.name}: no backend takes these inputs")
