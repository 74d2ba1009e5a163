"""Builds the C++ kernels (`mvar_kernels._native`) and the CUDA ones (`mvar_kernels._cuda`) with CMake.

Everything else is in pyproject.toml.

A machine that cannot compile at all (no CMake, no compiler, no Python headers) gets an install
without the kernels, and one line that says so. A machine that can, but on which our sources do not
compile, gets an error.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

PROBE = """
cmake_minimum_required(VERSION 3.18)
project(probe LANGUAGES CXX)
if(MSVC)
  message(FATAL_ERROR "needs GCC or Clang")
endif()
"""


def find_tool(name: str) -> str | None:
    """A program beside this Python (where pip puts cmake and ninja, though PATH may lack it) or on PATH."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=path)


def generator() -> list[str]:
    """The CMake arguments for ninja if there is one, else for make.

    The program is named each time: CMake would remember one in a build environment long deleted.
    """
    ninja = find_tool("ninja")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]


def find_obstacle() -> str | None:
    """Why nothing can be compiled on this machine, or None."""
    cmake = find_tool("cmake")
    if cmake is None:
        return "no CMake"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h (on Debian and Ubuntu: the package python3-dev)"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "CMakeLists.txt").write_text(PROBE)
        command = [cmake, "-S", folder, "-B", f"{folder}/build", *generator()]
        probe = subprocess.run(command, capture_output=True, text=True)
    return "no C++ compiler that CMake can use (GCC or Clang)" if probe.returncode else None


class CMakeBuild(build_ext):
    def run(self) -> None:
        obstacle = find_obstacle()
        if obstacle is not None:
            print(f"mvar: the C++ kernels were left out: {obstacle}", file=sys.stderr)
            self.extensions: list[Extension] = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake")
        assert cmake is not None, "find_obstacle() has looked"
        # A folder that outlives the build: an editable install builds in a temporary one, from
        # which only the extension comes back, and would compile everything anew each time.
        maker = "ninja" if find_tool("ninja") else "make"
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{maker}"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), *generator()),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)
        product = Path(self.get_ext_fullpath(ext.name))
        built = folder / product.name
        if ext.optional and not built.exists():
            return
        product.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(product))


# CMake finds the sources by itself: they are listed here for source distributions. One run of it builds both modules,
# the CUDA one where it can (CMakeLists.txt says where).
SOURCES = {
    "sources": sorted(glob("csrc/**/*.c*", recursive=True)),
    "depends": ["CMakeLists.txt", *sorted(glob("csrc/**/*.h", recursive=True))],
}
EXTENSIONS = [Extension("mvar_kernels._native", **SOURCES), Extension("mvar_kernels._cuda", optional=True, **SOURCES)]

if __name__ == "__main__":
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
