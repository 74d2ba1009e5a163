"""Tests of `mvar.log_likelihood` and `mvar.classify`."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import mvar
from mvar.inference.prepare import prepared_model
from mvar.models.tokenizer import Tokenizer

likelihood = importlib.import_module("mvar.inference.likelihood")
SCALES = (1, 4, 9)
LABELS = torch.tensor([3, 4, 0])
MODELS = pytest.mark.parametrize("sizes", [{}, {"architecture": "var"}], ids=["mvar", "var"])


def small(**sizes: Any) -> tuple[mvar.Model, Tokenizer]:
    config = mvar.TokenizerConfig((1, 2, 3), num_codes=16, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    model, tokenizer = mvar.build(2, num_classes=5, tokenizer=config, **sizes)
    return mvar.init_weights(model, alng=1.0, hd=30.0, seed=4), tokenizer  # hd: classes that differ by several nats


def tokens(count: int = 3) -> Tensor:
    return torch.randint(16, (count, sum(SCALES)), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def from_logits(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor) -> Tensor:
    """(B, S) float64, from the float32 logits of all tokens."""
    logits = model(labels, tokenizer.teacher_forcing_inputs(tokens()))
    log_p = logits.double().log_softmax(-1).gather(-1, tokens()[..., None])[..., 0]
    return torch.stack([part.sum(1) for part in log_p.split(SCALES, 1)], 1)


@MODELS
def test_equals_log_softmax_of_logits(sizes: dict[str, Any]) -> None:
    model, tokenizer = small(**sizes)
    for labels in (LABELS, torch.full((3,), 5)):  # 5: the unconditional class
        found = mvar.log_likelihood(model, tokenizer, tokens(), labels)
        expected = from_logits(model, tokenizer, labels)
        # float32 logits of up to 30 have rounding errors of about 1e-5, in up to 9 tokens of a scale.
        assert (found.by_scale - expected).abs().max() < 1e-4 and expected.std() > 1
        assert torch.equal(found.total, found.by_scale.sum(1))
    bits = -expected / torch.log(torch.tensor(2.0)).double()
    assert (found.bits_per_token - bits / torch.tensor(SCALES)).abs().max() < 1e-4
    assert (found.bits_per_image - bits.sum(1)).abs().max() < 1e-4


def test_probabilities_of_a_scale_sum_to_1() -> None:
    model, tokenizer = small()
    each = torch.cat([torch.arange(16)[:, None], tokens(1)[:, 1:].expand(16, -1)], 1)
    first = mvar.log_likelihood(model, tokenizer, each, [2] * 16, scales=1).by_scale[:, 0]
    assert abs(float(first.logsumexp(0))) < 1e-5


def test_all_classes_and_images() -> None:
    model, tokenizer = small()
    images = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    found = mvar.log_likelihood(model, tokenizer, images)
    assert found.by_scale.shape == (3, 5, 3) and found.by_scale.dtype == torch.float64
    assert found.bits_per_token.shape == (3, 5, 3) and found.bits_per_image.shape == (3, 5)
    encoded = tokenizer.encode(images * 2 - 1)
    for c in range(5):
        alone = mvar.log_likelihood(model, tokenizer, encoded, [c] * 3).by_scale
        assert (found.by_scale[:, c] - alone).abs().max() < 1e-4
    two = mvar.log_likelihood(model, tokenizer, images, scales=2, batch=2)
    assert two.tokens == SCALES[:2] and (two.by_scale - found.by_scale[..., :2]).abs().max() < 1e-4


def test_logits_are_never_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small()
    whole = mvar.log_likelihood(model, tokenizer, tokens(), LABELS)
    monkeypatch.setattr(likelihood, "LOGITS_PER_CHUNK", 5 * 16)
    rows: list[int] = []
    handle = prepared_model(model, torch.float32).head.register_forward_hook(
        lambda module, args, output: rows.append(output.shape[:-1].numel())
    )
    chunked = mvar.log_likelihood(model, tokenizer, tokens(), LABELS, batch=2)
    handle.remove()
    assert max(rows) == 5 and sum(rows) == 3 * sum(SCALES)
    assert (whole.by_scale - chunked.by_scale).abs().max() < 1e-4


@MODELS
def test_classify(sizes: dict[str, Any]) -> None:
    model, tokenizer = small(**sizes)
    total = mvar.log_likelihood(model, tokenizer, tokens(8)).total
    found = mvar.classify(model, tokenizer, tokens(8))
    assert torch.equal(found.labels, total.argmax(1)) and found.exact.all() and found.complete.all()
    assert len(found.labels.unique()) > 1


def test_pruning_by_coarse_scales() -> None:
    """`exact` is True only for the arg-max over all scales, and the best classes alone are scored on all of them."""
    model, tokenizer = small()
    generated = mvar.generate(model, tokenizer, torch.arange(20) % 5, cfg=0, top_k=1, dtype=torch.float32).tokens
    many = torch.cat([generated, tokens(20)])  # the former are likely, so that coarse scales are decisive
    full = mvar.log_likelihood(model, tokenizer, many)
    total, coarse = full.total, full.by_scale[..., :2].sum(-1)
    found = mvar.classify(model, tokenizer, many, scales=2, keep=2)
    kept = coarse.topk(2, -1).indices
    assert torch.equal(found.complete, torch.zeros_like(found.complete).scatter(1, kept, True))
    assert (found.log_likelihood - torch.where(found.complete, total, coarse)).abs().max() < 1e-3
    right = found.labels == total.argmax(1)
    assert found.exact.any() and not found.exact.all() and right[found.exact].all()
    assert torch.equal(found.labels, total.masked_fill(~found.complete, -torch.inf).argmax(1))

    only_coarse = mvar.classify(model, tokenizer, many, scales=2)
    assert torch.equal(only_coarse.labels, coarse.argmax(1)) and not only_coarse.exact.any()
    everything = mvar.classify(model, tokenizer, many, scales=2, keep=5)
    assert everything.exact.all() and torch.equal(everything.labels, total.argmax(1))


def test_custom_layers_are_in_evaluation_mode() -> None:
    model, tokenizer = small()
    expected = mvar.log_likelihood(model, tokenizer, tokens(), LABELS)
    model.head = torch.nn.Sequential(model.head, torch.nn.Dropout(0.5))  # type: ignore[assignment]
    found = mvar.log_likelihood(torch.nn.DataParallel(model.train()), tokenizer, tokens(), LABELS)
    assert (expected.by_scale - found.by_scale).abs().max() < 1e-4 and model.training and model.head.training


def test_excluded_code_has_likelihood_0() -> None:
    model, tokenizer = small()
    with torch.no_grad():
        model.head.bias[int(tokens()[0, 0])] = -torch.inf
    assert mvar.log_likelihood(model, tokenizer, tokens(), LABELS).by_scale[0, 0] == -torch.inf


def test_nan_is_an_error() -> None:
    model, tokenizer = small()
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        mvar.classify(model, tokenizer, tokens())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"images": tokens()[:, 1:]}, ValueError, "tokens: expected shape"),
        ({"images": tokens() + 16}, ValueError, r"tokens: expected values in \[0, 16\)"),
        ({"images": torch.rand(3, 3, 7, 7)}, ValueError, r"images: expected shape \(B, 3, 6, 6\)"),
        ({"images": tokens().int()}, TypeError, "images: expected a floating-point tensor"),
        ({"images": tokens()[:0]}, ValueError, "expected at least one"),
        ({"labels": [1, 2]}, ValueError, "labels: expected one class for each of 3 images, got 2"),
        ({"labels": [1, 2, 6]}, ValueError, "labels: expected classes from 0 to 5"),
        ({"scales": 0}, ValueError, "scales: expected a whole number from 1 to 3, got 0"),
        ({"scales": 4}, ValueError, "scales"),
        ({"batch": 0}, ValueError, "batch: expected a whole number of at least 1"),
        ({"dtype": torch.float64}, ValueError, "dtype"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model, tokenizer = small()
    with pytest.raises(error, match=message):
        mvar.log_likelihood(model, tokenizer, **({"images": tokens(), "labels": LABELS} | wrong))


@pytest.mark.parametrize("keep", [0, 6, True, 1.5])
def test_bad_keep(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep: expected a whole number from 1 to 5"):
        mvar.classify(*small(), tokens(), scales=1, keep=keep)
