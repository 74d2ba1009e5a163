"""Processes of this checkout in which Triton compiles, where the tests themselves interpret."""

import os

from tests.helpers.paths import ROOT


def compiler_environment() -> dict[str, str]:
    """Environment variables of such a process."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(ROOT)}
