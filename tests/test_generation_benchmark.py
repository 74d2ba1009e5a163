"""The GPU's benchmark in small on the CPU: every line of it but CUDA's own, because a GPU's time is short."""

import copy
import time
from typing import Any

import pytest
import torch

import mvar
from benchmarks import generation, public, report_gpu
from benchmarks.generation import ALL, COMPILED, COMPILED_DECODER, NO_GRAPH, OURS, PUBLIC, VAR, Size, targets
from mvar.tokenizer import Tokenizer

TINY = mvar.TokenizerConfig((1, 2, 3), num_codes=1024, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)


def tiny_pair(depth: int, resolution: int, architecture: str) -> tuple[mvar.Model, Tokenizer]:
    return mvar.build(depth, tokenizer=TINY, architecture=architecture)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    files: dict[str, Any] = {}
    monkeypatch.setattr(generation, "write", lambda name, rows: files.update({name: copy.deepcopy(rows)}))
    monkeypatch.setattr(generation, "TIMING_SECONDS", 0.0)
    return files


def test_all_sides_and_a_timeline(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_compiled_block", lambda: torch.compile(public.block, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    sides = (*ALL, NO_GRAPH, COMPILED_DECODER, COMPILED)
    generation.run_plan([Size(2, 256, 2, sides, with_timeline=True)], tiny_pair, seconds=100)
    (row,), (line,) = written["generation"]["sizes"], written["timeline"]
    assert written["generation"]["agreement"] == {
        "greedy_tokens_equal_to_public": 1.0,
        "same_tokens_without_a_graph": True,
    }
    assert row["left_out"] == {} and set(row["median_ms"]) == set(sides) == set(row["peak_gib"])
    assert all(ms > 0 for ms in row["median_ms"].values()) and row["scan_chunk_of_public"] in generation.CHUNKS
    assert row["images_per_second"][OURS] == pytest.approx(2e3 / row["median_ms"][OURS])
    text = report_gpu.generation(written["generation"], [line])
    assert "| d2 at 256×256 | 2 |" in text and f"| {PUBLIC} |" in text and "- batch 1: less than 25 ms: not" in text
    spent = line["parts_ms"]
    assert sum(spent.values()) == pytest.approx(line["total_ms"])
    assert all(spent[name] > 0 for name in ("linear layers", "attention", "mixer", "adaLN", "drawing", "decoder"))


def test_a_side_that_fails_is_left_out_and_named(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = public.generate

    def fails(*args: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):  # and not while the engine is checked
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more of that")
        return theirs(*args, **options)

    monkeypatch.setattr(public, "generate", fails)
    generation.run_plan([Size(1, 256, 1, ALL), Size(1, 256, 2)], tiny_pair, seconds=100)
    first, second = written["generation"]["sizes"]
    assert first["left_out"] == {PUBLIC: "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"}
    assert f"Tried to allocate 20 GiB: {PUBLIC} (d1, 256, batch 1)." in report_gpu.generation(written["generation"], [])
    assert set(first["median_ms"]) == {OURS, VAR} and set(second["median_ms"]) == {OURS}


def test_what_there_is_no_time_for_is_left_out_and_named(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(generation, "fault", lambda pair: ({}, None))
    monkeypatch.setattr(public, "generate", lambda *args, **options: time.sleep(60))
    generation.run_plan([Size(1, 256, 1, (OURS, PUBLIC)), Size(2, 256, 1)], tiny_pair, seconds=4)
    first, second = written["generation"]["sizes"]
    assert first["left_out"][PUBLIC].startswith("TimeoutError: not done within")
    assert second["left_out"] == {OURS: "TimeoutError: no time left"} and second["median_ms"] == {}


def test_a_wrong_engine_is_not_timed(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def draws_nonsense(pair: Any) -> dict[str, Any]:
        return {"greedy_tokens_equal_to_public": 0.2, "same_tokens_without_a_graph": True}

    monkeypatch.setattr(generation, "check", draws_nonsense)
    generation.run_plan([Size(1, 256, 1, ALL, with_timeline=True)], tiny_pair, seconds=100)
    (row,) = written["generation"]["sizes"]
    assert set(row["median_ms"]) == {PUBLIC} and written["timeline"] == []
    assert row["left_out"][OURS] == "wrong: 20.0% of its greedy tokens are the public algorithm's"


def test_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generation, "_compiled_block", lambda: torch.compile(public.block, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    monkeypatch.setattr(generation, "PLAN", [Size(1, 256, 1), Size(1, 256, 2, (OURS, *generation.TO_COMPILE))])
    generation.compile_ahead(tiny_pair, seconds=100)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 9 and said[2] == f"{COMPILED}, scan in chunks of 256"


def test_targets_are_said_beside_what_was_found() -> None:
    def row(batch: int, **ms: float) -> dict[str, Any]:
        return {"depth": 16, "resolution": 256, "batch": batch, "median_ms": {OURS: ms["ours"], PUBLIC: ms["theirs"]}}

    rows = [row(25, ours=200.0, theirs=1000.0), row(1, ours=20.0, theirs=300.0)]
    timelines = [{"batch": 64, "linear_tflops": 400.0, "product_tflops": 800.0}]
    assert [value for _, value in targets(rows, timelines)] == ["5.0 times", "0.200 s", "20.0 ms", "50%"]
    assert [value for _, value in targets([], [])] == ["not measured"] * 4


def test_the_plan_has_every_size() -> None:
    """Depth 16, 24 and 30, 256 and 512, batch 1, 8, 25 and 64, in groups of one model; and one image at 1024."""
    sizes = {size[:3] for size in generation.PLAN if OURS in size.sides}
    everything = {(d, r, b) for d in (16, 24, 30) for r in (256, 512) for b in (1, 8, 25, 64)}
    assert sizes == everything | {(16, 1024, 1)}
