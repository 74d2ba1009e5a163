"""The baselines of each op: the same computation in PyTorch or by third-party kernels, in its best configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import eager_generation, third_party
from mvar_kernels.ops.adaln.spec import EPS as ADALN_EPS
from mvar_kernels.ops.group_norm_silu.spec import EPS as GROUP_NORM_EPS
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER, SSD_SCAN
from mvar_kernels.ops.scale_attention.flash_attn import boundaries
from mvar_kernels.ops.scale_attention.reference import MAX_LOG_TEMPERATURE, spans
from mvar_kernels.ops.scale_attention.spec import score_scale
from mvar_kernels.testing.spec import Case, Inputs


@dataclass(frozen=True)
class Baseline:
    """supports: whether it takes these inputs; None: all. synchronizes: with the host, so it cannot be captured.

    gpu: runs on a GPU alone. compiled: by torch.compile, which takes seconds per case. third_party: other kernels.
    """

    run: Callable[[Inputs, Case], tuple[Tensor, ...]]
    supports: Callable[[Inputs, Case], bool] | None = None
    synchronizes: bool = False
    gpu: bool = False
    compiled: bool = False
    third_party: bool = False


Norm = Callable[[Tensor], Tensor]


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=ADALN_EPS)


def _adaln(t: Inputs, case: Case, norm: Norm = _layer_norm) -> tuple[Tensor, ...]:
    return (norm(t["x"]) * (1 + t["scale"][:, None]) + t["shift"][:, None],)


def _gated_adaln(t: Inputs, case: Case, norm: Norm = _layer_norm) -> tuple[Tensor, ...]:
    x = t["x"] + t["gate"][:, None] * t["branch"]
    return x, *_adaln(t | {"x": x}, case, norm)


def _group_norm_silu(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    return (F.silu(F.group_norm(t["x"], case.options["groups"], t["weight"], t["bias"], GROUP_NORM_EPS), inplace=True),)


def _qkv(t: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, L, H, D); with a log_temperature, q and k normalized and q times the temperature."""
    q, k, v = t["q"], t["k"], t["v"]
    if "log_temperature" in t:
        temperature = t["log_temperature"].clamp_max(MAX_LOG_TEMPERATURE).exp()[:, None]
        q, k = (F.normalize(q.float(), dim=-1) * temperature).to(v.dtype), F.normalize(k, dim=-1)
    return q, k, v


def _pieces(t: Inputs, case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v), each (B, H, rows, D), of every scale."""
    causal = case.options["pattern"] == "causal"
    q, k, v = (x.transpose(1, 2) for x in _qkv(t))
    return [
        (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        for rows, keys in spans(case.options["scales"], t["q"].shape[1], causal)
    ]


def _sdpa_by_scale(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    outs = [F.scaled_dot_product_attention(q, k, v, scale=score_scale(case)) for q, k, v in _pieces(t, case)]
    return (torch.cat(outs, 2).transpose(1, 2),)


def _matmul_by_scale(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    outs = [((q * score_scale(case)) @ k.transpose(-1, -2)).softmax(-1) @ v for q, k, v in _pieces(t, case)]
    return (torch.cat(outs, 2).transpose(1, 2),)


def _sdpa_dense_mask(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    q, k, v = (x.transpose(1, 2) for x in _qkv(t))
    mask = _mask(case.options["scales"], case.options["pattern"], q.dtype, q.device)
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=score_scale(case)).transpose(1, 2),)


@cache
def _mask(scales: tuple[int, ...], pattern: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    level = torch.repeat_interleave(torch.arange(len(scales)), torch.tensor(scales))
    visible = level[:, None] >= level if pattern == "causal" else level[:, None] == level
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf).to(device)


def _varlen(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    """torch's varlen attention: each scale of each image is one sequence."""
    from torch.nn.attention.varlen import varlen_attn  # not in every torch that the package supports

    scales, longest = case.options["scales"], max(case.options["scales"])
    starts = boundaries(scales, case.sizes["B"], t["q"].device)
    q, k, v = (x.flatten(0, 1) for x in _qkv(t))
    out = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(out, Tensor)
    return (out.view(t["q"].shape),)


def _varlen_supports(t: Inputs, case: Case) -> bool:
    # In older versions its scale is always 1/√D.
    default = score_scale(case) == case.sizes["D"] ** -0.5
    return t["q"].element_size() == 2 and case.options["pattern"] == "diagonal" and default


def _flex(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    """FlexAttention with the pattern as its block mask, compiled with the norm and the temperature."""
    mask = _block_mask(case.options["scales"], case.options["pattern"], t["q"].device)
    return (_compiled_flex()(t, mask, score_scale(case)),)


@cache
def _compiled_flex() -> Callable[[Inputs, Any, float], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(t: Inputs, mask: Any, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in _qkv(t))
        out = flex_attention(q, k, v, block_mask=mask, scale=scale)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return torch.compile(attend, dynamic=False)


@cache
def _block_mask(scales: tuple[int, ...], pattern: str, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    level = torch.repeat_interleave(torch.arange(len(scales)), torch.tensor(scales)).to(device)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return level[query] >= level[key] if pattern == "causal" else level[query] == level[key]

    return create_block_mask(visible, None, None, len(level), len(level), device=str(device))


def _flex_supports(t: Inputs, case: Case) -> bool:
    return t["q"].shape[1] == t["k"].shape[1] == sum(case.options["scales"])  # no keys of earlier scales


def _sample(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    logits, c = t["cond"].float(), case.options["guidance"]
    if c:
        logits = (1 + c) * logits - c * t["uncond"].float()
    return (eager_generation.sample(logits, case.options["top_k"], case.options["top_p"]),)


def _adaln_baselines(run: Callable[..., tuple[Tensor, ...]]) -> Mapping[str, Baseline]:
    liger = partial(run, norm=third_party.layer_norm)
    return {
        "eager": Baseline(run),
        "Liger's norm": Baseline(liger, third_party.supports_adaln, gpu=True, third_party=True),
    }


BASELINES: Mapping[str, Mapping[str, Baseline]] = {
    "adaln": _adaln_baselines(_adaln),
    "gated_adaln": _adaln_baselines(_gated_adaln),
    "group_norm_silu": {"eager": Baseline(_group_norm_silu)},
    "scale_attention": {
        "SDPA by scale": Baseline(_sdpa_by_scale),
        "matmul by scale": Baseline(_matmul_by_scale),
        "SDPA, dense mask": Baseline(_sdpa_dense_mask),
        "varlen attention": Baseline(_varlen, _varlen_supports, gpu=True),
        "FlexAttention": Baseline(_flex, _flex_supports, gpu=True, compiled=True),
    },
    "ssd_scan": {"chunked PyTorch": Baseline(SSD_SCAN.reference)},
    "mamba2_mixer": {
        "chunked PyTorch": Baseline(MAMBA2_MIXER.reference),
        "mamba_ssm's scan, fla's convolution": Baseline(
            third_party.mamba2_mixer, third_party.supports_mixer, gpu=True, third_party=True
        ),
    },
    "sample_tokens": {"topk, sort, multinomial": Baseline(_sample, synchronizes=True)},
}
"""By op and name. op_calls.py adds torch.compile of the first baseline of each op."""
