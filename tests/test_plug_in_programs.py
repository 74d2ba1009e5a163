"""accelerate inside other people's programs: caches, hooks, classes, settings and models that are not plain."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import mvar_kernels as mk
from mvar_kernels import precision
from mvar_kernels.backends import native
from mvar_kernels.remembered import made_once, schedule_of
from mvar_kernels.replacements import Replacement
from tests.plain_mamba2 import PlainMamba2
from tests.plain_var import PlainVAR, SelfAttention, randomised

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built: there is nothing to plug in")
LABELS = torch.tensor([3, 7])
TOLERANCE = 1e-4  # as in test_plug_in.py, through one block of narrower layers


def plain(heads: int = 1, patch_nums: tuple[int, ...] = (1, 2), depth: int = 1, **sizes: Any) -> PlainVAR:
    torch.manual_seed(0)
    return randomised(PlainVAR(depth, patch_nums, heads=heads, **sizes))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return got.dtype == expected.dtype and bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def accelerated(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Replacement)]


# --- the key/value cache ----------------------------------------------------------------------------------------------

LENGTHS = (1, 4, 9, 16)
MASK = torch.where(
    torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[:, None]
    >= torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
    0.0,
    -torch.inf,
)[None, None]
SOFT = MASK.nan_to_num(neginf=-3.0)  # not VAR's


def masked_prefix(attn: Any, x: Tensor) -> Iterator[Tensor]:
    """CoDe's refiner."""
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


def another_mask_first(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :14], attn_bias=SOFT[:, :, :14, :14])
    yield attn(x[:, 14:], attn_bias=None)


def off_and_on_again(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :5], attn_bias=None)
    attn.kv_caching(False)
    yield attn(x, attn_bias=MASK)
    attn.kv_caching(True)
    yield attn(x[:, :1], attn_bias=None)
    attn.cached_k = attn.cached_v = None
    yield attn(x[:1, :5], attn_bias=None)


def cut_and_expanded(attn: Any, x: Tensor) -> Iterator[Tensor]:
    """Programs that use the cache themselves."""
    attn.kv_caching(True)
    yield attn(x[:1, :9], attn_bias=None)
    attn.cached_k, attn.cached_v = (t[:, :, :5].expand(2, -1, -1, -1) for t in (attn.cached_k, attn.cached_v))
    yield attn(x[:, 5:14], attn_bias=None)
    attn.cached_k, attn.cached_v = attn.cached_k[:, :, :0], attn.cached_v[:, :, :0]
    yield attn(x[:, :5], attn_bias=None)


def hooked_in_the_middle(attn: Any, x: Tensor) -> Iterator[Tensor]:
    attn.kv_caching(True)
    yield attn(x[:, :5], attn_bias=None)
    handle = attn.mat_qkv.register_forward_hook(lambda *_: None)  # so that the next call goes the old way
    yield attn(x[:, 5:14], attn_bias=None)
    handle.remove()
    yield attn(x[:, 14:], attn_bias=None)


ORDERS = (
    masked_prefix,
    prefix_in_two_calls,
    mask_after_cached,
    boolean_prefix,
    another_mask_first,
    off_and_on_again,
    cut_and_expanded,
    hooked_in_the_middle,
)


@pytest.mark.parametrize("norm", [True, False], ids=["qk_norm", "no_qk_norm"])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_the_cache_in_every_order_of_calls(heads: int, norm: bool) -> None:
    """The same outputs, and the same keys and values in the cache, whoever looks."""
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


def test_accelerate_and_restore_in_the_middle_of_a_generation() -> None:
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
    """As VAR with xformers: the cache is (B, L, H, D)."""

    using_xform = True

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        for name in ("cached_k", "cached_v"):
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).transpose(1, 2))
        out = super().forward(x, attn_bias)
        for name in ("cached_k", "cached_v"):
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).transpose(1, 2))
        return out


def test_both_layouts_of_the_cache() -> None:
    model, x = plain(2, (1, 2, 3, 4)), normal(2, 30, 128)
    attn: Any = model.blocks[0].attn
    attn.__class__ = TokensFirst
    with torch.no_grad():
        expected = [*another_mask_first(attn, x), attn.cached_k]
        assert "blocks.0.attn" in mk.accelerate(model).replaced
        assert all(map(close, [*another_mask_first(attn, x), attn.cached_k], expected))

    class Unmarked(TokensFirst):
        using_xform = False

    attn.__class__ = Unmarked  # a layout of which the module says nothing
    assert "does not compute" in mk.accelerate(model).left["blocks.0.attn"]


