"""The loss: cross entropy over the tokens of all scales in training, computed in chunks from the head's input.

The head's logits are the largest tensor of a training step: (B·L, V) in float32 is 1.07 GB for 96 images at 256×256,
and softmax, its gradient and their copies are as much again. Here logits exist for `CHUNK_ROWS` tokens at a time: their
loss, and what it hands back to the head's input and weight, are made together in the forward pass.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.model import Model

CHUNK_ROWS = {"cpu": 512, "cuda": 4096}
"""Tokens whose logits exist at once; 8 MB and 64 MB of 4,096 float32 codes."""


class TokenLosses(NamedTuple):
    """loss: the weighted sum over all tokens, a scalar, the only one with a gradient.
    nll: (n,) float32, −log p of every true token, without smoothing and weights.
    predictions: (n,) int64, the likeliest codes.
    """

    loss: Tensor
    nll: Tensor
    predictions: Tensor


def head_cross_entropy(
    hidden: Tensor, head: nn.Linear, tokens: Tensor, weights: Tensor, *, smoothing: float = 0.0
) -> TokenLosses:
    """Cross entropy of `head(hidden)`, without ever holding the logits of all tokens.

        loss = Σ_i w_i · [(1−ε)·(−log p_i,t) + ε·mean_v(−log p_i,v)]        ε: label smoothing (arXiv 1512.00567)

    Args:
        hidden: (n, C) floating point.
        head: C → V, with bias. Under autocast its products are in autocast's dtype; softmax and sums are in float32.
        tokens: (n,) int64, the true codes.
        weights: (n,) float32; around 1, since gradients in 16 bits are kept with these weights alone.
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
        wanted = any(ctx.needs_input_grad[:3])
        rows = CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cuda"])
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), bias.to(dtype)
            grad_hidden = torch.empty_like(hidden) if wanted else None
            exact = torch.promote_types(dtype, torch.float32)
            grad_weight, grad_bias = (torch.zeros_like(p, dtype=exact) for p in (weight, bias))
            losses, nlls, predictions = [], [], []
            chunks = zip(hidden.split(rows), tokens.split(rows), weights.split(rows), strict=True)
            for i, (x, target, share) in enumerate(chunks):
                x = x.to(dtype)
                logits = F.linear(x, w, b).to(exact)  # (rows, V)
                log_p = logits.log_softmax(-1)
                nll = -log_p.gather(-1, target[:, None])[:, 0]
                loss = (1 - smoothing) * nll - smoothing * log_p.mean(-1) if smoothing else nll
                losses.append((loss * share).sum())
                nlls.append(nll)
                predictions.append(logits.argmax(-1))
                if grad_hidden is None:
                    continue
                grad = log_p.exp_()  # the loss's gradient by the logits, in the place of log_p
                if smoothing:
                    grad -= smoothing / grad.shape[-1]
                grad.scatter_add_(-1, target[:, None], grad.new_full((len(x), 1), smoothing - 1))
                grad *= share[:, None]
                grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                grad_hidden[i * rows : i * rows + len(x)] = grad @ w
                if dtype == exact:
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


class Objective(nn.Module):
    """The model with its loss: what DDP and FSDP2 wrap, so that the head's weights are there when it is computed."""

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
        """The loss of a batch, B images of the first scales: those that `tokens` covers.

        Every token weighs 1/(B·L), L of all scales, also while only the first are in training (as in VAR).

        Args:
            labels, inputs, draws: as of :meth:`Model.features`.
            tokens: (B, L') int64, the true tokens of whole scales.
            newest_weight: factor on the loss of the last scale there.
            share: factor on the whole loss: 1 over the number of accumulated batches.

        Returns:
            loss, a scalar; nll and predictions, (B, L').
        """
        hidden = self.model.features(labels, inputs, draws=draws, backend=self.backend)  # (B, L', C)
        # 1/(B·L) is split into a power of two, by which gradients in 16 bits are multiplied exactly, and a rest near 1.
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
