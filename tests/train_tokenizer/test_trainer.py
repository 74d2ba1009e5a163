"""Tests of `mvar train-tokenizer`: learning, resumption, several processes, frozen parts, code usage."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import multiprocessing

import mvar
from mvar import digits
from mvar.cli.main import main
from mvar.data import Batch, Source, tensor_source
from mvar.models.config import SCHEDULES
from mvar.models.tokenizer import Tokenizer, TokenizerConfig
from mvar.train.distributed import TrainContext, init_training
from mvar.train_tokenizer.codebook import CodebookHealth
from mvar.train_tokenizer.flags import TokenizerFlags
from mvar.train_tokenizer.run import image_folders, new_tokenizer, read_data, tokenizer_config
from mvar.train_tokenizer.trainer import TokenizerTrainer
from mvar.utils.images import save_image
from tests.helpers import tokenizer_training as training
from tests.helpers import training as model_training

pytestmark = pytest.mark.slow

ADVERSARIAL = {"disc": 0.5, "disc_start": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as images: train/<digit>/….png and val/<digit>/….png."""
    root = tmp_path_factory.mktemp("digits")
    for name, part in zip(("train", "val"), digits.load(), strict=True):
        for i, (image, label) in enumerate(zip(training.images(part), part.labels, strict=False)):
            path = root / name / str(int(label)) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, (image + 1) / 2)
    return root


def test_learns_and_its_result_is_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    """On 64 digits, for 20 epochs; the file is then used by the other commands."""
    run = [f"--data_path={folder}", f"--out={tmp_path / 'run'}", "--ep=20", "--mid_reso=1.0", "--log_every=20"]
    main(["train-tokenizer", *training.arguments(samples=8, save_every=1000), *run])
    first, *_, last = training.rows(tmp_path / "run")
    validation = training.rows(tmp_path / "run", "val_psnr")
    assert last["psnr"] > first["psnr"] + 8 and last["loss"] < first["loss"] / 4
    assert len(validation) == 2 and validation[-1]["val_psnr"] > first["psnr"] + 6
    assert last["revived"] == 0 and sum(row["revived"] for row in training.rows(tmp_path / "run")) >= 64
    for k in range(3):
        assert 0 < last[f"code_usage_scale{k}"] <= last["code_usage"] <= 1 and 0 <= last[f"entropy_scale{k}"] <= 6
    with Image.open(tmp_path / "run" / "reconstructions.png") as strip:
        assert strip.size == (8 * 18 + 2, 2 * 18 + 2)
    file = tmp_path / "run" / "tokenizer.safetensors"
    tokenizer = mvar.load_tokenizer(file)
    assert tokenizer.patch_nums == (1, 2, 4) and tokenizer.num_codes == 64
    evaluated = [f"--reconstruct={folder / 'val'}", f"--tokenizer={file}", f"--out={tmp_path}", "--device=cpu"]
    main(["evaluate", *evaluated, "--workers=0"])
    psnr = json.loads((tmp_path / "reconstruction.json").read_text())["metrics"]["psnr"]
    assert psnr == pytest.approx(validation[-1]["val_psnr"], abs=0.2)  # of 8-bit pixels
    main(["tokenize", f"--data_path={folder}", f"--tokenizer={file}", f"--out={tmp_path / 'tokens'}", "--device=cpu"])
    assert (tmp_path / "tokens" / "train").is_dir()


