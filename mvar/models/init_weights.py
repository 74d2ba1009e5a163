"""Random initialization of VAR's trainer."""

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mvar.models.config import unboxed
from mvar.models.layers import Mamba2
from mvar.models.transformer import Model

FP32_CPU: Any = {"dtype": torch.float32, "device": "cpu"}  # independent of torch's defaults
AnyModel = TypeVar("AnyModel", bound=Model)


@torch.no_grad()
def init_weights(
    model: AnyModel, *, ini: float = -1, hd: float = 0.02, aln: float = 0.5, alng: float = 1e-5, seed: int = 0
) -> AnyModel:
    """Initialize a model in place as VAR's trainer does, with its option names; Mamba-2's parameters as in mamba_ssm.

    Args:
        ini: standard deviation of linear layers and embeddings; negative for √(1/3C).
        hd: factor of the head's weight.
        aln: factor of the modulation layers, except for their gates.
        alng: factor of the gates. (The public M-VAR code applies it to the first two of the three gates only; here it
            applies to all.)
        seed: seed of the random numbers.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(unboxed(seed))
    C, depth = model.config.channels, model.config.depth
    std = ini if ini >= 0 else math.sqrt(1 / (3 * C))

    def normal(parameter: Tensor, std: float) -> None:
        parameter.copy_(nn.init.trunc_normal_(torch.empty(parameter.shape, **FP32_CPU), std=std, generator=generator))

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, **FP32_CPU).to(like)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            normal(module.weight, 0.02 if isinstance(module, nn.Conv1d) else std)
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            module.bias.zero_()
    normal(model.pos_start, std)
    normal(model.pos_1LC, std)
    model.head.weight.mul_(hd)
    cast(nn.Linear, model.head_nm.ada_lin[1]).weight.mul_(aln)
    for block in model.typed_blocks():
        block.attn.proj.weight.div_(math.sqrt(2 * depth))
        block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
        if model.config.shared_adaln:
            block.ada_gss.copy_(torch.randn(block.ada_gss.shape, generator=generator, **FP32_CPU) / math.sqrt(C))
            rows = block.ada_gss.flatten()
        else:
            rows = cast(nn.Linear, block.ada_lin[1]).weight
        rows[: block.branches * C].mul_(alng)
        rows[block.branches * C :].mul_(aln)
    for mixer in (module for module in model.modules() if isinstance(module, Mamba2)):
        dt = torch.exp(math.log(1e-3) + uniform(mixer.dt_bias) * math.log(0.1 / 1e-3)).clamp_min(1e-4)
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        mixer.A_log.copy_((1 + 15 * uniform(mixer.A_log)).log())
        mixer.D.fill_(1)
        mixer.norm.weight.fill_(1)
    return model
