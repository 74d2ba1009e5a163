"""The training benchmarks: their sides compute the same, and a wrong one is not timed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mvar
from benchmarks import digits, measure, plain, report_training, sides, train, training_run
from benchmarks.digits import EAGER, OURS, Run
from benchmarks.training_run import EXACT, EagerObjective
from mvar.data import tensor_source
from mvar.train import run
from mvar.train.objective import Objective
from tests import training


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without generated code, which takes a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))


def digits_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = next(training.data().train.batches(batch=8, seed=0, epoch=0))
    assert batch.tokens is not None
    return batch.labels, training.data().tokenizer.teacher_forcing_inputs(batch.tokens), batch.tokens


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("side", [EAGER, training_run.COMPILED])
def test_sides_compute_what_mvar_does(side: str, tmp_path: Path) -> None:
    """Losses, predictions and every gradient, with labels and branches dropped; and without, in validation."""
    model = run.new_model(training.flags(tmp_path, depth=2, alng=0.5, hd=1.0), training.data(), 0)
    object.__setattr__(model.config, "drop_path", 0.5)
    labels, inputs, tokens = digits_batch()
    draws = torch.rand(8, model.draws_per_image, generator=torch.Generator().manual_seed(2))
    draws[:4, 0] = 0  # labels are dropped
    assert (draws[:, 4:] > 0.5).any()  # and branches of the second block
    parameters = list(model.parameters())
    found = []
    for objective in (Objective(model), training_run.OBJECTIVES[side](model)):
        out, evaluated = objective.train()(labels, inputs, tokens, draws), objective.eval()(labels, inputs, tokens)
        found.append((out, evaluated, torch.autograd.grad(out.loss, parameters)))
    (ours, validated, gradients), (theirs, their_validated, theirs_gradients) = found
    for a, b in ((ours, theirs), (validated, their_validated)):
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.nll, b.nll)
        assert torch.equal(a.predictions, b.predictions)
    assert not torch.allclose(ours.nll, validated.nll)
    for a, b in zip(gradients, theirs_gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_run_that_the_plain_model_lacks_is_refused(tmp_path: Path) -> None:
    model = run.new_model(training.flags(tmp_path), training.data(), 0)
    with pytest.raises(ValueError, match="--ls, --pg, --ac"):
        EagerObjective(model, smoothing=0.1)(*digits_batch())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`digits.command` without its process, on 192 digits: 12 steps of a small model."""
    tokenizer, train, _ = training.data()
    first = next(train.batches(batch=192, seed=0, epoch=0))
    assert first.tokens is not None
    source = tensor_source(first.tokens, first.labels, train.num_classes)

    def command(side: str, dtype: str, shorten: float, out: Path) -> Run:
        flags = training.arguments(out, bs=16, fp16=digits.FP16[dtype], pictures=1)
        training_run.main([side, str(out), *flags])
        mvar.save(out / "tokenizer.safetensors", tokenizer)
        parts = json.loads((out / "parts.json").read_text())
        return Run(10.0, parts | dict.fromkeys(("start and end", "tokenizer"), 1.0), digits.losses(out))

    monkeypatch.setattr(run, "digits_data", lambda flags, world: run.Data(tokenizer, source, source))
    monkeypatch.setattr(digits, "command", command)
    monkeypatch.setattr(digits, "best_tflops", lambda dtype: (0.1, "measured"))
    monkeypatch.setattr(digits, "DRAWN", 20)


@pytest.mark.usefixtures("compiled", "small")
def test_digits_end_to_end(tmp_path: Path) -> None:
    exact = digits.command(EXACT, "float32", 1.0, tmp_path / "exact")
    assert len(exact.losses) == 13 and exact.parts.keys() >= {"steps", "first step", "checkpoints", "grid"}
    for dtype in digits.FP16:
        row = digits.measure(exact, dtype, 1.0, 1, tmp_path / dtype)
        assert 0 < row["loss_distances"][OURS] < (1e-4 if dtype == "float32" else 1e-1)
        assert row["steps"] == 12 and row["val_loss"][OURS] != row["val_loss"][EAGER]  # they are two
        text = report_training.digits([row])
        assert f"| 100%, 12 steps | {dtype} | the whole command, s | 10.0 | 10.0 (1.00×) | 10.0 (1.00×) | – |" in text


@pytest.mark.usefixtures("small")
def test_a_side_without_drops_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutDrops(EagerObjective):
        def features(self, labels: torch.Tensor, inputs: torch.Tensor, draws: torch.Tensor | None) -> plain.Features:
            return super().features(labels, inputs, None)

    monkeypatch.setitem(training_run.OBJECTIVES, digits.COMPILED, WithoutDrops)
    exact = digits.command(EXACT, "float32", 1.0, tmp_path / "exact")
    with pytest.raises(SystemExit, match="the losses are wrong.*torch.compile"):
        digits.measure(exact, "float32", 1.0, 1, tmp_path)


