"""Tests wrapped, parametrized, pruned, quantized and hooked models and tokenizers, and those with adapters."""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import mvar
from mvar.inference.prepare import custom_layer_of
from mvar.models.weights import fingerprint

CONFIG = mvar.TokenizerConfig((1, 2, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 2), num_res_blocks=1)


def pair(**sizes: Any) -> tuple[mvar.Model, mvar.Tokenizer]:
    model, tokenizer = mvar.build(num_classes=10, tokenizer=CONFIG, depth=2, **sizes)
    return mvar.init_weights(model, alng=1.0, hd=1.0, seed=4), tokenizer


def generate(model: nn.Module, tokenizer: nn.Module, **options: Any) -> mvar.Generated:
    how: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "dtype": torch.float32, **options}
    return mvar.generate(model, tokenizer, [1, 7], **how)  # type: ignore[arg-type]


@torch.no_grad()
def expected_images(tokenizer: mvar.Tokenizer, tokens: Tensor) -> Tensor:
    return (tokenizer.decode(tokens) + 1) / 2


@pytest.fixture
def single_process_group() -> Iterator[None]:
    """A process group with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


class Adapter(nn.Module):
    """A LoRA adapter that wraps a layer as in peft."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = (
            nn.Linear(base_layer.in_features, 4, bias=False),
            nn.Linear(4, base_layer.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + 3 * self.up(self.down(x))
        return out


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)  # type: ignore[operator, union-attr]


def new_weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr, operator]


REWEIGHTED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "weight_norm": new_weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "prune twice": lambda layer: [prune.random_unstructured(layer, "weight", amount=0.3) for _ in range(2)],
}
LAYERS = {
    "model": ("blocks.1.ffn.fc1", "blocks.0.attn.mat_qkv", "blocks.0.ada_lin.1", "class_emb"),
    "tokenizer": (
        "decoder.conv_out",
        "decoder.up.1.upsample.conv",
        "quantize.quant_resi.qresi_ls.1",
        "post_quant_conv",
    ),
}


@pytest.mark.parametrize("how", REWEIGHTED)
def test_parametrized_weights(how: str, tmp_path: Path) -> None:
    """Generating, saving and loading use the parametrized weights, also if inference copies were made before."""
    model, tokenizer = pair()
    generate(model, tokenizer)  # creates the inference copies
    for module, names in ((model, LAYERS["model"]), (tokenizer, LAYERS["tokenizer"])):
        for name in names:
            REWEIGHTED[how](module.get_submodule(name))
    model.train()  # where spectral norm would update its buffers
    before = {n: t.clone() for n, t in model.state_dict().items()}
    out = generate(model, tokenizer)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    model.eval()
    # With one power iteration, spectral norm gives weights, and rounding errors, some ten times larger.
    torch.testing.assert_close(out.images, expected_images(tokenizer, out.tokens), rtol=0, atol=1e-4)
    mvar.save(tmp_path / "m.safetensors", model)
    mvar.save(tmp_path / "t.safetensors", tokenizer)
    plain = mvar.load_model(tmp_path / "m.safetensors"), mvar.load_tokenizer(tmp_path / "t.safetensors")
    again = generate(*plain)
    assert torch.equal(again.tokens, out.tokens) and torch.equal(again.images, out.images)
    inputs = tokenizer.teacher_forcing_inputs(out.tokens)
    with torch.no_grad():
        logits = [m(torch.tensor([1, 7]), inputs) for m in (model, plain[0])]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert fingerprint(plain[0]) == fingerprint(model)


def test_parametrized_non_layer_weights(tmp_path: Path) -> None:
    """Parametrized weights of the model itself, of a block and of a layer whose forward is never called."""
    model, tokenizer = pair()
    generate(model, tokenizer)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (scaled.pos_1LC, scaled.blocks[0].attn.q_bias, scaled.blocks[0].mamba.conv1d.weight):
            weight.mul_(3)
    for layer, name in (
        (model, "pos_1LC"),
        (model.blocks[0].attn, "q_bias"),
        (model.blocks[0].mamba.conv1d, "weight"),
    ):
        parametrize.register_parametrization(layer, name, Scaled())  # type: ignore[arg-type]
    assert torch.equal(generate(model, tokenizer).tokens, generate(scaled, tokenizer).tokens)


