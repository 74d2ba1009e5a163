"""The CUDA kernels on a CPU: the same sources, compiled against the headers in this folder.

`with installed():` the backend "cuda" takes CPU tensors and runs them there.
"""

import fcntl
import importlib
import importlib.util
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from mvar_kernels import dispatch
from tests.helpers.native_build import configure_command, environment
from tests.helpers.paths import ROOT

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cuda-on-cpu"
NAME = "_cuda_on_cpu"


@cache
def build() -> Path:
    """Build the module, recompiling changed sources. Returns its path.

    Workers of pytest-xdist take turns: two builds at once in one folder leave objects of either.

    Raises:
        RuntimeError: a source does not compile, with the compiler's output.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure_command(HERE, BUILD), ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment())
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    (module,) = BUILD.glob(f"{NAME}*.so")
    return module


def load(path: Path) -> ModuleType:
    # A name of its own: pybind11 answers a name that it has seen with the module that it made then.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{NAME}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def module() -> ModuleType:
    """The kernels as they are in csrc."""
    return load(build())


_playing: list[ModuleType] = []


@contextmanager
def playing(kernels: ModuleType) -> Iterator[None]:
    """:func:`installed` runs `kernels` instead of those in csrc."""
    _playing.append(kernels)
    try:
        yield
    finally:
        _playing.pop()


@contextmanager
def installed() -> Iterator[None]:
    """The backend "cuda" takes CPU tensors, and the CPU plays the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "native", lambda: _playing[-1] if _playing else module())
        patch.setattr(dispatch, "unavailable", lambda name: None if name == "cuda" else "the CPU plays a GPU")
        patch.setattr(dispatch, "PREFERENCE", {"cpu": ("cuda",)})
        yield
