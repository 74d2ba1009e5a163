"""The CUDA kernels on a CPU: the same sources, compiled against the headers in this folder.

`with installed():` the backend "cuda" takes CPU tensors and runs them there.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from mvar_kernels import dispatch
from tests.helpers.paths import ROOT

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cuda-on-cpu"
NAME = "_cuda_on_cpu"


@cache
def build() -> Path:
    """The compiled module, made anew where a source has changed.

    Raises RuntimeError with the compiler's words where they do not compile.
    """
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    configure = ["cmake", "-S", str(HERE), "-B", str(BUILD), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
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
