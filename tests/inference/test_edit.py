"""Tests of `mvar.edit`: its exact ends, agreement with a run over the whole prefix, and its options."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mvar
from mvar.inference.cuda_graphs import Graphs
from mvar.inference.edit import filled
from mvar.inference.prepare import prepared_model
from mvar.models.tokenizer import Tokenizer
from tests.inference.test_cuda_graphs import FakeGraph, graphs, same

__all__ = ["graphs"]

R = 20
LABELS = torch.tensor([3, 7])
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "seed": 5, "top_k": 40, "top_p": 0.9}
MODELS = pytest.mark.parametrize(
    "sizes", [{}, {"bidirectional": True}, {"architecture": "var"}], ids=["mvar", "bidirectional", "var"]
)


def small(**sizes: Any) -> tuple[mvar.Model, Tokenizer]:
    config = mvar.TokenizerConfig((1, 2, 3, 5), num_codes=64, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    model, tokenizer = mvar.build(2, num_classes=10, tokenizer=config, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tokenizer.revive_dead_codes(torch.rand(16, 3, R, R) * 2 - 1)  # codes near residuals, so that encodings use many
    return mvar.init_weights(model, alng=1.0, hd=1.0, seed=4), tokenizer


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, R, R, generator=torch.Generator().manual_seed(2))


def right_half() -> Tensor:
    mask = torch.zeros(R, R, dtype=torch.bool)
    mask[:, R // 2 :] = True
    return mask


EVERYWHERE = torch.ones(R, R, dtype=torch.bool)


@MODELS
@pytest.mark.parametrize("options", [{}, {"cfg": 0}, {"more_smooth": True}], ids=["guided", "unguided", "smooth"])
def test_masks_of_one_value(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    """Nothing masked: the encoding. Everything masked: generation with the same seed and indices."""
    model, tokenizer = small(**sizes)
    how = OPTIONS | options | {"first_index": 3}
    encoded = tokenizer.encode(images() * 2 - 1)
    kept = mvar.edit(model, tokenizer, images(), ~EVERYWHERE, LABELS, **how)
    assert torch.equal(kept.tokens, encoded) and torch.equal(kept.images, images())
    assert len(encoded.unique()) > 20
    decoded = mvar.edit(model, tokenizer, images(), ~EVERYWHERE, LABELS, **how, blend=False).images
    assert (decoded - (tokenizer.decode(encoded) + 1) / 2).abs().max() < 1e-5
    for mask in (EVERYWHERE, None):
        assert same(
            mvar.edit(model, tokenizer, images(), mask, LABELS, **how), mvar.generate(model, tokenizer, LABELS, **how)
        )


@torch.no_grad()
def edit_from_prefix(
    model: mvar.Model, tokenizer: Tokenizer, generated: list[Tensor], cfg: float, reencode: bool
) -> Tensor:
    """Greedy editing that runs all layers over the full prefix at every scale, and encodes from the features anew."""
    config, B = model.config, len(LABELS)
    original = tokenizer.encode(images() * 2 - 1)
    features = tokenizer.features(images() * 2 - 1)
    tokens = original[:, :0]
    for k, scale in enumerate(config.scales):
        padded = torch.cat([tokens, tokens.new_zeros(B, config.num_tokens - tokens.shape[1])], 1)
        inputs = tokenizer.teacher_forcing_inputs(padded)[:, : sum(config.scales[: k + 1]) - config.scales[0]]
        cond, uncond = (model(rows, inputs)[:, -scale:] for rows in (LABELS, torch.full_like(LABELS, 10)))
        c = cfg * k / (len(config.scales) - 1)
        sampled = ((1 + c) * cond - c * uncond).argmax(-1)
        if reencode:
            parts = [
                tokenizer.scale_features(i, tokenizer.embed(part))
                for i, part in enumerate(tokens.split(config.scales[:k], 1) if k else ())
            ]
            own = tokenizer.quantize.nearest(tokenizer.next_input(k, features - sum(parts)))
        else:
            own = original.split(config.scales, 1)[k]
        tokens = torch.cat([tokens, torch.where(generated[k], sampled, own)], 1)
    return tokens


@MODELS
@pytest.mark.parametrize("reencode", [True, False])
def test_carried_state_matches_full_prefix(sizes: dict[str, Any], reencode: bool) -> None:
    model, tokenizer = small(**sizes)
    out = mvar.edit(
        model, tokenizer, images(), right_half(), LABELS, cfg=1.5, top_k=1, dtype=torch.float32, reencode=reencode
    )
    # Columns from the one that contains pixel 10 of 20 on.
    columns = [torch.arange(n) >= n * (R // 2) // R for n in (1, 2, 3, 5)]
    generated = [row.expand(len(row), -1).flatten() for row in columns]
    assert torch.equal(out.tokens, edit_from_prefix(model, tokenizer, generated, 1.5, reencode))
    original = tokenizer.encode(images() * 2 - 1)
    kept = ~torch.cat(generated)
    assert torch.equal(out.tokens[:, kept], original[:, kept]) is not reencode


def test_cells_that_overlap_the_mask_are_sampled() -> None:
    """A masked pixel in a corner changes one token per scale, and pixels outside of the mask are the input's."""
    model, tokenizer = small()
    mask = torch.zeros(2, 1, R, R, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[1, 0, -1, -1] = True
    out = mvar.edit(model, tokenizer, images(), mask, LABELS, **OPTIONS, reencode=False)
    changed = out.tokens != tokenizer.encode(images() * 2 - 1)
    assert [part.nonzero().tolist() for part in changed[0].split((1, 4, 9, 25))] == [[[0]]] * 4
    assert [part.nonzero().tolist() for part in changed[1].split((1, 4, 9, 25))] == [[[n]] for n in (0, 3, 8, 24)]
    assert torch.equal(out.images == images(), ~mask.expand(-1, 3, -1, -1))


def test_keep_scales() -> None:
    model, tokenizer = small()
    encoded = tokenizer.encode(images() * 2 - 1)
    ends = [0, 1, 5, 14, 39]
    for k, end in enumerate(ends):
        tokens = mvar.edit(model, tokenizer, images(), None, LABELS, **OPTIONS, keep_scales=k).tokens
        assert torch.equal(tokens[:, :end], encoded[:, :end])
        assert k == 4 or not torch.equal(tokens[:, end : ends[k + 1]], encoded[:, end : ends[k + 1]])


def test_result_depends_on_seed_and_index_alone() -> None:
    model, tokenizer = small()
    together = mvar.edit(model, tokenizer, images(3), right_half(), [3, 7, 1], **OPTIONS, first_index=4)
    alone = mvar.edit(model, tokenizer, images(3)[2:], right_half(), [1], **OPTIONS, first_index=6)
    assert torch.equal(together.tokens[2:], alone.tokens)
    other = mvar.edit(model, tokenizer, images(3)[2:], right_half(), [1], **OPTIONS, first_index=7)
    assert not torch.equal(alone.tokens, other.tokens)


def test_labels() -> None:
    """One class for all images; None and num_classes are the unconditional class, for which guidance has no effect."""
    model, tokenizer = small()
    pair = model, tokenizer, images(), right_half()
    assert same(mvar.edit(*pair, 3, **OPTIONS), mvar.edit(*pair, [3, 3], **OPTIONS))
    none = mvar.edit(*pair, None, **OPTIONS)
    assert same(none, mvar.edit(*pair, 10, **OPTIONS)) and same(none, mvar.edit(*pair, **OPTIONS, cfg=0))
    for unconditional in (torch.tensor([10, 10]), (10, 10)):  # without guidance, not with guidance of no effect
        assert same(none, mvar.edit(*pair, unconditional, **OPTIONS))
    rows: list[int] = []
    embedding = prepared_model(model, torch.float32).class_emb.register_forward_hook(
        lambda module, args, output: rows.append(len(output))
    )
    mvar.edit(*pair, torch.tensor([10, 10]), **OPTIONS)
    assert rows == [2]
    embedding.remove()
    mixed = mvar.edit(*pair, torch.tensor([10, 7]), **OPTIONS).tokens
    assert torch.equal(mixed[:1], none.tokens[:1])
    assert torch.equal(mixed[1:], mvar.edit(*pair, LABELS, **OPTIONS).tokens[1:])


def test_fill_removes_influence_of_masked_pixels() -> None:
    model, tokenizer = small()
    blank = torch.where(right_half(), 0.0, images())
    for fill in (True, False):
        one, other = (
            mvar.edit(model, tokenizer, pixels, right_half(), LABELS, **OPTIONS, fill=fill, blend=False)
            for pixels in (images(), blank)
        )
        assert same(one, other) is fill


def test_filled() -> None:
    row = torch.tensor([0.1, 0.3, 0.0, 0.0, 0.0, 0.9]).expand(1, 3, 6, 6)
    mask = torch.tensor([False, False, True, True, True, False]).expand(1, 1, 6, 6)
    expected = torch.tensor([0.1, 0.3, 0.3, 0.6, 0.9, 0.9]).expand(1, 3, 6, 6)  # 0.6: the mean of 0.3 and 0.9
    assert (filled(row, mask) - expected).abs().max() < 1e-6
    assert torch.equal(filled(row, torch.ones_like(mask)), torch.zeros_like(row))
    assert torch.equal(filled(row, torch.zeros_like(mask)), row)


def test_return_scales_are_blended() -> None:
    model, tokenizer = small()
    out = mvar.edit(model, tokenizer, images(), right_half(), LABELS, **OPTIONS, return_scales=True)
    assert out.scales is not None and len(out.scales) == 4 and torch.equal(out.scales[-1], out.images)
    for image in out.scales:
        assert torch.equal(image[..., : R // 2], images()[..., : R // 2])


@pytest.mark.parametrize("sizes", [{}, {"architecture": "var"}], ids=["mvar", "var"])
def test_one_graph_for_all_masks(graphs: Graphs, sizes: dict[str, Any]) -> None:
    """Another image, mask, class, seed and number of kept scales replay the same graph; three images pad to four."""
    pair, pixels = small(**sizes), images(3)
    corner = torch.zeros(3, 1, R, R, dtype=torch.bool)
    corner[:, :, :3, :3] = True
    edits: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = [
        (pixels, right_half(), {}),
        (pixels, ~right_half(), {"seed": 6}),
        (pixels.flip(0), corner, {"keep_scales": 2, "fill": True}),
        (pixels, None, {"first_index": 9}),
    ]
    for source, mask, options in edits:
        how = OPTIONS | options
        replayed = mvar.edit(*pair, source, mask, [1, 2, 3], **how, graph=True)
        assert same(replayed, mvar.edit(*pair, source, mask, [1, 2, 3], **how, graph=False))
    assert len(FakeGraph.made) == len(graphs) == 1 and FakeGraph.made[0].replays == 4
    assert len(FakeGraph.made[0].inputs[3]) == 4
    mvar.generate(*pair, [1, 2, 3], **OPTIONS)
    assert len(FakeGraph.made) == 2


def test_wrapped_and_custom_modules() -> None:
    """Data parallel and inference-mode modules, and a model with a layer of another class, edit the same."""
    model, tokenizer = small()
    pair = images(), right_half(), LABELS
    right = mvar.edit(model, tokenizer, *pair, **OPTIONS)
    assert same(right, mvar.edit(torch.nn.DataParallel(model), torch.nn.DataParallel(tokenizer), *pair, **OPTIONS))
    with torch.inference_mode():
        assert same(right, mvar.edit(*small(), images().clone(), *pair[1:], **OPTIONS))

    class Same(torch.nn.Linear):
        pass

    model.head.__class__ = Same
    Same.forward = lambda self, x: torch.nn.Linear.forward(self, x)  # type: ignore[method-assign]
    assert torch.equal(right.tokens, mvar.edit(model.train(), tokenizer, *pair, **OPTIONS).tokens)


def test_smooth_edits_embed_sampled_cells_softly() -> None:
    model, tokenizer = small()
    out = mvar.edit(model, tokenizer, images(), right_half(), LABELS, **OPTIONS, more_smooth=True, blend=False)
    hard = (tokenizer.decode(out.tokens) + 1) / 2
    assert (out.images - hard).abs().max() > 1e-3
    plain = mvar.edit(model, tokenizer, images(), right_half(), LABELS, **OPTIONS, blend=False)
    assert (plain.images - (tokenizer.decode(plain.tokens) + 1) / 2).abs().max() < 1e-5


def test_autocast_and_training_mode_do_not_matter() -> None:
    model, tokenizer = small()
    pair = images(), right_half(), LABELS
    right = mvar.edit(model, tokenizer, *pair, **OPTIONS)
    scored = mvar.log_likelihood(model, tokenizer, images(), LABELS).by_scale
    with torch.autocast("cpu", torch.bfloat16):
        assert same(right, mvar.edit(model, tokenizer, *pair, **OPTIONS))
        assert torch.equal(scored, mvar.log_likelihood(model, tokenizer, images(), LABELS).by_scale)
    tokenizer.quant_conv = torch.nn.Sequential(tokenizer.quant_conv, torch.nn.Dropout(0.5))  # type: ignore[assignment]
    tokenizer.train()
    assert torch.equal(right.tokens, mvar.edit(model, tokenizer, *pair, **OPTIONS).tokens)
    assert torch.equal(scored, mvar.log_likelihood(model, tokenizer, images(), LABELS).by_scale)
    assert tokenizer.training and tokenizer.quant_conv[1].training


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"images": images().to(torch.uint8)}, TypeError, "images: expected a floating-point tensor, got torch.uint8"),
        ({"images": images()[:, :, 1:]}, ValueError, r"images: expected shape \(B, 3, 20, 20\)"),
        ({"images": images() * 2 - 1}, ValueError, r"images: expected values in \[0, 1\], got -"),
        ({"images": images() * torch.nan}, ValueError, r"images: expected values in \[0, 1\], got nan"),
        ({"images": images()[:0]}, ValueError, "images: expected shape"),
        ({"mask": right_half().float()}, TypeError, "mask: expected a bool tensor"),
        ({"mask": right_half()[1:]}, ValueError, r"mask: expected shape \(2, 1, 20, 20\), .* or \(20, 20\)"),
        ({"mask": right_half().expand(3, 1, R, R)}, ValueError, "mask: expected shape"),
        ({"labels": [1]}, ValueError, "labels: expected one class, or one for each of 2 images, got 1"),
        ({"labels": [1, 11]}, ValueError, "labels: expected classes from 0 to 10"),
        ({"labels": -1}, ValueError, "labels: expected classes"),
        ({"labels": True}, ValueError, "labels"),
        ({"labels": 1.0}, ValueError, "labels"),
        ({"keep_scales": 5}, ValueError, "keep_scales: expected a whole number from 0 to 4, got 5"),
        ({"keep_scales": True}, ValueError, "keep_scales"),
        ({"cfg": -1.0}, ValueError, "cfg"),
        ({"cfg": -1.0, "labels": None}, ValueError, "cfg"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model, tokenizer = small()
    with pytest.raises(error, match=message):
        mvar.edit(model, tokenizer, **({"images": images(), "mask": right_half(), "labels": LABELS} | wrong))


def test_nan_in_encoder_is_an_error() -> None:
    model, tokenizer = small()
    with torch.no_grad():
        tokenizer.quant_conv.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError):
        mvar.edit(model, tokenizer, images(), ~EVERYWHERE, LABELS, **OPTIONS)