def test_resume_after_sigkill(folder: Path, tmp_path: Path) -> None:
    """Bitwise, with the discriminator, accumulated gradients, replaced codes, moving averages and code statistics."""
    options = {**ADVERSARIAL, "ac": 2, "bs": 16, "ep": 4, "data_path": folder, "save_every": 2}
    main(["train-tokenizer", *training.arguments(**options, out=tmp_path / "whole")])
    command = ["train-tokenizer", *training.arguments(**options, out=tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-m", "mvar", *command], stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoints" / "00000012").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "tokenizer.safetensors").exists()
    main(command)
    whole, resumed = (load_file(tmp_path / name / "tokenizer.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items()) and len(whole) == len(resumed)
    last, again = (training.rows(tmp_path / name)[-1] for name in ("whole", "killed"))
    assert "generator_loss" in last
    for name in ("loss", "discriminator_loss", "adaptive_weight", "gradient_norm"):
        assert last[name] == again[name], name


def _train_process(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with init_training("cpu") as context:
        run = training.trainer(training.flags(out, **ADVERSARIAL, save_every=100), context)
        run.run()
        torch.save(run.weights(), out / f"weights{rank}.pt")


def test_two_processes_match_single_process(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = training.trainer(training.flags(tmp_path / "one", **ADVERSARIAL, save_every=100))
    alone.run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_train_process, (port, tmp_path / "two"), nprocs=2)
    first, second = (torch.load(tmp_path / "two" / f"weights{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    rows = [training.rows(tmp_path / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 12 and [row["revived"] for row in rows[0]] == [
        row["revived"] for row in rows[1]
    ]
    for row, other in zip(*rows, strict=True):
        for key in row.keys() - {"time", "images_per_s", "mfu", "loss_scale"}:
            # float32 sums are taken in a different order, and a token may change where two codes are equally near
            assert other[key] == pytest.approx(row[key], rel=5e-3, abs=1e-6), key
    for name, value in alone.weights().items():
        torch.testing.assert_close(first[name], value, rtol=0.05, atol=2e-3)


def send_signal(number: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal to this process in the middle of iteration `at`."""
    forward_backward = TokenizerTrainer._forward_backward

    def forward_backward_and_send(self: TokenizerTrainer, batch: Batch) -> None:
        forward_backward(self, batch)
        if self.iteration == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TokenizerTrainer, "_forward_backward", forward_backward_and_send)


def test_interrupted_validation_is_repeated(tmp_path: Path) -> None:
    """A run that ends between its last checkpoint and its last validation."""
    flags = training.flags(tmp_path, ep=1, samples=4)
    training.trainer(flags).run()
    rows, log, strip = training.rows(tmp_path, "val_psnr"), tmp_path / "log.jsonl", tmp_path / "reconstructions.png"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if "val_psnr" not in line))
    strip.unlink()
    for _ in range(2):  # the second time there is nothing to do
        resumed = training.trainer(flags)
        assert resumed.resume()
        resumed.run()
        (row,) = training.rows(tmp_path, "val_psnr")
        assert row.pop("time") and row == {key: value for key, value in rows[0].items() if key != "time"}
    assert strip.is_file()


def test_perceptual_loss_is_part_of_the_loss(tmp_path: Path) -> None:
    """Three times the squared error as `lpips`."""

    class Lpips(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return 3 * (a - b).square().mean((1, 2, 3))

    flags = training.flags(tmp_path, ep=1, l1=0.0, perceptual=2.0)
    run = training.trainer(flags, lpips=Lpips())
    run.run()
    (validation,) = training.rows(tmp_path, "val_psnr")
    assert validation["val_perceptual"] == pytest.approx(3 * validation["val_l2"], rel=1e-5)
    for row in training.rows(tmp_path):
        assert row["perceptual"] == pytest.approx(3 * row["l2"], rel=1e-5)
        assert row["loss"] == pytest.approx(7 * row["l2"] + row["codebook_loss"], rel=1e-4)
    with pytest.raises(ValueError, match=r"--lpips: the run in .* has False, not True"):
        training.trainer(training.flags(tmp_path, ep=1, l1=0.0, perceptual=2.0, lpips="vgg16.pth")).resume()


def test_resumed_run_has_the_discriminators_loss_scale(tmp_path: Path) -> None:
    flags = training.flags(tmp_path, fp16=1, ep=1, disc=0.5, disc_start=0.0)
    run = training.trainer(flags)
    run.run()
    run.discriminator_optimizer.scaler.update(2.0**7)
    run.saved_iteration = 0
    run._save()
    resumed = training.trainer(flags)
    assert resumed.resume() and resumed.discriminator_optimizer.scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("freeze", ["encoder", "tokens"])
def test_frozen_parts_keep_their_weights(
    freeze: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a run that is resumed."""
    start = tmp_path / "start.safetensors"
    config = TokenizerConfig(
        (1, 2, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attention=False, num_phi=2
    )
    tokenizer = Tokenizer(config).eval()
    mvar.save(start, tokenizer)
    architecture = {"ch_mult", "ch", "blocks", "attention", "codes", "code_dim", "phi", "pn"}
    chosen = [a for a in training.arguments(ep=1) if a[2:].partition("=")[0] not in architecture]
    run = [
        f"--init_from={start}",
        f"--freeze={freeze}",
        f"--data_path={folder}",
        f"--out={tmp_path / 'run'}",
        "--beta=2",
    ]
    with monkeypatch.context() as patch:
        send_signal(signal.SIGTERM, 2, patch)
        with pytest.raises(SystemExit):
            main(["train-tokenizer", *chosen, *run])
    main(["train-tokenizer", *chosen, *run, "--seed=0"])  # resumed: --init_from is not read again
    trained = mvar.load_tokenizer(tmp_path / "run" / "tokenizer.safetensors")
    assert trained.config.beta == 2
    changed = {
        name.split(".")[0]
        for (name, before), after in zip(tokenizer.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    moved = {"decoder", "post_quant_conv"}
    assert changed == (moved if freeze == "tokens" else moved | {"quantize"})
    images = training.images(digits.load()[0])[:8]
    assert torch.equal(tokenizer.encode(images), trained.encode(images)) == (freeze == "tokens")


def test_unused_phi_and_small_images_train(tmp_path: Path) -> None:
    """One scale uses one of four φ; without a file, images or logs to write."""
    run = training.trainer(training.flags(tmp_path, pn=(4,), phi=4, ep=1, average=0.0))
    before = {name: value.clone() for name, value in run.tokenizer.named_parameters()}
    run.run()
    unused = run.tokenizer.quantize.quant_resi.phi_of_scale
    for name, value in run.tokenizer.named_parameters():
        idle = "qresi_ls" in name and not any(f"qresi_ls.{i}." in name for i in unused)
        assert torch.equal(value, before[name]) == idle, name


def test_averages_are_validated_and_weights_restored(tmp_path: Path) -> None:
    run = training.trainer(training.flags(tmp_path, ep=1))
    run.run()
    assert run.flags.average
    weights, averages = dict(run.tokenizer.named_parameters()), run.weights()
    assert not torch.equal(weights["decoder.conv_out.weight"], averages["decoder.conv_out.weight"])
    finished = Tokenizer(run.tokenizer.config)
    finished.load_state_dict(averages)
    images = training.images(digits.load()[1])
    error = (finished(images).images.detach().clamp(-1, 1) - images).square().flatten(1).mean(1)
    expected = float((10 * (4 / error).log10()).mean())
    assert training.rows(tmp_path, "val_psnr")[-1]["val_psnr"] == pytest.approx(expected, abs=1e-3)


def test_collapse_is_named() -> None:
    health = CodebookHealth((1, 4), 1024, TrainContext(0, 1, torch.device("cpu")))
    hits = torch.zeros(2, 1024, dtype=torch.int64)
    hits[0, 5], hits[1] = 500, 3
    health.add(hits)
    metrics, collapsed = health.report()
    assert collapsed == {0: "1×1 (1 of 1024 codes, 0.0 of 10.0 bits)"}
    assert metrics["code_usage"] == metrics["code_usage_scale1"] == 1
    assert metrics["code_usage_scale0"] == 1 / 1024 and metrics["entropy_scale1"] == pytest.approx(10)
    assert health.report()[1] == {}
    few = CodebookHealth((1, 4), 2, TrainContext(0, 1, torch.device("cpu")))
    few.add(torch.tensor([[100, 0], [99, 1]]))
    assert list(few.report()[1]) == [0]


def test_published_sizes_take_a_step(tmp_path: Path) -> None:
    """256×256 with the sizes of vae_ch160v4096z32.pth and the discriminator: one step on one image, without files."""
    run = TokenizerFlags(out=str(tmp_path), bs=1, ep=1, disc_start=0.0, average=0.0, revive=0, device="cpu")
    tokenizer = new_tokenizer(tokenizer_config(run), 0)
    assert tokenizer.config == TokenizerConfig(SCHEDULES[256])
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    source = tensor_source(image, torch.zeros(1, dtype=torch.int64))
    trainer = TokenizerTrainer(run, tokenizer, source, TrainContext(0, 1, torch.device("cpu")), seed=0)
    before = tokenizer.encoder.conv_in.weight.clone()
    trainer._forward_backward(Batch(torch.zeros(1, dtype=torch.int64), image))
    assert trainer._step(1e-4, 0.0).taken and not torch.equal(tokenizer.encoder.conv_in.weight, before)
    assert 0 < float(trainer.sums["adaptive_weight"][0]) and "discriminator_loss" in trainer.sums


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resolution=48", r"--resolution: expected 16, the last of --pn \(4\) times .* \(4\), got 48"),
        ("--pn=4_2_1", "--pn: "),
        ("--ch=33", "--ch: expected a multiple of 32"),
        ("--codes=0", "--codes: expected a positive integer, got 0"),
        ("--freeze=encoder", "--freeze: expected nothing, without --init_from, got encoder"),
        ("--l1=0 --l2=0", "--l1: expected a number above 0"),
        ("--disc_start=1.5", "--disc_start: expected a number from 0 to 1"),
        ("--init_from=absent.pth", "--init_from: .*absent.pth"),
        ("--lpips=absent.pth", "absent.pth"),
        ("--disc=1 --disc_layers=5", "--disc_layers: 5 layers need at least 96×96 pixels, the images have 16×16"),
        ("--disc=1 --disc_channels=5", "--disc_channels: "),
        ("--data_path=absent", "--data_path: expected a folder of images, got absent: no such folder"),
    ],
)
def test_wrong_flags(
    options: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--data_path={folder}", f"--out={tmp_path / 'run'}", *options.split()]
    with pytest.raises(SystemExit) as exited:
        main(["train-tokenizer", *training.arguments(), *given])
    assert exited.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_folders_than_train_and_val_are_images_too(folder: Path, tmp_path: Path) -> None:
    """A folder with a class "train" next to other classes has no parts."""
    run = training.flags(tmp_path, data_path=str(folder))

    def read(flags: TokenizerFlags) -> tuple[Source, Source | None]:
        return read_data(flags, tokenizer_config(run), image_folders(flags))

    train, val = read(run)
    assert len(train) == training.ITEMS and val is not None and len(val) == training.ITEMS
    classes = tmp_path / "classes"
    for name in ("car", "train"):
        (classes / name).mkdir(parents=True)
        save_image(classes / name / "one.png", torch.zeros(3, 20, 20))
    train, val = read(training.flags(tmp_path, data_path=str(classes)))
    assert len(train) == 2 and val is None
    (classes / "val").mkdir()  # now they are parts, whatever else is there
    save_image(classes / "val" / "one.png", torch.zeros(3, 20, 20))
    train, val = read(training.flags(tmp_path, data_path=str(classes)))
    assert len(train) == 1 and val is not None and len(val) == 1
    read(training.flags(classes / "runs", data_path=str(classes)))
    with pytest.raises(ValueError, match="--out: expected a folder outside of the images in .*train, got"):
        read(training.flags(classes / "train" / "runs", data_path=str(classes)))


def test_codes_of_init_from_are_kept(folder: Path, tmp_path: Path) -> None:
    """Also with other token maps, for which the file has no code statistics."""
    config = TokenizerConfig(
        (1, 2, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attention=False
    )
    tokenizer = Tokenizer(config).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    mvar.save(tmp_path / "start.safetensors", tokenizer)
    run = f"--init_from={tmp_path / 'start.safetensors'} --data_path={folder} --out={tmp_path / 'run'} --pn=1_4"
    main(
        ["train-tokenizer", *run.split(), *"--bs=16 --ep=1 --tblr=1e-9 --disc=0 --tb=0 --samples=0 --average=0".split()]
    )
    trained = mvar.load_tokenizer(tmp_path / "run" / "tokenizer.safetensors")
    assert trained.patch_nums == (1, 4)
    torch.testing.assert_close(
        trained.quantize.embedding.weight, tokenizer.quantize.embedding.weight, rtol=0, atol=1e-3
    )


def test_folder_of_another_kind_of_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.trainer(training.flags(tmp_path / "tokenizer", ep=1)).run()
    model_training.trainer(model_training.flags(tmp_path / "model", ep=1)).run()
    for command, other in (("train", "tokenizer"), ("train-tokenizer", "model")):
        options = model_training.arguments if command == "train" else training.arguments
        given = [*options(out=tmp_path / other)] + ([f"--data_path={folder}"] if command == "train-tokenizer" else [])
        with pytest.raises(SystemExit):
            main([command, *given])
        error = capsys.readouterr().err
        assert f"--out: {tmp_path / other}" in error and f", got that of a {other}; choose another folder" in error
    (checkpoint, *_) = (tmp_path / "tokenizer" / "checkpoints").iterdir()
    with pytest.raises(SystemExit):
        main(["convert", str(checkpoint), str(tmp_path / "m.pth")])
    assert "expected the checkpoint of a model, got that of a tokenizer" in capsys.readouterr().err
