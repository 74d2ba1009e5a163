"""Tests the training benchmarks: implementations agree, and wrong ones are not timed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mvar
from benchmarks import bench_training_memory, bench_training_run, bench_training_step
from benchmarks.baselines import eager_training
from benchmarks.baselines.eager_training import COMPILED, EAGER, EXACT, OBJECTIVES, OURS, EagerObjective
from benchmarks.bench_training_run import Run
from benchmarks.common import results
from benchmarks.generation import methods
from benchmarks.report import training as report
from mvar.data import tensor_source
from mvar.train import run
from mvar.train.objective import Objective
from tests.helpers import training

pytestmark = pytest.mark.slow


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with the eager backend, as code generation takes a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))


def digits_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = next(training.data().train.batches(batch=8, seed=0, epoch=0))
    assert batch.tokens is not None
    return batch.labels, training.data().tokenizer.teacher_forcing_inputs(batch.tokens), batch.tokens


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("implementation", [EAGER, COMPILED])
def test_implementations_match_mvar(implementation: str, tmp_path: Path) -> None:
    """Losses, predictions and gradients match, with label and branch dropping in training and without in validation."""
    model = run.new_model(training.flags(tmp_path, depth=2, alng=0.5, hd=1.0), training.data(), 0)
    object.__setattr__(model.config, "drop_path", 0.5)
    labels, inputs, tokens = digits_batch()
    draws = torch.rand(8, model.draws_per_image, generator=torch.Generator().manual_seed(2))
    draws[:4, 0] = 0  # drops labels
    assert (draws[:, 4:] > 0.5).any()  # drops branches of the second block
    parameters = list(model.parameters())
    found = []
    for objective in (Objective(model), OBJECTIVES[implementation](model)):
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


def test_unsupported_flags_are_rejected(tmp_path: Path) -> None:
    model = run.new_model(training.flags(tmp_path), training.data(), 0)
    with pytest.raises(ValueError, match="--ls, --pg, --ac"):
        EagerObjective(model, smoothing=0.1)(*digits_batch())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `bench_training_run.command` in this process: 12 steps of a small model on 192 digits."""
    tokenizer, train, _ = training.data()
    first = next(train.batches(batch=192, seed=0, epoch=0))
    assert first.tokens is not None
    source = tensor_source(first.tokens, first.labels, train.num_classes)

    def command(implementation: str, dtype: str, shorten: float, out: Path) -> Run:
        flags = training.arguments(out, bs=16, fp16=bench_training_run.FP16[dtype], samples=1)
        bench_training_run.train(implementation, str(out), *flags)
        mvar.save(out / "tokenizer.safetensors", tokenizer)
        parts = json.loads((out / "parts.json").read_text())
        return Run(10.0, parts | dict.fromkeys(("start and end", "tokenizer"), 1.0), bench_training_run.losses(out))

    monkeypatch.setattr(run, "digits_data", lambda flags, world: run.Data(tokenizer, source, source))
    monkeypatch.setattr(bench_training_run, "command", command)
    monkeypatch.setattr(bench_training_run, "peak_tflops", lambda dtype: (0.1, "measured"))
    monkeypatch.setattr(bench_training_run, "SAMPLES", 20)


@pytest.mark.usefixtures("compiled", "small")
def test_training_run_on_digits(tmp_path: Path) -> None:
    exact = bench_training_run.command(EXACT, "float32", 1.0, tmp_path / "exact")
    assert len(exact.losses) == 13 and exact.parts.keys() >= {"steps", "first step", "checkpoints", "data and grid"}
    for dtype in bench_training_run.FP16:
        row = bench_training_run.measure(exact, dtype, 1.0, 1, tmp_path / dtype)
        assert 0 < row["loss_distances"][OURS] < (1e-4 if dtype == "float32" else 1e-1)
        assert row["steps"] == 12 and row["val_loss"].keys() >= {OURS, EAGER}
        text = report.digits([row])
        assert f"| 100%, 12 steps | {dtype} | the whole command, s | 10.0 | 10.0 (1.00×) | 10.0 (1.00×) | – |" in text


@pytest.mark.usefixtures("small")
def test_implementation_without_drops_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutDrops(EagerObjective):
        def features(
            self, labels: torch.Tensor, inputs: torch.Tensor, draws: torch.Tensor | None
        ) -> eager_training.Features:
            return super().features(labels, inputs, None)

    monkeypatch.setitem(OBJECTIVES, COMPILED, WithoutDrops)
    exact = bench_training_run.command(EXACT, "float32", 1.0, tmp_path / "exact")
    with pytest.raises(SystemExit, match="the losses are wrong.*torch.compile"):
        bench_training_run.measure(exact, "float32", 1.0, 1, tmp_path)


