"""Tests of --opt=adamw8bit: AdamW with moments in 8 bits, by bitsandbytes."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mvar.cli.main import main
from mvar.train.optimizer import OptimizerStep, adamw, adamw8bit
from tests.helpers import training

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
RATE, DECAY = 1e-2, 0.1
ITEMS = 512  # 8 iterations
SIGNED, UNSIGNED = 0.9 / 64 / 2, 0.9 / 128 / 2
"""Half the distance of neighbouring codes from 0.1 to 1 of a block's largest moment: 64 or 128 codes are there."""


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *training.arguments(tmp_path / "run"), "--opt=adamw8bit"])
    assert stopped.value.code
    assert "--opt=adamw8bit requires bitsandbytes: pip install 'bitsandbytes>=0.50'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sharding_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *training.arguments(tmp_path / "run"), "--opt=adamw8bit", "--fsdp=1"])
    assert "--opt: expected adamw with --fsdp, which shards the moments, got adamw8bit" in capsys.readouterr().err


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """The weight after each step."""
    stepper, found = OptimizerStep(optimizer, torch.device("cpu"), clip=0.0, float16=False, average=0.0), []
    (weight,) = module.parameters()
    for gradient in gradients:
        stepper.backward((weight * gradient).sum())
        assert stepper.step(RATE, DECAY).taken
        found.append(weight.detach().double())
    return found


@installed
def test_steps_match_adamw() -> None:
    """The first step equals AdamW's, as the moments are rounded after they are used; the second within the rounding.

    Gradients of 1 to 2 keep every moment above 0.1 of the largest of its block, where the codes are evenly spaced.
    """
    draws = torch.Generator().manual_seed(0)
    first, second = (1 + torch.rand(64, 80, generator=draws) for _ in range(2))
    first[:32] *= -1  # blocks of 256 with and without a sign
    layers = [nn.Linear(80, 64, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    expected = steps(layers[0], adamw(layers[0]), [first, second])
    optimizer = adamw8bit(layers[1])
    found = steps(layers[1], optimizer, [first, second])
    assert optimizer.state[layers[1].weight]["state1"].dtype == torch.uint8

    m1, v1 = 0.1 * first.double(), 0.05 * first.double() ** 2
    largest = first.double().abs().flatten().view(-1, 256).amax(1, keepdim=True).expand(-1, 256).reshape(64, 80)
    m, v = 0.9 * m1 + 0.1 * second, 0.95 * v1 + 0.05 * second.double() ** 2
    m_error, v_error = 0.9 * 0.1 * largest * SIGNED, 0.95 * 0.05 * largest**2 * UNSIGNED
    m, m_error, v, v_error = m / (1 - 0.9**2), m_error / (1 - 0.9**2), v / (1 - 0.95**2), v_error / (1 - 0.95**2)
    bound = RATE * ((m.abs() + m_error) / (v - v_error).sqrt() - m.abs() / v.sqrt())
    rounding = 8 * torch.finfo(torch.float32).eps  # of a few operations on weights below 1
    assert bound.max() < 0.02 * RATE  # of a step of about RATE
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=rounding)
    difference = (found[1] - expected[1]).abs()
    assert (difference <= bound + rounding).all() and difference.max() > 10 * rounding


@installed
def test_small_tensors_are_float32() -> None:
    module = nn.Linear(63, 65)
    optimizer = adamw8bit(module)
    for parameter in module.parameters():
        assert optimizer.state[parameter]["state1"].dtype == torch.float32


@installed
def test_training_and_resumption(tmp_path: Path) -> None:
    """Losses fall as with AdamW; a run that is resumed equals the uninterrupted one bit for bit."""
    flags = training.flags(tmp_path / "run", opt="adamw8bit", save_every=5)
    uninterrupted = training.trainer(flags, items=ITEMS)
    uninterrupted.run()
    losses = training.losses(tmp_path / "run")
    training.trainer(training.flags(tmp_path / "adamw"), items=ITEMS).run()
    expected = training.losses(tmp_path / "adamw")
    # Blocks hold moments of very different sizes, and the small ones are rounded more coarsely than in the test above.
    # An update that is a tenth off loses at most a tenth of what it gains, to first order.
    assert losses[0] == expected[0] and losses[0] - losses[-1] > 0.9 * (expected[0] - expected[-1]) > 0.2

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000008")
    resumed = training.trainer(flags, items=ITEMS)
    assert resumed.resume() and resumed.iteration == 5
    resumed.run()
    assert training.losses(tmp_path / "run")[-3:] == losses[-3:]
    found, right = resumed._tensors(), uninterrupted._tensors()
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    kinds = {name.partition(".")[0] for name in right}
    assert kinds == {"model", "state1", "state2", "absmax1", "absmax2", "average"}
    assert {right[name].dtype for name in right if name.startswith("state1")} == {torch.uint8, torch.float32}
    assert resumed.optimizer.state_dict() == uninterrupted.optimizer.state_dict()
    assert set(resumed.optimizer.state_dict()["steps"]) == {8}

    for out, saved, given in (("run", "adamw8bit", "adamw"), ("adamw", "adamw", "adamw8bit")):
        with pytest.raises(ValueError, match=f"--opt: the run in .* has {saved}, not {given}; keep it"):
            training.trainer(training.flags(tmp_path / out, opt=given), items=ITEMS).resume()
