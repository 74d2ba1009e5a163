"""Tests of accelerate on the attention and the block of Infinity."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels.dispatch import native
from tests.helpers.patched import close, normal
from tests.helpers.plain_infinity import (
    EditAttention,
    EditBlock,
    FastVARAttention,
    InfinityAttention,
    InfinityBlock,
    rope_grid,
)
from tests.helpers.plain_rotary import do_nothing
from tests.helpers.plain_var import randomised

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")
SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 2)]
SCALES = [h * w for _, h, w in SCHEDULE]
L, C, HEADS = sum(SCALES), 64, 2
level = torch.repeat_interleave(torch.arange(3), torch.tensor(SCALES))
CAUSAL, DIAGONAL = (torch.where(seen, 0.0, -torch.inf) for seen in (level[:, None] >= level, level[:, None] == level))
ROPE: dict[str, Any] = {"scale_schedule": SCHEDULE, "rope2d_freqs_grid": rope_grid(SCHEDULE, C // HEADS)}
TEXT = normal(5, C), torch.tensor([0, 2, 5], dtype=torch.int32), 3  # of two samples


def made(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    module = kind(C, HEADS, **options)
    module.pos_start = module.pos_1LC = None
    return randomised(module)


def outputs_and_grads(module: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    """Outputs of the calls, and gradients of their first arguments and of all parameters."""
    torch.manual_seed(2)
    module.zero_grad()
    inputs = [normal(2, L, C).requires_grad_() for _ in calls]
    outs = [module(x, *args, **options) for x, (args, options) in zip(inputs, calls, strict=True)]
    sum((out * normal(*out.shape)).sum() for out in outs).backward()
    leaves = [*inputs, *module.parameters()]
    return [*(out.detach() for out in outs), *(t.grad for t in leaves if t.grad is not None)]


def generated(module: Any, attention: Any, *args: Any, **options: Any) -> list[Tensor]:
    """Outputs of all scales, and the cached keys and values after each."""
    attention.kv_caching(True)
    results = []
    with torch.no_grad():
        for k, part in enumerate(normal(2, L, C).split(SCALES, 1)):
            results.append(module(part, *args, scale_ind=k, **options))
            results += [attention.cached_k, attention.cached_v]
    attention.kv_caching(False)
    return results


def agree(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(close, got, expected))


@pytest.mark.parametrize("cos_attn", [True, False])
@pytest.mark.parametrize("using_flash", [False, True])
def test_attention(using_flash: bool, cos_attn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(InfinityAttention, cos_attn=cos_attn, using_flash=using_flash)
    rope = {} if using_flash else ROPE
    calls: list[Any] = [((None,), rope)]
    if not using_flash:
        calls += [((CAUSAL,), ROPE), ((CAUSAL, None, SCHEDULE, ROPE["rope2d_freqs_grid"]), {}), ((DIAGONAL,), {})]
    expected = outputs_and_grads(module, calls), generated(module, module, None, **rope)
    contiguous = [t.is_contiguous() for t in expected[1]]
    assert mk.accelerate(module).replaced == {"": "scale_attention"}
    with monkeypatch.context() as patched:  # nothing may run the original
        patched.setattr(F, "scaled_dot_product_attention", None)
        assert agree(outputs_and_grads(module, calls), expected[0])
        tokens = generated(module, module, None, **rope)
    assert agree(tokens, expected[1]) and [t.is_contiguous() for t in tokens] == contiguous
    mk.restore(module)
    assert type(module) is InfinityAttention
    assert agree(outputs_and_grads(module, calls), expected[0])


def test_generation_alternates_with_the_original() -> None:
    module = made(InfinityAttention)
    expected = generated(module, module, None, **ROPE)
    mk.accelerate(module)
    module.kv_caching(True)
    with torch.no_grad():
        for k, part in enumerate(normal(2, L, C).split(SCALES, 1)):
            got = [module(part, None, scale_ind=k, **ROPE), module.cached_k, module.cached_v]
            assert agree(got, expected[3 * k : 3 * k + 3])
            (mk.restore, mk.accelerate, mk.restore)[k](module)


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL, scale=scale)


PADDED = torch.where(torch.arange(L)[:, None] == L - 1, torch.arange(L) == 0, CAUSAL == 0).float().log()
UNSUPPORTED: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "flex attention": ({"use_flex_attn": True}, (None, flex), ROPE),
    "padding": ({}, (PADDED,), ROPE),
    "mask and cache": ({"caching": True}, (CAUSAL,), ROPE),
    "table in float64": (
        {},
        (CAUSAL,),
        ROPE | {"rope2d_freqs_grid": {k: t.double() for k, t in ROPE["rope2d_freqs_grid"].items()}},
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_calls_run_the_original(case: str) -> None:
    attributes, args, options = UNSUPPORTED[case]
    module, x = made(InfinityAttention), normal(2, L, C)

    def call() -> Tensor:
        module.kv_caching(False)
        vars(module).update(attributes)
        with torch.no_grad():
            result: Tensor = module(x, *args, **options)
        return result

    expected = call()
    vars(module)["use_flex_attn"] = False
    assert mk.accelerate(module).replaced
    assert torch.equal(call(), expected)


@pytest.mark.parametrize("options", [{"scale_schedule": SCHEDULE[:2]}, {"scale_ind": 1}], ids=["unknown", "too short"])
def test_errors_are_those_of_the_original(options: dict[str, Any]) -> None:
    """A schedule that is not in the grid, and a table with fewer rows than tokens."""
    module = made(InfinityAttention)
    errors = []
    for _ in range(2):
        with pytest.raises((KeyError, RuntimeError)) as error:
            module(normal(2, L, C), None, **ROPE | options)
        errors.append(str(error.value))
        mk.accelerate(module)
    assert errors[0] == errors[1]


BLOCKS: dict[str, dict[str, Any]] = {
    "as published": {},
    "without fused norm": {"fused": False, "ca_gamma": 0.5},
    "own ada_lin": {"shared_aln": False, "cos_attn": False},
    "checkpointing": {"checkpointing_sa_only": True},
    "flash": {"using_flash": True},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_block(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = made(InfinityBlock, drop_path=0.3, **BLOCKS[case])
    cond = normal(2, 1, 6, C) if block.shared_aln else normal(2, C)
    mask, rope = (None, {}) if block.sa.using_flash else (CAUSAL, ROPE)
    calls: list[Any] = [((cond, TEXT, mask), rope), ((cond, TEXT, mask, None, *rope.values()), {})]
    calls.append(((cond[:1], TEXT, None), {}))

    def everything() -> list[list[Tensor]]:
        results = [outputs_and_grads(block.train(mode), calls) for mode in (True, False)]
        return [*results, generated(block, block.sa, cond, TEXT, None, **rope)]

    expected = everything()
    report = mk.accelerate(block)
    assert set(report.replaced) == {"", "sa"} and set(report.left) == {"ca", "ffn"}
    with monkeypatch.context() as patched:  # nothing may run the original
        patched.setattr(F, "layer_norm", None)
        assert all(map(agree, everything(), expected))
    mk.restore(block)
    assert type(block) is InfinityBlock and all(map(agree, everything(), expected))


@pytest.mark.parametrize("options", [{}, {"fused": False, "cos_attn": False}, {"checkpointing_sa_only": True}], ids=str)
def test_edit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A source image first, whose tokens have rows of the table of their own."""
    block, cond = made(EditBlock, **options), normal(2, 1, 6, C)
    (table,) = rope_grid([SCHEDULE[-1], *SCHEDULE], C // HEADS).values()
    rope = {"scale_schedule": SCHEDULE, "rope2d_freqs_grid": {str(tuple(SCHEDULE)): table}}
    calls: list[Any] = [((cond, TEXT, CAUSAL), rope), ((cond, TEXT, None, None, *rope.values()), {"src": False})]

    def everything() -> list[list[Tensor]]:
        results = [outputs_and_grads(block.train(mode), calls) for mode in (True, False)]
        block.sa.kv_caching(True)
        with torch.no_grad():
            outs = [block(normal(2, SCALES[-1], C), cond, TEXT, None, scale_ind=2, **rope)]
            for k, part in enumerate(normal(2, L, C).split(SCALES, 1)):
                outs.append(block(part, cond, TEXT, None, scale_ind=k, src=False, **rope))
        results.append([*outs, block.sa.cached_k, block.sa.cached_v])
        block.sa.kv_caching(False)
        return results

    expected = everything()
    first = block(normal(2, L, C), cond, TEXT, CAUSAL, start_layer=True, **rope)
    assert set(mk.accelerate(block).replaced) == {"", "sa"}
    with monkeypatch.context() as patched:  # nothing may run the original
        patched.setattr(F, "scaled_dot_product_attention", None)
        block.ca.forward = lambda q, ca_kv: q
        with pytest.raises(TypeError):
            block(normal(2, L, C), cond, TEXT, CAUSAL, start_layer=True, **rope)
        everything()
        del block.ca.forward
    assert all(map(agree, everything(), expected))
    assert close(block(normal(2, L, C), cond, TEXT, CAUSAL, start_layer=True, **rope), first)


@pytest.mark.parametrize("cos_attn", [True, False])
def test_pruned_tokens(cos_attn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastVAR: three tokens of the last scale, others in each sample."""
    attention, kept = made(FastVARAttention, cos_attn=cos_attn), torch.tensor([[5, 0, 3], [1, 2, 4]])[..., None]
    scales = [{"ori_len": n, "scale_ind": k, "rope_idx": do_nothing} for k, n in enumerate(SCALES)]
    scales[-1]["rope_idx"] = lambda: kept

    def generated() -> list[Tensor]:
        outs = []
        for caching in (True, False):
            attention.kv_caching(caching)
            parts = normal(2, 8, C).split([1, 4, 3], 1)
            outs += [attention(part, None, **ROPE, **options) for part, options in zip(parts, scales, strict=True)]
            outs += [attention.cached_k, attention.cached_v] if caching else []
        return outs

    with torch.no_grad():
        x = normal(2, L, C)
        masked, expected = attention(x, DIAGONAL, **ROPE, ori_len=L), generated()
        assert mk.accelerate(attention).replaced == {"": "scale_attention"}
        assert torch.equal(attention(x, DIAGONAL, **ROPE, ori_len=L), masked)  # the mask is not read
        with pytest.raises(RuntimeError, match="must match the size"):  # the original's own error
            attention(x, None, **ROPE, ori_len=L - 1)
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        assert agree(generated(), expected)


def test_block_with_other_inputs_runs_the_original() -> None:
    block, x, cond = made(InfinityBlock), normal(2, L, C), normal(2, L, 6, C)
    expected = block(x, cond, TEXT, CAUSAL)
    mk.accelerate(block)
    assert close(block(x, cond, TEXT, CAUSAL), expected)  # a modulation for each token
    assert block(x[:, :0], cond[:, :1], TEXT, None).shape == (2, 0, C)
    double = (x.double(), cond[:, :1].double(), (TEXT[0].double(), *TEXT[1:]), None)
    got = block.double()(*double)
    mk.restore(block)
    assert torch.allclose(got, block(*double), rtol=1e-12)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared_aln", [True, False])
def test_autocast(shared_aln: bool, inputs: torch.dtype, weights: torch.dtype) -> None:
    """Same dtypes, and the error against float32 is less than twice the original's, in training and in generation."""
    exact, block = (made(InfinityBlock, shared_aln=shared_aln) for _ in range(2))
    block.sa.scale_mul_1H11.data.fill_(1)  # large scores are more sensitive to the rounding of keys
    block.to(weights).ca_norm.float()
    exact.load_state_dict(block.state_dict())
    cond = normal(2, 1, 6, C) if shared_aln else normal(2, C)

    def results(block: Any) -> list[Tensor]:
        x = normal(2, L, C).to(inputs)
        x = (x.float() if block is exact else x).requires_grad_()
        block.zero_grad()
        out = block(x, cond, TEXT, CAUSAL, **ROPE)
        (out * normal(2, L, C)).sum().backward()
        modulation = block.ada_gss if shared_aln else block.ada_lin[-1].bias
        return [out.detach(), x.grad, block.sa.q_bias.grad, block.ca_norm.weight.grad, modulation.grad]

    def both(block: Any) -> list[Tensor]:
        return [*results(block), *generated(block, block.sa, cond, TEXT, None, **ROPE)]

    reference, runs = both(exact), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            runs.append(both(block))
        assert set(mk.accelerate(block).replaced) == {"", "sa"}
    for original, got, expected in zip(*runs, reference, strict=True):
        errors = [float((t.float() - expected).norm()) for t in (original, got)]
        assert got.dtype == original.dtype and errors[1] <= 2 * errors[0] + 1e-6 * float(expected.norm())


class HalfSplit(InfinityAttention):
    """Channels i and i + D/2 are a pair."""

    def rotated(self, t: Tensor, table: Tensor) -> Tensor:
        pairs = t.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return super().rotated(pairs, table).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class Longer(InfinityAttention):
    """Rotated queries and keys are twice as long."""

    def rotated(self, t: Tensor, table: Tensor) -> Tensor:
        return 2 * super().rotated(t, table)


class OtherScale(InfinityBlock):
    """`scale_ind` reaches self-attention without `fused`, and not with it."""

    def passes_scale_ind(self) -> bool:
        return not super().passes_scale_ind()


class SourceLast(EditAttention):
    """The rows of the source are those of the scales."""

    def first_row(self, schedule: Any, scale_ind: int) -> int:
        self.src = not self.src
        return super().first_row(schedule, scale_ind)


@pytest.mark.parametrize("kind", [HalfSplit, Longer, OtherScale, SourceLast])
def test_other_computations_are_left(kind: Any) -> None:
    report = mk.accelerate(made(kind))
    assert "" not in report.replaced and report.left[""].startswith("it does not compute what")
