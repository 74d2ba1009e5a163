"""Tests generation by two models, and guidance on the first scales alone."""

from typing import Any

import pytest
import torch

import mvar
from mvar.inference.prepare import prepared_model
from tests.helpers.generation import generate_from_prefix, small, with_guided_logits

LABELS = torch.tensor([3, 7, 1])
OPTIONS: dict[str, Any] = {"cfg": 1.5, "dtype": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "mvar": {},
    "bidirectional": {"bidirectional": True},
    "var": {"architecture": "var"},
    "shared_adaln": {"architecture": "var", "shared_adaln": True},
}


def refiner(**sizes: Any) -> mvar.Model:
    """A model of another depth, width and weights for the same tokens."""
    return small(depth=1, seed=5, width=64, **sizes)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_until", [None, 2])
def test_refining_itself_changes_nothing(kind: str, guidance_until: int | None) -> None:
    model, tokenizer = small(**KINDS[kind])
    options = OPTIONS | {"top_k": 20, "seed": 3, "guidance_until": guidance_until}
    want, want_logits = with_guided_logits(lambda: mvar.generate(model, tokenizer, LABELS, **options), model)
    for k in range(5):
        got, logits = with_guided_logits(
            lambda k=k: mvar.generate(model, tokenizer, LABELS, refiner=model, refine_from=k, **options), model
        )
        assert torch.equal(got.tokens, want.tokens)
        assert (logits - want_logits).abs().max() < 1e-5 * max(1.0, float(want_logits.abs().max()))
        torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_until", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("refine_from", [0, 1, 3])
@pytest.mark.parametrize(("of_model", "of_refiner"), [("mvar", "mvar"), ("mvar", "var"), ("var", "bidirectional")])
def test_two_models(of_model: str, of_refiner: str, refine_from: int, guidance_until: int | None) -> None:
    """Equal to running the models over the complete prefix at every scale."""
    model, tokenizer = small(**KINDS[of_model])
    options: dict[str, Any] = {
        "refiner": refiner(**KINDS[of_refiner]),
        "refine_from": refine_from,
        "guidance_until": guidance_until,
    }
    with torch.no_grad():
        tokens, logits = generate_from_prefix(model, tokenizer, LABELS, 1.5, **options)
    got, got_logits = with_guided_logits(
        lambda: mvar.generate(model, tokenizer, LABELS, top_k=1, **OPTIONS, **options), model, options["refiner"]
    )
    assert torch.equal(got.tokens, tokens)
    assert (got_logits - logits).abs().max() < 1e-5 * max(1.0, float(logits.abs().max()))


def test_number_of_rows_and_tokens() -> None:
    """The refiner runs once over all coarser tokens; no unconditional row is computed after `guidance_until`."""
    (model, tokenizer), other = small(), refiner()
    seen: dict[str, list[tuple[int, int]]] = {}
    for name, one in (("model", model), ("refiner", other)):
        passes = seen.setdefault(name, [])
        prepared_model(one, torch.float32).blocks[0].attn.register_forward_pre_hook(
            lambda module, args, passes=passes: passes.append(tuple(args[0].shape[:2]))
        )
    mvar.generate(model, tokenizer, LABELS, refiner=other, refine_from=2, guidance_until=3, **OPTIONS)
    assert seen == {"model": [(6, 1), (6, 4)], "refiner": [(6, 14), (3, 25)]}
    for passes in seen.values():
        passes.clear()
    mvar.generate(model, tokenizer, LABELS, refiner=other, refine_from=3, guidance_until=3, **OPTIONS)
    assert seen == {"model": [(6, 1), (6, 4), (6, 9)], "refiner": [(3, 39)]}
    seen["model"].clear()
    mvar.generate(model, tokenizer, LABELS, guidance_until=1, **OPTIONS)  # the first scale's factor is 0
    assert seen["model"] == [(3, 1), (3, 4), (3, 9), (3, 25)]


def test_more_smooth_and_batches() -> None:
    """Soft embeddings reach the refiner, and the images do not depend on the batch."""
    (model, tokenizer), other = small(), refiner()
    options = OPTIONS | {"refiner": other, "refine_from": 2, "guidance_until": 3, "more_smooth": True, "top_k": 20}
    whole = mvar.generate(model, tokenizer, LABELS, **options)
    itself = mvar.generate(model, tokenizer, LABELS, **options | {"refiner": model})
    plain = mvar.generate(model, tokenizer, LABELS, **options | {"refiner": None, "refine_from": None})
    torch.testing.assert_close(itself.images, plain.images, rtol=0, atol=1e-4)
    assert not torch.equal(whole.tokens, plain.tokens)
    for i in range(3):
        one = mvar.generate(model, tokenizer, LABELS[i : i + 1], first_index=i, **options)
        assert torch.equal(one.tokens, whole.tokens[i : i + 1])


def test_editing() -> None:
    """With a mask that is True everywhere the tokens are those of generation; outside of a mask those of the image."""
    (model, tokenizer), other = small(), refiner()
    options = OPTIONS | {"refiner": other, "refine_from": 2, "guidance_until": 3}
    images = torch.rand(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    edited = mvar.edit(model, tokenizer, images, None, LABELS, **options)
    assert torch.equal(edited.tokens, mvar.generate(model, tokenizer, LABELS, **options).tokens)
    kept = mvar.edit(model, tokenizer, images, torch.zeros(10, 10, dtype=torch.bool), LABELS, **options)
    assert torch.equal(kept.tokens, tokenizer.encode(images * 2 - 1))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"refine_from": None}, ValueError, "refiner and refine_from: expected both or neither"),
        ({"refiner": None}, ValueError, "refiner and refine_from: expected both or neither"),
        ({"refine_from": -1}, ValueError, "refine_from: expected a whole number from 0 to 4, got -1"),
        ({"refine_from": 5}, ValueError, "refine_from"),
        ({"refine_from": 1.5}, ValueError, "refine_from"),
        ({"refiner": torch.nn.Linear(2, 2)}, TypeError, "expected an mvar.Model"),
        ({"refiner": refiner(num_classes=9)}, ValueError, "refiner: expected the 10 classes of the model, got 9"),
        (
            {"refiner": mvar.build(1, num_classes=10, patch_nums=(1, 2, 3, 4))[0]},
            ValueError,
            "refiner and tokenizer do not fit together: num_codes",
        ),
        (
            {"refiner": mvar.build(1, num_classes=10, patch_nums=(1, 2, 3, 5))[0], "refine_from": 4},
            ValueError,
            "refiner and tokenizer do not fit together: num_codes",
        ),
    ],
)
def test_bad_refiners(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model, tokenizer = small()
    with pytest.raises(error, match=message):
        mvar.generate(model, tokenizer, [1], **{"refiner": model, "refine_from": 2} | wrong)


def test_class_names_have_to_agree() -> None:
    (model, tokenizer), other = small(), refiner()
    model.class_names, other.class_names = tuple("abcdefghij"), tuple("bacdefghij")
    with pytest.raises(ValueError, match="refiner: expected the class names of the model"):
        mvar.generate(model, tokenizer, [1], refiner=other, refine_from=2)
    other.class_names = list("abcdefghij")  # type: ignore[assignment]
    mvar.generate(model, tokenizer, [1], refiner=other, refine_from=2)