def test_a_bias_that_learns_gets_its_gradient() -> None:
    """At zero it looks like a mask under which everybody sees everybody."""
    model, x = plain(), normal(2, 5, 64)
    mk.accelerate(model)
    bias = nn.Parameter(torch.zeros(1, 1, 5, 5))
    model.blocks[0].attn(x, bias).square().sum().backward()
    assert bias.grad is not None and bias.grad.abs().max() > 0


# --- modulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modulation_once_a_generation_and_never_stale(mode: Callable[[], Any]) -> None:
    """Whatever changes in place between two scales, the embedding or a weight, and whoever empties the cache."""
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
        for one in (model, other):  # what no version counts, between two generations
            one.blocks[0].ada_lin[1].weight.data.mul_(2)
        caching(True)
        assert close(scale(model, x, cond), scale(other, x, cond))


def test_modulation_that_cannot_be_known_to_stay_runs_every_time() -> None:
    with torch.inference_mode():
        layer, cond = nn.Sequential(nn.SiLU(), nn.Linear(3, 3)), torch.randn(2, 3)
        before = made_once(layer, cond)
        layer[1].weight.add_(1)
        assert torch.equal(made_once(layer, cond), layer(cond)) and not torch.equal(made_once(layer, cond), before)
    dropping = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
    cond = torch.randn(50, 3)
    with torch.no_grad():
        assert not torch.equal(made_once(dropping, cond), made_once(dropping, cond))
        with torch.autocast("cpu", torch.bfloat16):
            layer = nn.Sequential(nn.Linear(3, 3))
            assert made_once(layer, cond).dtype == torch.bfloat16
        assert made_once(layer, cond).dtype == torch.float32


def test_under_capture_nothing_is_remembered_or_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's CUDA graph has to hold the layer, and may not wait for a mask."""
    monkeypatch.setattr("mvar_kernels.remembered.capturing", lambda device: True)
    layer, cond, ran = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3), []
    layer.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        made_once(layer, cond), made_once(layer, cond)
    assert ran == [1, 1]
    assert schedule_of(torch.zeros(1, 1, 4, 4)) is None


# --- hooks and replaced forwards --------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "kwargs": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "pre": lambda m, f: m.register_forward_pre_hook(f),
    "pre kwargs": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.parametrize(
    "child", ["blocks.0.ln_wo_grad", "blocks.0.drop_path", "head_nm.ln_wo_grad", "blocks.0.attn.proj"]
)
def test_hooks_are_called_as_before(child: str) -> None:
    """As often, with the same inputs; whether they come before accelerate, or after it."""
    seen: list[list[tuple[int, ...]]] = []
    now: list[tuple[int, ...]] = []
    for when in ("plain", "before", "after"):
        model = plain(drop_path=0.1)
        model.requires_grad_(False)
        if when == "after":
            assert len(mk.accelerate(model).replaced) == 3
        now.clear()
        for hook in HOOKS.values():
            hook(model.get_submodule(child), lambda module, first, *rest: now.append(tuple(first[0].shape)))
        if when == "before":
            report = mk.accelerate(model)
            parent = child.rpartition(".")[0]
            assert (parent in report.left) == (child != "blocks.0.attn.proj"), report
            assert "has hooks" in report.left.get(parent, "has hooks")
        model(LABELS, normal(2, 4, 32).requires_grad_()).sum().backward()
        seen.append(list(now))
    assert seen[0] and seen[0] == seen[1] == seen[2]


