"""Tests of accelerate(model, sampling=True)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar_kernels.dispatch import native

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")


def sample_with_top_k_top_p_(
    logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0, rng: torch.Generator | None = None, num_samples: int = 1
) -> Tensor:
    """As VAR's: filters the logits in place."""
    if top_k > 0:
        least = logits_BlV.topk(top_k).values[..., -1:]
        logits_BlV.masked_fill_(logits_BlV < least, -torch.inf)
    if top_p > 0:
        ascending, order = logits_BlV.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits_BlV.masked_fill_(drop.scatter(-1, order, drop), -torch.inf)
    rows, n = logits_BlV.softmax(-1).flatten(0, 1), abs(num_samples)
    tokens = torch.multinomial(rows, n, replacement=num_samples > 0, generator=rng)
    return tokens.view(*logits_BlV.shape[:2], n)


class Model(nn.Module):
    """The parts of a VAR that sampling sees."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 32)
        self.rng = torch.Generator()

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        g_seed: int | None = None,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
        n: int = 1,
    ) -> Tensor:
        """Tokens (B, 5, n) of scales of 1 and 4 tokens; with more_smooth the filtered logits."""
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        outs = []
        for length in (1, 4):
            logits = self.head(torch.ones(B, length, 8))
            tokens = sample_with_top_k_top_p_(logits, rng=rng, top_k=top_k, top_p=top_p, num_samples=n)
            if not more_smooth:
                outs.append(tokens)
            else:
                outs.append(logits.mul(2))
        return torch.cat(outs, 1)


class Rereading(Model):
    smooth = True

    def generate(self, logits: Tensor) -> Tensor:
        tokens = sample_with_top_k_top_p_(logits, top_k=2)
        return logits.softmax(-1).gather(-1, tokens)

    def by_keyword(self, logits: Tensor) -> Tensor:
        tokens = sample_with_top_k_top_p_(top_k=2, logits_BlV=logits)
        return logits.softmax(-1).gather(-1, tokens)

    def in_an_assignment(self, logits: Tensor) -> Tensor:
        sample_with_top_k_top_p_(logits, top_k=2)
        logits = logits.softmax(-1)
        return logits

    def by_another_name(self, logits: Tensor) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        sample_with_top_k_top_p_(logits, top_k=2)
        return rows.softmax(-1)

    def in_the_next_iteration(self, logits: Tensor) -> Tensor:
        out, kept = logits.clone(), None
        for _ in range(2):
            if kept is not None:
                out = kept.softmax(-1)
            kept = logits.clone() if kept is None else kept
            sample_with_top_k_top_p_(kept, top_k=2)
        return out

    def by_an_attribute(self, logits: Tensor) -> Tensor:
        sample_with_top_k_top_p_(logits, top_k=2)
        return logits.softmax(-1) if self.smooth else logits

    def in_a_global(self, logits: Tensor) -> Tensor:
        global _tokens
        _tokens = sample_with_top_k_top_p_(logits, top_k=2)
        return _tokens


class Overriding(Model):
    def autoregressive_infer_cfg(self, *args: Any, **options: Any) -> Tensor:
        return 1000 + super().autoregressive_infer_cfg(*args, **options)


class Smooth(Model):
    @torch.no_grad()
    def generate(self, top_k: int, more_smooth: bool = True) -> Tensor:
        logits = self.head(torch.ones(1, 1, 8))
        tokens = sample_with_top_k_top_p_(logits, top_k=top_k)
        if more_smooth:
            return logits
        return tokens


def test_sampling() -> None:
    model = Model()
    assert "sampling=True" in mk.accelerate(model).left["autoregressive_infer_cfg"]
    greedy = model.autoregressive_infer_cfg(2, top_k=1)
    smooth = model.autoregressive_infer_cfg(2, top_k=4, more_smooth=True)
    expected = model.autoregressive_infer_cfg(8, g_seed=1)
    random_state = torch.get_rng_state()
    for _ in range(2):
        report = mk.accelerate(model, sampling=True)
        assert report.replaced == {"autoregressive_infer_cfg": "sample_tokens, with other random numbers"}
    assert mk.accelerate(model).replaced == report.replaced
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.autoregressive_infer_cfg(2, top_k=1), greedy)
    assert torch.equal(model.autoregressive_infer_cfg(2, top_k=4, more_smooth=True), smooth)

    by_seed = [model.autoregressive_infer_cfg(8, g_seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1]) and not torch.equal(by_seed[0], by_seed[2])
    assert not torch.equal(by_seed[0][:, :1], by_seed[0][:, 1:2])  # scales differ
    assert torch.equal(
        model.autoregressive_infer_cfg(3, g_seed=1), by_seed[0][:3]
    )  # an image is one whatever the batch
    torch.manual_seed(0)
    unseeded = [model.autoregressive_infer_cfg(8) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(model.autoregressive_infer_cfg(8), unseeded[0]) and not torch.equal(*unseeded)

    mk.restore(model)
    assert type(model) is Model and torch.equal(model.autoregressive_infer_cfg(8, g_seed=1), expected)


def test_distribution() -> None:
    """Frequencies of 20,000 samples are within five standard deviations of the filtered softmax."""
    model, n = Model(), 20_000
    assert mk.accelerate(model, sampling=True).replaced
    tokens = model.autoregressive_infer_cfg(1, g_seed=0, top_k=10, top_p=0.9, n=n)[0, 0]
    p = model.autoregressive_infer_cfg(1, top_k=10, top_p=0.9, more_smooth=True)[0, 0].div(2).softmax(-1)
    frequencies = tokens.bincount(minlength=32) / n
    assert bool(((frequencies - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all())


def test_methods_that_read_the_filtered_logits_stay() -> None:
    model: Any = Rereading()
    report = mk.accelerate(model, sampling=True)
    methods = [name for name in vars(Rereading) if not name.startswith("_") and name != "smooth"]
    assert len(methods) == 7 and list(report.replaced) == ["autoregressive_infer_cfg"]
    assert all("may read the logits again" in report.left[name] for name in methods)
    logits = torch.randn(1, 2, 8)
    assert model.generate(logits.clone()).min() > 1 / 8


def test_overridden_method_and_default_of_more_smooth() -> None:
    overriding, smooth = Overriding(), Smooth()
    expected = overriding.autoregressive_infer_cfg(2, top_k=1), smooth.generate(3)
    assert not mk.accelerate(overriding, sampling=True).replaced
    assert "generate" in mk.accelerate(smooth, sampling=True).replaced
    assert torch.equal(overriding.autoregressive_infer_cfg(2, top_k=1), expected[0])
    assert torch.equal(smooth.generate(3), expected[1])


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.0), (0, -1.0), (-2, 1.5)])
def test_filters_that_are_off(top_k: int, top_p: float) -> None:
    model = Model()
    mk.accelerate(model, sampling=True)
    expected = model.autoregressive_infer_cfg(2, g_seed=1)
    assert torch.equal(model.autoregressive_infer_cfg(2, g_seed=1, top_k=top_k, top_p=top_p), expected)


@pytest.mark.parametrize("change", ["keeps more", "other arguments"])
def test_other_functions_stay(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sample_with_top_k_top_p_

    def keeps_more(
        logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0, rng: torch.Generator | None = None, num_samples: int = 1
    ) -> Tensor:
        return original(logits_BlV, top_k and top_k + 1, top_p, rng, num_samples)

    def other_arguments(logits: Tensor, k: int) -> Tensor:
        return original(logits, k)

    other = keeps_more if change == "keeps more" else other_arguments
    monkeypatch.setitem(globals(), "sample_with_top_k_top_p_", other)
    report = mk.accelerate(Model(), sampling=True)
    reason = "does not keep" if change == "keeps more" else "expected a function of logits_BlV"
    assert not report.replaced and reason in report.left["autoregressive_infer_cfg"]
