"""Tests generation with CUDA graphs, except the capture itself: buffers, padding, cache, seeds and fallbacks."""

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvar
from mvar.inference.cuda_graphs import BATCHES, MAX_GRAPHS, CaptureError, Graphs, Outputs, padded_batch
from mvar.models.tokenizer import Tokenizer

generating = importlib.import_module("mvar.inference.api")  # `mvar.generate` is the function
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "top_k": 20, "seed": 9}


class FakeGraph:
    """A fake CUDA graph whose replay only reads the recorded inputs and writes the recorded outputs.

    Like a CUDA graph, it does not keep the models alive whose weights it reads.
    """

    made: list["FakeGraph"] = []
    refuses = False

    def __init__(self, device: torch.device) -> None:
        self.replays = 0
        FakeGraph.made.append(self)

    def record(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> Outputs:
        if self.refuses:
            raise CaptureError("operation not permitted when stream is capturing")
        assert isinstance(function, partial)
        models, tokenizer, self.how = function.args
        self.draw, self.inputs, self.shared = function.func, inputs, pool
        self.models = {first: weakref.ref(model) for first, model in models.items()}
        self.tokenizer = weakref.ref(tokenizer)
        self.outputs: Outputs = function(*inputs)
        return self.outputs

    def replay(self) -> None:
        self.replays += 1
        models, tokenizer = {first: ref() for first, ref in self.models.items()}, self.tokenizer()
        assert None not in (*models.values(), tokenizer), "the weights are gone"
        for output, new in zip(self.outputs, self.draw(models, tokenizer, self.how, *self.inputs), strict=True):
            output.copy_(new)

    def pool(self) -> Any:
        return self


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Enables graphs on the CPU and replaces CUDA graphs by fake ones."""
    monkeypatch.setattr(generating, "has_graphs", lambda device: True)
    monkeypatch.setattr(generating, "GRAPHS", Graphs(FakeGraph))
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr("mvar.inference.cuda_graphs._warned", set())
    graphs: Graphs = generating.GRAPHS
    yield graphs


def small(**sizes: Any) -> tuple[mvar.Model, Tokenizer]:
    tokenizer = mvar.TokenizerConfig((1, 2, 3), num_codes=64, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)
    model, images = mvar.build(1, num_classes=10, tokenizer=tokenizer, **sizes)
    return mvar.init_weights(model, alng=1.0, hd=1.0, seed=4), images


def same(a: mvar.Generated, b: mvar.Generated) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


@pytest.mark.parametrize("sizes", [{}, {"architecture": "var"}], ids=["mvar", "var"])
@pytest.mark.parametrize("options", [{}, {"cfg": 0}, {"more_smooth": True}], ids=["guided", "unguided", "smooth"])
def test_replays(graphs: Graphs, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    """Replays of one recording equal generation without a graph, and do not overwrite earlier results."""
    pair = small(**sizes)
    drawn = []
    for labels, seed, first in (([1, 2], 0, 0), ([1, 2], 1, 0), ([3, 2], 1, 0), ([3, 2], 1, 7), ([1, 2], 2**62 + 3, 0)):
        asked = OPTIONS | options | {"labels": labels, "seed": seed, "first_index": first}
        drawn.append((mvar.generate(*pair, **asked, graph=True), asked))
    assert len(FakeGraph.made) == len(graphs) == 1 and FakeGraph.made[0].replays == 5
    assert len({tuple(out.tokens.flatten().tolist()) for out, _ in drawn}) == 5
    for out, asked in drawn:
        assert same(out, mvar.generate(*pair, **asked, graph=False))


def test_padding(graphs: Graphs) -> None:
    pair = small()
    three, four = ([1, 2, 3], [1, 2, 3, 7])
    whole = mvar.generate(*pair, four, **OPTIONS)
    out = mvar.generate(*pair, three, **OPTIONS)
    assert len(FakeGraph.made) == 1
    assert out.tokens.shape[0] == out.images.shape[0] == 3
    assert torch.equal(out.tokens, whole.tokens[:3]) and torch.equal(out.images, whole.images[:3])
    labels, image_index, _ = FakeGraph.made[0].inputs
    assert labels.tolist() == [1, 2, 3, 3] and image_index.tolist() == [0, 1, 2, 2]
    assert same(out, mvar.generate(*pair, three, **OPTIONS, graph=False))


def test_padded_batches() -> None:
    """Padding never shrinks a batch, less than doubles those of up to 64 and leaves larger ones unchanged."""
    assert [padded_batch(n) for n in (1, 3, 17, 25, 26, 64, 65, 1000)] == [1, 4, 25, 25, 32, 64, 65, 1000]
    assert all(n <= padded_batch(n) < 2 * n or n == 1 for n in range(1, max(BATCHES) + 1))


def test_cache_evicts_least_recently_used(graphs: Graphs) -> None:
    pair = small()
    for k in range(MAX_GRAPHS):
        mvar.generate(*pair, [1], **OPTIONS | {"top_k": 10 + k})
    mvar.generate(*pair, [1], **OPTIONS | {"top_k": 10})  # used again, so top_k=11 is evicted next
    mvar.generate(*pair, [1], **OPTIONS | {"top_k": 30})
    assert len(graphs) == MAX_GRAPHS and len(FakeGraph.made) == MAX_GRAPHS + 1
    mvar.generate(*pair, [1], **OPTIONS | {"top_k": 10})
    assert len(FakeGraph.made) == MAX_GRAPHS + 1
    mvar.generate(*pair, [1], **OPTIONS | {"top_k": 11})
    assert len(FakeGraph.made) == MAX_GRAPHS + 2 and len(graphs) == MAX_GRAPHS
    first, *others = FakeGraph.made
    assert first.shared is None and all(other.shared in FakeGraph.made for other in others)  # all share one memory pool


@pytest.mark.parametrize(
    "other",
    [
        {"cfg": 2.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"more_smooth": True},
        {"backend": "reference"},
        {"guidance_until": 2},
    ],
)
def test_options_are_part_of_cache_key(graphs: Graphs, other: dict[str, Any]) -> None:
    pair = small()
    mvar.generate(*pair, [1], **OPTIONS)
    out = mvar.generate(*pair, [1], **OPTIONS | other)
    assert len(graphs) == 2
    assert same(out, mvar.generate(*pair, [1], **OPTIONS | other, graph=False))


def test_refiner_is_part_of_cache_key(graphs: Graphs) -> None:
    """Each refiner and first scale has its own recording, which is dropped with the refiner."""
    pair, refiner = small(), small(width=128)[0]
    plain = mvar.generate(*pair, [1], **OPTIONS)
    for k in (1, 2):
        asked = OPTIONS | {"refiner": refiner, "refine_from": k}
        for label in ([1], [2]):
            assert same(mvar.generate(*pair, label, **asked), mvar.generate(*pair, label, **asked, graph=False))
    assert len(graphs) == 3
    assert same(mvar.generate(*pair, [1], **OPTIONS | {"refiner": refiner, "refine_from": 3}), plain)
    assert len(graphs) == 3  # the refiner generates no scale
    del refiner, asked
    gc.collect()
    assert len(graphs) == 1


def test_matmul_precision_is_part_of_cache_key(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small()
    mvar.generate(*pair, [1], **OPTIONS)
    other = "high" if torch.get_float32_matmul_precision() == "highest" else "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: other)
    mvar.generate(*pair, [1], **OPTIONS)
    assert len(graphs) == 2


@pytest.mark.parametrize("owner", [0, 1])
def test_changed_weights_are_recaptured(graphs: Graphs, owner: int) -> None:
    pair = small()
    before = mvar.generate(*pair, [1], **OPTIONS)
    with torch.no_grad():
        (pair[0].head.bias[:32] if owner == 0 else pair[1].decoder.conv_out.bias).add_(5)
    out = mvar.generate(*pair, [1], **OPTIONS)
    assert len(graphs) == 1 and len(FakeGraph.made) == 2 and not same(out, before)
    assert same(out, mvar.generate(*pair, [1], **OPTIONS, graph=False))


def test_graphs_are_freed_with_model(graphs: Graphs) -> None:
    pair, other = small(), small()
    mvar.generate(*pair, [1], **OPTIONS)
    mvar.generate(*other, [1], **OPTIONS)
    assert len(graphs) == 2
    del pair
    gc.collect()
    assert len(graphs) == 1
    generating.GRAPHS.clear()
    assert len(graphs) == 0


def test_failed_capture_warns_once(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small()
    expected = mvar.generate(*pair, [1, 2, 3], **OPTIONS, graph=False)
    monkeypatch.setattr(FakeGraph, "refuses", True)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, slower: operation not permitted") as said:
        for _ in range(3):
            assert same(mvar.generate(*pair, [1, 2, 3], **OPTIONS), expected)
    assert len(said) == 1 and len(FakeGraph.made) == 1
    with pytest.raises(RuntimeError, match="operation not permitted"):
        mvar.generate(*pair, [1, 2, 3], **OPTIONS, graph=True)


def test_failed_capture_frees_model(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small()
    monkeypatch.setattr(FakeGraph, "refuses", True)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        mvar.generate(*pair, [1], **OPTIONS)
    model = weakref.ref(pair[0])
    del pair
    gc.collect()
    assert model() is None and len(graphs) == 0


def test_generation_errors(graphs: Graphs) -> None:
    """Invalid arguments and weights raise the usual errors, not capture errors."""
    pair = small()
    with pytest.raises(ValueError, match="top_k"):
        mvar.generate(*pair, [1], **OPTIONS | {"top_k": -1})
    with torch.no_grad():
        pair[0].head.bias[0] = torch.nan
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="not finite"):
            mvar.generate(*pair, [1], **OPTIONS)
    assert len(graphs) == 1


def test_inference_mode_weights_are_not_captured(graphs: Graphs) -> None:
    """Their inference copy is rebuilt for each call, so a recording would cost more than it saves."""
    pair = small()
    with torch.inference_mode():
        pair[0].head.weight = nn.Parameter(pair[0].head.weight.clone(), requires_grad=False)
    mvar.generate(*pair, [1], **OPTIONS)
    assert len(graphs) == 0


def test_return_scales_uses_no_graph(graphs: Graphs) -> None:
    pair = small()
    out = mvar.generate(*pair, [1, 2, 3], **OPTIONS, return_scales=True)
    assert len(graphs) == 0 and out.scales is not None and [len(t) for t in out.scales] == [3, 3, 3]
    assert same(out, mvar.generate(*pair, [1, 2, 3], **OPTIONS))


def test_graph_requires_gpu() -> None:
    pair = small()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="graph: CUDA graphs need a GPU, and the model is on cpu"):
            mvar.generate(*pair, [1], **OPTIONS, graph=True)
        assert same(mvar.generate(*pair, [1], **OPTIONS), mvar.generate(*pair, [1], **OPTIONS, graph=False))


def test_compile_decoder_uses_separate_graph(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    pair = small()
    plain = mvar.generate(*pair, [1], **OPTIONS)
    for _ in range(2):
        assert same(mvar.generate(*pair, [1], **OPTIONS, compile_decoder=True), plain)
    assert len(graphs) == 2 and len(compiled) == 1


def test_recording_is_shared_with_inference_mode(graphs: Graphs) -> None:
    pair = small()
    with torch.inference_mode():
        first = mvar.generate(*pair, [1], **OPTIONS)
    second = mvar.generate(*pair, [2], **OPTIONS)
    with torch.inference_mode():
        assert same(mvar.generate(*pair, [1], **OPTIONS), first)
    assert len(FakeGraph.made) == 1 and same(second, mvar.generate(*pair, [2], **OPTIONS, graph=False))
