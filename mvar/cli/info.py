"""`mvar info`: versions, devices and backends."""

import argparse

HELP = "print versions, devices and backends, and why a backend is not available"
EXAMPLES = "mvar info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`mvar info` has no arguments."""


def run(options: argparse.Namespace) -> None:
    print(*lines(), sep="\n")


def lines() -> list[str]:
    """Versions, devices and backends, with the reason if a backend is not available, one per line."""
    import platform

    import torch

    import mvar
    from mvar.inference.dtypes import fastest_dtype, linear_rates
    from mvar.utils.machine import cpu_model, version
    from mvar_kernels.dispatch import backends, native

    rates = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate:.0f}" for dtype, rate in linear_rates().items())
    found = [
        f"mvar {mvar.__version__}, torch {torch.__version__}, Triton {version('triton')}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        f"cpu: {cpu_model()}, {torch.get_num_threads()} threads, fastest dtype {fastest_dtype(torch.device('cpu'))}"
        + (rates and f" (GFLOP/s of one thread: {rates})"),
    ]
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        memory_gib = torch.cuda.get_device_properties(i).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(i)}, {memory_gib:.0f} GiB"
        found.append(f"{device}: {name}, CUDA {torch.version.cuda}, fastest dtype {fastest_dtype(device)}")
    extension = native()
    if extension is not None:
        facts = ", ".join(f"{name} {value}" for name, value in extension.build_info().items())
        found.append(f"extension: runs {extension.instruction_set()}; {facts}")
    found.append("backends:")
    for name, reason in backends().items():
        found.append(f"  {name:<11} {'available' if reason is None else f'not available: {reason}'}")
    return found