def test_wrong_losses_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(side: str, dtype: str, shorten: float, out: Path) -> Run:
        loss = {EXACT: 2.0, EAGER: 2.001, OURS: float("nan")}.get(side, 2.0)
        return Run(1.0, {"first step": 1.0}, {"loss 1": loss, "val_loss 1": 2.0})

    written: list[str] = []
    monkeypatch.setattr(digits, "command", command)
    monkeypatch.setattr(digits, "require_allocator", lambda: None)
    monkeypatch.setattr(digits, "write", lambda name, rows: written.append(name))
    with pytest.raises(SystemExit, match=r"at most 10 × 0.001 off expected, got \{'mvar': nan\}"):
        digits.main([])
    assert not written


def test_parts_inside_another_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(training_run.time, "perf_counter", lambda: float(next(clock)))

    class Work:
        def outer(self) -> None:
            self.inner()
            self.inner()

        def inner(self) -> None:
            next(clock)

    parts = ((Work, "outer", "outer"), (Work, "inner", "inner"))
    monkeypatch.setattr(training_run, "PARTS", parts)
    with training_run.observed() as spent:
        Work().outer()
    assert spent == {"inner": 4.0, "outer": 3.0}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    sizes = mvar.TokenizerConfig((1, 2, 3), num_codes=32, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)

    def pair(depth: int, resolution: int, architecture: str, **options: Any) -> sides.Pair:
        return sides.random_pair(depth, resolution, architecture, sizes, **options | {"width": 64})

    monkeypatch.setattr(train, "random_pair", pair)


@pytest.mark.usefixtures("tiny")
def test_gradients_of_a_wrong_side_are_noticed() -> None:
    steps = train.Steps(2, 3)
    assert max(steps.gradient_differences().values()) < 1e-4
    ours = steps.sides[OURS]
    steps.sides[OURS] = lambda *data: 1.01 * ours(*data)
    with pytest.raises(SystemExit, match="gradients differ .*mvar"):
        steps.gradient_differences()


@pytest.mark.usefixtures("tiny")
def test_a_dtype_is_added_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own, for which this one stands in."""
    files: dict[str, Any] = {}
    monkeypatch.setattr(train, "kept", files.get)
    monkeypatch.setattr(train, "write", lambda name, rows: files.update({name: rows}))
    monkeypatch.setattr(train, "require_allocator", lambda: None)
    monkeypatch.setattr(train, "best_tflops", lambda dtype: (0.1, "measured"))
    monkeypatch.setattr(train, "in_a_process_of_its_own", lambda *arguments: 1.0)

    def again(command: list[str], *, check: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            train.main()

    monkeypatch.setattr(subprocess, "run", again)
    monkeypatch.setattr(sys, "argv", ["train", "--depth=1", "--batch=2", "--rounds=1"])
    train.main()
    assert [run["dtype"] for run in files["train_d1"]["runs"]] == ["float32", "bfloat16"]
    before = files["train_d1"]["runs"][1]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtypes=float32"])
    train.main()
    assert files["train_d1"]["runs"][1] is before
    assert "| 2 | bfloat16 |" in report_training.step("d1", files["train_d1"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--batch=3"])
    train.main()
    assert [(run["batch"], run["dtype"]) for run in files["train_d1"]["runs"]] == [(3, "float32")]


@pytest.mark.usefixtures("tiny")
def test_what_is_compiled_ahead_is_one_block_of_every_side_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, str, torch.dtype]] = []
    monkeypatch.setattr(
        train.Steps, "step", lambda steps, side, dtype: taken.append((len(steps.model.blocks), side, dtype))
    )
    monkeypatch.setattr(train, "write", lambda name, rows: pytest.fail("timed"))
    monkeypatch.setattr(sys, "argv", ["train", "--depth=3", "--batch=2", "--untimed"])
    train.main()
    assert set(taken) == {(1, side, dtype) for side in train.SIDES for dtype in (torch.float32, torch.bfloat16)}


def test_results_are_added_to_those_of_the_same_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"device": "cpu", "cpu_model": "One, family 1", "commit": "1234567"}
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "machine", lambda: dict(machine))
    assert measure.kept("train_d1") is None
    measure.write("train_d1", {"runs": [1]})
    assert measure.kept("train_d1") == {"runs": [1]}
    machine["commit"] = "7654321"
    assert measure.kept("train_d1") is None
