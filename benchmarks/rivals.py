"""What each op is held against: the same computation in PyTorch or by other projects' kernels, at its best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers, public
from mvar_kernels.ops.adaln.spec import EPS as ADALN_EPS
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER, SSD_SCAN
from mvar_kernels.ops.scale_attention.flash_attn import boundaries
from mvar_kernels.ops.scale_attention.reference import MAX_LOG_TEMPERATURE, spans
from mvar_kernels.ops.scale_attention.spec import score_scale
from mvar_kernels.testing.spec import Case, Inputs


@dataclass(frozen=True)
class Rival:
    """`takes` says which inputs it can be held against; None: all. `waits`: for the device, so no graph can hold it.

    gpu: runs on a GPU alone. compiled: by torch.compile, which takes seconds a case. peer: another project's kernels.
    """

    run: Callable[[Inputs, Case], tuple[Tensor, ...]]
    takes: Callable[[Inputs, Case], bool] | None = None
    waits: bool = False
    gpu: bool = False
    compiled: bool = False
    peer: bool = False


Norm = Callable[[Tensor], Tensor]


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=ADALN_EPS)


def _adaln(t: Inputs, case: Case, norm: Norm = _layer_norm) -> tuple[Tensor, ...]:
    return (norm(t["x"]) * (1 + t["scale"][:, None]) + t["shift"][:, None],)


def _gated_adaln(t: Inputs, case: Case, norm: Norm = _layer_norm) -> tuple[Tensor, ...]:
    x = t["x"] + t["gate"][:, None] * t["branch"]
    return x, *_adaln(t | {"x": x}, case, norm)


def _qkv(t: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, (B, L, H, D); q and k as unit vectors and q with its temperature where there is one."""
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
    kept = level[:, None] >= level if pattern == "causal" else level[:, None] == level
    return torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, -torch.inf).to(device)


def _varlen(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    """torch's varlen attention: every scale of every image is a sequence of its own."""
    from torch.nn.attention.varlen import varlen_attn  # not in every torch that the package supports

    scales, longest = case.options["scales"], max(case.options["scales"])
    starts = boundaries(scales, case.sizes["B"], t["q"].device)
    q, k, v = (x.flatten(0, 1) for x in _qkv(t))
    out = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(out, Tensor)
    return (out.view(t["q"].shape),)


def _varlen_takes(t: Inputs, case: Case) -> bool:
    # Its scale is 1/√D in older versions, whatever is asked for.
    default = score_scale(case) == case.sizes["D"] ** -0.5
    return t["q"].element_size() == 2 and case.options["pattern"] == "diagonal" and default


def _flex(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    """FlexAttention with the pattern as its block mask; norm and temperature are compiled with it."""
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

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return level[query] >= level[key] if pattern == "causal" else level[query] == level[key]

    return create_block_mask(seen, None, None, len(level), len(level), device=str(device))


def _flex_takes(t: Inputs, case: Case) -> bool:
    return t["q"].shape[1] == t["k"].shape[1] == sum(case.options["scales"])  # no keys of former scales


def _draw(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    logits, c = t["cond"].float(), case.options["guidance"]
    if c:
        logits = (1 + c) * logits - c * t["uncond"].float()
    return (public.draw(logits, case.options["top_k"], case.options["top_p"]),)


RIVALS: Mapping[str, Mapping[str, Rival]] = {
    "adaln": {
        "eager": Rival(_adaln),
        "Liger's norm": Rival(partial(_adaln, norm=peers.layer_norm), peers.takes_adaln, gpu=True, peer=True),
    },
    "gated_adaln": {
        "eager": Rival(_gated_adaln),
        "Liger's norm": Rival(partial(_gated_adaln, norm=peers.layer_norm), peers.takes_adaln, gpu=True, peer=True),
    },
    "scale_attention": {
        "SDPA by scale": Rival(_sdpa_by_scale),
        "matmul by scale": Rival(_matmul_by_scale),
        "SDPA, dense mask": Rival(_sdpa_dense_mask),
        "varlen attention": Rival(_varlen, _varlen_takes, gpu=True),
        "FlexAttention": Rival(_flex, _flex_takes, gpu=True, compiled=True),
    },
    "ssd_scan": {"chunked PyTorch": Rival(SSD_SCAN.reference)},
    "mamba2_mixer": {
        "chunked PyTorch": Rival(MAMBA2_MIXER.reference),
        "mamba_ssm's scan, fla's convolution": Rival(peers.mamba2_mixer, peers.takes_mixer, gpu=True, peer=True),
    },
    "sample_tokens": {"topk, sort, multinomial": Rival(_draw, waits=True)},
}
"""Plain PyTorch and other projects' kernels, by op and name. `ops.py` adds torch.compile of the first of each."""
