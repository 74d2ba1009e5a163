"""Tests of accelerate with the key/value cache and with cached modulation."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar_kernels.dispatch import native
from mvar_kernels.patching.cache import cached_call, schedule_of
from tests.helpers.patched import accelerated, close, normal, plain
from tests.helpers.plain_var import SelfAttention

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")


# --- the key/value cache ----------------------------------------------------------------------------------------------

LENGTHS = (1, 4, 9, 16)
MASK = torch.where(
    torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[:, None]
    >= torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
    0.0,
    -torch.inf,
)[None, None]
SOFT = MASK.nan_to_num(neginf=-3.0)  # a finite bias, which VAR does not use


def masked_prefix(attn: Any, x: Tensor) -> Iterator[Tensor]:
    """The calls of CoDe's refiner."""
    attn.kv_caching(True)
    yield attn(x[:, :14], attn_bias=MASK[:, :, :14, :14])
    yield attn(x[:, 14:], attn_bias=None)


def prefix_in_two_calls(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :5], attn_bias=MASK[:, :, :5, :5])
    yield attn(x[:, 5:14], attn_bias=MASK[:, :, 5:14, :14])
    yield attn(x[:, 14:], attn_bias=None)


def mask_after_cached(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :1], attn_bias=None)
    yield attn(x[:, 1:5], attn_bias=SOFT[:, :, 1:5, :5])
    yield attn(x[:, 5:6], attn_bias=torch.zeros(1, 1, 1, 1))
    yield attn(x[:, 6:], attn_bias=None)


def boolean_prefix(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :5], attn_bias=MASK[:, :, :5, :5] == 0)
    yield attn(x[:, 5:], attn_bias=None)


def soft_mask_first(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :14], attn_bias=SOFT[:, :, :14, :14])
    yield attn(x[:, 14:], attn_bias=None)


def caching_toggled(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :5], attn_bias=None)
    attn.kv_caching(False)
    yield attn(x, attn_bias=MASK)
    attn.kv_caching(True)
    yield attn(x[:, :1], attn_bias=None)
    attn.cached_k = attn.cached_v = None
    yield attn(x[:1, :5], attn_bias=None)


def modified_cache(attn: Any, x: Tensor) -> Iterator[Tensor]:
    """The calls of a program that slices and expands the cached keys and values."""
    attn.kv_caching(True)
    yield attn(x[:1, :9], attn_bias=None)
    attn.cached_k, attn.cached_v = (t[:, :, :5].expand(2, -1, -1, -1) for t in (attn.cached_k, attn.cached_v))
    yield attn(x[:, 5:14], attn_bias=None)
    attn.cached_k, attn.cached_v = attn.cached_k[:, :, :0], attn.cached_v[:, :, :0]
    yield attn(x[:, :5], attn_bias=None)


def hook_on_second_call(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :5], attn_bias=None)
    handle = attn.mat_qkv.register_forward_hook(lambda *_: None)  # the next call runs the original forward
    yield attn(x[:, 5:14], attn_bias=None)
    handle.remove()
    yield attn(x[:, 14:], attn_bias=None)


ORDERS = (
    masked_prefix,
    prefix_in_two_calls,
    mask_after_cached,
    boolean_prefix,
    soft_mask_first,
    caching_toggled,
    modified_cache,
    hook_on_second_call,
)


@pytest.mark.parametrize("norm", [True, False], ids=["qk_norm", "no_qk_norm"])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_kv_cache_call_sequences(heads: int, norm: bool) -> None:
    """Outputs and cached keys and values match the original's."""
    model, x = plain(heads, (1, 2, 3, 4), attn_l2_norm=norm), normal(2, 30, 64 * heads)
    attn: Any = model.blocks[0].attn

    def run(order: Callable[..., Iterator[Tensor]]) -> list[Tensor]:
        out = list(order(attn, x))
        return [*out, attn.cached_k, attn.cached_v]

    with torch.no_grad():
        expected = [run(order) for order in ORDERS]
        assert "blocks.0.attn" in mk.accelerate(model).replaced
        for order, right in zip(ORDERS, expected, strict=True):
            assert all(map(close, run(order), right)), order.__name__


def test_accelerate_and_restore_during_generation() -> None:
    model, x = plain(2, (1, 2, 3, 4)), normal(2, 30, 128)
    attn: Any = model.blocks[0].attn

    def run(*between: Callable[..., Any]) -> Tensor:
        attn.kv_caching(True)
        out = [attn(x[:, :1], attn_bias=None)]
        for act, (a, b) in zip(between, [(1, 5), (5, 14), (14, 30)], strict=True):
            act(model)
            out.append(attn(x[:, a:b], attn_bias=None))
        return torch.cat(out, 1)

    def nothing(model: nn.Module) -> None:
        pass

    with torch.no_grad():
        expected = run(nothing, nothing, nothing)
        assert close(run(mk.accelerate, mk.restore, mk.accelerate), expected)
    assert "blocks.0.attn" in accelerated(model)


