"""Tests the tokenizer: agreement with the public implementation, properties of its parts, and errors."""

import dataclasses
import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.inference.prepare import prepared_tokenizer
from mvar.models import autoencoder
from mvar.models.quantizer import phi_index
from mvar.models.tokenizer import BY_NUMBER_OF_SCALES, Tokenizer, TokenizerConfig
from mvar_kernels.dispatch import native, unavailable
from tests.helpers.paths import ROOT

CASE = ROOT / "tests" / "upstream_case"
HITS = "quantize.ema_vocab_hit_SV"
SMALL = TokenizerConfig(
    patch_nums=(1, 2, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attention=False
)


def small_tokenizer(**changes: object) -> Tokenizer:
    """A small random tokenizer with standard normal codes, as the initial codes are all near zero."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(dataclasses.replace(SMALL, **changes)).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer


def random_images(tokenizer: Tokenizer, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    side = tokenizer.resolution
    return torch.rand(batch, 3, side, side, generator=generator) * 2 - 1


def random_tokens(tokenizer: Tokenizer, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(tokenizer.num_codes, (batch, tokenizer.num_tokens), generator=generator)


# Agreement with the public implementation


@pytest.fixture(scope="module")
def upstream() -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The tokenizer with the upstream case's weights, and the case's arrays."""
    spec = importlib.util.spec_from_file_location("fill", CASE / "fill.py")
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    description = json.loads((CASE / "case.json").read_text())
    state = {name: rule.fill(name, torch.zeros(shape)) for name, (shape, _) in description["tokenizer"].items()}
    tokenizer = Tokenizer(TokenizerConfig.from_state_dict(state, description["patch_nums"])).eval()
    tokenizer.load_state_dict(state, strict=True)
    return tokenizer, dict(np.load(CASE / "case.npz"))


def test_encode_matches_public_code(upstream):
    tokenizer, case = upstream
    tokens = tokenizer.encode(torch.from_numpy(case["images_uint8"]).float() / 127.5 - 1)
    assert tokens.dtype == torch.int64
    np.testing.assert_array_equal(tokens.numpy(), case["tokens"])


def test_teacher_forcing_inputs_match_public_code(upstream):
    tokenizer, case = upstream
    inputs = tokenizer.teacher_forcing_inputs(torch.from_numpy(case["tokens"]).long())
    assert inputs.shape == (2, 129, 32) and inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs[:, ::7].numpy(), case["inputs_every_7th"], atol=1e-4, rtol=0)


def test_decode_matches_public_code(upstream):
    tokenizer, case = upstream
    images = tokenizer.decode(torch.from_numpy(case["tokens"]).long())
    np.testing.assert_allclose(images[:, :, ::8, ::8].numpy(), case["decoded_every_8th"], atol=1e-3, rtol=0)
    assert images.abs().max() == 1, "the case has saturated pixels: they must be clamped"


