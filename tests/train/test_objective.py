"""Tests of the chunked cross-entropy loss against PyTorch and of the training objective."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mvar
from mvar.train import objective
from mvar.train.objective import Objective, head_cross_entropy

N, C, V = 1100, 24, 70  # more than two chunks on a CPU


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_match_torch(smoothing: float) -> None:
    # In float64, so that no rounding error hides a wrong term.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    head = nn.Linear(C, V, dtype=torch.float64)
    nn.init.normal_(head.bias, generator=generator)
    sources = [hidden, head.weight, head.bias]

    out = head_cross_entropy(hidden, head, tokens, weights, smoothing=smoothing)
    grads = torch.autograd.grad(out.loss * 3, sources)
    logits = head(hidden)
    expected = (F.cross_entropy(logits, tokens, label_smoothing=smoothing, reduction="none") * weights).sum()
    for got, right in zip(grads, torch.autograd.grad(expected * 3, sources), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.nll, F.cross_entropy(logits, tokens, reduction="none").detach())
    assert torch.equal(out.predictions, logits.argmax(-1))
    assert not out.nll.requires_grad


class LargestTensorMode(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_full_logits_are_never_materialized() -> None:
    hidden, head = torch.randn(8 * 512, 16, requires_grad=True), nn.Linear(16, 64)
    tokens = torch.zeros(len(hidden), dtype=torch.int64)
    with LargestTensorMode() as largest:
        head_cross_entropy(hidden, head, tokens, torch.ones(len(hidden))).loss.backward()
    assert largest.elements == max(hidden.numel(), objective.CHUNK_ROWS["cpu"] * 64)
    with LargestTensorMode() as largest:
        F.cross_entropy(head(hidden), tokens).backward()
    assert largest.elements == len(hidden) * 64  # the mode detects full logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of PyTorch's loss under autocast, plus one rounding error."""
    torch.manual_seed(0)
    hidden, tokens, weights = torch.randn(N, C), torch.randint(V, (N,)), torch.ones(N)
    head = nn.Linear(C, V)

    def grads(ours: bool, exact: bool = False) -> list[torch.Tensor]:
        layer = copy.deepcopy(head).double() if exact else head
        x = (hidden.double() if exact else hidden.to(dtype)).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=not exact):
            loss = (
                head_cross_entropy(x, layer, tokens, weights).loss
                if ours
                else F.cross_entropy(layer(x).double() if exact else layer(x).float(), tokens, reduction="sum")
            )
        return [g.double() for g in torch.autograd.grad(loss, [x, layer.weight, layer.bias])]

    for right, torch_grad, got in zip(grads(False, True), grads(False), grads(True), strict=True):
        rounding = torch.finfo(dtype).eps * right.abs().max()
        assert (got - right).abs().max() <= 2 * (torch_grad - right).abs().max() + rounding


def small_models() -> tuple[mvar.MVAR, mvar.Tokenizer]:
    sizes = mvar.TokenizerConfig((1, 2, 3), num_codes=32, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)
    model, tokenizer = mvar.build(2, num_classes=5, tokenizer=sizes, width=64, drop_path=0.5)
    mvar.init_weights(model, alng=0.5, hd=1.0)
    return model, tokenizer


def test_objective_of_the_first_scales() -> None:
    """In progressive training, every token has weight 1/(B·L) with L of all scales, less for the newest scale."""
    model, tokenizer = small_models()
    tokens = torch.randint(32, (3, 14), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokenizer.teacher_forcing_inputs(tokens), torch.tensor([0, 4, 2])
    out = Objective(model.eval(), smoothing=0.1)(labels, inputs[:, :4], tokens[:, :5], newest_weight=0.25, share=0.5)
    logits = model(labels, inputs)[:, :5]
    losses = F.cross_entropy(logits.mT, tokens[:, :5], label_smoothing=0.1, reduction="none")
    losses[:, 1:] *= 0.25
    torch.testing.assert_close(out.loss, 0.5 * losses.sum() / (3 * 14))
    assert out.nll.shape == out.predictions.shape == (3, 5)


def test_draws_determine_dropped_labels_and_branches() -> None:
    model, tokenizer = small_models()
    tokens = torch.randint(32, (4, 14), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokenizer.teacher_forcing_inputs(tokens), torch.arange(4)
    full = model.eval().features(labels, inputs)
    model.train()
    draws = torch.zeros(4, model.draws_per_image)
    draws[:, 0] = 0.99  # labels are kept
    kept = model.features(labels, inputs, draws=draws)  # the last block's branches are kept, and scaled by 1/keep
    assert not torch.allclose(kept, full)
    draws[1, 0] = 0.0  # image 1 loses its class
    unlabelled = model.features(labels, inputs, draws=draws)
    changed = [not torch.equal(a, b) for a, b in zip(kept, unlabelled, strict=True)]
    assert changed == [False, True, False, False]
    draws[2, 4:] = 0.99  # and image 2 the last block
    dropped = model.features(labels, inputs, draws=draws)
    changed = [not torch.equal(a, b) for a, b in zip(unlabelled, dropped, strict=True)]
    assert changed == [False, False, True, False]
    assert torch.equal(model.features(labels, inputs, draws=draws), dropped)
