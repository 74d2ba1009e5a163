"""`mvar info`: versions, devices and backends."""

import argparse

HELP = "print versions, devices and backends, and why a backend is not available"
EXAMPLES = "mvar info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`mvar info` has no arguments."""


def run(options: argparse.Namespace) -> None:
    from mvar.utils import machine

    print(*machine.lines(), sep="\n")