@pytest.mark.parametrize("num_phi", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_scales", [2, 3, 4, 6, 10, 13, 14, 19])
def test_phi_index(num_scales, num_phi):
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    expected = [int(np.argmin(np.abs(ticks - k / (num_scales - 1)))) for k in range(num_scales)]
    assert [phi_index(k, num_scales, num_phi) for k in range(num_scales)] == expected


def test_phi_index_of_published_schedules():
    assert [phi_index(k, 10, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(k, 14, 4) for k in range(14)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


# Names, shapes and sizes


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the published vae_ch160v4096z32.pth."""
    listed = json.loads((CASE / "released_checkpoints.json").read_text())["tokenizer"]
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in listed.items()}


def as_meta_state(listed: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (shape, dtype) in listed.items()
    }


def test_published_names_shapes_and_dtypes(published):
    config = TokenizerConfig.from_state_dict(as_meta_state(published))
    assert config == TokenizerConfig(patch_nums=BY_NUMBER_OF_SCALES[10])
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    state = tokenizer.state_dict()
    assert {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()} == published
    assert (tokenizer.num_tokens, tokenizer.downsampling, tokenizer.resolution) == (680, 16, 256)
    assert tokenizer.scales == (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ch": 64, "ch_mult": (1, 2, 3), "num_res_blocks": 2},
        {"attention": True, "num_codes": 32, "code_dim": 16},
        {"num_phi": 2, "ch_mult": (2,)},
    ],
)
def test_config_from_state_dict(changes):
    tokenizer = small_tokenizer(**changes)
    assert TokenizerConfig.from_state_dict(tokenizer.state_dict(), SMALL.patch_nums) == tokenizer.config


def test_config_from_1024_state_dict(published):
    state = as_meta_state(published | {HITS: ((14, 4096), "float32")})
    assert TokenizerConfig.from_state_dict(state).patch_nums == (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def test_config_with_unknown_number_of_scales(published):
    with pytest.raises(ValueError, match="patch_nums: no published schedule has 7 scales"):
        TokenizerConfig.from_state_dict(as_meta_state(published | {HITS: ((7, 4096), "float32")}))


@pytest.mark.parametrize(
    "missing",
    [
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "quantize.embedding.weight",
        "quantize.quant_resi.qresi_ls.0.weight",
        HITS,
    ],
)
def test_config_error_names_missing_weight(published, missing):
    state = as_meta_state({name: entry for name, entry in published.items() if name != missing})
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        TokenizerConfig.from_state_dict(state)


def test_load_ignores_hits_of_other_schedule():
    source, target = small_tokenizer(), small_tokenizer(patch_nums=(1, 4))
    source.quantize.ema_vocab_hit_SV.fill_(5)
    state = source.state_dict()
    target.load_state_dict(state, strict=True)
    assert target.quantize.ema_vocab_hit_SV.shape == (2, 64) and not target.quantize.ema_vocab_hit_SV.any()
    assert state[HITS].shape == (3, 64), "loading must not write to the caller's dict"
    assert torch.equal(target.quantize.embedding.weight, source.quantize.embedding.weight)
    same = small_tokenizer()
    same.load_state_dict(state, strict=True)
    assert torch.equal(same.quantize.ema_vocab_hit_SV, source.quantize.ema_vocab_hit_SV)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_nums": ()}, "patch_nums: expected increasing positive whole numbers"),
        ({"patch_nums": (0, 2)}, "patch_nums: expected increasing positive whole numbers"),
        ({"patch_nums": (1, 2.5)}, "patch_nums: expected increasing positive whole numbers"),
        ({"patch_nums": (1, 3, 3)}, "patch_nums: expected increasing positive whole numbers"),
        ({"ch_mult": (1, -1)}, "ch_mult: expected a non-empty tuple of positive integers"),
        ({"num_codes": 0}, "num_codes: expected a positive integer, got 0"),
        ({"num_phi": True}, "num_phi: expected a positive integer, got True"),
        ({"ch": 48}, "ch: expected a multiple of 32 .* got 48"),
        ({"beta": -0.1}, "beta: expected a finite number of at least 0"),
        ({"attention": 1}, "attention: expected a bool"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(SMALL, **changes)


# Shapes, generation steps and absence of side effects


@pytest.mark.parametrize("patch_nums", [(1, 2, 4), (2, 3, 5), (1,), (4,)])
def test_encode_decode_shapes(patch_nums):
    tokenizer = small_tokenizer(patch_nums=patch_nums)
    images = random_images(tokenizer)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (3, tokenizer.num_tokens) and tokens.dtype == torch.int64
    inputs = tokenizer.teacher_forcing_inputs(tokens)
    assert inputs.shape == (3, tokenizer.num_tokens - patch_nums[0] ** 2, 8) and inputs.dtype == torch.float32
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1


def test_stepwise_matches_teacher_forcing_and_decode():
    tokenizer = small_tokenizer()
    tokens = random_tokens(tokenizer)
    f_hat, inputs = torch.zeros(3, 8, 4, 4), []
    for k, tokens_k in enumerate(tokens.split(tokenizer.scales, dim=1)):
        if k > 0:
            inputs.append(tokenizer.next_input(k, f_hat))
        f_hat = f_hat + tokenizer.scale_features(k, tokenizer.embed(tokens_k))
    assert torch.equal(torch.cat(inputs, dim=1), tokenizer.teacher_forcing_inputs(tokens))
    assert torch.equal(tokenizer.decode_features(f_hat), tokenizer.decode(tokens))


def test_encode_selects_nearest_code_of_residual():
    tokenizer = small_tokenizer()
    images = random_images(tokenizer)
    rest = tokenizer.quant_conv(tokenizer.encoder(images)).detach()
    for k, tokens_k in enumerate(tokenizer.encode(images).split(tokenizer.scales, dim=1)):
        distances = torch.cdist(tokenizer.next_input(k, rest), tokenizer.quantize.embedding.weight)
        assert torch.equal(distances.argmin(dim=-1), tokens_k)
        rest = rest - tokenizer.scale_features(k, tokenizer.embed(tokens_k))


def test_inputs_are_not_modified():
    tokenizer = small_tokenizer()
    arguments = {
        "images": random_images(tokenizer),
        "tokens": random_tokens(tokenizer),
        "f_hat": torch.randn(3, 8, 4, 4) * 3,
        "embeddings": torch.randn(3, 16, 8),
    }
    before = {name: value.clone() for name, value in arguments.items()}
    tokenizer.encode(arguments["images"])
    tokenizer(arguments["images"])
    tokenizer.decode(arguments["tokens"])
    tokenizer.teacher_forcing_inputs(arguments["tokens"])
    for k in range(3):
        tokenizer.next_input(k, arguments["f_hat"])
    tokenizer.decode_features(arguments["f_hat"])
    tokenizer.scale_features(2, arguments["embeddings"])
    for name, value in arguments.items():
        assert torch.equal(value, before[name]), f"{name} was written to"


def test_quantizer_is_float32_under_autocast():
    tokenizer = small_tokenizer()
    embeddings, f_hat, rows = torch.randn(3, 4, 8), torch.randn(3, 8, 4, 4), torch.randn(3, 4000, 8)
    expected = tokenizer.scale_features(1, embeddings), tokenizer.quantize.nearest(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.scale_features(1, embeddings), expected[0])
        assert torch.equal(tokenizer.quantize.nearest(rows), expected[1])
        assert tokenizer.decode_features(f_hat).dtype == torch.float32


def test_half_precision_weights():
    tokenizer = small_tokenizer().to(torch.bfloat16)
    tokens = tokenizer.encode(random_images(tokenizer))
    assert tokenizer.teacher_forcing_inputs(tokens).dtype == torch.float32
    assert tokenizer.decode(tokens).isfinite().all()


# Training


def test_forward_matches_encode_and_decode():
    tokenizer = small_tokenizer()
    images = random_images(tokenizer)
    output = tokenizer(images)
    torch.testing.assert_close(output.images.clamp(-1, 1), tokenizer.decode(tokenizer.encode(images)))


def test_loss_and_hits():
    tokenizer = small_tokenizer(beta=0.5)
    images = random_images(tokenizer)
    output, tokens = tokenizer(images), tokenizer.encode(images)
    features = tokenizer.quant_conv(tokenizer.encoder(images)).detach()
    f_hat, losses, hits = torch.zeros_like(features), [], []
    for k, tokens_k in enumerate(tokens.split(tokenizer.scales, dim=1)):
        f_hat = f_hat + tokenizer.scale_features(k, tokenizer.embed(tokens_k))
        losses.append(1.5 * (features - f_hat).square().mean())
        hits.append(tokens_k.flatten().bincount(minlength=tokenizer.num_codes))
    torch.testing.assert_close(output.vq_loss, torch.stack(losses).mean())
    assert torch.equal(output.hits, torch.stack(hits))


def test_straight_through_gradient():
    tokenizer = small_tokenizer()
    features = torch.randn(2, 8, 4, 4, requires_grad=True)
    weight = torch.randn(2, 8, 4, 4)
    (tokenizer.quantize(features).features * weight).sum().backward()
    torch.testing.assert_close(features.grad, weight)
    assert tokenizer.quantize.embedding.weight.grad is None, "the reconstruction must not move the codebook"


def test_all_parameters_have_gradients():
    tokenizer = small_tokenizer(num_phi=3, attention=True).train()
    images = random_images(tokenizer)
    output = tokenizer(images)
    ((output.images - images).square().mean() + output.vq_loss).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_only_commitment_loss_trains_encoder():
    for beta, moves in ((0.25, True), (0.0, False)):
        features = torch.randn(2, 8, 4, 4, requires_grad=True)
        small_tokenizer(beta=beta).quantize(features).vq_loss.backward()
        assert features.grad.any() == moves


def test_hits_are_averaged_only_in_training_mode():
    tokenizer = small_tokenizer()
    hits = tokenizer.quantize.ema_vocab_hit_SV
    first, second = random_images(tokenizer), -random_images(tokenizer)
    tokenizer(first)
    assert not hits.any()

    def count(images: Tensor) -> Tensor:
        by_scale = tokenizer.encode(images).split(tokenizer.scales, dim=1)
        return torch.stack([tokens.flatten().bincount(minlength=64).float() for tokens in by_scale])

    tokenizer.train()
    tokenizer(first)
    assert torch.equal(hits, count(first))
    tokenizer(second)
    torch.testing.assert_close(hits, 0.99 * count(first) + 0.01 * count(second))


def test_hits_are_summed_over_processes(tmp_path, monkeypatch):
    """Two processes are simulated in one by an all-reduce that doubles its input."""
    tokenizer = small_tokenizer()
    images = random_images(tokenizer)
    alone = tokenizer(images)
    monkeypatch.setattr("mvar.models.quantizer.Quantizer._processes", lambda _: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    tokenizer.train()
    output = tokenizer(images)
    assert tokenizer.quantize.ema_vocab_hit_SV.sum(dim=1).tolist() == [2 * 3 * scale for scale in tokenizer.scales]
    assert torch.equal(output.hits, alone.hits), "those of this process"


def test_processes_revive_codes_as_one(monkeypatch):
    """Each of two simulated processes fills in the vectors of its own images; their sum is that of one process."""
    images, revived = random_images(small_tokenizer(), batch=4), []
    one = small_tokenizer()
    one.revive_dead_codes(images, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    for rank in range(2):
        tokenizer = small_tokenizer()
        monkeypatch.setattr("mvar.models.quantizer.Quantizer._processes", lambda _, rank=rank: (rank, 2))
        tokenizer.revive_dead_codes(images[2 * rank : 2 * rank + 2], generator=torch.Generator().manual_seed(3))
        revived.append(tokenizer.quantize.embedding.weight)
    assert all(own.any() for own in revived) and not (revived[0] * revived[1]).any()
    torch.testing.assert_close(revived[0] + revived[1], one.quantize.embedding.weight)


def test_dead_codes_are_replaced_by_residuals():
    tokenizer = small_tokenizer()
    images, codebook = random_images(tokenizer, batch=5), tokenizer.quantize.embedding.weight
    rest, candidates = tokenizer.quant_conv(tokenizer.encoder(images)).detach(), []
    for k, tokens_k in enumerate(tokenizer.encode(images).split(tokenizer.scales, dim=1)):
        candidates.append(tokenizer.next_input(k, rest).flatten(0, 1))
        rest = rest - tokenizer.scale_features(k, tokenizer.embed(tokens_k))

    tokenizer.quantize.ema_vocab_hit_SV[0, :24] = 1.0
    alive = codebook[:24].detach().clone()
    assert tokenizer.revive_dead_codes(images, threshold=0.5).sum() == 40
    assert torch.equal(codebook[:24], alive)
    distances = [torch.cdist(codebook[24:], rows).min(dim=1).values for rows in candidates]
    assert torch.stack(distances).min(dim=0).values.max() < 1e-3
    assert all(to_scale.min() < 1e-3 for to_scale in distances), "every scale has its share"
    assert tokenizer.revive_dead_codes(images, threshold=0.5).sum() == 0, "a new code is given time"


def test_revived_codes_are_distinct():
    """Scale 0 has 8 rows for a third of 64 codes; the rest is of the finest scale, which has 128."""
    tokenizer = small_tokenizer()
    tokenizer.revive_dead_codes(random_images(tokenizer, batch=8))
    assert len(tokenizer.quantize.embedding.weight.unique(dim=0)) == 64
    assert not tokenizer.quantize.ema_vocab_hit_SV.any(), "the first batch initializes the statistics"


def test_evenly_used_codes_are_not_dead():
    """However few tokens a batch has."""
    tokenizer = small_tokenizer()
    tokenizer.quantize.ema_vocab_hit_SV.fill_(1e-3)
    assert not tokenizer.revive_dead_codes(random_images(tokenizer)).any()


def test_revive_initializes_codebook():
    tokenizer = small_tokenizer()
    images = random_images(tokenizer, batch=8)
    before = tokenizer(images)
    assert tokenizer.revive_dead_codes(images).all()
    after = tokenizer(images)
    assert after.vq_loss < before.vq_loss and (after.hits > 0).sum() > (before.hits > 0).sum()


# Errors


SMALL_TOKENIZER = small_tokenizer()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(torch.zeros(1, 3, 8, 9)), ValueError, r"images: expected shape \(B, 3, 8, 8\), got"),
        (lambda t: t(torch.zeros(3, 8, 8)), ValueError, r"images: expected shape \(B, 3, 8, 8\), got \(3, 8, 8\)"),
        (lambda t: t.encode(torch.zeros(1, 3, 8, 8).byte()), TypeError, "images: expected floating point, got .*uint8"),
        (lambda t: t.decode(torch.zeros(1, 20).long()), ValueError, r"tokens: expected shape \(B, 21\), got \(1, 20\)"),
        (lambda t: t.decode(torch.zeros(21).long()), ValueError, r"tokens: expected shape \(B, 21\), got \(21,\)"),
        (lambda t: t.decode(torch.zeros(1, 21)), TypeError, "tokens: expected int64, got torch.float32"),
        (lambda t: t.decode(torch.full((1, 21), 64)), ValueError, r"tokens: expected .* \[0, 64\), got 64 to 64"),
        (
            lambda t: t.teacher_forcing_inputs(torch.full((1, 21), -1)),
            ValueError,
            "tokens: expected .* got -1 to -1",
        ),
        (lambda t: t.teacher_forcing_inputs(torch.zeros(1, 22).long()), ValueError, "tokens: expected shape"),
        (lambda t: t.embed(torch.zeros(1, 4).int()), TypeError, "tokens: expected int64, got torch.int32"),
        (lambda t: t.embed(torch.zeros(4).long()), ValueError, r"tokens: expected shape \(B, l\), got \(4,\)"),
        (lambda t: t.scale_features(3, torch.zeros(1, 16, 8)), ValueError, r"k: expected .* in \[0, 3\), got 3"),
        (lambda t: t.scale_features(1, torch.zeros(1, 9, 8)), ValueError, r"embeddings: expected shape \(B, 4, 8\)"),
        (lambda t: t.scale_features(1, torch.zeros(1, 4, 8).int()), TypeError, "embeddings: expected floating point"),
        (lambda t: t.next_input(-1, torch.zeros(1, 8, 4, 4)), ValueError, r"k: expected .* got -1"),
        (lambda t: t.next_input(1, torch.zeros(1, 8, 4, 5)), ValueError, r"f_hat: expected shape \(B, 8, 4, 4\)"),
        (lambda t: t.decode_features(torch.zeros(1, 7, 4, 4)), ValueError, r"f_hat: expected shape \(B, 8, 4, 4\)"),
        (lambda t: t.decode_features(torch.zeros(1, 8, 4, 4).long()), TypeError, "f_hat: expected floating point"),
    ],
)
def test_argument_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(SMALL_TOKENIZER)


def test_argument_errors_with_single_scale():
    with pytest.raises(ValueError, match="tokens: expected values in"):
        small_tokenizer(patch_nums=(4,)).teacher_forcing_inputs(torch.full((1, 16), 99))


def norms_with_silu(module: nn.Module) -> list[nn.Module]:
    return [m for name, m in module.named_modules() if isinstance(m, nn.GroupNorm) and not name.endswith(".norm")]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of all norms that the fused op was called for."""
    called: list[Tensor] = []
    op = mk.group_norm_silu
    monkeypatch.setattr(
        mk, "group_norm_silu", lambda x, weight, *rest, **more: (called.append(weight), op(x, weight, *rest, **more))[1]
    )
    return called


@pytest.mark.parametrize("cpp", [native() is not None, False])
def test_group_norm_and_silu_are_one_op(cpp: bool, fused: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and under autocast where there are C++ kernels, never in torch.compile; PyTorch's own computes the
    same, in the same dtypes."""
    if not cpp:
        monkeypatch.setattr(autoencoder, "native", lambda: None)
    tokenizer = small_tokenizer(attention=True)

    def run(module: nn.Module, given: Tensor, bfloat16: bool = False) -> tuple[Tensor, int]:
        fused.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = module(given)
        assert {id(t) for t in fused} in (set(), {id(m.weight) for m in norms_with_silu(module)})
        return out, len(fused)

    for module, given in ((tokenizer.encoder, random_images(tokenizer)), (tokenizer.decoder, torch.randn(2, 8, 4, 4))):
        norms = len(norms_with_silu(module))
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            with_grad, none = run(module, given)
            in_bfloat16, none_in_bfloat16 = run(module, given, bfloat16=True)
            assert none == none_in_bfloat16 == 0
        want = gradient(with_grad, module)
        with torch.no_grad():
            without, count = run(module, given)
        got, count_with_grad = run(module, given)
        got_in_bfloat16, count_in_bfloat16 = run(module, given, bfloat16=True)
        assert norms > 5 and count == norms and count_with_grad == count_in_bfloat16 == cpp * norms
        assert torch.equal(without, got) or not cpp
        close(without, with_grad, 2e-5)
        close(got, with_grad, 2e-5)
        assert got_in_bfloat16.dtype == in_bfloat16.dtype
        error, of_pytorch = (float((t - with_grad).norm()) for t in (got_in_bfloat16, in_bfloat16))
        assert error <= 1.5 * of_pytorch
        close(gradient(got, module), want, 2e-5)


def gradient(out: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([t.flatten() for t in torch.autograd.grad(out.sin().sum(), list(module.parameters()))])


def close(got: Tensor, want: Tensor, relative: float) -> None:
    assert (got - want).norm() <= relative * want.norm()


def test_changed_norm_is_called(fused: list[Tensor]) -> None:
    """A norm with a hook, of another class or with its forward replaced is called like any module."""
    decoder = small_tokenizer().decoder
    seen: list[str] = []

    class Other(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("class")
            return super().forward(x)

    blocks = decoder.mid.block_1, decoder.mid.block_2
    blocks[0].norm1 = Other(32, 64)
    blocks[0].norm2 = nn.GroupNorm(32, 64, affine=False)
    blocks[1].norm1.register_forward_hook(lambda *_: seen.append("hook"))
    blocks[1].norm2.register_forward_pre_hook(lambda *_: seen.append("pre-hook"))
    forward = decoder.norm_out.forward
    decoder.norm_out.forward = lambda x: (seen.append("forward"), forward(x))[1]
    with torch.no_grad():
        decoder(torch.randn(1, 8, 4, 4))
    assert seen == ["class", "hook", "pre-hook", "forward"] and len(fused) == len(norms_with_silu(decoder)) - 5


@pytest.mark.skipif(unavailable("triton") is not None, reason=str(unavailable("triton")))
def test_triton_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last, as generation decodes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = prepared_tokenizer(small_tokenizer().to(device), torch.float32)
    features = copy.post_quant_conv(torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(device))
    formats: list[bool] = []
    op = mk.group_norm_silu

    def triton(x: Tensor, *arguments: Any) -> Tensor:
        out = op(x, *arguments, backend="triton")
        formats.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, out)))
        return out

    with torch.no_grad():
        want = copy.decoder(features)
        monkeypatch.setattr(mk, "group_norm_silu", triton)
        torch.testing.assert_close(copy.decoder(features), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert formats == [True] * len(norms_with_silu(copy.decoder))
