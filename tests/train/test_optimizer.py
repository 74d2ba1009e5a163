"""Tests of the optimizer step: AdamW with VAR's parameter groups, gradient clipping and weight averaging."""

import pytest
import torch
from torch import nn

from mvar.models.config import ModelConfig
from mvar.models.transformer import from_config
from mvar.train.optimizer import OptimizerStep, adamw

SIZES = {"depth": 1, "width": 64, "patch_nums": (1, 2), "num_classes": 3, "num_codes": 8, "code_dim": 4}


def make_step(module: nn.Module, *, clip: float = 0.0, float16: bool = False, average: float = 0.0) -> OptimizerStep:
    return OptimizerStep(adamw(module), torch.device("cpu"), clip=clip, float16=float16, average=average)


@pytest.mark.parametrize(
    ("changed", "special"),
    [
        ({"bidirectional": True}, {"blocks.0.mamba.A_log", "blocks.0.mamba.dt_bias"}),
        ({"architecture": "var", "shared_adaln": True}, {"blocks.0.ada_gss"}),
    ],
)
def test_parameters_without_weight_decay(changed: dict, special: set[str]) -> None:
    model = from_config(ModelConfig(**SIZES, qk_norm=True, **changed))
    decaying, others = adamw(model).param_groups
    assert (decaying["decays"], others["decays"]) == (True, False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    plain = {names[p] for p in others["params"]}
    assert plain >= {name for name, p in model.named_parameters() if p.dim() == 1} | special
    matrices = {name for name in plain - special if model.get_parameter(name).dim() > 1}
    assert matrices == {"pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.attn.scale_mul_1H11"}


def test_step_matches_adamw() -> None:
    """Two steps match the formulas of arXiv 1711.05101 for a matrix with weight decay and a bias without."""
    module = nn.Linear(3, 2).double()
    stepper = make_step(module, clip=0.5, average=0.9)
    expected = [p.detach().clone() for p in module.parameters()]
    average = [p.clone() for p in expected]
    first, second = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for t, (rate, decay, size) in enumerate([(0.1, 0.5, 3.0), (0.05, 0.25, 1e-3)], start=1):
        gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * size for p in expected]
        stepper.backward(sum((p * g).sum() for p, g in zip(module.parameters(), gradients, strict=True)))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        step = stepper.step(rate, decay)
        assert step.taken and step.gradient_norm == pytest.approx(float(norm))  # before clipping
        assert (norm > 0.5) == (t == 1)
        for i, p in enumerate(expected):
            g = gradients[i] * min(1.0, float(0.5 / (norm + 1e-6)))
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g**2
            p *= 1 - rate * decay * (p.dim() > 1)
            p -= rate * (first[i] / (1 - 0.9**t)) / ((second[i] / (1 - 0.95**t)).sqrt() + 1e-8)
            average[i].lerp_(p, 1 - t / (t + 9))  # as long as that is less than 0.9
            torch.testing.assert_close(list(module.parameters())[i].detach(), p)
            torch.testing.assert_close(stepper.average[i], average[i])
    stepper.taken = 10**6
    for p in stepper.parameters:
        p.grad = torch.zeros_like(p)
    stepper.step(0.0, 0.0)
    for mean, p, before in zip(stepper.average, expected, average, strict=True):
        torch.testing.assert_close(mean, 0.9 * before + 0.1 * p)


def test_negative_clip_disables_clipping() -> None:
    module = nn.Linear(1, 1, bias=False)
    stepper = make_step(module, clip=-1.0)
    stepper.backward(module.weight.sum() * 100)
    assert stepper.step(0.0, 0.0).gradient_norm == 100
    assert float(stepper.optimizer.state[module.weight]["exp_avg"]) == pytest.approx(10)


def test_float16_loss_scale_is_bounded() -> None:
    module = nn.Linear(1, 1)
    stepper = make_step(module, float16=True)
    assert stepper.scaler.get_scale() == 2**11 and stepper.scaler.get_growth_interval() == 1000
    stepper.load_state_dict(stepper.state_dict() | {"scaler": stepper.scaler.state_dict() | {"scale": 2.0**16}})
    stepper.backward(module(torch.ones(1)).sum())
    assert stepper.step(0.0, 0.0).taken and stepper.scaler.get_scale() == 2**15
