"""What can run on this machine, and which kernel an op uses.

The only place that looks at hardware. An op asks :meth:`Op.choose`; `auto` takes the first kernel
that supports the inputs, in the device's order of preference; a backend requested by name raises with
its reason instead of falling back.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
# Where a CUDA kernel was measured to be faster than Triton's and goes first; `benchmarks.select_backends` writes it.
MEASURED = Path(__file__).with_name("measured.json")
# Third-party packages, for comparison; used only when requested by name.
THIRD_PARTY: Mapping[str, tuple[str, str]] = {  # the function that is called: its module and its name
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
}
NAMES = ("auto", "reference", "cpu", "triton", "cuda", *THIRD_PARTY)


@dataclass(frozen=True)
class Implementation:
    """One op on one backend: the same three functions everywhere, of the op's inputs, a NamedTuple.

    unsupported_reason(inputs): None, or why they are not supported ("dtype float64 is not float32 or bfloat16").
    forward(inputs): the outputs, a tuple.
    backward(grads, inputs): gradients of the inputs' tensors, those that there are, in their order; None: there is no
        backward.
    own_arithmetic: no setting of torch (autocast, the precision of float32 matmuls) changes what it computes.
    """

    unsupported_reason: Callable[[Any], str | None]
    forward: Callable[[Any], tuple[Any, ...]]
    backward: Callable[[Any, Any], Sequence[Any]] | None
    own_arithmetic: bool = False


class BackendError(RuntimeError):
    """A backend that was requested by name does not support the call."""


@cache
def _extension(name: str) -> ModuleType | str:
    """An extension of this package, or why it cannot be loaded."""
    try:
        return importlib.import_module(f"mvar_kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"mvar_kernels.{name}":
            return f"cannot be imported: {error_message(error)}"
        others = sorted(path.name for path in Path(__file__).parent.glob(f"{name}.*.so"))
        return f"was built for another Python: {', '.join(others)}" if others else "was not built"
    except Exception as error:  # of another ABI, or damaged: ImportError, OSError, SystemError, …
        return f"cannot be imported: {error_message(error)}"


@cache
def native() -> ModuleType | None:
    """The extension of C++ kernels, or None where there is none that can be loaded."""
    module = _extension("_native")
    return None if isinstance(module, str) else module


@cache
def cuda() -> ModuleType | None:
    """The extension of CUDA kernels, or None where there is none that can be loaded."""
    module = _extension("_cuda")
    return None if isinstance(module, str) else module


def extension(t: torch.Tensor) -> ModuleType:
    """The extension whose kernels run where `t` is, one of which was chosen."""
    module = cuda() if t.is_cuda else native()
    assert module is not None, "unavailable() answers before a kernel is called"
    return module


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU: its own switch, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def error_message(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _not_installed(package: str) -> str | None:
    """Why there is nothing to import, or None; nothing is imported, which for Triton takes a second."""
    try:
        found = importlib.util.find_spec(package) is not None
    except Exception as error:  # ValueError for a fake module in sys.modules, which has no __spec__
        return f"{package} is no installed package: {error_message(error)}"
    return None if found else f"{package} is not installed"


def _another_mode() -> str | None:
    """Whether TRITON_INTERPRET was changed too late: Triton's own functions are made for it at its import."""
    of_import = type(importlib.import_module("triton.language").cdiv).__name__ == "InterpretedFunction"
    return None if of_import == interpreted() else "TRITON_INTERPRET was changed after Triton was imported"


@cache  # of what can be imported: an exception is not kept
def _imported(module: str, name: str) -> None:
    """Raises whatever keeps `name` from being imported from `module`."""
    # A package that fails leaves submodules behind, in which a second attempt would find the name.
    importlib.import_module(module.partition(".")[0])
    if getattr(importlib.import_module(module), name, None) is None:
        raise ImportError(f"{module} has no {name}: another version, or a stub module")


def _not_importable(module: str, name: str) -> str | None:
    """Why `from module import name` fails, or None. Half-installed packages raise anything, sys.exit included."""
    package = module.partition(".")[0]
    try:
        _imported(module, name)
    except (Exception, SystemExit) as error:
        return f"{package} cannot be imported: {error_message(error)}"
    return None


@cache
def architecture(device: torch.device) -> str:
    """The GPU's architecture as compilers name it ("sm_90"), or "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """The GPU's number of multiprocessors; 1 in the interpreter, which runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def measured() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Architecture → op → the passes ("forward", "backward") in which its CUDA kernel was measured to be the faster."""
    table: Mapping[str, Mapping[str, tuple[str, ...]]] = json.loads(MEASURED.read_text())
    return table