def test_torch_wrappers(single_process_group: None, tmp_path: Path) -> None:
    model, tokenizer = pair()
    right = generate(model, tokenizer)
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    in_place.blocks[0] = torch.compile(in_place.blocks[0], backend="eager")  # type: ignore[assignment]
    wrapped: dict[str, nn.Module] = {
        "compiled": torch.compile(model, backend="eager"),  # type: ignore[dict-item]
        "ddp": nn.parallel.DistributedDataParallel(model),
        "compiled ddp": torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),  # type: ignore[dict-item]
        "data parallel": nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "in place": in_place,
    }
    decoding = torch.compile(tokenizer, backend="eager")
    for name, module in wrapped.items():
        assert torch.equal(generate(module, decoding).tokens, right.tokens), name  # type: ignore[arg-type]
        mvar.save(tmp_path / "m.safetensors", module)  # type: ignore[arg-type]
        again = mvar.load_model(tmp_path / "m.safetensors").state_dict()
        assert all(torch.equal(again[n], t) for n, t in model.state_dict().items()), name
        assert custom_layer_of(model) is None and custom_layer_of(in_place) is None


def test_fsdp(single_process_group: None, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, tokenizer = pair()
    right = generate(model, tokenizer)
    sharded = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert torch.equal(generate(sharded, tokenizer).tokens, right.tokens)
    mvar.save(tmp_path / "m.safetensors", sharded)
    assert torch.equal(mvar.load_model(tmp_path / "m.safetensors").head.weight, model.head.weight)
    with torch.no_grad():
        sharded.word_embed.weight.mul_(-2)
        model.word_embed.weight.mul_(-2)
    after_a_step = generate(model, tokenizer).tokens
    assert not torch.equal(after_a_step, right.tokens)
    assert torch.equal(generate(sharded, tokenizer).tokens, after_a_step)
    labels, inputs = torch.tensor([1]), torch.randn(1, model.config.num_tokens - 1, model.config.code_dim)
    with pytest.raises(RuntimeError, match=r"fully_shard\(block.ada_lin\) before fully_shard\(block\); got DTensor"):
        sharded(labels, inputs)
    trained = copy.deepcopy(model)
    for block in trained.blocks:
        fully_shard(block.ada_lin, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    assert torch.equal(trained(labels, inputs), model(labels, inputs))
    sharded.blocks[1].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: blocks.1.ffn has a forward hook, .* sharded"):
        generate(sharded, tokenizer)
    flat = FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))
    for use in (lambda: generate(flat, tokenizer), lambda: mvar.save(tmp_path / "f.safetensors", flat)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"expected an mvar.Model.*, got a FullyShardedDataParallel"):
            use()
    assert not (tmp_path / "f.safetensors").exists()


