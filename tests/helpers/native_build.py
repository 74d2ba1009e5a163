"""Builds the C++ extension with other options, in separate folders."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.helpers.paths import ROOT

MODULE = "mvar_kernels._native"


def configure_command(source: Path, folder: Path, *options: str) -> list[str]:
    """The command that configures a CMake project in `folder`, for this Python and its pybind11.

    CMake rejects the cache of a project that was moved; such a cache is removed.
    """
    import pybind11

    cache = folder / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={source}\n" not in cache.read_text():
        cache.unlink()
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment()["PATH"]) else []
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return ["cmake", "-S", str(source), "-B", str(folder), *options, *generator, *python]


def environment() -> dict[str, str]:
    """The environment with this Python's scripts, where pip installs cmake and ninja, first in PATH."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    return os.environ | {"PATH": path}


def build(folder: Path, *options: str) -> Path:
    """Build the extension with the given CMake options, recompiling changed sources. Returns the module's path."""
    configure = configure_command(ROOT, folder, *options)
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_native", "--parallel", "2"]):
        subprocess.run(command, check=True, env=environment())
    (module,) = folder.glob("_native*.so")
    return module


def load(path: Path) -> None:
    """Use the extension at `path` instead of the package's, which must not have been imported yet."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
