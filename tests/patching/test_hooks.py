"""Tests of accelerate with hooks, patched forwards, parametrizations and subclasses."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mvar_kernels as mk
from mvar_kernels.dispatch import native
from mvar_kernels.patching.patches.base import Patch
from tests.helpers.patched import HOOKS, LABELS, accelerated, close, normal, plain
from tests.helpers.plain_var import PlainVAR, SelfAttention, randomised

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")


# --- hooks and replaced forwards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "child", ["blocks.0.ln_wo_grad", "blocks.0.drop_path", "head_nm.ln_wo_grad", "blocks.0.attn.proj"]
)
def test_hooks_on_children(child: str) -> None:
    """Hooks registered before or after accelerate are called as often as in the original, with the same inputs."""
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


def test_forward_wrapped_after_accelerate() -> None:
    """As ScaleKV and other programs do: `restore` gives back the original forward that the wrapper calls."""
    model, inputs = plain(), (LABELS, normal(2, 4, 32))
    expected, attn = model(*inputs), model.blocks[0].attn
    mk.accelerate(model)
    attn.inner = attn.forward
    attn.forward = MethodType(lambda self, *args, **options: 2 * self.inner(*args, **options), attn)
    doubled = model(*inputs)
    assert not close(doubled, expected) and isinstance(attn, Patch)
    copied = copy.deepcopy(model)
    for wrapped in (model, copied):
        mk.restore(wrapped)
        assert close(wrapped(*inputs), doubled)
        assert wrapped.blocks[0].attn.inner == MethodType(SelfAttention.forward, wrapped.blocks[0].attn)
    assert "on the instance" in mk.accelerate(model).left["blocks.0.attn"]


def test_child_modified_after_accelerate() -> None:
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


def test_class_forward_patched_after_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = plain(), normal(2, 5, 64)
    mk.accelerate(model)
    before = SelfAttention.forward
    monkeypatch.setattr(SelfAttention, "forward", lambda self, x, attn_bias: 2 * before(self, x, attn_bias))
    got = model.blocks[0].attn(x, None)
    assert "the original forward runs" in mk.accelerate(model).left["blocks.0.attn"]
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
        report = mk.accelerate(plain())  # no trial run, which would call the hooks
        assert not names and not report.replaced and "global hooks" in report.left["blocks.0"]
        assert "global hooks" in mk.accelerate(model).left["blocks.0"]
    finally:
        handle.remove()
    assert len(mk.accelerate(model).replaced) == 3


# --- other classes ----------------------------------------------------------------------------------------------------


class Same(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w


def add_parametrization(model: Any) -> None:
    parametrize.register_parametrization(model.blocks[0].attn, "q_bias", Same())


def remove_parametrization(model: Any) -> None:
    parametrize.remove_parametrizations(model.blocks[0].attn, "q_bias")


@pytest.mark.parametrize("order", ["parametrized first", "accelerated first"])
@pytest.mark.parametrize("off", ["restored first", "plain first"])
def test_parametrizations(order: str, off: str) -> None:
    model, inputs = plain(), normal(2, 4, 32)
    expected, types = model(LABELS, inputs), [type(m) for m in model.modules()]
    acts = [add_parametrization, mk.accelerate]
    for act in acts if order == "parametrized first" else acts[::-1]:
        act(model)  # type: ignore[operator]
        assert close(model(LABELS, inputs), expected)
    assert accelerated(model) == ["blocks.0", "blocks.0.attn", "head_nm"]
    assert parametrize.is_parametrized(model.blocks[0].attn, "q_bias")
    undo = [mk.restore, remove_parametrization]
    for act in undo if off == "restored first" else undo[::-1]:
        act(model)
        assert close(model(LABELS, inputs), expected)
    assert [type(m) for m in model.modules()] == types


def test_restore_keeps_user_subclass() -> None:
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
    mk.restore(model)  # restore is idempotent
    assert not accelerated(model) and accelerated(other)
    assert type(model.blocks[0].attn) is type(model.blocks[1].attn)
    assert type(model.blocks[0].attn).__mro__[1] is SelfAttention and model.blocks[0].attn.doubled == 4
    assert all(map(close, (block.attn(x, None) for block in (*model.blocks, *other.blocks)), expected))


def test_restore_submodule_or_copy() -> None:
    model = plain(depth=2)
    mk.accelerate(model)
    other = copy.deepcopy(model)
    mk.restore(model.blocks[0])
    assert accelerated(model) == ["blocks.1", "blocks.1.attn", "head_nm"]
    assert len(accelerated(other)) == 5
    mk.restore(other)
    assert not accelerated(other) and accelerated(model)


def test_accelerate_error_replaces_nothing() -> None:
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
