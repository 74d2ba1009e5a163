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


def build(folder: Path, *options: str) -> Path:
    """Build the extension with the given CMake options, recompiling changed sources. Returns the module's path."""
    import pybind11

    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    configure += ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_native", "--parallel", "2"]):
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
    (module,) = folder.glob("_native*.so")
    return module


def load(path: Path) -> None:
    """Use the extension at `path` instead of the package's, which must not have been imported yet."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
