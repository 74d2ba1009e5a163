"""The training loss: cross entropy over the tokens of all scales in training, fused with the head and chunked.

The logits would be the largest tensor of a training step: (B·L, V) in float32 is 1.07 GB for 96 images at 256×256, and
softmax, its gradient and their copies take as much again. Here logits are materialized for `CHUNK_ROWS` tokens at a
time: the forward pass computes the loss of a chunk and its gradients for the head's input, weight and bias together.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.models.transformer import Model

AUTOCAST_DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}  # by --fp16
CHUNK_ROWS = {"cpu": 512, "cuda": 4096}
"""Tokens per chunk; the logits of 4,096 codes in float32 are 8 MB and 64 MB."""


class TokenLosses(NamedTuple):
    """Loss and per-token results.

    Attributes:
        loss: the weighted sum over all tokens, a scalar; the only differentiable output.
        nll: (n,) float32, −log p of the target tokens, without label smoothing and weights.
        predictions: (n,) int64, argmax of the logits.
    """

    loss: Tensor
    nll: Tensor
    predictions: Tensor


def head_cross_entropy(
    hidden: Tensor, head: nn.Linear, tokens: Tensor, weights: Tensor, *, smoothing: float = 0.0
) -> TokenLosses:
    """Cross entropy of `head(hidden)` without materializing the logits of all tokens.

        loss = Σ_i w_i · [(1−ε)·(−log p_i,t) + ε·mean_v(−log p_i,v)]        ε: label smoothing (arXiv 1512.00567)

    Args:
        hidden: (n, C) floating point.
        head: linear layer C → V with bias. Matmuls run in the autocast dtype if autocast is enabled; softmax and sums
            are in float32.
        tokens: (n,) int64, the target codes.
        weights: (n,) float32, loss weights; should be near 1, since 16-bit gradients are stored with these weights.
        smoothing: ε.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return TokenLosses(*_HeadCrossEntropy.apply(hidden, head.weight, head.bias, tokens, weights, smoothing, dtype))


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        tokens: Tensor,
        weights: Tensor,
        smoothing: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad[:3])
        rows = CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cuda"])
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), bias.to(dtype)
            grad_hidden = torch.empty_like(hidden) if needs_grad else None
            acc_dtype = torch.promote_types(dtype, torch.float32)
            grad_weight, grad_bias = (torch.zeros_like(p, dtype=acc_dtype) for p in (weight, bias))
            losses, nlls, predictions = [], [], []
            chunks = zip(hidden.split(rows), tokens.split(rows), weights.split(rows), strict=True)
            for i, (x, target, chunk_weights) in enumerate(chunks):
                x = x.to(dtype)
                logits = F.linear(x, w, b).to(acc_dtype)  # (rows, V)
                log_p = logits.log_softmax(-1)
                nll = -log_p.gather(-1, target[:, None])[:, 0]
                loss = (1 - smoothing) * nll - smoothing * log_p.mean(-1) if smoothing else nll
                losses.append((loss * chunk_weights).sum())
                nlls.append(nll)
                predictions.append(logits.argmax(-1))
                if grad_hidden is None:
                    continue
                grad = log_p.exp_()  # gradient with respect to the logits, computed in place
                if smoothing:
                    grad -= smoothing / grad.shape[-1]
                grad.scatter_add_(-1, target[:, None], grad.new_full((len(x), 1), smoothing - 1))
                grad *= chunk_weights[:, None]
                grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                grad_hidden[i * rows : i * rows + len(x)] = grad @ w
                if dtype == acc_dtype:
                    grad_weight.addmm_(grad.T, x)
                else:
                    grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        out = torch.stack(losses).sum(), torch.cat(nlls), torch.cat(predictions)
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((value * grad.to(value.dtype)).to(dtype) for value, dtype in grads), None, None, None, None)


def autocast(fp16: int, device: torch.device) -> torch.autocast:
    """The autocast context of --fp16: 0 for none, 1 for float16, 2 for bfloat16."""
    dtype = AUTOCAST_DTYPES[fp16]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Objective(nn.Module):
    """The model and its loss as one module, to be wrapped by DDP or FSDP2, so that the head's weights are gathered."""

    def __init__(self, model: Model, *, smoothing: float = 0.0, backend: str = "auto") -> None:
        super().__init__()
        self.model, self.smoothing, self.backend = model, smoothing, backend

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        tokens: Tensor,
        draws: Tensor | None = None,
        *,
        newest_weight: float = 1.0,
        share: float = 1.0,
    ) -> TokenLosses:
        """Loss of a batch of B images on the first scales, those of `tokens`.

        Every token has the weight 1/(B·L), where L is the length of all scales, including those that are not yet in
        training (as in VAR).

        Args:
            labels, inputs, draws: see :meth:`Model.features`.
            tokens: (B, L') int64, the target tokens of the first scales.
            newest_weight: factor on the loss of the last of these scales.
            share: factor on the loss, 1 / (gradient accumulation steps).

        Returns:
            loss, a scalar; nll and predictions, (B, L').
        """
        hidden = self.model.features(labels, inputs, draws=draws, backend=self.backend)  # (B, L', C)
        # The weight is split into a power of two, which is exact in 16 bits, and a factor near 1.
        total = share / (len(labels) * self.model.config.num_tokens)
        power = 2.0 ** math.floor(math.log2(total))
        level = self.model.lvl_1L[:, : tokens.shape[1]]  # (1, L')
        weights = torch.ones(level.shape, dtype=torch.float32, device=level.device)
        weights = weights.masked_fill(level == level[:, -1:], newest_weight) * (total / power)
        out = head_cross_entropy(
            hidden.flatten(0, 1),
            self.model.head,
            tokens.flatten(),
            weights.expand_as(tokens).flatten(),
            smoothing=self.smoothing,
        )
        return TokenLosses(out.loss * power, out.nll.view_as(tokens), out.predictions.view_as(tokens))