_found: set[str] = set()  # backends that can run here: looked up at every call with a named backend


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None."""
    if name in _found:
        return None
    reason = _looked_for(name)
    if reason is None:
        _found.add(name)
    return reason


def _looked_for(name: str) -> str | None:
    no_device = None if torch.cuda.is_available() else "no CUDA device"
    match name:
        case "reference":
            return None
        case "cpu":
            module = _extension("_native")
            return _unloaded("C++", module, "no compiler at install") if isinstance(module, str) else None
        case "cuda":
            module = _extension("_cuda")
            if isinstance(module, str):
                return _unloaded("CUDA", module, "at install: no nvcc, or neither a GPU nor CUDAARCHS")
            return no_device
        case "triton":
            reason = _not_installed(name)
            if reason is not None:
                return f"{reason} (a CUDA build of torch brings it)"
            reason = None if interpreted() else no_device
            return reason or _not_importable("triton.language", "cdiv") or _another_mode()
        case _:
            return _not_installed(name) or _not_importable(*THIRD_PARTY[name]) or no_device


def _unloaded(language: str, reason: str, why_not_built: str) -> str:
    hint = f" ({why_not_built})" if reason == "was not built" else ""
    return f"the extension of {language} kernels {reason}{hint}"


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where it is available here and else the reason why not."""
    return {name: unavailable(name) for name in NAMES if name != "auto"}


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_capturing(op: str, device: torch.device) -> None:
    """Raise RuntimeError where a first call's tables would be copied to the GPU inside a CUDA graph's capture."""
    if capturing(device):
        raise RuntimeError(
            f"{op}: the first call with new scales copies their tables to the GPU, which a CUDA graph cannot capture: "
            "call it once with these sizes before the capture"
        )


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is one of :data:`NAMES`."""
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {backend!r}")


def guarded(kernel: Implementation, device: torch.device) -> Implementation:
    """The kernel as an op may call it: with the inputs' GPU as the current one, and in true float32.

    Triton launches on the current GPU; autocast, and on some CPUs torch's precision of float32 matmuls, would compute
    in 16 bits what an op promises in float32.
    """
    contexts: list[Callable[[], Any]] = []
    if not kernel.own_arithmetic:
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

    return replace(kernel, forward=inside(kernel.forward), backward=kernel.backward and inside(kernel.backward))


OPS: dict[str, "Op"] = {}
"""Every op by its name, from when its module is imported."""


class Op:
    """The kernels of one op: `modules` maps a backend to its module inside the op's package.

    The module exports the :class:`Implementation` as `<op>_<backend>` and is imported when first asked
    for, so that importing mvar_kernels never imports Triton.
    """

    def __init__(self, name: str, package: str, modules: Mapping[str, str]) -> None:
        self.name, self.package, self.modules = name, package, dict(modules)
        OPS[name] = self

    # Looked up at every call of an op; ops are made once, with their modules, and live as long as the process.
    @cache  # noqa: B019
    def kernel(self, backend: str) -> Implementation:
        """The op's kernel of that name; imports its module."""
        module = importlib.import_module(f".{self.modules[backend]}", self.package)
        kernel: Implementation = getattr(module, f"{self.name}_{backend}")
        return kernel

    def unsupported_reason(self, backend: str, device: torch.device, inputs: Any, backward: bool) -> str | None:
        """Why `backend` cannot run this op on these inputs, or None."""
        if backend not in self.modules:
            return f"has no {self.name} kernel"
        reason = unavailable(backend)
        if reason is not None:
            return reason
        if backend not in ("reference", *PREFERENCE.get(device.type, ()), *THIRD_PARTY) and not (
            backend == "triton" and interpreted()
        ):
            return f"inputs are on {device.type}"
        kernel = self.kernel(backend)
        if backward and kernel.backward is None:
            return f"{self.name} has no backward kernel"
        return kernel.unsupported_reason(inputs)

    @cache  # noqa: B019
    def available(self, device: torch.device, backward: bool) -> tuple[Implementation, ...]:
        """The kernels that can run a pass on this device, in order of preference."""
        names = PREFERENCE.get(device.type, ("reference",))
        one_pass = "backward" if backward else "forward"
        if one_pass in measured().get(architecture(device), {}).get(self.name, ()):
            names = ("cuda", *(name for name in names if name != "cuda"))
        here = (self.kernel(name) for name in names if name in self.modules and unavailable(name) is None)
        return tuple(kernel for kernel in here if kernel.backward or not backward)

    def choose(self, backend: str, device: torch.device, inputs: Any, *, backward: bool = False) -> Implementation:
        """The kernel to use for these inputs."""
        if backend != "auto":
            reason = self.unsupported_reason(backend, device, inputs, backward)
            if reason is not None:
                raise BackendError(f"{self.name}: backend {backend!r} requested, but: {reason}")
            return guarded(self.kernel(backend), device)
        for kernel in self.available(device, backward):
            if kernel.unsupported_reason(inputs) is None:
                return guarded(kernel, device)
        raise BackendError(f"{self.name}: no backend takes these inputs")
