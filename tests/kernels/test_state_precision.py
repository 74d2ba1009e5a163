"""Tests that the error of the Triton mixer's state in bfloat16 is negligible in a model's logits.

With 16-bit inputs the kernel adds products of two bfloat16 parts of each factor to its float32 state (chunk.py). A
model's own roundings to bfloat16 would hide what that costs, since any change, however small, moves some of them. Here
a float64 model carries exact states from scale to scale, to which the kernel's errors are added.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mvar
import mvar_kernels as mk
from mvar.inference.prepare import prepared_model
from mvar.models.transformer import Model, ScaleTransformer, from_config
from mvar_kernels.dispatch import unavailable
from mvar_kernels.ops.mamba2 import reference
from mvar_kernels.ops.mamba2.inputs import Mixer
from mvar_kernels.ops.mamba2.spec import EPS

if unavailable("triton") is not None:
    pytest.skip(str(unavailable("triton")), allow_module_level=True)

from mvar_kernels.ops.mamba2.triton import mamba2_mixer_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.slow


def state_dominated_model() -> Model:
    """A model with gates of about 0.3 whose mixers pass on nothing but slowly decaying states (A = −1, D = 0)."""
    model = from_config(mvar.ModelConfig(2, (3, 9, 10), width=64, num_classes=10, num_codes=512)).eval()
    mvar.init_weights(model, alng=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.class_emb.weight.normal_(generator=generator)
        for block in model.typed_blocks():
            block.mamba.conv1d.weight.uniform_(-1, 1, generator=generator)
            block.mamba.D.zero_()
            block.mamba.A_log.zero_()
    return model


@torch.no_grad()
def logits(model: ScaleTransformer, inputs: Tensor) -> Tensor:
    """Logits under teacher forcing, scale by scale with carried states: (1, L, V) float64."""
    label = torch.tensor([3])
    cond = model.class_emb(label)
    x = torch.cat([model.start(cond), model.word_embed(inputs.to(cond.dtype))], 1) + model.positions()
    modulation, states, out = model.modulation(label, cond), model.empty_states(1), []
    for tokens in x.split(model.config.scales, 1):
        hidden, states = model.hidden(tokens, modulation, (tokens.shape[1],), states, backend="reference")
        out.append(model.head(hidden).double())
    return torch.cat(out, 1)


def state_error(zxbcdt: Tensor, parameters: tuple[Tensor, ...], conv: Tensor, ssm: Tensor, eps: float) -> Tensor:
    """The error of the kernel's last state for these inputs rounded to bfloat16."""
    _, L, columns = zxbcdt.shape
    heads = ssm.shape[1]
    rows, dt = zxbcdt.bfloat16().split([columns - heads, heads], -1)
    call = Mixer(rows, dt.float(), *(t.float() for t in parameters), conv.bfloat16(), ssm.float(), (L,), eps)
    on_device, in_float64 = (
        Mixer(*(t.to(**options) if isinstance(t, Tensor) else t for t in call))
        for options in ({"device": DEVICE}, {"dtype": torch.float64})
    )
    return mamba2_mixer_triton.forward(on_device)[-1].cpu() - reference.mamba2_mixer(in_float64)[-1]


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def test_state_error_in_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors change the logits by 1/9,200 of what bfloat16 changes them by; with one bfloat16 part of each factor
    it would be 1/17 (root mean squares, in the interpreter)."""
    model = state_dominated_model()
    first, *_, last = model.config.scales
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, model.config.num_tokens - first, model.config.code_dim, generator=generator)
    bfloat16 = logits(prepared_model(model, torch.bfloat16), inputs)
    exact = logits(model.double(), inputs)
    of_bfloat16 = rms(bfloat16 - exact)
    mixer = mk.mamba2_mixer

    def with_states(change: Callable[..., Tensor]) -> Tensor:
        """Logits where the state after each scale but the last is changed."""

        def call(zxbcdt: Tensor, *parameters: Tensor, state: mk.Mamba2State, **options: Any) -> Any:
            y, new = mixer(zxbcdt, *parameters, state=state, **options)
            if zxbcdt.shape[1] < last:
                new = new._replace(ssm=new.ssm + change(new.ssm, zxbcdt, parameters, state))
            return y, new

        with monkeypatch.context() as patch:
            patch.setattr(mk, "mamba2_mixer", call)
            return logits(model, inputs)

    forgotten = with_states(lambda ssm, *_: -ssm)
    assert rms(forgotten - exact) > 10 * of_bfloat16, "the states do not matter"
    kernel = with_states(lambda _, zxbcdt, parameters, state: state_error(zxbcdt, parameters, *state, EPS))
    assert 0 < rms(kernel - exact) < of_bfloat16 / 1000
