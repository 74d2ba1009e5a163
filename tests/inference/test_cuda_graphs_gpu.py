"""Tests captured CUDA graphs of generation on a GPU."""

import gc
import importlib
from typing import Any

import pytest
import torch

import mvar
from mvar.inference.prefetch import to_host
from tests.inference.test_cuda_graphs import same, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
generating = importlib.import_module("mvar.inference.api")  # `mvar.generate` is the function


def on_gpu(**sizes: Any) -> tuple[mvar.Model, mvar.Tokenizer]:
    model, tokenizer = small(**sizes)
    return model.cuda(), tokenizer.cuda()


@pytest.mark.parametrize(
    "sizes", [{}, {"bidirectional": True}, {"architecture": "var"}], ids=["mvar", "bidirectional", "var"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"cfg": 0}, {"more_smooth": True}], ids=["guided", "unguided", "smooth"])
def test_replay_matches_generation_without_graph(
    sizes: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    pair = on_gpu(**sizes)
    for labels, seed in (([1, 2], 0), ([3, 2], 1), ([1, 2, 4], 2**62 + 3)):
        asked = options | {"labels": labels, "seed": seed, "dtype": dtype, "top_k": 20}
        assert same(mvar.generate(*pair, **asked, graph=True), mvar.generate(*pair, **asked, graph=False))


@pytest.mark.parametrize("sizes", [{}, {"architecture": "var"}], ids=["mvar", "var"])
def test_edits_replay_one_graph(sizes: dict[str, Any]) -> None:
    pair = on_gpu(**sizes)
    images = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(2)).cuda()
    masks = [torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(i)) < 0.4 for i in range(3)]
    before = len(generating.GRAPHS)
    for seed, mask in enumerate(masks):
        asked: dict[str, Any] = {"seed": seed, "dtype": torch.float32, "top_k": 20, "keep_scales": seed}
        out = mvar.edit(*pair, images, mask, [1, 2, 3], **asked, graph=True)
        assert same(out, mvar.edit(*pair, images, mask, [1, 2, 3], **asked, graph=False))
        assert torch.equal(out.images.where(~mask.cuda(), images), images)
    assert len(generating.GRAPHS) == before + 1
    encoded = pair[1].encode(images * 2 - 1)
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert torch.equal(mvar.edit(*pair, images, nothing, 1, dtype=torch.float32).tokens, encoded)


def test_shared_memory_pool() -> None:
    """Alternates two models and two batch sizes on two streams, then checks that graphs are freed with the models."""
    pairs = [on_gpu(), on_gpu(architecture="var")]
    asked = [{"labels": [3] * n, "seed": n, "dtype": torch.float32, "top_k": 20} for n in (1, 8)]
    alone = [[mvar.generate(*pair, **options, graph=False) for options in asked] for pair in pairs]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for turn in range(6):
        with torch.cuda.stream(streams[turn % 2]):
            for pair, expected in zip(pairs, alone, strict=True):
                for options, want in zip(asked, expected, strict=True):
                    assert same(mvar.generate(*pair, **options, graph=True), want)
    assert len(generating.GRAPHS) == 4
    del pair, pairs
    gc.collect()
    assert len(generating.GRAPHS) == 0


def test_changed_weights_are_recaptured() -> None:
    pair = on_gpu()
    before = mvar.generate(*pair, [1], dtype=torch.float32, top_k=20, graph=True)
    with torch.no_grad():
        pair[0].head.bias[:32] += 5
    out = mvar.generate(*pair, [1], dtype=torch.float32, top_k=20, graph=True)
    assert not same(out, before)
    assert same(out, mvar.generate(*pair, [1], dtype=torch.float32, top_k=20, graph=False))


def test_copy_to_host() -> None:
    source = torch.arange(1 << 20, device="cuda")
    arriving = to_host(source, source.sum())
    source = source.new_zeros(1 << 20)  # may reuse the memory, but not before the copy is done
    values, total = arriving()
    assert torch.equal(values, torch.arange(1 << 20)) and int(total) == (1 << 19) * ((1 << 20) - 1)
    assert values.is_pinned()