def test_what_is_put_on_a_bypassed_child_later_has_its_effect() -> None:
    def twice(module: nn.Module) -> None:
        before = module.forward
        module.forward = lambda *args, **options: 2 * before(*args, **options)

    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    changes: dict[str, Callable[[PlainVAR], Any]] = {
        "hook": lambda m: m.blocks[0].ln_wo_grad.register_forward_hook(lambda module, args, out: 2 * out),
        "forward": lambda m: twice(m.blocks[0].ln_wo_grad),
        "class": lambda m: setattr(m.blocks[0].ln_wo_grad, "__class__", Doubled),
        "another": lambda m: setattr(m.blocks[0], "ln_wo_grad", randomised(nn.LayerNorm(64))),
        "drop_path": lambda m: setattr(m.blocks[0], "drop_path", nn.Softsign()),
        "head": lambda m: twice(m.head_nm.ln_wo_grad),
        "proj": lambda m: twice(m.blocks[0].attn.proj),
        "parametrized": lambda m: parametrize.register_parametrization(m.blocks[0].attn.mat_qkv, "weight", Half()),
        "of the part": lambda m: twice(m.head_nm),
    }
    for name, change in changes.items():
        results = []
        for accelerate in (False, True):
            model = plain()
            if accelerate:
                mk.accelerate(model)
            change(model)
            results.append(model(LABELS, normal(2, 4, 32)))
        assert close(results[1], results[0]), name
        assert not close(plain()(LABELS, normal(2, 4, 32)), results[0]), name


def test_a_forward_of_the_class_that_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = plain(), normal(2, 5, 64)
    mk.accelerate(model)
    before = SelfAttention.forward
    monkeypatch.setattr(SelfAttention, "forward", lambda self, x, attn_bias: 2 * before(self, x, attn_bias))
    got = model.blocks[0].attn(x, None)
    assert "goes the old way" in mk.accelerate(model).left["blocks.0.attn"]
    mk.restore(model)
    assert torch.equal(got, model.blocks[0].attn(x, None))


def test_global_hooks() -> None:
    model, names = plain(), []
    mk.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: names.append(type(module).__name__)
    )
    try:
        model(LABELS, normal(2, 4, 32))
        assert names.count("LayerNorm") == 3
        names.clear()
        report = mk.accelerate(plain())  # no trial, which would run the original twice, and the hooks
        assert not names and not report.replaced and "global hooks" in report.left["blocks.0"]
        assert "global hooks" in mk.accelerate(model).left["blocks.0"]
    finally:
        handle.remove()
    assert len(mk.accelerate(model).replaced) == 3


# --- other classes ----------------------------------------------------------------------------------------------------