def with_custom_layer(name: str) -> tuple[mvar.Model, mvar.Tokenizer, str, str]:
    """A pair with a custom layer, the layer's name and the expected description."""
    torch.manual_seed(0)  # adapters have random weights
    model, tokenizer = pair()
    block: Any = model.blocks[1]
    generate(model, tokenizer)  # the change comes after the inference copies
    if name == "adapter":
        block.ffn.fc2 = Adapter(block.ffn.fc2)
        return model, tokenizer, "blocks.1.ffn.fc2", "is a Adapter"
    if name == "qkv adapter":
        block.attn.mat_qkv = Adapter(block.attn.mat_qkv)
        return model, tokenizer, "blocks.1.attn.mat_qkv", "is a Adapter"
    if name == "decoder adapter":
        tokenizer.decoder.conv_out = nn.Sequential(tokenizer.decoder.conv_out, nn.Tanh())  # type: ignore[assignment]
        return model, tokenizer, "decoder.conv_out", "is a Sequential"
    if name == "quantized":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block.ffn = torch.ao.quantization.quantize_dynamic(block.ffn, {nn.Linear}, dtype=torch.qint8)
        return model, tokenizer, "blocks.1.ffn.fc1", "is a Linear of torch.ao"
    if name == "setting":
        tokenizer.decoder.conv_in.padding_mode = "circular"
        tokenizer.decoder.conv_in._reversed_padding_repeated_twice = [1, 1, 1, 1]
        return model, tokenizer, "decoder.conv_in", "has padding_mode 'circular'"
    if name == "hook":
        block.ffn.register_forward_hook(lambda module, args, out: 3 * out)
        return model, tokenizer, "blocks.1.ffn", "has a forward hook"
    if name == "pre-hook":
        tokenizer.decoder.mid.register_forward_pre_hook(lambda module, args: (-args[0],))
        return model, tokenizer, "decoder.mid", "has a forward hook"
    if name == "forward":
        forward = block.ffn.forward
        block.ffn.forward = lambda x: 3 * forward(x)
        return model, tokenizer, "blocks.1.ffn", "has a method replaced"
    assert name == "subclass"

    class Tripled(mvar.MVAR):
        def start(self, cond: Tensor) -> Tensor:
            return 3 * super().start(cond)

    model.__class__ = Tripled
    return model, tokenizer, "it", "is a Tripled"


CHANGES = "adapter, qkv adapter, decoder adapter, quantized, setting, hook, pre-hook, forward, subclass".split(", ")


@pytest.mark.parametrize("name", CHANGES)
def test_custom_layer(name: str, tmp_path: Path) -> None:
    """A model with a custom layer is used without a copy, matches its forward or decode, and cannot be saved."""
    before = pair()
    model, tokenizer, layer, said = with_custom_layer(name)
    changed_module = tokenizer if layer.startswith("decoder") else model
    assert (custom_layer_of(changed_module) or "").startswith(f"{layer} {said}")
    changed_module.train()
    out = generate(model, tokenizer, top_k=1, cfg=0.0)
    assert all(m.training for m in changed_module.modules())
    changed_module.eval()
    torch.testing.assert_close(out.images, expected_images(tokenizer, out.tokens), rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = model(torch.tensor([1, 7]), tokenizer.teacher_forcing_inputs(out.tokens))
    assert torch.equal(logits.argmax(-1), out.tokens)
    plain = generate(*before, top_k=1, cfg=0.0)
    if changed_module is model:
        assert name == "quantized" or not torch.equal(plain.tokens, out.tokens)  # 8 bits may suffice for equal tokens
    else:
        assert not torch.allclose(plain.images, out.images, atol=1e-3)
    with pytest.raises(ValueError, match=f"dtype: .* used without a copy, as {layer} {said}"):
        generate(model, tokenizer, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="graph: |CUDA graphs need a GPU"):
        generate(model, tokenizer, graph=True)
    assert torch.equal(generate(model, tokenizer, top_k=1, cfg=0.0, dtype=None).tokens, out.tokens)
    if name in ("adapter", "qkv adapter", "decoder adapter", "quantized"):
        with pytest.raises(ValueError, match=f"{layer} {said}.*: merge an adapter"):
            mvar.save(tmp_path / "m.safetensors", changed_module)
        assert not list(tmp_path.iterdir())


def test_unusable_custom_layer_error() -> None:
    """An adapter around the codebook fails, as its weight is read without calling the module."""
    model, tokenizer = pair()
    tokenizer.quantize.embedding = nn.Sequential(tokenizer.quantize.embedding)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"quantize.embedding is a Sequential .* no attribute 'weight'"):
        generate(model, tokenizer)


def test_removed_hook_restores_copy() -> None:
    model, tokenizer = pair()
    seen: list[str] = []
    handle = model.blocks[0].register_forward_hook(lambda *_: seen.append("called"))
    generate(model, tokenizer)
    assert len(seen) == len(CONFIG.patch_nums)
    handle.remove()
    generate(model, tokenizer)
    assert len(seen) == len(CONFIG.patch_nums) and custom_layer_of(model) is None


