"""Tests of the trainer: convergence, interruption, bitwise-identical resumption and reported metrics."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mvar
from mvar.cli.main import main
from mvar.models import quantizer
from mvar.train.digits_tokenizer import STEPS, train_digits_tokenizer
from mvar.train.loop import Interrupted
from mvar.train.trainer import Trainer
from tests.helpers import training
from tests.helpers.images import write_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run, with its averaged weights in weights.safetensors."""
    out = tmp_path_factory.mktemp("finished")
    undisturbed = training.trainer(training.flags(out))
    undisturbed.run()
    save_file(undisturbed.weights(), out / "weights.safetensors")
    return out


def equal_weights(weights: dict[str, torch.Tensor], uninterrupted: Path) -> bool:
    right = load_file(uninterrupted / "weights.safetensors")
    return weights.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in weights.items())


def test_training_decreases_loss_and_writes_files(uninterrupted: Path) -> None:
    rows = training.rows(uninterrupted)
    assert len(rows) == 22 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    last = rows[-1]
    assert abs(sum(n * last[f"loss_scale{k}"] for k, n in enumerate((1, 4, 9, 16))) / 30 - last["loss"]) < 1e-6
    assert last["loss_last"] == last["loss_scale3"] and 0 < last["code_usage"] <= 1
    assert last["mfu"] is None and last["images_per_s"] > 0 and last["skipped"] == 0
    assert [p.name for p in sorted((uninterrupted / "checkpoints").iterdir())] == ["00000016", "00000022"]
    assert "val_loss_last" in (uninterrupted / "log.jsonl").read_text()


def test_resume_after_sigkill(uninterrupted: Path, tmp_path: Path) -> None:
    """A run killed with SIGKILL resumes to bitwise-identical losses and weights."""
    command = [sys.executable, "-m", "mvar", "train", *training.arguments(tmp_path, samples=3)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / "00000008").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "model.safetensors").exists()
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "resumed after iteration" in result.stdout
    assert equal_weights(load_file(tmp_path / "model.safetensors"), uninterrupted)
    assert mvar.load_model(tmp_path / "model.safetensors").config.depth == 1
    assert (tmp_path / "samples.png").is_file()
    assert training.losses(tmp_path)[-6:] == training.losses(uninterrupted)[-6:]


