"""Tests of backend selection and of the reasons why a backend is unavailable."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import mvar_kernels as mk
from benchmarks.select_backends import faster_in_cuda
from mvar_kernels import dispatch
from mvar_kernels.ops.adaln import op as adaln


def test_backend_order(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    op = dispatch.Op("adaln", adaln.__package__, adaln._ADALN.modules)
    cuda, triton = op.kernel("cuda"), op.kernel("triton")
    assert op.available(device, False)[:2] == (triton, cuda)
    for passes in (["forward"], ["backward"]):
        op = dispatch.Op("adaln", adaln.__package__, adaln._ADALN.modules)
        monkeypatch.setattr(dispatch, "measured", lambda passes=passes: {"sm_90": {"adaln": passes}})
        for backward in (False, True):
            first = cuda if passes == ["backward" if backward else "forward"] else triton
            assert op.available(device, backward)[0] is first


def test_faster_in_cuda() -> None:
    def row(one_pass: str, **median_ms: float) -> dict[str, Any]:
        return {"pass": one_pass, "median_ms": {f"mvar {name}": ms for name, ms in median_ms.items()}}

    won, lost, alone = row("forward", cuda=1, triton=2), row("forward", cuda=2, triton=1), row("backward", cuda=1)
    assert faster_in_cuda([won, won, alone]) == ["forward"]
    assert faster_in_cuda([won, lost]) == [] and faster_in_cuda([alone]) == []


def test_committed_preferences() -> None:
    table = json.loads(Path(dispatch.MEASURED).read_text())
    assert all(set(passes) <= {"forward", "backward"} for ops in table.values() for passes in ops.values())


@pytest.fixture
def clean_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the cache of found backends, and remove third-party modules imported by the test afterwards."""
    monkeypatch.setattr(dispatch, "_found", set())
    before = dict(sys.modules)
    dispatch._imported.cache_clear()
    yield
    dispatch._imported.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in dispatch.THIRD_PARTY and name not in before]:
        del sys.modules[name]


def with_spec(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


FAKE_MODULES: dict[str, Callable[[str], Any]] = {
    "an empty module": ModuleType,
    "one with a spec": with_spec,
    "a mock": lambda name: MagicMock(),
    "None": lambda name: None,
}


@pytest.mark.parametrize("kind", FAKE_MODULES)
@pytest.mark.parametrize("name", dispatch.THIRD_PARTY)
def test_fake_third_party(name: str, kind: str, clean_backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, FAKE_MODULES[kind](name))
    reason = mk.backends()[name]
    assert reason is not None and reason.startswith(f"{name} ")
    q = torch.ones(1, 2, 1, 4)
    op: Callable[..., Any] = mk.scale_attention if name == "flash_attn" else mk.ssd_scan
    inputs = (q, q, q, (2,)) if name == "flash_attn" else (q, q[..., 0], -torch.ones(1), q[:, :, 0], q[:, :, 0])
    with pytest.raises(mk.BackendError, match=f"backend '{name}' requested, but: {name} "):
        op(*inputs, backend=name)
    op(*inputs)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("raise RuntimeError('first line\\nsecond')", "RuntimeError: first line"),
        ("raise RuntimeError", "RuntimeError"),
        ("import sys; sys.exit('needs a GPU')", "SystemExit: needs a GPU"),
        ("import there_is_no_such_module", "No module named 'there_is_no_such_module'"),
        ("flash_attn_varlen_func = None", "has no flash_attn_varlen_func"),
        (None, "has no flash_attn_varlen_func"),  # an empty folder, which Python imports as a namespace package
    ],
)
def test_broken_third_party_package(
    source: str | None, reason: str, clean_backends: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    if source is not None:
        (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = mk.backends()["flash_attn"]
    assert found is not None and found.startswith("flash_attn cannot be imported: ") and reason in found
    assert "second" not in found


def test_reason_stays_the_same(clean_backends: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's __init__ fails after it has imported the kernel's module: mamba_ssm's without transformers."""
    module, name = dispatch.THIRD_PARTY["mamba_ssm"]
    kernel = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    kernel.parent.mkdir(parents=True)
    kernel.write_text(f"{name} = print")
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(f"import {module}\nimport there_is_no_such_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = (mk.backends()["mamba_ssm"] for _ in range(2))
    assert first == second and "No module named 'there_is_no_such_module'" in str(first)


def test_fake_triton_module(clean_backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton.language"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", with_spec("triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert str(mk.backends()["triton"]).startswith("triton cannot be imported: ")
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert "no installed package" in str(mk.backends()["triton"])
    with pytest.raises(mk.BackendError, match="triton"):
        mk.adaln(torch.ones(1, 1, 4), torch.ones(1, 4), torch.ones(1, 4), backend="triton")
    mk.adaln(torch.ones(1, 1, 4), torch.ones(1, 4), torch.ones(1, 4))


def test_triton_interpret_set_after_import(clean_backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch._not_installed("triton"):
        pytest.skip("triton is not installed")
    language = with_spec("triton.language")
    language.cdiv = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.language", language)
    for value in ("1", "true", "ON"):  # all of which Triton accepts
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert mk.backends()["triton"] == "TRITON_INTERPRET was changed after Triton was imported"


def test_extension_import_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Covers an extension that was not built, was built for another Python, or is damaged."""
    here = Path(dispatch.__file__).parent
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    load = dispatch._extension.__wrapped__
    assert load("_nowhere") == "was not built"
    (tmp_path / "_nowhere.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    assert load("_nowhere") == "was built for another Python: _nowhere.cpython-39-x86_64-linux-gnu.so"

    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_damaged{suffix}").write_bytes(b"no library")
    monkeypatch.setattr(mk, "__path__", [str(here), str(tmp_path)])
    assert str(load("_damaged")).startswith("cannot be imported: ImportError: ")

    monkeypatch.setattr(dispatch, "_found", set())
    monkeypatch.setattr(dispatch, "_extension", lambda name: load("_damaged"))
    for name in ("cpu", "cuda"):
        assert "cannot be imported: ImportError" in str(mk.backends()[name])


def test_plan_during_cuda_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvar_kernels.ops.scale_attention.plan import plan

    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="call it once with these sizes before the capture"):
        plan((1, 2, 39), 42, False, False, 64, 64, torch.device("cpu"))
    monkeypatch.undo()
    assert plan((1, 2, 39), 42, False, False, 64, 64, torch.device("cpu")).tiles.numel()  # the error is not cached