def test_save_rejects_unknown_weights(tmp_path: Path) -> None:
    model, _ = pair()
    model.extra = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="extra.weight is not a weight of this configuration"):
        mvar.save(tmp_path / "m.safetensors", model)
    del model.extra
    model.blocks[0].ffn.gain = nn.Parameter(torch.ones(1))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"blocks.0.ffn.gain is not a weight"):
        mvar.save(tmp_path / "m.safetensors", model)
    del model.blocks[0].ffn.gain
    model.blocks[0].register_buffer("mean", torch.zeros(3))
    with pytest.raises(ValueError, match=r"blocks.0.mean is not a weight"):
        mvar.save(tmp_path / "m.safetensors", model)
    del model.blocks[0].mean
    model.blocks[0].register_buffer("cache", torch.zeros(3), persistent=False)
    mvar.save(tmp_path / "m.safetensors", model)
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(TypeError, match="expected an mvar.Model or mvar.Tokenizer, got a Linear"):
        mvar.save(tmp_path / "m.safetensors", nn.Linear(2, 2))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e8m0fnu])
def test_save_rejects_unsupported_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dtype: expected one of float32, float16, .* or None, got torch"):
        mvar.save(tmp_path / "m.safetensors", pair()[0], dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e5, torch.float16), (torch.nan, None), (torch.inf, None), (torch.nan, torch.float8_e4m3fn)]
)
def test_save_rejects_non_finite_weights(value: float, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model, _ = pair()
    mvar.save(tmp_path / "m.safetensors", model, dtype=dtype)
    mvar.load_model(tmp_path / "m.safetensors")
    with torch.no_grad():
        model.head.weight[3, 2] = value
    before = (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(ValueError, match="head.weight: not all values are finite in float"):
        mvar.save(tmp_path / "m.safetensors", model, dtype=dtype)
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_uninitialized_lazy_layer_error() -> None:
    model, tokenizer = pair()
    model.head = nn.LazyLinear(64)
    with pytest.raises(ValueError, match="MVAR: head.weight is not initialized"):
        generate(model, tokenizer)


def test_meta_weights_error() -> None:
    model, tokenizer = pair()
    tokenizer.decoder.conv_out.to("meta")
    with pytest.raises(ValueError, match="decoder.conv_out"):
        generate(model, tokenizer)
    with pytest.raises(ValueError, match="expected weights, got modules without storage"):
        generate(model.to("meta"), tokenizer.to("meta"))


def test_tied_weights_are_saved_separately(tmp_path: Path) -> None:
    model, tokenizer = pair()
    blocks: Any = model.blocks
    blocks[1].ffn.fc1.weight = blocks[0].ffn.fc1.weight
    blocks[1].ffn.fc1.bias.data = blocks[0].ffn.fc1.bias.data[:1].expand(512)
    mvar.save(tmp_path / "m.safetensors", model)
    again: Any = mvar.load_model(tmp_path / "m.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(generate(again, tokenizer).tokens, generate(model, tokenizer).tokens)
    assert again.blocks[0].ffn.fc1.weight.data_ptr() != again.blocks[1].ffn.fc1.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loaded_weights_share_no_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors in the file may share a flat buffer or another tensor's memory, have stride 0 or be transposed."""
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in pair()[0].state_dict().items()}
    flat = torch.cat([t.flatten() for t in state.values() if t.is_floating_point()])
    start = 0
    for name, t in state.items():
        if t.is_floating_point():
            state[name] = flat[start : start + t.numel()].view(t.shape)
            start += t.numel()
    state["blocks.1.ffn.fc1.weight"] = state["blocks.0.ffn.fc1.weight"]
    state["blocks.1.ffn.fc2.weight"] = state["blocks.0.ffn.fc1.weight"].T
    state["head.bias"] = flat[:1].expand(64)
    torch.save(state, tmp_path / "m.pth")
    loaded = mvar.load_model(tmp_path / "m.pth")
    storages = [t.untyped_storage() for t in loaded.state_dict().values()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    for name, t in loaded.state_dict().items():
        assert t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes, name
        assert torch.equal(t, state[name].to(t.dtype)), name


def test_inference_mode(tmp_path: Path) -> None:
    """Models built, loaded or constructed under torch.inference_mode work outside of it."""
    right = generate(*pair())
    with torch.inference_mode():
        built, tokenizer = pair()
        generate(built, tokenizer)  # the inference copies are reused outside
        mvar.save(tmp_path / "m.safetensors", built)
        loaded = mvar.load_model(tmp_path / "m.safetensors")
        by_hand = mvar.from_config(built.config)
        by_hand.load_state_dict(built.state_dict())
        assert by_hand.head.weight.is_inference()
    for model in (built, loaded, by_hand):
        out = generate(model, tokenizer)
        assert torch.equal(out.tokens, right.tokens) and not out.images.is_inference()
        mvar.save(tmp_path / "again.safetensors", model)
        assert torch.equal(mvar.load_model(tmp_path / "again.safetensors").head.weight, built.head.weight)
    inputs = tokenizer.teacher_forcing_inputs(right.tokens)
    for model in (built, loaded):
        model(torch.tensor([1, 7]), inputs).sum().backward()
        assert model.head.weight.grad is not None
    by_hand.blocks[0].register_forward_hook(lambda *_: None)
    assert torch.equal(generate(by_hand, tokenizer).tokens, right.tokens)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_caller_grad_mode_and_autocast(context: Callable[[], Any]) -> None:
    model, tokenizer = pair()
    right = generate(model, tokenizer)
    with context(), torch.autocast("cpu", torch.bfloat16):
        out = generate(model, tokenizer)
    assert torch.equal(out.tokens, right.tokens) and torch.equal(out.images, right.images)
    assert not out.images.requires_grad


def test_concurrent_generation() -> None:
    model, tokenizer = pair()
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = generate(model, tokenizer, seed=seed).tokens

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(found[seed], generate(model, tokenizer, seed=seed).tokens)


def test_modulation_weight_is_read_once() -> None:
    """A parametrization may have side effects, and an adapter may have no weight attribute."""
    calls: list[Tensor] = []

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(weight)
            return weight

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model, _ = pair()
    first, second = (cast(nn.Sequential, block.ada_lin) for block in model.typed_blocks())
    labels, inputs = torch.tensor([1]), torch.randn(1, model.config.num_tokens - 1, model.config.code_dim)
    right = model(labels, inputs)
    parametrize.register_parametrization(first[1], "weight", Counting(), unsafe=True)
    second[1] = Scaled(second[1])
    calls.clear()
    assert torch.equal(model(labels, inputs), right) and len(calls) == 1


def test_compile_and_export_tokenizer() -> None:
    _, tokenizer = pair()
    tokens = torch.randint(tokenizer.num_codes, (3, tokenizer.num_tokens))
    torch.compiler.reset()
    for method in (tokenizer.decode, tokenizer.teacher_forcing_inputs):
        whole = torch.compile(method, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(tokens), method(tokens))

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        def forward(self, tokens: Tensor) -> Tensor:
            return self.tokenizer.decode(tokens)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Decoding(), (tokens,), dynamic_shapes={"tokens": {0: batch}}).module()
    torch.testing.assert_close(exported(tokens[:2]), tokenizer.decode(tokens[:2]))


def test_export_with_dynamic_batch() -> None:
    model, _ = pair()
    labels, inputs = torch.tensor([1, 7, 2]), torch.randn(3, model.config.num_tokens - 1, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        model, (labels, inputs), dynamic_shapes={"labels": {0: batch}, "inputs": {0: batch}}
    ).module()
    with torch.no_grad():
        for rows in ([0, 1], [0, 1, 2], [0, 1, 2, 2, 1]):
            torch.testing.assert_close(exported(labels[rows], inputs[rows]), model(labels[rows], inputs[rows]))
