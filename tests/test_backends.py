"""Which kernel `auto` takes."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.prefer import faster_in_cuda
from mvar_kernels.ops.adaln import op as adaln

backends = importlib.import_module("mvar_kernels.backends")  # the package calls a function by that name


def test_triton_goes_first_unless_cuda_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "architecture", lambda device: "sm_90")
    op = backends.Op("adaln", adaln.__package__, adaln._ADALN.modules)
    cuda, triton = op.kernel("cuda"), op.kernel("triton")
    assert op.available(device, False)[:2] == (triton, cuda)
    for passes in (["forward"], ["backward"]):
        op = backends.Op("adaln", adaln.__package__, adaln._ADALN.modules)
        monkeypatch.setattr(backends, "measured", lambda passes=passes: {"sm_90": {"adaln": passes}})
        for backward in (False, True):
            first = cuda if passes == ["backward" if backward else "forward"] else triton
            assert op.available(device, backward)[0] is first


def test_cuda_is_preferred_only_where_it_won_every_case() -> None:
    def row(one_pass: str, **median_ms: float) -> dict[str, Any]:
        return {"pass": one_pass, "median_ms": {f"mvar {name}": ms for name, ms in median_ms.items()}}

    won, lost, alone = row("forward", cuda=1, triton=2), row("forward", cuda=2, triton=1), row("backward", cuda=1)
    assert faster_in_cuda([won, won, alone]) == ["forward"]
    assert faster_in_cuda([won, lost]) == [] and faster_in_cuda([alone]) == []


def test_committed_preferences_name_ops_and_passes() -> None:
    table = json.loads(Path(backends.MEASURED).read_text())
    assert all(set(passes) <= {"forward", "backward"} for ops in table.values() for passes in ops.values())
