"""Blocks with a norm before and after each branch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.patching.patches.base import (
    Patch,
    Randn,
    modulation_unsupported,
    norm_options,
    norm_width,
    normed_dtype,
    roll_tokens,
)
from mvar_kernels.patching.patches.block import in_common_dtype


class SandwichBlock(Patch):
    """Attention, cross-attention where there is a context, and feed-forward network, each between two RMSNorms:
    yandex-research/switti. As there, stochastic depth is not applied."""

    ops = "adaln and gated_adaln"
    required = ("x", "cond_BD", "attn_bias", "context", "context_attn_bias", "freqs_cis")
    optional = ("crop_cond",)
    bypassed = (
        "self_attention_norm1",
        "self_attention_norm2",
        "cross_attention_norm1",
        "cross_attention_norm2",
        "ffn_norm1",
        "ffn_norm2",
    )
    attributes = ("attn", "cross_attn", "ffn", "ada_lin", "attention_y_norm", *bypassed)
    unpatched = {
        "cross_attn": "scale_attention takes no mask per sample, which hides the padding of the text here",
        "ffn": "its linear layers are the library's own already",
    }

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        C = norm_width(module.self_attention_norm1)
        for name in cls.bypassed:
            if C is None or norm_width(getattr(module, name)) != C:
                return f"{name}: expected a norm over the same channels as the others, an RMSNorm or without weights"
        return modulation_unsupported(module, 6, C or 0)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        module.attn.kv_caching(False)
        module.cross_attn.kv_caching(False)
        yield cls._call(module, randn, 2, 5, randn(2, 3, norm_width(module.attention_y_norm)))

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        roll_tokens(module.attn, module.ffn)
        yield cls._call(module, randn, 1, length, None)

    @classmethod
    def _call(cls, module: Any, randn: Randn, batch: int, length: int, context: Tensor | None) -> Tensor:
        C, D = norm_width(module.ffn_norm1), module.ada_lin[-1].in_features
        x, cond = randn(batch, length, C), randn(batch, D)
        options = {"crop_cond": randn(batch, D)} if getattr(module, "use_crop_cond", False) else {}
        out: Tensor = module(x, cond, None, context=context, **options)
        return out

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        cropped = getattr(self, "use_crop_cond", False)
        if values is None or not values["x"].numel() or (cropped and values.get("crop_cond") is None):
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        cond, context, freqs_cis = (values[name] for name in ("cond_BD", "context", "freqs_cis"))
        if cropped:
            cond = cond + self.crop_cond_scales * values["crop_cond"]
        six = self.ada_lin(cond)
        x = values["x"].to(normed_dtype(self.self_attention_norm2, values["x"].dtype))
        x, (g1, g2, s1, s2, t1, t2) = in_common_dtype(x, six.view(-1, 1, 6, x.shape[-1]))

        h = adaln(x, s1[:, 0], t1[:, 0], **self._norm("self_attention_norm1", x))
        branch = self.attn(h, attn_bias=values["attn_bias"], freqs_cis=freqs_cis)
        branch = self._normed("self_attention_norm2", branch, x)
        gate = g1[:, 0]
        if context is not None:
            x, h = gated_adaln(x, branch, gate, None, **self._norm("cross_attention_norm1", x))
            bias = values["context_attn_bias"]
            context = self.attention_y_norm(context)
            branch = self.cross_attn(h, context, context_attn_bias=bias, freqs_cis=freqs_cis)
            branch = self._normed("cross_attention_norm2", branch, x)
            gate = torch.ones_like(gate[:1])
        x, h = gated_adaln(x, branch, gate, s2[:, 0], t2[:, 0], **self._norm("ffn_norm1", x))
        return torch.addcmul(x, self._normed("ffn_norm2", self.ffn(h), x), g2)

    def _norm(self: Any, name: str, x: Tensor) -> dict[str, Any]:
        return norm_options(self._modules[name], x.dtype)

    def _normed(self: Any, name: str, branch: Tensor, x: Tensor) -> Tensor:
        """A branch in the dtype of the residual stream x, normalized."""
        return adaln(branch.to(x.dtype), **self._norm(name, x))
