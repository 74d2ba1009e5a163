"""Tests of accelerate on the structures of VAR's relatives."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mvar_kernels as mk
from mvar_kernels.dispatch import native
from tests.helpers.patched import close, normal
from tests.helpers.plain_family import ControlVARAttention, HMARAttention, HMARBlock, MVARAttention, MVARBlock
from tests.helpers.plain_var import FFN, AdaLNBeforeHead, AdaLNSelfAttn, SelfAttention, randomised

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")
SCALES = (1, 4, 9)
L = sum(SCALES)
level = torch.repeat_interleave(torch.arange(3), torch.tensor(SCALES))
CAUSAL, DIAGONAL = (torch.where(seen, 0.0, -torch.inf) for seen in (level[:, None] >= level, level[:, None] == level))


def made(module: nn.Module) -> Any:
    torch.manual_seed(0)
    module.pos_start = module.pos_1LC = None  # type: ignore[assignment]
    return randomised(module)  # type: ignore[arg-type]


def outputs_and_grads(module: nn.Module, calls: Callable[[nn.Module], list[Tensor]]) -> list[Tensor]:
    torch.manual_seed(2)
    module.zero_grad()
    outs = calls(module)
    sum((out * normal(*out.shape)).sum() for out in outs).backward()  # type: ignore[union-attr]
    return [*(out.detach() for out in outs), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("norm", [True, False], ids=["qk_norm", "no_qk_norm"])
@pytest.mark.parametrize("kind", ["ControlVAR", "HMAR", "HMAR causal"])
def test_attention(kind: str, norm: bool) -> None:
    module = made(
        {
            "ControlVAR": lambda: ControlVARAttention(64, 2, norm),
            "HMAR": lambda: HMARAttention(64, 2, norm, SCALES),
            "HMAR causal": lambda: HMARAttention(64, 2, norm, SCALES, "block_causal"),
        }[kind]()
    )
    x = normal(2, L, 64).requires_grad_()

    def calls(attention: Any) -> list[Tensor]:
        outs = [attention(x, attn_bias=mask) for mask in (CAUSAL, DIAGONAL, None)]
        return outs + ([attention(x, using_block_sparse_attn=True)] if "HMAR" in kind else [])

    def generated() -> list[Tensor]:
        module.kv_caching(True)
        with torch.no_grad():
            outs = [module(part, attn_bias=None) for part in x.split(SCALES, 1)]
        return [*outs, module.cached_k, module.cached_v]

    expected, tokens = outputs_and_grads(module, calls), generated()
    module.kv_caching(False)
    original = type(module).forward
    assert mk.accelerate(module).replaced == {"": "scale_attention"}
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:  # nothing may run the original
        patched.setattr(SelfAttention, "forward", None)
        assert all(map(close, outputs_and_grads(module, calls), expected))
        assert all(map(close, generated(), tokens))
    mk.restore(module)
    assert type(module).forward is original


def test_hmar_block() -> None:
    block = made(HMARBlock(64, 1, SCALES, drop_path=0.3)).train()
    x, cond = normal(2, L, 64).requires_grad_(), normal(2, 64)

    def calls(block: Any) -> list[Tensor]:
        return [block(x, cond, attn_bias=CAUSAL), block(x, cond, True, CAUSAL), block(x, cond)]

    expected = outputs_and_grads(block, calls)
    report = mk.accelerate(block)
    assert set(report.replaced) == {"", "attn"} and set(report.left) == {"ffn"}
    assert all(map(close, outputs_and_grads(block, calls), expected))


def test_mvar_training() -> None:
    block = made(MVARBlock(64, 2, SCALES, drop_path=0.3)).train()
    x, cond = normal(2, L, 64).requires_grad_(), normal(2, 64)
    expected = outputs_and_grads(block, lambda block: [block(x, cond, None)])
    assert set(mk.accelerate(block).replaced) == {"", "attn", "mamba"}
    assert all(map(close, outputs_and_grads(block, lambda block: [block(x, cond, None)]), expected))


def test_attention_in_16_bits_only() -> None:
    """It is compared under autocast; the error against float32 is then less than twice the original's."""
    block, halves = (made(MVARBlock(64, 2, SCALES, halves=h)).train() for h in (False, True))
    x, cond = normal(2, L, 64), normal(2, 64)
    exact, errors = block(x, cond, None), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(float((halves(x, cond, None) - exact).norm()))
        assert {"", "attn"} <= set(mk.accelerate(halves).replaced)
    assert 0 < errors[1] < 2 * errors[0]


