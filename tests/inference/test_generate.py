"""Tests generation: agreement with the public implementation, the carried state, and random numbers."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mvar
import mvar_kernels as mk
from mvar.inference.prepare import prepared_model
from mvar.models.tokenizer import Tokenizer
from tests.helpers import upstream
from tests.helpers.generation import generate_from_prefix, small, with_guided_logits

LABELS = torch.tensor([3, 7, 1])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[mvar.MVAR, Tokenizer]:
    """The model and tokenizer of the upstream case, read by the loaders."""
    folder: Path = tmp_path_factory.mktemp("weights")
    for kind in ("model", "tokenizer"):
        torch.save(upstream.weights(kind), folder / f"{kind}.pth")
    model = mvar.load_model(folder / "model.pth")
    return model, mvar.load_tokenizer(folder / "tokenizer.pth", patch_nums=upstream.PATCH_NUMS)


def test_logits_match_public_implementation(published: tuple[mvar.MVAR, Tokenizer]) -> None:
    model, tokenizer = published
    tokens = torch.from_numpy(upstream.ARRAYS["tokens"]).long()
    with torch.no_grad():
        logits = model(torch.from_numpy(upstream.ARRAYS["labels"]), tokenizer.teacher_forcing_inputs(tokens))
    assert np.abs(logits[:, ::5, ::4].numpy() - upstream.ARRAYS["logits_every_5th_4th"]).max() < 1e-4


def test_greedy_images_match_public_implementation(published: tuple[mvar.MVAR, Tokenizer]) -> None:
    out = mvar.generate(*published, upstream.ARRAYS["labels"], cfg=1.5, top_k=1, dtype=torch.float32)
    assert np.array_equal(out.tokens.numpy(), upstream.ARRAYS["greedy_tokens"])
    assert np.abs(out.images[:, :, ::8, ::8].numpy() - upstream.ARRAYS["greedy_images_every_8th"]).max() < 1e-3


@pytest.mark.parametrize(
    "sizes", [{}, {"bidirectional": True}, {"qk_norm": True}], ids=["plain", "bidirectional", "qk_norm"]
)
def test_carried_state_matches_full_prefix(sizes: dict[str, bool]) -> None:
    model, tokenizer = small(**sizes)
    expected_tokens, expected_logits = generate_from_prefix(model, tokenizer, LABELS, cfg=1.5)
    out, logits = with_guided_logits(
        lambda: mvar.generate(model, tokenizer, LABELS, cfg=1.5, top_k=1, dtype=torch.float32), model
    )
    assert torch.equal(out.tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-5 * max(1.0, float(expected_logits.abs().max()))


def test_carried_state_matches_full_prefix_on_upstream_case(published: tuple[mvar.MVAR, Tokenizer]) -> None:
    model, tokenizer = published
    expected_tokens, expected_logits = generate_from_prefix(model, tokenizer, LABELS, cfg=1.5)
    out, logits = with_guided_logits(
        lambda: mvar.generate(model, tokenizer, LABELS, cfg=1.5, top_k=1, dtype=torch.float32), model
    )
    assert torch.equal(out.tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-5


def test_number_of_token_passes() -> None:
    """With the 256×256 schedule the mixer processes 680 tokens, and 1,710 with the public algorithm."""
    patch_nums = mvar.SCHEDULES[256]
    tokenizer_config = mvar.TokenizerConfig(
        patch_nums, num_codes=32, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False
    )
    model, tokenizer = mvar.build(1, num_classes=10, tokenizer=tokenizer_config)
    passes: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        passes.append(args[0].shape[1])

    prepared_model(model, torch.float32).blocks[0].mamba.register_forward_pre_hook(count)
    mvar.generate(model, tokenizer, [1], dtype=torch.float32)
    assert sum(passes) == 680
    model.blocks[0].mamba.register_forward_pre_hook(count)
    passes.clear()
    generate_from_prefix(model, tokenizer, torch.tensor([1]), cfg=1.5)
    assert sum(passes) == 1710


def test_modulation_runs_once() -> None:
    """Modulation is computed for B + 1 rows, as the unconditional row is shared."""
    model, tokenizer = small()
    rows: list[int] = []
    prepared = prepared_model(model, torch.float32)
    for layer in (*(block.ada_lin for block in prepared.blocks), prepared.head_nm.ada_lin):
        layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    mvar.generate(model, tokenizer, LABELS, dtype=torch.float32)
    assert rows == [4, 4, 4]


@pytest.mark.parametrize("more_smooth", [False, True])
def test_batch_invariance(more_smooth: bool) -> None:
    model, tokenizer = small()
    labels = torch.arange(8)
    options = {"seed": 9, "more_smooth": more_smooth, "dtype": torch.float32, "top_k": 20}
    whole = mvar.generate(model, tokenizer, labels, first_index=5, **options)
    for i in range(8):
        one = mvar.generate(model, tokenizer, labels[i : i + 1], first_index=5 + i, **options)
        assert torch.equal(one.tokens, whole.tokens[i : i + 1])
        torch.testing.assert_close(one.images, whole.images[i : i + 1], rtol=0, atol=1e-5)
    other = mvar.generate(model, tokenizer, labels, first_index=6, **options)
    assert not torch.equal(other.tokens, whole.tokens)


def test_global_rng_state_is_unused() -> None:
    model, tokenizer = small()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = mvar.generate(model, tokenizer, LABELS, seed=2, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(mvar.generate(model, tokenizer, LABELS, seed=2, dtype=torch.float32).tokens, first.tokens)


def test_random_weights_depend_only_on_seed() -> None:
    def weights(seed: int) -> list[Tensor]:
        sizes = mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1,), num_res_blocks=1)
        model, tokenizer = mvar.build(1, num_classes=2, tokenizer=sizes, seed=seed)
        return [model.head.weight, model.blocks[0].mamba.A_log, tokenizer.encoder.conv_in.weight]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(weights(2), first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(3), first, strict=True))


def test_random_weights_in_threads() -> None:
    def weights(seed: int) -> Tensor:
        sizes = mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1,), num_res_blocks=1)
        return mvar.build(1, num_classes=2, tokenizer=sizes, seed=seed)[1].encoder.conv_in.weight

    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(weights, [0, 1] * 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weight, weights(i % 2)) for i, weight in enumerate(found))


def test_sampling_options() -> None:
    """Sampling uses the given filters, seed and image indices, and separate random numbers per scale."""
    model, tokenizer = small()
    asked: dict[str, Any] = {"top_k": 20, "top_p": 0.7, "seed": 9}
    out, logits = with_guided_logits(
        lambda: mvar.generate(model, tokenizer, LABELS, first_index=5, dtype=torch.float32, **asked), model
    )
    by_scale = (t.split(model.config.scales, 1) for t in (logits, out.tokens))
    for k, (of_scale, tokens) in enumerate(zip(*by_scale, strict=True)):
        drawn = mk.sample_tokens(of_scale, image_index=torch.arange(5, 8), scale_index=k, **asked)
        assert torch.equal(tokens, drawn), k


def test_no_unconditional_rows_without_guidance() -> None:
    model, tokenizer = small()
    rows: list[int] = []
    prepared = prepared_model(model, torch.float32)
    prepared.blocks[0].mamba.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    mvar.generate(model, tokenizer, LABELS, cfg=0, dtype=torch.float32)
    assert set(rows) == {3}


def test_return_scales() -> None:
    model, tokenizer = small()
    out = mvar.generate(model, tokenizer, LABELS, return_scales=True, dtype=torch.float32)
    assert out.scales is not None and len(out.scales) == 4
    assert out.scales[-1] is out.images and out.images.shape == (3, 3, 10, 10)
    assert out.images.min() >= 0 and out.images.max() <= 1
    torch.testing.assert_close(out.images, (tokenizer.decode(out.tokens) + 1) / 2)


def test_more_smooth_parameters_match_var(monkeypatch: pytest.MonkeyPatch) -> None:
    """logits·(1+k/(K−1)) at temperature 0.27·(1−0.95·k/(K−1)), for four scales."""
    soft_embedding, seen = mk.soft_embedding, []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.extend((options["sharpness"], options["temperature"]))
        return soft_embedding(*args, **options)

    monkeypatch.setattr(mk, "soft_embedding", spy)
    model, tokenizer = small()
    mvar.generate(model, tokenizer, LABELS, more_smooth=True, dtype=torch.float32)
    assert seen == pytest.approx([1, 0.27, 4 / 3, 0.1845, 5 / 3, 0.099, 2, 0.0135])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_copy(dtype: torch.dtype) -> None:
    """The copy is cached, rebuilt when a weight changes, and its logits match float32 within a few roundings."""
    model, tokenizer = small()
    copy = prepared_model(model, dtype)
    assert prepared_model(model, dtype) is copy
    mixer = copy.blocks[0].mamba
    assert {t.dtype for t in (mixer.dt_bias, mixer.A_log, mixer.D)} == {torch.float32}  # parameters of the recurrence
    inputs = torch.randn(3, 38, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rough = model(LABELS, inputs), copy(LABELS, inputs)
        assert (exact - rough).norm() / exact.norm() < 16 * torch.finfo(dtype).eps
        model.head.bias.add_(1)
    assert prepared_model(model, dtype) is not copy
    assert mvar.generate(model, tokenizer, LABELS, dtype=dtype).images.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"labels": [1, 10]}, ValueError, "labels: expected classes from 0 to 9, got 1 to 10"),
        ({"labels": [-1]}, ValueError, "labels"),
        ({"labels": []}, ValueError, "labels: expected a non-empty"),
        ({"labels": [1.5]}, ValueError, "labels"),
        ({"cfg": -0.5}, ValueError, r"cfg: expected a number from 0 to 1e\+06, got -0.5"),
        ({"cfg": math.nan}, ValueError, "cfg"),
        ({"cfg": math.inf}, ValueError, "cfg"),
        ({"cfg": 1e300}, ValueError, "cfg"),
        ({"labels": "ab"}, ValueError, "labels"),
        ({"labels": None}, ValueError, "labels"),
        ({"labels": [2**70]}, ValueError, "labels"),
        ({"first_index": 2**32}, ValueError, "first_index"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": 1.5}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.01}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"seed": -1}, ValueError, "seed"),
        ({"first_index": -1}, ValueError, "first_index"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected one of"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected one of"),
        ({"backend": "quick"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' requested"),
        ({"guidance_until": -1}, ValueError, "guidance_until: expected a whole number from 0 to 4, got -1"),
        ({"guidance_until": 5}, ValueError, "guidance_until"),
        ({"guidance_until": 1.5}, ValueError, "guidance_until"),
        ({"guidance_until": True}, ValueError, "guidance_until"),
    ],
)
def test_bad_arguments(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"labels": [1], "dtype": torch.float32} | wrong
    with pytest.raises(error, match=message):
        mvar.generate(*small(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("num_codes", mvar.TokenizerConfig((1, 2, 3, 5), num_codes=65, ch=32, ch_mult=(1,))),
        ("code_dim", mvar.TokenizerConfig((1, 2, 3, 5), num_codes=64, code_dim=16, ch=32, ch_mult=(1,))),
        ("patch_nums", mvar.TokenizerConfig((1, 2, 4, 5), num_codes=64, ch=32, ch_mult=(1,))),
    ],
)
def test_model_tokenizer_mismatch(name: str, config: mvar.TokenizerConfig) -> None:
    with pytest.raises(ValueError, match=f"do not fit together: {name}"):
        mvar.generate(small()[0], Tokenizer(config), [1])


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (0, "blocks.1.ffn.fc2.weight"),
        (0, "blocks.0.mamba.A_log"),
        (0, "head.weight"),
        (0, "head.bias"),
        (1, "quantize.embedding.weight"),
        (1, "decoder.conv_out.bias"),
    ],
)
def test_nan_weights(owner: int, name: str) -> None:
    pair = small()
    with torch.no_grad():
        pair[owner].get_parameter(name).view(-1)[0] = torch.nan
    # A single code might not be sampled, so the entire codebook is set to NaN.
    if name == "quantize.embedding.weight":
        pair[owner].get_parameter(name).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        mvar.generate(*pair, [1], dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_with_infinite_bias_are_not_sampled(dtype: torch.dtype) -> None:
    model, tokenizer = small()
    ruled_out = torch.arange(64) % 2 == 1
    with torch.no_grad():
        model.head.bias[ruled_out] = -torch.inf
    for more_smooth in (False, True):
        out = mvar.generate(model, tokenizer, [1, 7], top_k=50, more_smooth=more_smooth, dtype=dtype)
        assert not ruled_out[out.tokens].any() and out.images.isfinite().all()
    with torch.no_grad():
        model.head.bias.fill_(-torch.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        mvar.generate(model, tokenizer, [1], dtype=dtype)


def test_float16_overflow() -> None:
    model, tokenizer = small()
    with torch.no_grad():
        model.head.weight.mul_(1e5)
    mvar.generate(model, tokenizer, [1], dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="float16 are not finite"):
        mvar.generate(model, tokenizer, [1], dtype=torch.float16)


@pytest.mark.slow
def test_training_with_compile_and_autocast() -> None:
    """Training compiles to one graph with label and branch dropping, and autocast gradients are close to float32."""
    model, _ = small(drop_path=0.3)
    inputs = torch.randn(3, 38, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    compiled(LABELS, inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    model.eval()
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(LABELS, inputs).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() < 16 * torch.finfo(torch.bfloat16).eps * grads[0].norm()


def test_label_and_branch_dropping() -> None:
    """Training mode drops labels and branches at random; evaluation mode does not."""
    model, _ = small(label_drop=0.5, drop_path=0.5)
    labels, inputs = torch.full((64,), 3), torch.randn(1, 38, 32).expand(64, -1, -1)
    assert torch.allclose(model(labels, inputs)[0], model(labels, inputs)[1], atol=1e-5)
    model.train()
    torch.manual_seed(0)
    kinds = model(labels, inputs)[:, 0].detach().unique(dim=0)
    assert 4 < len(kinds) < 64  # 2 labels × 2 states each of the last block's three branches, at most 16


def test_generation_avoids_slow_imports() -> None:
    """Generation imports neither Triton nor torch._dynamo; with them it took 8 s instead of 3 (AMD EPYC, Zen 3)."""
    assets = Path(mvar.__file__).parent / "assets"
    code = (
        "import sys, mvar\n"
        f"model = mvar.load_model({str(assets / 'digits.safetensors')!r})\n"
        f"tokenizer = mvar.load_tokenizer({str(assets / 'digits_tokenizer.safetensors')!r})\n"
        "mvar.generate(model, tokenizer, [1], backend='cpu')\n"
        "print(sys.modules.keys() & {'torch._dynamo', 'triton'})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
