"""Result files: results/<CPU or GPU>/<name>.json, each with the machine, the versions and the commit it is of."""

import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import mvar
from benchmarks.common.environment import DEVICE, REHEARSAL
from mvar.utils.files import make_folder, write_json
from mvar.utils.machine import cpu_model, cpuinfo, version
from mvar_kernels.dispatch import architecture, native

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("csrc/**/*", "mvar/**/*.py", "mvar_kernels/**/*.py", "benchmarks/**/*.py")


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, commit."""
    extension = native()
    return {
        "processor": cpuinfo().get("model name", platform.processor()),
        "cpu_model": cpu_model(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "architecture": architecture(DEVICE),
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mvar": mvar.__version__,
        "instruction_set": extension.instruction_set() if extension else None,
        "compiler": extension.build_info()["compiler"] if extension else None,
        "commit": _commit(),
        "sources": _sources(),
    }


def _commit() -> str:
    """The short hash, and whether code has changed since; "unknown" without git or its history."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    # A run changes results and docs, which are not code. In a pathspec * also matches slashes.
    changed = git("status", "--porcelain", "--", "csrc", "mvar", "mvar_kernels", "benchmarks/*.py")
    commit = git("rev-parse", "--short", "HEAD")
    return commit + (" with changes" if changed else "") if commit else "unknown, maybe with changes"


def _sources() -> str:
    """A hash of the source files: results of other code are never resumed, also without git."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def device_name() -> str:
    """The folder of this GPU's, or this model of CPU's, results: "nvidia_h200", "amd_epyc_family_26_avx512"."""
    here = machine()
    name: str = here["cpu_model"] if here["device"] == "cpu" else here["device"]
    return slug(name)


def slug(name: str) -> str:
    """ "AMD EPYC, family 26, avx512" → "amd_epyc_family_26_avx512" """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def folder() -> Path:
    """The folder of this machine's results; a rehearsal's is below the working directory."""
    return Path("build") / "rehearsal" if REHEARSAL else RESULTS / device_name()


def load(name: str) -> Any:
    """The rows of <name>.json if this machine measured them at this commit, else None."""
    try:
        content = json.loads((folder() / f"{name}.json").read_text())
    except (OSError, ValueError):  # missing or damaged
        return None
    return content["rows"] if content.get("machine") == machine() else None


def save(name: str, rows: Any) -> Path:
    """Write <name>.json: the machine and the rows."""
    path = folder() / f"{name}.json"
    make_folder(path.parent)
    write_json(path, {"machine": machine(), "rows": rows})
    return path