def generation(block: Any, cond: Tensor, between: Callable[[int], Any] = lambda scale: None) -> list[Tensor]:
    block.eval().cache = None
    outs = []
    for k, part in enumerate(normal(2, L, 64).split(SCALES, 1)):
        between(k)
        outs.append(block(x=part, cond_BD=cond, attn_bias=None))
    return [*outs, block.cache]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mvar_generation_carries_the_state(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token passes the mixer once, and outputs and cache are the original's, whatever happens in between."""
    block, cond = made(MVARBlock(64, 2, SCALES)), normal(2, 64)
    lengths: list[int] = []

    def run(between: Callable[[int], Any] = lambda scale: None) -> list[Tensor]:
        lengths.clear()
        with mode():
            return generation(block, cond.clone(), between)

    def hook(scale: int) -> None:
        if scale == 2:
            block.mamba.register_forward_hook(lambda *_: None)

    def new_weights(scale: int) -> None:
        if scale == 2:
            block.mamba.D.data = block.mamba.D.data + 1

    def new_cache(scale: int) -> None:
        if scale == 2:
            block.cache = 2 * block.cache

    expected = run()
    mk.accelerate(block)
    block.mamba.in_proj.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert all(map(close, run(), expected)) and lengths == [1, 4, 9]
    for between, passed in ((hook, [1, 4, 14]), (new_weights, [1, 4, 14]), (new_cache, [1, 4, 14])):
        weights = copy.deepcopy(block.state_dict())
        got = run(between)
        assert lengths == passed, between
        block.load_state_dict(weights)
        mk.restore(block)
        assert all(map(close, got, run(between))), between
        block.load_state_dict(weights)
        block.mamba._forward_hooks.clear()
        mk.accelerate(block)
    assert all(map(close, run(lambda k: (mk.restore, mk.accelerate, mk.restore)[k](block)), expected))


def test_mvar_generation_with_gradients_runs_the_original() -> None:
    block, cond = made(MVARBlock(64, 2, SCALES)), normal(2, 64)
    expected = outputs_and_grads(block, lambda block: generation(block, cond)[:-1])
    mk.accelerate(block)
    assert all(map(close, outputs_and_grads(block, lambda block: generation(block, cond)[:-1]), expected))


def test_report_names_every_part() -> None:
    """Attention, mixers, blocks and norms without a patch are left with what they lack."""

    class CrossAttention(nn.MultiheadAttention):
        pass

    class RMSNorm(nn.LayerNorm):
        pass

    class Mamba(nn.Linear):
        pass

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm1, self.mixer = CrossAttention(8, 1), RMSNorm(8), Mamba(8, 8)

    model = made(nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "norm": RMSNorm(8)}))
    model["var"] = HMARBlock(64, 1, SCALES)
    model["var"].attn.proj = nn.Sequential(model["var"].attn.proj)
    report = mk.accelerate(model)
    assert set(report.replaced) == {"var"}
    reasons = {
        "layers.0": "a block of a structure that accelerate does not know: it lacks ffn, ln_wo_grad, drop_path",
        "layers.0.attn": "attention of a structure that accelerate does not know: it lacks mat_qkv",
        "layers.0.mixer": "a mixer of a structure that accelerate does not know: it lacks in_proj",
        "norm": "a norm without a modulation",
        "var.attn": "mat_qkv and proj: expected linear layers",
        "var.ffn": "its two linear layers",
    }
    for name, reason in reasons.items():
        assert report.left[name].startswith(reason), report.left[name]
    assert "left layers.* (2): a block" in str(report)


class PruningBlock(AdaLNSelfAttn):
    """Leaves out every other token of a large scale (FastVAR)."""

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None, si: int = -1) -> Tensor:
        if x.shape[1] > 300 or si == 9:
            return super().forward(x[:, ::2], cond_BD, attn_bias).repeat_interleave(2, 1)[:, : x.shape[1]]
        return super().forward(x, cond_BD, attn_bias)


class PruningAttention(SelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        return super().forward(x * (x.shape[1] <= 500), attn_bias)


class ScaledBlock(AdaLNSelfAttn):
    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None, si: int = -1) -> Tensor:
        return super().forward(2 * x if si == 9 else x, cond_BD, attn_bias)


