"""Tests of accelerate on VAR's relatives with RoPE and RMSNorm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar_kernels.dispatch import native
from tests.helpers.patched import close, normal
from tests.helpers.plain_rotary import (
    FastHARTAttention,
    HARTAttention,
    HARTBlock,
    LlamaRMSNormFused,
    MapRotaryEmbedding,
    MarkovAttention,
    MarkovBlock,
    RMSNorm,
    RMSNormBeforeHead,
    SwittiAttention,
    SwittiBlock,
    do_nothing,
)
from tests.helpers.plain_var import AdaLNBeforeHead
from tests.patching.test_family import CAUSAL, DIAGONAL, SCALES, L, made, outputs_and_grads

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")
PATCH_NUMS = (1, 2, 3)
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["qk_norm", "no_qk_norm"])
Calls = Callable[[Any], list[Tensor]]


class Model(nn.Module):
    """Blocks and the norm before the head, called with teacher forcing, or scale by scale."""

    def __init__(self, blocks: list[nn.Module], head_nm: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head_nm = nn.ModuleList(blocks), head_nm

    def forward(self, x: Tensor, cond: Tensor, attn_bias: Tensor | None, **options: Any) -> Tensor:
        for block in self.blocks:
            x = block(x=x, cond_BD=cond, attn_bias=attn_bias, **options)
        out: Tensor = self.head_nm(x, cond)
        return out

    @torch.no_grad()
    def generated(self, x: Tensor, cond: Tensor, *, caching: bool, freqs_cis: Tensor | None = None) -> list[Tensor]:
        """Outputs, cached keys and cached values; the options of a scale are its number or its complex numbers."""
        attentions: list[Any] = [block.attn for block in self.blocks]
        for attn in attentions:
            attn.kv_caching(caching)
        each: list[dict[str, Any]] = [{"si": si} for si in range(len(SCALES))]
        if freqs_cis is not None:
            each = [{"freqs_cis": part, **switti_options()} for part in freqs_cis.split(SCALES, 1)]
        outs = [self(part, cond, None, **options) for part, options in zip(x.split(SCALES, 1), each, strict=True)]
        cached = [t for attn in attentions for t in (attn.cached_k, attn.cached_v) if t is not None]
        for attn in attentions:
            attn.kv_caching(False)
        return outs + cached


def markov(*, drop_path: float = 0.0, norm: bool = True, disable_aln: bool = False) -> Any:
    options: dict[str, Any] = {"drop_path": drop_path, "disable_aln": disable_aln}
    return made(Model([MarkovBlock(64, 2, norm, PATCH_NUMS, **options) for _ in range(2)], RMSNormBeforeHead(64)))


FREQS_CIS = torch.polar(torch.ones(1, L, 16), 3 * normal(1, L, 16))


def switti(use_crop_cond: bool = True) -> Any:
    blocks: list[nn.Module] = [SwittiBlock(64, 2, 48, use_crop_cond) for _ in range(2)]
    return made(Model(blocks, AdaLNBeforeHead(64)))


def switti_options(text: bool = True) -> dict[str, Any]:
    padded = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]])
    return {"crop_cond": normal(2, 64), **({"context": normal(2, 3, 48), "context_attn_bias": padded} if text else {})}


def originals_raise(patched: pytest.MonkeyPatch, *classes: type[nn.Module]) -> None:
    for cls in classes:
        patched.setattr(cls, "forward", None)


def replaced(model: nn.Module) -> set[str]:
    return set(mk.accelerate(model).replaced)


@NORMS
def test_markov_attention(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(MarkovAttention(64, 2, norm, PATCH_NUMS))
    x = normal(2, L, 64).requires_grad_()

    def calls(attention: Any) -> list[Tensor]:
        outs = [attention(x, attn_bias=mask) for mask in (CAUSAL, DIAGONAL, None)]
        return [*outs, attention(x[:, 1:5], None, 1), attention(x[:, 5:], None, si=2)]

    expected = outputs_and_grads(module, calls)
    assert mk.accelerate(module).replaced == {"": "scale_attention"}
    originals_raise(monkeypatch, MarkovAttention)
    monkeypatch.setattr(type(module), "is_valid", lambda self: True)
    assert all(map(close, outputs_and_grads(module, calls), expected))


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"disable_aln": True}], ids=str)
def test_markov(options: dict[str, bool]) -> None:
    model = markov(drop_path=0.3, **options).train()
    x, cond = normal(2, L, 64).requires_grad_(), normal(2, 64)
    calls: list[Calls] = [lambda model, mask=mask: [model(x, cond, mask)] for mask in (DIAGONAL, CAUSAL, None)]
    expected = [outputs_and_grads(model, call) for call in calls]
    generated = [model.eval().generated(x, cond, caching=caching) for caching in (False, True)]

    assert replaced(model) == {"blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn", "head_nm"}
    for call, before in zip(calls, expected, strict=True):
        assert all(map(close, outputs_and_grads(model.train(), call), before))
    for caching, before in zip((False, True), generated, strict=True):
        assert all(map(close, model.eval().generated(x, cond, caching=caching), before))
    mk.restore(model)
    assert all(map(torch.equal, model.generated(x, cond, caching=True), generated[1]))


@NORMS
def test_switti_attention(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(SwittiAttention(64, 2, norm))
    x = normal(2, L, 64).requires_grad_()

    def calls(attention: Any) -> list[Tensor]:
        outs = [attention(x, attn_bias=mask, freqs_cis=FREQS_CIS) for mask in (CAUSAL, DIAGONAL, None)]
        return [*outs, attention(x[:, 5:], None, FREQS_CIS), attention(x, CAUSAL)]

    expected = outputs_and_grads(module, calls)
    assert mk.accelerate(module).replaced == {"": "scale_attention"}
    originals_raise(monkeypatch, SwittiAttention)
    monkeypatch.setattr(type(module), "is_valid", lambda self: True)
    assert all(map(close, outputs_and_grads(module, calls), expected))


def test_switti() -> None:
    model = switti().train()
    x, cond = normal(2, L, 64).requires_grad_(), normal(2, 64)

    def call(mask: Tensor, text: bool) -> Calls:
        return lambda model: [model(x, cond, mask, freqs_cis=FREQS_CIS, **switti_options(text))]

    calls = [call(DIAGONAL, True), call(CAUSAL, False)]
    expected = [outputs_and_grads(model, call) for call in calls]
    generated = [model.eval().generated(x, cond, caching=caching, freqs_cis=FREQS_CIS) for caching in (False, True)]
    assert replaced(model) == {"blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn", "head_nm"}
    for call_, before in zip(calls, expected, strict=True):
        assert all(map(close, outputs_and_grads(model.train(), call_), before))
    for caching, before in zip((False, True), generated, strict=True):
        got = model.eval().generated(x, cond, caching=caching, freqs_cis=FREQS_CIS)
        assert all(map(close, got, before))
    mk.restore(model)
    assert all(map(torch.equal, model.generated(x, cond, caching=True, freqs_cis=FREQS_CIS), generated[1]))


@pytest.mark.parametrize("norm", [RMSNorm, LlamaRMSNormFused])
@pytest.mark.parametrize("disable_aln", [True, False])
def test_hart(norm: type, disable_aln: bool) -> None:
    """Texts of 5 tokens at other positions in each sample, and some of the tokens of the last scale."""
    block: Any = made(HARTBlock(64, 2, (1, 2, 3), 0.3, disable_aln, norm)).train()
    x, text = normal(2, 18, 64).requires_grad_(), normal(2, 5, 64)
    positions, mask = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 2]]), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    options = {"context_position_ids": positions, "context_mask": mask}
    some = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0, 0]])
    all_some = torch.cat([torch.ones(2, 4, dtype=torch.int64), some], 1)
    level = torch.tensor([0] * 5 + [1] * 4 + [2] * 9)
    causal = torch.where(level[:, None] >= level, 0.0, -torch.inf)[None, None]

    def calls(block: Any) -> list[Tensor]:
        part = all_some.nonzero(as_tuple=True)
        return [
            block(x, text, causal, **options),
            block(x[:, :13], text, causal[..., :13, :13], m_maskgit=part, **options),
        ]

    @torch.no_grad()
    def generated() -> list[Tensor]:
        block.attn.kv_caching(True)
        outs = [block(part, text, None, si=si, **options) for si, part in enumerate(x[:, :9].split((5, 4), 1))]
        outs.append(block(x[:, 9:13], text, None, si=2, m_maskgit=some.nonzero(as_tuple=True), **options))
        outs += [block.attn.cached_k, block.attn.cached_v]
        block.attn.kv_caching(False)
        return outs

    expected, tokens = outputs_and_grads(block, calls), (block.eval(), generated())[1]
    assert replaced(block) == {"", "attn"}
    assert all(map(close, outputs_and_grads(block.train(), calls), expected))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        for module, cls in ((block, HARTBlock), (block.attn, HARTAttention)):
            patched.setattr(type(module.eval()), "is_valid", lambda self: True)
            patched.setattr(cls, "forward", None)
        assert all(map(close, generated(), tokens))


@NORMS
def test_hart_with_pruned_tokens(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention: Any = made(FastHARTAttention(64, 2, norm, PATCH_NUMS)).eval()
    kept = torch.tensor([[8, 0, 3, 4], [1, 2, 7, 6]])[..., None]
    text = {"context_position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 2]]), "is_later_layer": True}

    @torch.no_grad()
    def generated() -> list[Tensor]:
        outs = []
        for caching in (True, False):
            attention.kv_caching(caching)
            for si, part in enumerate(normal(2, 13, 64).split((5, 4, 4), 1)):
                outs.append(attention(part, None, si=si, idx_fn=do_nothing if si < 2 else lambda: kept, **text))
            outs += [attention.cached_k, attention.cached_v] if caching else []
        return outs

    expected = generated()
    assert replaced(attention) == {""}
    originals_raise(monkeypatch, FastHARTAttention)
    monkeypatch.setattr(type(attention), "is_valid", lambda self: True)
    assert all(map(close, generated(), expected))


@pytest.mark.parametrize("kind", ["Markov-VAR", "Switti"])
def test_autocast(kind: str) -> None:
    """Dtypes are the original's, also of the cache, and the error against float32 is less than twice its error."""
    model, x, cond = {"Markov-VAR": markov, "Switti": switti}[kind](), normal(2, L, 64), normal(2, 64)
    options = {"freqs_cis": FREQS_CIS, **switti_options()} if kind == "Switti" else {}

    def generated() -> list[Tensor]:
        return model.generated(x, cond, caching=True, freqs_cis=options.get("freqs_cis"))  # type: ignore[no-any-return]

    exact, found = [model(x, cond, DIAGONAL, **options).detach(), *generated()], []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outs = [model(t, cond, DIAGONAL, **options) for t in (x, x.bfloat16())]
            found.append(outs + generated())
        mk.accelerate(model)
    exact.insert(0, exact[0])
    errors = [[float((out - e).norm() / e.norm()) for out, e in zip(outs, exact, strict=True)] for outs in found]
    assert [out.dtype for out in found[1]] == [out.dtype for out in found[0]]
    assert all(0 < after < 2 * before for before, after in zip(*errors, strict=True))


