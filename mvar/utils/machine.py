"""Hardware and software versions, for `mvar info`, `mvar check`, `mvar evaluate` and benchmarks."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import mvar
from mvar_kernels.dispatch import backends


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {
        "mvar": mvar.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("numpy", "triton", "torchvision", "torch-fidelity")},
    }


def device_and_backends(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backends": {name: reason or "available" for name, reason in backends().items()},
    }


def cpu_model() -> str:
    """Name, family and instruction sets of the CPU, such as "AMD EPYC, family 26, avx512".

    Family and instruction sets are included because virtual machines hide the model name. The instruction sets are the
    widest vector extension, AMX, and the limit ONEDNN_MAX_CPU_ISA.
    """
    facts = cpuinfo()
    features = set(facts.get("flags", "").split())
    widest = next((name for flag, name in (("avx512f", "avx512"), ("avx2", "avx2")) if flag in features), None)
    described = (
        facts.get("model name", platform.processor() or platform.machine()),
        "cpu family" in facts and f"family {facts['cpu family']}",
        widest,
        "amx_tile" in features and "amx",
        (limit := os.environ.get("ONEDNN_MAX_CPU_ISA")) and f"oneDNN up to {limit}",
    )
    return ", ".join(part for part in described if part)


def cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first CPU, empty on other systems."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
