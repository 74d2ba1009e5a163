"""Tests of accelerate with global settings, transforms, distributed training and unusual models."""

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

import mvar_kernels as mk
from mvar_kernels import precision
from mvar_kernels.dispatch import native
from tests.helpers.patched import HOOKS, LABELS, accelerated, close, normal, plain
from tests.helpers.plain_mamba2 import PlainMamba2
from tests.helpers.plain_var import PlainVAR, SelfAttention

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")


# --- the trial run does not modify the model or global state ----------------------------------------------------------


class Stateful(nn.Module):
    """A feed-forward network whose forward modifies its buffers, attributes and random state."""

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


def test_trial_does_not_modify_model() -> None:
    model = plain(depth=2)
    for i, block in enumerate(model.blocks):
        block.ffn = Stateful(64).train(i == 0)
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
            if isinstance(module, Stateful):
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


def test_deepcopy_that_shares_state_is_not_replaced() -> None:
    model = plain(depth=2)
    norm = nn.BatchNorm1d(64)
    model.blocks[0].ffn = nn.Sequential(norm)
    model.blocks[0].ffn.forward = lambda x: norm(x.transpose(1, 2)).transpose(1, 2)  # deepcopy does not copy functions

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
def test_global_settings(setting: str) -> None:
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


def test_model_created_in_inference_mode() -> None:
    with torch.inference_mode():
        model = plain()
        expected = model(LABELS, normal(2, 4, 32))
        assert len(mk.accelerate(model).replaced) == 3
        assert close(model(LABELS, normal(2, 4, 32)), expected)
    mk.restore(model)
    assert len(mk.accelerate(model).replaced) == 3  # outside inference mode
    with torch.no_grad():
        assert close(model(LABELS, normal(2, 4, 32)), expected)


# --- unusual models ---------------------------------------------------------------------------------------------------


def test_not_a_module_error() -> None:
    for call in (mk.accelerate, mk.restore):
        for wrong, word in ((None, "NoneType"), ("model", "str"), (PlainVAR, "the class PlainVAR"), ({}, "dict")):
            with pytest.raises(TypeError, match=rf"expected a torch.nn.Module, got {word}"):
                call(wrong)  # type: ignore[arg-type]


def test_unusual_models() -> None:
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
        expected = model(LABELS, normal(2, 4, 32))
        report = mk.accelerate(model)
        if name == "attn.proj":  # called as a module
            assert "blocks.0.attn" in report.replaced
        else:
            assert "linear layer" in report.left["blocks.0"]
        assert close(model(LABELS, normal(2, 4, 32)), expected)


def test_compiled_submodule() -> None:
    model, inputs = plain(), (normal(2, 5, 64), normal(2, 64))
    expected = model.head_nm(*inputs)
    wrapped = torch.compile(model.head_nm, backend="eager", fullgraph=True)
    for act in (mk.accelerate, mk.restore):
        act(wrapped)
        assert close(wrapped(*inputs), expected)
    assert mk.accelerate(wrapped).replaced == {"_orig_mod": "adaln"} and accelerated(model) == ["head_nm"]


def test_function_transforms() -> None:
    """Per-sample gradients and forward-mode differentiation use the original forward."""
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
def test_checkpoint_with_dropout_and_frozen_weights(reentrant: bool) -> None:
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


def test_empty_batch() -> None:
    model = plain()
    expected = model(LABELS[:0], normal(0, 4, 32))
    mk.accelerate(model)
    assert model(LABELS[:0], normal(0, 4, 32)).shape == expected.shape
    assert model.blocks[0].attn(normal(2, 0, 64), None).shape == (2, 0, 64)


@pytest.mark.parametrize("shared", [False, True])
def test_modulation_dtype_promotion(shared: bool) -> None:
    """A bfloat16 input and a float32 embedding give a float32 output, as in the original; ada_lin runs once."""
    model, ran = plain(shared_aln=shared), []
    block, x = model.blocks[0], normal(2, 5, 64).bfloat16()
    cond = normal(2, 1, 6, 64) if shared else normal(2, 64)
    expected = block(x, cond, None), model.head_nm(x, normal(2, 64))
    mk.accelerate(model)
    model.head_nm.ada_lin.register_forward_hook(lambda *_: ran.append(1))
    got = block(x, cond, None), model.head_nm(x, normal(2, 64))
    assert all(a.dtype == torch.float32 and close(a, b, 2**-7) for a, b in zip(got, expected, strict=True))
    assert ran == [1]


def test_mamba2_hooks() -> None:
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
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def grads_of(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(LABELS, inputs).square().sum().backward()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def test_ddp_and_fsdp(process_group: None) -> None:
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
    report = mk.accelerate(model)  # after fully_shard, sharded modules are not replaced
    assert "before fully_shard" in report.left["blocks.0"]
    assert all(close(g, expected[n], 1e-3) for n, g in grads_of(model, inputs).items())