def test_unsupported_calls_run_the_original() -> None:
    """Masks that are no pattern, other numbers of tokens than positions, angles of each head, and of gradients."""
    attention: Any = made(MarkovAttention(64, 2, True, PATCH_NUMS))
    x, soft = normal(2, L, 64), CAUSAL.nan_to_num(neginf=-3.0)
    expected = attention(x, soft)
    mk.accelerate(attention)
    assert torch.equal(attention(x, soft), expected)
    with pytest.raises(RuntimeError, match="must match the size"):  # the original's own error
        attention(x[:, :7], None)

    attention = made(SwittiAttention(64, 2, True))
    of_heads = torch.cat([FREQS_CIS, FREQS_CIS.conj()])
    calls = [(x, soft, FREQS_CIS), (x, CAUSAL, of_heads), (x, None, FREQS_CIS.clone().requires_grad_())]
    before = [attention(*call) for call in calls]
    mk.accelerate(attention)
    assert all(torch.equal(attention(*call), out) for call, out in zip(calls, before, strict=True))


def test_changed_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are computed once, and again for other frequencies."""
    attention: Any = made(MarkovAttention(64, 2, True, PATCH_NUMS))
    mk.accelerate(attention)
    x, calls, original = normal(2, L, 64), [], MapRotaryEmbedding.forward
    monkeypatch.setattr(MapRotaryEmbedding, "forward", lambda *args: calls.append(args) or original(*args))
    with torch.inference_mode():
        before = attention(x, DIAGONAL)
    assert torch.equal(attention(x, DIAGONAL), before) and len(calls) == 1
    attention.rotary_emb.inv_freq.mul_(2)
    after = attention(x, DIAGONAL)
    mk.restore(attention)
    assert not close(after, before) and close(after, attention(x, DIAGONAL))


def test_compile() -> None:
    model = markov(drop_path=0.3).train()
    x, cond = normal(2, L, 64), normal(2, 64)
    mk.accelerate(model)
    expected = outputs_and_grads(model, lambda model: [model(x, cond, DIAGONAL)])
    compiled = torch.compile(model, backend="aot_eager")
    assert all(map(close, outputs_and_grads(compiled, lambda model: [model(x, cond, DIAGONAL)]), expected))