def test_wrong_losses_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(implementation: str, dtype: str, shorten: float, out: Path) -> Run:
        loss = {EXACT: 2.0, EAGER: 2.001, OURS: float("nan")}.get(implementation, 2.0)
        return Run(1.0, {"first step": 1.0}, {"loss 1": loss, "val_loss 1": 2.0})

    written: list[str] = []
    monkeypatch.setattr(bench_training_run, "command", command)
    monkeypatch.setattr(bench_training_run, "set_allocator", lambda: None)
    monkeypatch.setattr(bench_training_run, "save", lambda name, rows: written.append(name))
    with pytest.raises(SystemExit, match=r"at most 10 × 0.001 off expected, got \{'mvar': nan\}"):
        bench_training_run.main([])
    assert not written


def test_nested_phases_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(bench_training_run.time, "perf_counter", lambda: float(next(clock)))
    phases = bench_training_run.Phases()
    with phases.phase("outer"):
        for _ in range(2):
            with phases.phase("inner"):
                next(clock)
    assert phases.seconds == {"inner": 4.0, "outer": 3.0}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    sizes = mvar.TokenizerConfig((1, 2, 3), num_codes=32, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)

    def pair(depth: int, resolution: int, architecture: str, **options: Any) -> methods.Pair:
        return methods.random_pair(depth, resolution, architecture, sizes, **options | {"width": 64})

    monkeypatch.setattr(bench_training_step, "random_pair", pair)


@pytest.mark.usefixtures("tiny")
def test_wrong_gradients_are_detected() -> None:
    steps = bench_training_step.TrainingStep(2, 3)
    assert max(steps.gradient_differences().values()) < 1e-4
    objective = steps.objectives[OURS]
    objective.register_forward_hook(lambda module, data, found: found._replace(loss=1.01 * found.loss))
    with pytest.raises(SystemExit, match="gradients differ .*mvar"):
        steps.gradient_differences()


@pytest.mark.usefixtures("tiny")
def test_dtypes_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dtype is measured in a subprocess, which is replaced by a call in this process."""
    files: dict[str, Any] = {}
    monkeypatch.setattr(bench_training_step, "load", files.get)
    monkeypatch.setattr(bench_training_step, "save", lambda name, rows: files.update({name: rows}))
    monkeypatch.setattr(bench_training_step, "set_allocator", lambda: None)
    monkeypatch.setattr(bench_training_step, "peak_tflops", lambda dtype: (0.1, "measured"))
    monkeypatch.setattr(bench_training_step, "in_subprocess", lambda *arguments: 1.0)

    def again(command: list[str], *, check: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            bench_training_step.main()

    monkeypatch.setattr(subprocess, "run", again)
    monkeypatch.setattr(sys, "argv", ["train", "--depth=1", "--batch=2", "--rounds=1"])
    bench_training_step.main()
    assert [run["dtype"] for run in files["train_d1"]["runs"]] == ["float32", "bfloat16"]
    before = files["train_d1"]["runs"][1]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtypes=float32"])
    bench_training_step.main()
    assert files["train_d1"]["runs"][1] is before
    assert "| 2 | bfloat16 |" in report.step("d1", files["train_d1"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--batch=3"])
    bench_training_step.main()
    assert [(run["batch"], run["dtype"]) for run in files["train_d1"]["runs"]] == [(3, "float32")]


@pytest.mark.usefixtures("tiny")
def test_memory_of_a_step() -> None:
    """The moments are twice as large as the weights, the gradients as large; recomputation keeps fewer activations."""
    cases = [bench_training_memory.Case("float32", recompute, "adamw") for recompute in (False, True)]
    plain, recomputed = (bench_training_memory.measure(4, 3, case) for case in cases)
    for sizes in (plain, recomputed):
        assert 0 < sizes["weights"] == sizes["moments"] / 2
        assert 1 <= sizes["gradients"] / sizes["weights"] < 1.01  # a few are views of larger tensors
        held = ("process before the model", "tokenizer", "weights", "gradients", "moments")
        assert sizes["sum"] == pytest.approx(sum(sizes[name] for name in held))
        assert sizes["peak"] == max(value for name, value in sizes.items() if name.startswith("peak of"))
    kept = "activations at the end of the forward pass"
    assert 0 < recomputed[kept] < 0.5 * plain[kept]
    assert f"| weights | {plain['weights']:.2f} |" in bench_training_memory.report({"float32": plain})


def test_results_are_kept_per_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"device": "cpu", "cpu_model": "One, family 1", "commit": "1234567"}
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "machine", lambda: dict(machine))
    assert results.load("train_d1") is None
    results.save("train_d1", {"runs": [1]})
    assert results.load("train_d1") == {"runs": [1]}
    machine["commit"] = "7654321"
    assert results.load("train_d1") is None