class TokensFirst(SelfAttention):
    """VAR's attention with xformers, whose cache is (B, L, H, D)."""

    using_xform = True

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        for name in ("cached_k", "cached_v"):
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).transpose(1, 2))
        out = super().forward(x, attn_bias)
        for name in ("cached_k", "cached_v"):
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).transpose(1, 2))
        return out


def test_kv_cache_layouts() -> None:
    model, x = plain(2, (1, 2, 3, 4)), normal(2, 30, 128)
    attn: Any = model.blocks[0].attn
    attn.__class__ = TokensFirst
    with torch.no_grad():
        expected = [*soft_mask_first(attn, x), attn.cached_k]
        assert "blocks.0.attn" in mk.accelerate(model).replaced
        assert all(map(close, [*soft_mask_first(attn, x), attn.cached_k], expected))

    class Unmarked(TokensFirst):
        using_xform = False

    attn.__class__ = Unmarked  # a layout that the module does not declare
    assert "does not compute" in mk.accelerate(model).left["blocks.0.attn"]


def test_learnable_attn_bias_gets_gradient() -> None:
    """A bias of zeros looks like a mask that allows all positions."""
    model, x = plain(), normal(2, 5, 64)
    mk.accelerate(model)
    bias = nn.Parameter(torch.zeros(1, 1, 5, 5))
    model.blocks[0].attn(x, bias).square().sum().backward()
    assert bias.grad is not None and bias.grad.abs().max() > 0


# --- modulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modulation_cache_is_invalidated(mode: Callable[[], Any]) -> None:
    """Modulation is computed once per generation, and again after a change of the embedding or of a weight."""
    model = plain(depth=2)
    other = copy.deepcopy(model)
    mk.accelerate(model)
    rows: list[int] = []
    model.blocks[0].ada_lin.register_forward_hook(lambda module, args, out: rows.append(len(out)))

    def scale(one: Any, x: Tensor, cond: Tensor) -> Tensor:
        for block in one.blocks:
            x = block(x, cond, None)
        return x

    def caching(on: bool) -> None:
        for block in [*model.blocks, *other.blocks]:
            block.attn.kv_caching(on)

    with mode():
        cond, x = normal(2, 64) + 0, normal(2, 3, 64)
        caching(True)
        for _ in range(3):
            assert close(scale(model, x, cond), scale(other, x, cond))
        assert rows == [2]
        cond.mul_(-1)
        assert close(scale(model, x, cond), scale(other, x, cond)) and rows == [2, 2]
        for one in (model, other):
            one.blocks[0].ada_lin[1].weight.add_(0.1)
        assert close(scale(model, x, cond), scale(other, x, cond)) and rows == [2, 2, 2]
        for one in (model, other):
            one.blocks[0].ada_lin[1].weight = nn.Parameter(-one.blocks[0].ada_lin[1].weight)
        assert close(scale(model, x, cond), scale(other, x, cond))
        for one in (model, other):  # between two generations; .data does not increment the version counter
            one.blocks[0].ada_lin[1].weight.data.mul_(2)
        caching(True)
        assert close(scale(model, x, cond), scale(other, x, cond))


def test_modulation_that_cannot_be_cached() -> None:
    with torch.inference_mode():
        layer, cond = nn.Sequential(nn.SiLU(), nn.Linear(3, 3)), torch.randn(2, 3)
        before = cached_call(layer, cond)
        layer[1].weight.add_(1)
        assert torch.equal(cached_call(layer, cond), layer(cond)) and not torch.equal(cached_call(layer, cond), before)
    dropping = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
    cond = torch.randn(50, 3)
    with torch.no_grad():
        assert not torch.equal(cached_call(dropping, cond), cached_call(dropping, cond))
        with torch.autocast("cpu", torch.bfloat16):
            layer = nn.Sequential(nn.Linear(3, 3))
            assert cached_call(layer, cond).dtype == torch.bfloat16
        assert cached_call(layer, cond).dtype == torch.float32


def test_no_caching_during_cuda_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph must record the layer, and capture does not allow the synchronization that reading a mask takes."""
    monkeypatch.setattr("mvar_kernels.patching.cache.capturing", lambda device: True)
    layer, cond, ran = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3), []
    layer.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        cached_call(layer, cond), cached_call(layer, cond)
    assert ran == [1, 1]
    assert schedule_of(torch.zeros(1, 1, 4, 4)) is None