def test_argument_that_attention_does_not_take() -> None:
    block, x, cond = made(ScaledBlock(64, 1, True, False, 0.0)), normal(2, 5, 64), normal(2, 64)
    expected = [block(x, cond, None, si) for si in (-1, 9)]
    assert "" in mk.accelerate(block).replaced
    assert all(map(close, [block(x, cond, None), block(x, cond, None, si=9)], expected))


@pytest.mark.parametrize("kind", [PruningBlock, PruningAttention])
def test_token_pruning_is_seen(kind: Any) -> None:
    """What happens at large scales alone is seen, too."""
    block = made(AdaLNSelfAttn(64, 1, True, False, 0.0))
    part = block.attn if kind is PruningAttention else block
    part.__class__ = kind
    report = mk.accelerate(block)
    assert set(report.left) | set(report.replaced) == {"", "attn"} | ({"ffn"} if kind is PruningAttention else set())
    name = "attn" if kind is PruningAttention else ""
    assert "in evaluation on long sequences" in report.left[name] and len(report.replaced) == 1


def test_modulation_per_token_and_other_batches() -> None:
    """The original forward runs: kernels of a block take one modulation for each sample of x."""
    shared, own = made(AdaLNSelfAttn(64, 2, True, True, 0.0)), made(AdaLNSelfAttn(64, 2, True, False, 0.0))
    x, per_token, conds = normal(2, 5, 64), normal(2, 5, 6, 64), normal(3, 64)
    expected = shared(x, per_token, None), own(x[:1], conds, None)
    for block in (shared, own):
        assert mk.accelerate(block).replaced
    assert close(shared(x, per_token, None), expected[0]) and close(own(x[:1], conds, None), expected[1])


def test_head_norm_of_other_shapes() -> None:
    head = made(AdaLNBeforeHead(64))
    calls = [(normal(14, 64), normal(1, 64)), (normal(2, 3, 5, 64), normal(1, 64)), (normal(1, 5, 64), normal(3, 64))]
    expected = [head(*call) for call in calls]
    assert mk.accelerate(head).replaced
    assert all(torch.equal(head(*call), want) for call, want in zip(calls, expected, strict=True))


@pytest.mark.parametrize(
    "wrap", [checkpoint_wrapper, partial(torch.compile, backend="eager")], ids=["checkpoint", "compile"]
)
@pytest.mark.parametrize("kind", ["VAR", "HMAR"])
def test_wrapped_attention_of_a_block(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A wrapper does not say which arguments it passes on: the mask must not be lost."""

    def new() -> Any:
        return made(HMARBlock(64, 2, SCALES) if kind == "HMAR" else AdaLNSelfAttn(64, 2, True, False, 0.0))

    x, cond = normal(2, L, 64), normal(2, 64)
    expected, later, before = new()(x, cond, attn_bias=CAUSAL), new(), new()
    assert mk.accelerate(later).replaced
    later.attn = wrap(later.attn)
    before.attn = wrap(before.attn)
    assert "attn: expected a forward with an argument attn_bias" in mk.accelerate(before).left.values()
    for block in (later, before):
        assert close(block(x, cond, attn_bias=CAUSAL), expected)


@pytest.mark.parametrize("dropout", [0.5, nn.Dropout(0.5)], ids=["number", "module"])
def test_attention_dropout_of_mvar(dropout: float | nn.Module) -> None:
    """Set after the comparison, it drops in training alone."""

    class Dropping(MVARAttention):
        def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
            out: Tensor = super().forward(x, attn_bias)
            p = getattr(self.attn_drop, "p", self.attn_drop)
            return F.dropout(out, float(p), training=self.training)

    attention: Any = made(MVARAttention(64, 2, True, SCALES, False))
    attention.__class__, attention.attn_drop = Dropping, 0.0
    assert mk.accelerate(attention).replaced
    attention.train().attn_drop = dropout
    x = normal(2, L, 64)
    assert not torch.equal(attention(x, None), attention(x, None))
    attention.eval()
    assert torch.equal(attention(x[:, :1], None), attention(x[:, :1], None))


def test_branch_without_autocast() -> None:
    """A branch that computes in float32 under autocast cannot take the input of 16 bits that the kernels would give."""

    class FullPrecision(FFN):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    block = made(AdaLNSelfAttn(64, 2, True, False, 0.0))
    block.ffn.__class__ = FullPrecision
    x, cond = normal(2, 5, 64), normal(2, 64)
    assert "" in mk.accelerate(block).left
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, cond, None).dtype == torch.float32