class Same(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w


def put_parametrization(model: Any) -> None:
    parametrize.register_parametrization(model.blocks[0].attn, "q_bias", Same())


def drop_parametrization(model: Any) -> None:
    parametrize.remove_parametrizations(model.blocks[0].attn, "q_bias")


@pytest.mark.parametrize("order", ["parametrized first", "accelerated first"])
@pytest.mark.parametrize("off", ["restored first", "plain first"])
def test_parametrizations_and_accelerate_in_every_order(order: str, off: str) -> None:
    model, inputs = plain(), normal(2, 4, 32)
    expected, types = model(LABELS, inputs), [type(m) for m in model.modules()]
    acts = [put_parametrization, mk.accelerate]
    for act in acts if order == "parametrized first" else acts[::-1]:
        act(model)  # type: ignore[operator]
        assert close(model(LABELS, inputs), expected)
    assert accelerated(model) == ["blocks.0", "blocks.0.attn", "head_nm"]
    assert parametrize.is_parametrized(model.blocks[0].attn, "q_bias")
    undo = [mk.restore, drop_parametrization]
    for act in undo if off == "restored first" else undo[::-1]:
        act(model)
        assert close(model(LABELS, inputs), expected)
    assert [type(m) for m in model.modules()] == types


def test_restore_takes_its_own_class_from_below_a_users() -> None:
    model, other = plain(depth=2), plain()
    mk.accelerate(model), mk.accelerate(other)
    before: Any = type(model.blocks[0].attn)

    class Mine(before):  # type: ignore[misc]
        factor = 2.0

        def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
            return self.factor * super().forward(x, attn_bias)

        @property
        def doubled(self) -> float:
            return 2 * self.factor

        @classmethod
        def name(cls) -> str:
            return super().__name__ if hasattr(super(), "__name__") else cls.__name__

    for block in (*model.blocks, *other.blocks):
        block.attn.__class__ = Mine
    x = normal(2, 5, 64)
    expected = [block.attn(x, None) for block in (*model.blocks, *other.blocks)]
    mk.restore(model)
    mk.restore(model)  # twice is once
    assert not accelerated(model) and accelerated(other)
    assert type(model.blocks[0].attn) is type(model.blocks[1].attn)
    assert type(model.blocks[0].attn).__mro__[1] is SelfAttention and model.blocks[0].attn.doubled == 4
    assert all(map(close, (block.attn(x, None) for block in (*model.blocks, *other.blocks)), expected))


def test_restore_of_a_part_or_a_copy_leaves_the_rest() -> None:
    model = plain(depth=2)
    mk.accelerate(model)
    other = copy.deepcopy(model)
    mk.restore(model.blocks[0])
    assert accelerated(model) == ["blocks.1", "blocks.1.attn", "head_nm"]
    assert len(accelerated(other)) == 5
    mk.restore(other)
    assert not accelerated(other) and accelerated(model)


def test_a_class_that_cannot_be_mixed_is_a_reason_and_nothing_is_half_replaced() -> None:
    class Counted(type):
        pass

    class Closed(SelfAttention):
        def __init_subclass__(cls, **options: Any) -> None:
            raise TypeError("no subclasses, please")

    model = plain(depth=2)
    model.blocks[1].attn.__class__ = Closed
    report = mk.accelerate(model)
    assert "no subclasses" in report.left["blocks.1.attn"] and "blocks.0.attn" in report.replaced

    class Stopping(SelfAttention):
        def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
            raise KeyboardInterrupt

    model = plain(depth=2)
    model.blocks[1].attn.__class__ = Stopping
    with pytest.raises(KeyboardInterrupt):
        mk.accelerate(model)
    assert not accelerated(model)


# --- the trial leaves the live model and the program alone ------------------------------------------------------------


class Restless(nn.Module):
    """A feed-forward network that changes whatever it has whenever it runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.plain, self.calls, self.log, self.table = torch.zeros(3), 0, [torch.zeros(2)], {"last": torch.zeros(1)}
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden.add_(1), self.plain.add_(1), self.log[0].add_(1)
        self.log.append(x.detach())
        self.table["last"] = x.detach()
        torch.rand(1, generator=self.generator), torch.rand(1), random.random()
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


def test_a_trial_changes_nothing_of_the_live_model() -> None:
    model = plain(depth=2)
    for i, block in enumerate(model.blocks):
        block.ffn = Restless(64).train(i == 0)
    ran: list[str] = []
    for module in model.modules():
        for hook in HOOKS.values():
            if not isinstance(module, nn.LayerNorm | nn.Identity) and type(module).__name__ != "Linear":
                hook(module, lambda *_: ran.append("hook"))
        module.register_state_dict_post_hook(lambda *_: None)
    attn: Any = model.blocks[0].attn
    attn.caching, attn.cached_k, attn.cached_v = True, normal(2, 1, 3, 64), normal(2, 1, 3, 64)
    model.blocks[1].attn.q_bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    hooks = {id(m): {k: len(v) for k, v in vars(m).items() if "_hooks" in k and v} for m in model.modules()}

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {n: (t.clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
        found |= {f"{n}.grad": p.grad for n, p in model.named_parameters()}
        for name, module in model.named_modules():
            found[f"{name}.training"] = module.training
            if isinstance(module, Restless):
                own = {k: v for k, v in vars(module).items() if k in ("calls", "plain", "log", "table")}
                found[name] = copy.deepcopy(own) | {
                    "rng": module.generator.get_state(),
                    "hidden": module.hidden.clone(),
                }
        found["cache"] = attn.caching, attn.cached_k.clone(), attn.cached_v.clone()
        found["rng"] = torch.get_rng_state(), random.getstate()
        return found

    before = state()
    report = mk.accelerate(model)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert not ran and "blocks.0.attn" in report.replaced and "blocks.1" in report.replaced
    assert hooks == {id(m): {k: len(v) for k, v in vars(m).items() if "_hooks" in k and v} for m in model.modules()}


def test_a_copy_that_reaches_the_live_model_is_noticed() -> None:
    model = plain(depth=2)
    norm = nn.BatchNorm1d(64)
    model.blocks[0].ffn = nn.Sequential(norm)
    model.blocks[0].ffn.forward = lambda x: norm(x.transpose(1, 2)).transpose(1, 2)  # a function is not copied

    class Single(SelfAttention):
        def __deepcopy__(self, memo: Any) -> "Single":
            return self

    model.blocks[1].attn.__class__ = Single
    before = norm.running_mean.clone()
    report = mk.accelerate(model)
    assert "writes to the model itself" in report.left["blocks.0"] and torch.equal(norm.running_mean, before)
    assert "deepcopy is not a copy" in report.left["blocks.1.attn"]


@pytest.mark.parametrize(
    "setting", ["default dtype", "default device", "autocast", "no_grad", "inference", "deterministic", "medium"]
)
def test_the_programs_settings_make_no_difference(setting: str) -> None:
    contexts: dict[str, Callable[[], Any]] = {
        "default device": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    model = plain()
    before = precision.settings()
    with contexts.get(setting, nullcontext)():
        try:
            if setting == "medium":
                torch.set_float32_matmul_precision("medium")
            if setting == "default dtype":
                torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(setting == "deterministic")
            report = mk.accelerate(model)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            precision.restore(before)
    assert list(report.replaced) == ["blocks.0", "blocks.0.attn", "head_nm"], report


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = plain()
        expected = model(LABELS, normal(2, 4, 32))
        assert len(mk.accelerate(model).replaced) == 3
        assert close(model(LABELS, normal(2, 4, 32)), expected)
    mk.restore(model)
    assert len(mk.accelerate(model).replaced) == 3  # outside, too
    with torch.no_grad():
        assert close(model(LABELS, normal(2, 4, 32)), expected)


# --- models of many makes ---------------------------------------------------------------------------------------------


def test_what_is_no_module_is_refused_in_words() -> None:
    for call in (mk.accelerate, mk.restore):
        for wrong, word in ((None, "NoneType"), ("model", "str"), (PlainVAR, "the class PlainVAR"), ({}, "dict")):
            with pytest.raises(TypeError, match=rf"expected a torch.nn.Module, got {word}"):
                call(wrong)  # type: ignore[arg-type]


def test_odd_models() -> None:
    class Raising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = plain().blocks[0]

        @property
        def autoregressive_infer_cfg(self) -> None:
            raise RuntimeError("not on Sundays")

        attn = ffn = ada_lin = ln_wo_grad = autoregressive_infer_cfg

    assert len(mk.accelerate(Raising()).replaced) == 2
    assert "no part that looks" in str(mk.accelerate(nn.Module()))

    model = plain()
    model.blocks.append(model.blocks[0])  # tied
    assert len(mk.accelerate(model).replaced) == 3
    expected = copy.deepcopy(model)
    mk.restore(expected)
    assert close(model(LABELS, normal(2, 4, 32)), expected(LABELS, normal(2, 4, 32)))

    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x)

    for name in ("attn.proj", "ada_lin.1"):
        model = plain()
        parent, _, child = name.rpartition(".")
        block = model.blocks[0]
        setattr(block.get_submodule(parent), child, Lora(block.get_submodule(name)))  # type: ignore[arg-type]
        part = "blocks.0.attn" if name == "attn.proj" else "blocks.0"
        assert "linear layer" in mk.accelerate(model).left[part]


def test_a_compiled_part() -> None:
    model, inputs = plain(), (normal(2, 5, 64), normal(2, 64))
    expected = model.head_nm(*inputs)
    wrapped = torch.compile(model.head_nm, backend="eager", fullgraph=True)
    for act in (mk.accelerate, mk.restore):
        act(wrapped)
        assert close(wrapped(*inputs), expected)
    assert mk.accelerate(wrapped).replaced == {"_orig_mod": "adaln"} and accelerated(model) == ["head_nm"]


def test_function_transforms() -> None:
    """Gradients of each sample, and forward-mode differentiation: through the original."""
    model, inputs = plain(), normal(2, 4, 32)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (LABELS[:1], row[None])).square().mean()

    def run() -> list[Tensor]:
        samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
        with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = torch.autograd.forward_ad.make_dual(inputs, inputs)
            tangent = torch.autograd.forward_ad.unpack_dual(model(LABELS, dual)).tangent
        return [samples["blocks.0.attn.mat_qkv.weight"], samples["blocks.0.ada_lin.1.weight"], tangent]

    expected = run()
    mk.accelerate(model)
    assert all(map(close, run(), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_dropout_and_frozen_weights(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    results = []
    for accelerate in (False, True):
        model = plain(drop_path=0.5).train()
        block: Any = model.blocks[0]
        block.attn.proj_drop, block.ffn.drop = nn.Dropout(0.3, inplace=True), nn.Dropout(0.3)
        block.attn.mat_qkv.requires_grad_(False)
        if accelerate:
            assert len(mk.accelerate(model).replaced) == 3
        x, cond = normal(2, 5, 64).requires_grad_(), normal(2, 64).requires_grad_()
        torch.manual_seed(4)
        out = checkpoint(block, x, cond, model.attn_bias_for_masking, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append([out, x.grad, cond.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
        assert block.attn.mat_qkv.weight.grad is None
    assert all(map(close, results[1], results[0]))


def test_empty_batches() -> None:
    model = plain()
    expected = model(LABELS[:0], normal(0, 4, 32))
    mk.accelerate(model)
    assert model(LABELS[:0], normal(0, 4, 32)).shape == expected.shape
    assert model.blocks[0].attn(normal(2, 0, 64), None).shape == (2, 0, 64)


@pytest.mark.parametrize("shared", [False, True])
def test_modulation_of_a_wider_dtype(shared: bool) -> None:
    """bfloat16 rows and a float32 embedding: as before, the rows become float32, and the layer runs once."""
    model, ran = plain(shared_aln=shared), []
    block, x = model.blocks[0], normal(2, 5, 64).bfloat16()
    cond = normal(2, 1, 6, 64) if shared else normal(2, 64)
    expected = block(x, cond, None), model.head_nm(x, normal(2, 64))
    mk.accelerate(model)
    model.head_nm.ada_lin.register_forward_hook(lambda *_: ran.append(1))
    got = block(x, cond, None), model.head_nm(x, normal(2, 64))
    assert all(a.dtype == torch.float32 and close(a, b, 2**-7) for a, b in zip(got, expected, strict=True))
    assert ran == [1]


def test_mamba2_and_hooks() -> None:
    layer, u = PlainMamba2(64), normal(2, 6, 64)
    holder, seen = nn.ModuleList([layer]), []
    assert mk.accelerate(holder).replaced
    expected = layer(u)
    handle = layer.norm.register_forward_hook(lambda *_: seen.append(1))
    assert close(layer(u), expected) and seen == [1]
    state = layer.allocate_inference_cache(2)
    for t in range(2):
        layer.step(u[:, t : t + 1], *state)
    assert seen == [1, 1, 1]
    handle.remove()
    other = layer.allocate_inference_cache(2)
    out = layer.step(u[:, :2], *other)[0]
    assert len(seen) == 3 and close(other[1], state[1]) and close(out, expected[:, :2])


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def grads_of(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(LABELS, inputs).square().sum().backward()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def test_training_under_ddp_and_fsdp(one_process: None) -> None:
    inputs = normal(2, 4, 32)
    expected = grads_of(plain(), inputs)
    model = plain()
    mk.accelerate(model)
    found = [grads_of(DistributedDataParallel(model), inputs)]
    mk.accelerate(wrapped := DistributedDataParallel(plain()))
    assert len(accelerated(wrapped)) == 3
    found.append(grads_of(wrapped, inputs))

    model = plain()
    mk.accelerate(model)
    for sharded in (model.blocks[0].attn, model.blocks[0], model):
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))  # type: ignore[arg-type]
    assert len(accelerated(model)) == 3
    found.append(grads_of(model, inputs))
    mk.restore(model)
    assert not accelerated(model) and all(isinstance(m, FSDPModule) for m in (model.blocks[0].attn, model.blocks[0]))
    assert isinstance(model.blocks[0].attn, SelfAttention)
    found.append(grads_of(model, inputs))
    for grads in found:
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert close(grads[name], grad, 1e-3), name

    model = plain()
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (1,)))
    report = mk.accelerate(model)  # too late for what is sharded
    assert "before fully_shard" in report.left["blocks.0"]
    assert all(close(g, expected[n], 1e-3) for n, g in grads_of(model, inputs).items())