def send_signal(number: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal to this process in the middle of iteration `at`."""
    forward_backward = Trainer._forward_backward

    def forward_backward_and_send(self: Trainer, batch: object) -> None:
        forward_backward(self, batch)  # type: ignore[arg-type]
        if self.iteration == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_forward_backward", forward_backward_and_send)


def test_sigterm_saves_checkpoint_and_exits(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = training.flags(tmp_path, save_every=100)
    with monkeypatch.context() as patch:
        send_signal(signal.SIGTERM, 6, patch)
        with pytest.raises(Interrupted, match="after iteration 7 of 22") as raised:
            training.trainer(flags).run()
        assert raised.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = training.trainer(flags)
    assert resumed.resume() and resumed.iteration == 7
    resumed.run()
    assert training.losses(tmp_path) == training.losses(uninterrupted)
    assert equal_weights(resumed.weights(), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_repeated_signal(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal repeated within the grace period is ignored, since torchrun forwards signals that processes already got.

    After the grace period, a second SIGINT raises KeyboardInterrupt.
    """
    send_signal(number, 2, monkeypatch)
    send_signal(number, 2, monkeypatch)
    with pytest.raises(Interrupted, match="after iteration 3 of 22"):
        training.trainer(training.flags(tmp_path / "saved", save_every=100)).run()
    monkeypatch.setattr("mvar.train.loop.GRACE_SECONDS", -1.0)
    resumed = training.trainer(training.flags(tmp_path / "ended", save_every=100))
    with pytest.raises(Interrupted if number == signal.SIGTERM else KeyboardInterrupt):
        resumed.run()
    assert resumed.saved_iteration == (3 if number == signal.SIGTERM else 0)


def test_damaged_checkpoint_is_skipped(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = training.trainer(training.flags(tmp_path))
    first.run()
    newest = next((tmp_path / "checkpoints" / "00000022").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    resumed = training.trainer(training.flags(tmp_path))
    assert resumed.resume() and resumed.iteration == 16
    assert "trying the previous one" in capsys.readouterr().out
    resumed.run()
    assert training.losses(tmp_path)[-6:] == training.losses(uninterrupted)[-6:]
    assert training.trainer(training.flags(tmp_path)).resume()
    for state in (tmp_path / "checkpoints").glob("*/state.json"):
        state.write_text("{")
    with pytest.raises(OSError, match="state.json: cannot be used"):  # does not restart from iteration 0
        training.trainer(training.flags(tmp_path)).resume()


def test_resume_rejects_different_flags(tmp_path: Path) -> None:
    training.trainer(training.flags(tmp_path)).run()
    with pytest.raises(ValueError, match=r"--ep: the run in .* has 1, not 3; keep it, or choose another --out"):
        training.trainer(training.flags(tmp_path, ep=3)).resume()
    with pytest.raises(ValueError, match="--depth"):
        training.trainer(training.flags(tmp_path, depth=2)).resume()
    with pytest.raises(ValueError, match="--seed: the run in .* has 0, not 4"):
        training.trainer(training.flags(tmp_path, seed=4)).resume()
    for changed in ({"log_every": 7}, {"seed": None}, {"seed": 0}):
        assert training.trainer(training.flags(tmp_path, **changed)).resume()
    facts = tmp_path / "checkpoints" / "00000022" / "state.json"
    facts.write_text(facts.read_text().replace('"seed": 0,\n  "out"', '"seed": null,\n  "out"'))
    assert '"seed": null' in facts.read_text()  # as saved by a run with a random seed
    assert training.trainer(training.flags(tmp_path, seed=0)).resume()


def test_resume_from_empty_folder(tmp_path: Path) -> None:
    assert not training.trainer(training.flags(tmp_path)).resume()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writes beyond `size` bytes of a file fail, as on a full disk. Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_does_not_stop_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = training.trainer(training.flags(tmp_path))
    save, saved_iterations = trainer._save, []

    def save_on_a_full_disk() -> None:
        saved_iterations.append(trainer.iteration)
        if trainer.iteration < 16:
            save()
        else:
            with file_size_limit(100_000):
                save()

    trainer._save = save_on_a_full_disk  # type: ignore[method-assign]
    # Failing to save the last checkpoint is an error.
    with pytest.raises(OSError, match="cannot write .*00000022.*resumes after iteration 8"):
        trainer.run()
    assert saved_iterations == [8, 16, 22]
    assert "training continues, the last checkpoint is of iteration 8" in capfd.readouterr().out
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000008"]
    resumed = training.trainer(training.flags(tmp_path))
    assert resumed.resume() and resumed.iteration == 8


def inject_nan(trainer: Trainer, at: range) -> None:
    backward = trainer.optimizer.backward

    def nan_backward(loss: torch.Tensor) -> None:
        backward(loss * torch.nan if trainer.iteration in at else loss)

    trainer.optimizer.backward = nan_backward  # type: ignore[method-assign]


@pytest.mark.parametrize("fp16", [0, 1])
def test_non_finite_gradient_step_is_skipped(fp16: int, tmp_path: Path) -> None:
    trainer = training.trainer(training.flags(tmp_path, skips=3, fp16=fp16, bs=16), items=352)
    inject_nan(trainer, range(5, 7))
    trainer.run()
    rows = training.rows(tmp_path)
    assert [row["skipped"] for row in rows] == [0] * 5 + [1] + [2] * 16
    assert [row["gradient_norm"] is None for row in rows] == [False] * 5 + [True] * 2 + [False] * 15
    assert all(bool(value.isfinite().all()) for value in trainer.weights().values())
    assert rows[-1]["loss"] < rows[0]["loss"]
    if fp16:  # the loss scale is halved for each skipped step
        assert [rows[i]["loss_scale"] for i in (4, 5, 6)] == [2**11, 2**10, 2**9]


def test_too_many_skipped_steps_raise(tmp_path: Path) -> None:
    trainer = training.trainer(training.flags(tmp_path, skips=3))
    inject_nan(trainer, range(9, 100))
    with pytest.raises(
        FloatingPointError, match="iteration 12: 3 consecutive steps .* last checkpoint is of iteration 8"
    ):
        trainer.run()


def test_kernel_losses_match_reference(tmp_path: Path) -> None:
    """The error against a float64 reference is at most ten times that of the float32 reference.

    Rounding differs and accumulates during training; the factor of ten allows for that.
    """
    curves = {}
    for name, backend, dtype in (
        ("exact", "reference", torch.float64),
        ("reference", "reference", torch.float32),
        ("kernels", "auto", torch.float32),
    ):
        training.trainer(training.flags(tmp_path / name, backend=backend, bs=16), dtype=dtype, items=192).run()
        curves[name] = torch.tensor(training.losses(tmp_path / name), dtype=torch.float64)
    noise = (curves["reference"] - curves["exact"]).abs().max()
    assert 0 < noise < 1e-3
    assert (curves["kernels"] - curves["exact"]).abs().max() <= 10 * noise
    assert not torch.equal(curves["kernels"], curves["reference"])  # the two implementations round differently


@pytest.mark.parametrize("fp16", [1, 2])
def test_mixed_precision_training(fp16: int, tmp_path: Path) -> None:
    losses = {}
    for bits in (0, fp16):
        trainer = training.trainer(training.flags(tmp_path / str(bits), fp16=bits, bs=16), items=192)
        trainer.run()
        losses[bits] = training.losses(tmp_path / str(bits))
    last = training.rows(tmp_path / str(fp16))[-1]
    assert last["skipped"] == 0 and last["loss_scale"] == (2**11 if fp16 == 1 else None)
    assert losses[fp16][-1] < losses[fp16][0] - 0.05
    assert losses[fp16] == pytest.approx(losses[0], rel=1e-2) and losses[fp16] != losses[0]
    assert all(value.dtype == torch.float32 for value in trainer.weights().values() if value.is_floating_point())


def test_gradient_accumulation_matches_single_batch(tmp_path: Path) -> None:
    norms = []
    for ac in (1, 4):
        out = tmp_path / str(ac)
        training.trainer(training.flags(out, ac=ac), drops=False).run()
        norms.append(training.rows(out)[0]["gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_progressive_training_stages(tmp_path: Path) -> None:
    training.trainer(training.flags(tmp_path, pg=0.8, pg0=0, wp=0.1, pgwp=0.2)).run()
    rows = training.rows(tmp_path)
    assert [row["scales"] for row in rows] == sorted(row["scales"] for row in rows)
    assert {row["scales"] for row in rows} == {1, 2, 3, 4}
    assert "loss_last" not in rows[0] and "loss_scale1" not in rows[0] and "loss_last" in rows[-1]


@pytest.mark.parametrize("changed", [{"recompute": True}, {"arch": "var", "anorm": True, "saln": True}])
def test_other_models_and_recomputation(changed: dict, uninterrupted: Path, tmp_path: Path) -> None:
    training.trainer(training.flags(tmp_path, **changed)).run()
    losses = training.losses(tmp_path)
    assert losses[-1] < losses[0] - 0.2
    if "recompute" in changed:  # recomputed activations are identical
        assert losses == training.losses(uninterrupted)


def test_training_under_non_default_device_and_inference_mode(tmp_path: Path) -> None:
    """AdamW creates its step counter on the default device of torch."""
    with torch.device("meta"), torch.inference_mode():
        main(["train", *training.arguments(tmp_path, seed=0)])
    assert training.losses(tmp_path)[-1] < training.losses(tmp_path)[0] - 0.5


def test_training_from_images_matches_tokens(tmp_path: Path) -> None:
    from mvar import digits
    from mvar.data import tensor_source

    trainer = training.trainer(training.flags(tmp_path / "tokens"))
    trainer.run()
    trainer = training.trainer(training.flags(tmp_path / "images"))
    train, _ = digits.load()
    trainer.source = tensor_source(train.images, train.labels, digits.NUM_CLASSES)
    trainer.run()
    assert training.losses(tmp_path / "images") == pytest.approx(training.losses(tmp_path / "tokens"), rel=1e-3)


def test_tensorboard_requested_but_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'mvar\[train\]'"):
        training.trainer(training.flags(tmp_path, tb=True)).run()
    training.trainer(training.flags(tmp_path, tb=None)).run()


def test_training_from_image_folder_and_token_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 6), ("val", 2)):
        write_images(tmp_path / "data" / part, {"cat": count, "dog": count}, size=(24, 20))
    sizes = mvar.TokenizerConfig((1, 2, 4), num_codes=16, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attention=False)
    mvar.save(tmp_path / "codes.safetensors", mvar.build(1, tokenizer=sizes)[1])
    files = [f"--data_path={tmp_path}/data", f"--tokenizer={tmp_path}/codes.safetensors"]
    main(["tokenize", *files, f"--out={tmp_path}/t", "--hflip"])
    shared = [
        f"--tokenizer={tmp_path}/codes.safetensors",
        "--depth=1",
        "--bs=4",
        "--ep=2",
        "--log_every=1",
    ]
    for source in (f"--data_path={tmp_path}/data", f"--tokens={tmp_path}/t"):
        out = tmp_path / source[2:6]
        main(["train", *shared, source, f"--out={out}", "--tb=0", "--device=cpu", "--hflip"])
        assert len(training.rows(out)) == 6 and "val_loss" in (out / "log.jsonl").read_text()
        assert Image.open(out / "samples.png").size == (8 * 18 + 2, 2 * 18 + 2)
        assert mvar.load_model(out / "model.safetensors").config.num_classes == 2
    assert "12 items of 2 classes" in capsys.readouterr().out
    for odd, said in (("--hflip=0", "made with 1, not 0"), ("--mid_reso=1.5", "resized to 18 pixels, not 24")):
        with pytest.raises(SystemExit):
            main(["train", *shared, f"--tokens={tmp_path}/t", f"--out={tmp_path}/o", "--device=cpu", "--hflip", odd])
        assert said in capsys.readouterr().err


def test_one_process_of_a_group_trains_the_digits_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others wait: it must not take part in a collective operation, which would never end."""

    def never(*_: object) -> None:
        raise AssertionError("collective operation")

    alone, in_group = tmp_path / "alone.safetensors", tmp_path / "group.safetensors"
    train_digits_tokenizer(alone, shorten=1 / STEPS)
    group = {"is_initialized": lambda: True, "get_rank": lambda: 0, "get_world_size": lambda: 2, "all_reduce": never}
    for name, value in group.items():
        monkeypatch.setattr(quantizer.distributed, name, value)
    train_digits_tokenizer(in_group, shorten=1 / STEPS)
    assert in_group.read_bytes() == alone.read_bytes()
    with pytest.raises(AssertionError, match="collective"):
        quantizer.Quantizer((1, 2), 8, 4, 1, 0.25)(torch.zeros(1, 4, 2, 2))
