"""Tests of accelerate on models with LoRA adapters of peft, which are added before or after."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar_kernels.dispatch import native
from tests.helpers.patched import accelerated, close, normal, plain
from tests.helpers.plain_family import MVARBlock
from tests.helpers.plain_var import randomised

pytestmark = [
    pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched"),
    pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed"),
]
CALLED = ["proj", "in_proj", "out_proj", "fc1", "fc2"]
LAYERS = ["mat_qkv", *CALLED]
SCALES = (1, 4)


class Blocks(nn.Module):
    """M-VAR's block, called as its model does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MVARBlock(64, 2, SCALES)
        self.pos_start = self.pos_1LC = None

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.block(x=x, cond_BD=cond, attn_bias=None)
        return out


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return plain() if kind == "VAR" else randomised(Blocks()).train()  # type: ignore[arg-type]


def arguments_of(kind: str) -> tuple[Tensor, Tensor]:
    return (torch.tensor([3, 7]), normal(2, 4, 32)) if kind == "VAR" else (normal(2, 5, 64), normal(2, 64))


def with_adapters(model: nn.Module, layers: list[str]) -> Any:
    """Adapters whose weights are all random: as peft begins them, they do not change the output."""
    import peft  # takes seconds, which collecting the tests should not

    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return adapted


def output_and_grads(model: nn.Module, *arguments: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(*arguments)
    (out * normal(*out.shape)).sum().backward()
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [CALLED, LAYERS], ids=["called", "with mat_qkv"])
@pytest.mark.parametrize("order", ["adapters first", "accelerate first"])
@pytest.mark.parametrize("kind", ["VAR", "M-VAR"])
def test_adapters(kind: str, order: str, layers: list[str]) -> None:
    arguments, without = arguments_of(kind), model_of(kind)(*arguments_of(kind))
    expected = output_and_grads(with_adapters(model_of(kind), layers), *arguments)
    assert not close(expected["out"], without, 0.1) and all("lora_" in name for name in expected.keys() - {"out"})

    model = model_of(kind)
    if order == "accelerate first":
        mk.accelerate(model)
    adapted = with_adapters(model, layers)
    if order == "adapters first":
        mk.accelerate(adapted)
    patched = {name.rpartition(".")[2] for name in accelerated(model)}
    assert ("head_nm" if kind == "VAR" else "mamba") in patched
    # An adapter on mat_qkv, of which only the weight is used, leaves attention to the original.
    assert ("attn" in patched) == (layers is CALLED or order == "accelerate first")
    got = output_and_grads(adapted, *arguments)
    assert got.keys() == expected.keys() and all(close(got[name], value) for name, value in expected.items())

    mk.restore(adapted)
    again = output_and_grads(adapted, *arguments)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_merged_adapters() -> None:
    """Merged adapters leave an accelerated model that computes the same."""
    arguments = arguments_of("VAR")
    model = model_of("VAR")
    mk.accelerate(model)
    adapted = with_adapters(model, CALLED)
    expected = adapted(*arguments)
    merged = adapted.merge_and_unload()
    assert merged is model and all(module.is_valid() for module in model.modules() if hasattr(module, "is_valid"))
    assert close(merged(*arguments), expected)
