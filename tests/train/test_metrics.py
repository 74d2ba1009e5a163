"""Tests of training metrics: means without non-finite values, FLOPs, throughput, TensorBoard and terminal output."""

import io
import json
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import mvar
from mvar.cli.main import main
from mvar.models.transformer import from_config
from mvar.train.distributed import TrainContext
from mvar.train.metrics import MetricAccumulator, MetricLogger, flops_per_image, peak_flops
from mvar.train.objective import TokenLosses
from mvar.train.tensorboard import tags
from tests.helpers import training
from tests.helpers.images import write_images


def test_means_exclude_and_count_non_finite_values() -> None:
    tokens = torch.tensor([[0, 1, 2], [0, 1, 2]])
    nll = torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 5.0]])
    window = MetricAccumulator((1, 2), 4, TrainContext())
    window.add(TokenLosses(torch.tensor(torch.nan), nll, tokens), tokens)
    window.add(TokenLosses(torch.tensor(2.0), nll[:1] + 2, tokens[:1] + 1), tokens[:1])
    means = window.means()
    assert (means["loss"], means["loss_last"], means["accuracy"]) == (3.0, 3.5, 0.5)
    assert means["not_finite"] == 1
    window.reset()
    window.add(TokenLosses(torch.tensor(2.0), nll[:1], tokens[:1]), tokens[:1])
    assert window.means()["not_finite"] == 0
    window.add(TokenLosses(torch.tensor(2.0), nll[:, :1], tokens[:, :1]), tokens[:, :1])  # the first scale only
    means = window.means()
    assert (means["accuracy_scale0"], means["accuracy_scale1"], means["loss_last"]) == (1.0, 1.0, 2.5)
    rare = torch.tensor([0] * 98 + [1]).view(33, 3)  # above a thousandth of the uniform frequency: counted as used
    window.add(TokenLosses(torch.tensor(2.0), torch.ones(33, 3), rare), rare)
    assert window.means()["code_usage"] == 0.5


@pytest.mark.parametrize("changed", [{}, {"bidirectional": True}, {"architecture": "var", "shared_adaln": True}])
@pytest.mark.parametrize("scales", [1, 2, None])
def test_flops_per_image(changed: dict, scales: int | None) -> None:
    """FLOPs match the products of every linear layer call, the visible token pairs and the scan."""
    model = from_config(mvar.ModelConfig(depth=2, patch_nums=(1, 2, 3), code_dim=8, num_codes=16, **changed)).eval()
    config, products = model.config, 0

    def count(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal products
        products += inputs[0].numel() * layer.out_features

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    length = sum(config.scales[:scales])
    model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, length - 1, 8), backend="reference")
    level = model.lvl_1L[0, :length].tolist()
    causal = config.architecture == "var"
    pairs = sum(b <= a if causal else a == b for a, b in product(level, level))
    attention = 2 * config.channels * pairs  # q·k, and p·v
    # The input to the state, its decay and its readout, for every token.
    scan = 0 if causal else 3 * config.inner_width * config.state_dim * length * (1 + config.bidirectional)
    assert flops_per_image(model, scales) == 3 * 2 * (products + config.depth * (attention + scan))


def test_peak_flops_by_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_flops(torch.device("cuda"))

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12 and peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB") == peak("A100-PCIE-40GB") == peak("NVIDIA A100 80GB PCIe") == 312e12
    assert peak("NVIDIA L4") == 121e12 and peak("NVIDIA GeForce RTX 4090") == 165e12
    for other in ("NVIDIA L40", "NVIDIA H100 NVL", "NVIDIA H200 MIG 1g.18gb", "NVIDIA RTX A1000 Laptop GPU"):
        assert peak(other) is None
    assert peak_flops(torch.device("cpu")) is None


def test_mfu_uses_scales_in_training(tmp_path: Path) -> None:
    run = training.trainer(training.flags(tmp_path, pg=0.8, pg0=0, wp=0.1, pgwp=0.2, peak_tflops=2.0))
    run.run()
    rows = training.rows(tmp_path)
    assert {row["scales"] for row in rows} == {1, 2, 3, 4}
    for row in rows:
        assert row["mfu"] == pytest.approx(row["images_per_s"] * flops_per_image(run.model, row["scales"]) / 2e12)


