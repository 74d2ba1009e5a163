"""Random weights as VAR's trainer makes them."""

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mvar.config import unboxed
from mvar.layers import Mamba2
from mvar.model import Model

PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}  # where the generator draws, whatever torch's defaults
AnyModel = TypeVar("AnyModel", bound=Model)


@torch.no_grad()
def initialise(
    model: AnyModel, *, ini: float = -1, hd: float = 0.02, aln: float = 0.5, alng: float = 1e-5, seed: int = 0
) -> AnyModel:
    """Fill a model with random weights, under the option names of VAR's trainer; Mamba-2's own as in mamba_ssm.

    Args:
        ini: standard deviation of all linear layers and embeddings; below 0 for √(1/3C).
        hd: factor on the head's weight.
        aln: factor on the modulation layers.
        alng: factor on their gates' rows, instead. (The public M-VAR code applies it to the first two of the
            three gates only; here to all.)
        seed: decides every weight.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(unboxed(seed))
    C, depth = model.config.channels, model.config.depth
    std = ini if ini >= 0 else math.sqrt(1 / (3 * C))

    def normal(parameter: Tensor, std: float) -> None:
        parameter.copy_(nn.init.trunc_normal_(torch.empty(parameter.shape, **PLAIN), std=std, generator=generator))

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, **PLAIN).to(like)

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
            block.ada_gss.copy_(torch.randn(block.ada_gss.shape, generator=generator, **PLAIN) / math.sqrt(C))
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