def test_remaining_time_and_throughput_after_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training.trainer(training.flags(tmp_path))
    first.iteration = 12
    first._save()
    run = training.trainer(training.flags(tmp_path, log_every=2))
    assert run.resume()
    remaining_by_iteration: dict[int, float] = {}
    log = MetricLogger.log

    def log_and_record(self: MetricLogger, iteration: int, values: dict, remaining: float) -> None:
        remaining_by_iteration[iteration] = remaining
        log(self, iteration, values, remaining)

    monkeypatch.setattr(MetricLogger, "log", log_and_record)
    clock = SimpleNamespace(perf_counter=lambda: 4.0 * run.iteration, time=time.time)
    monkeypatch.setattr("mvar.train.metrics.time", clock)
    run.run()
    assert remaining_by_iteration == {n: 4.0 * (22 - n) for n in range(14, 23, 2)}
    assert {row["images_per_s"] for row in training.rows(tmp_path)} == {64 / 4}


def test_validation_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.trainer(training.flags(tmp_path), items=128).run()
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    line = f"validation after iteration 2: loss {row['val_loss']:.4g} loss_last {row['val_loss_last']:.4g} accuracy "
    assert line in capsys.readouterr().out


def test_unreadable_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "data" / "train", {"cat": 60, "dog": 60}, size=(8, 8))
    (tmp_path / "data" / "train" / "cat" / "007.png").write_bytes(b"no image")
    sizes = mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    mvar.save(tmp_path / "codes.safetensors", mvar.build(1, tokenizer=sizes)[1])
    words = "--depth=1 --bs=60 --ep=2 --log_every=1 --tb=0 --device=cpu --samples=0"
    main(
        ["train", f"--data_path={tmp_path}/data", f"--tokenizer={tmp_path}/codes.safetensors"]
        + [*words.split(), f"--out={tmp_path}/run"]
    )
    out = capsys.readouterr().out
    assert "warning: 1 of 120 training images could not be read" in out
    rows = training.rows(tmp_path / "run")
    assert rows[0]["unreadable"] in (0, 1) and [row["unreadable"] for row in rows[1:]] == [1, 1, 1]
    assert "unreadable 1\n" in out


def test_tensorboard_tags_and_units_match_var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, float] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            shown["hidden from"] = purge_step

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown[name] = value

        def add_image(self, name: str, image: Tensor, step: int) -> None:
            shown[name] = (tuple(image.shape), step)

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    logger = MetricLogger(tmp_path, True, tensorboard=True, name="run", iteration=3, total=5, tags=tags((16, 32)))
    logger.row(1, {"loss": 2.0, "accuracy_last": 0.25, "loss_scale1": 3.0, "accuracy_scale0": 0.5, "loss_scale": 4.0})
    logger.log_validation(2, {"loss": 2.5, "accuracy": 0.125})
    logger.image(2, "reconstructions", torch.zeros(3, 4, 6))
    logger.close()
    assert shown == {
        "reconstructions": ((3, 4, 6), 2),
        "hidden from": 4,  # resumed after iteration 3, which is kept
        "AR_ep_loss/L_mean": 2.0,
        "AR_ep_loss/acc_tail": 25.0,
        "AR_iter_loss/L_32": 3.0,
        "AR_iter_loss/acc_16": 50.0,
        "AR_opt_grad/fp16/scale_log2": 2.0,
        "AR_ep_loss/vL_mean": 2.5,
        "AR_ep_loss/vacc_mean": 12.5,
    }


def test_progress_bar_or_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout(io.StringIO):
        def __init__(self, is_terminal: bool) -> None:
            super().__init__()
            self.is_terminal = is_terminal

        def isatty(self) -> bool:
            return self.is_terminal

    for is_terminal in (True, False):
        monkeypatch.setattr(sys, "stdout", stdout := Stdout(is_terminal))
        logger = MetricLogger(tmp_path, True, tensorboard=False, name="run", iteration=2, total=4)
        logger.advance()
        logger.log(3, {"accuracy": 0.5, "loss": 1.5}, 7.0)
        logger.close()
        output = stdout.getvalue()
        line = "run: iteration 3 of 4, 0:00:07 left, loss 1.5 accuracy 0.5\n"
        assert "iteration" not in output if is_terminal else output == line
        assert ("\r" in output and "3/4" in output and "loss=1.5, accuracy=0.5" in output) == is_terminal


def test_validation_every_ten_epochs_and_at_end(tmp_path: Path) -> None:
    training.trainer(training.flags(tmp_path, ep=12, log_every=100), items=64).run()
    rows = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [row["iteration"] for row in rows if "val_loss" in row] == [10, 12]
