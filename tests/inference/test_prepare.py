"""Tests that inference copies compute the same results as the original modules."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar
from mvar.inference.model import FusedFeedForward, InferenceModel
from mvar.inference.onednn import PrepackedFeedForward, PrepackedLinear, can_prepack
from mvar.inference.prepare import prepared_model, prepared_tokenizer
from mvar.inference.tokenizer import fuse_upsample_conv
from mvar.models.layers import FeedForward
from mvar.models.weights import plain_module

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Tolerance relative to the largest result of a sum of `terms` products: in float32, 8·√terms roundings."""
    return 8 * terms**0.5 * torch.finfo(dtype).eps if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_prepacked_layers(dtype: torch.dtype, rows: int) -> None:
    if not can_prepack(CPU, dtype):
        pytest.skip("oneDNN prepacks no bfloat16 on this CPU")
    torch.manual_seed(0)
    x = torch.randn(2, rows, 128).to(dtype)
    linear, without_bias = nn.Linear(128, 384).to(dtype), nn.Linear(128, 384, bias=False).to(dtype)
    ffn = FeedForward(128, 512).to(dtype)
    with torch.no_grad():
        pairs = (
            (PrepackedLinear(linear)(x), linear.double()(x.double())),
            (PrepackedLinear(without_bias)(x), without_bias.double()(x.double())),
            (PrepackedFeedForward(ffn)(x), ffn.double()(x.double())),
        )
    for got, exact in pairs:
        assert got.dtype == dtype and got.shape == exact.shape
        assert (got - exact).abs().max() <= rounding(dtype, 512) * exact.abs().max()


def addmm_gelu(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
    """torch._addmm_activation as it is on CUDA; on a CPU it is erf's GELU."""
    assert use_gelu
    return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 33, 128), (0, 4, 128)])
def test_fused_feed_forward(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ffn, x = FeedForward(128, 512).to(device, dtype), 3 * torch.randn(shape, device=device).to(dtype)
    if device == "cpu":
        monkeypatch.setattr(torch, "_addmm_activation", addmm_gelu)
    with torch.no_grad():
        got, exact = FusedFeedForward(ffn)(x), copy.deepcopy(ffn).double()(x.double())
    assert got.dtype == dtype and got.shape == exact.shape
    if exact.numel():
        assert (got - exact).abs().max() <= rounding(dtype, 512) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuse_upsample_conv(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, kernel_size=3, padding=1).requires_grad_(False).to(dtype)
    fused, exactly = fuse_upsample_conv(conv), copy.deepcopy(conv).double()
    for height, width in ((1, 1), (2, 5), (7, 4)):
        x = torch.randn(2, 6, height, width).to(dtype)
        got, exact = fused(x), exactly(F.interpolate(x.double(), scale_factor=2, mode="nearest"))
        assert got.dtype == dtype and got.shape == exact.shape
        assert (got - exact).abs().max() <= rounding(dtype, 54) * exact.abs().max()


def test_decoder_dtypes() -> None:
    _, tokenizer = mvar.build(
        1,
        num_classes=2,
        tokenizer=mvar.TokenizerConfig((1, 2, 4), num_codes=16, ch=32, ch_mult=(1, 2), num_res_blocks=1),
    )
    features = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = tokenizer.decode_features(features)
    torch.testing.assert_close(
        prepared_tokenizer(tokenizer, torch.float32).decode_features(features), exact, rtol=0, atol=1e-5
    )
    in_16_bits = prepared_tokenizer(tokenizer, torch.bfloat16)
    assert torch.equal(in_16_bits.quantize.embedding.weight, tokenizer.quantize.embedding.weight)
    rough = in_16_bits.decode_features(features)
    psnr_db = -10 * ((rough - exact).square().mean() / 4).log10()
    assert rough.dtype == torch.float32 and 35 < psnr_db < 80  # below 80 dB, so it did run in bfloat16


def test_decoder_runs_on_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most DECODED_PIXELS at a time, but one image at least; the images are those of the whole batch."""
    _, tokenizer = mvar.build(
        1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2, 4), num_codes=16, ch=32, ch_mult=(1, 2))
    )
    prepared = prepared_tokenizer(tokenizer, torch.float32)
    features = torch.randn(5, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = prepared.decode_features(features)
    batches: list[int] = []
    prepared.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    for pixels, expected in ((2 * 8 * 8, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr("mvar.inference.tokenizer.DECODED_PIXELS", pixels)
        batches.clear()
        torch.testing.assert_close(prepared.decode_features(features), whole, rtol=0, atol=1e-5)
        assert batches == expected
    assert prepared.decode_features(features[:0]).shape == (0, 3, 8, 8)


def test_copy_does_not_change_model() -> None:
    """Preparing a copy does not convert, replace or pack any parameter of the original."""
    model, _ = mvar.build(
        1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1,), num_res_blocks=1)
    )
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        prepared = prepared_model(model, dtype)
        assert prepared is not model and prepared.pos_1LC.dtype == dtype
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert isinstance(model.blocks[0].ffn, FeedForward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_mixer_dt_is_float32(dtype: torch.dtype, bidirectional: bool, mixer_inputs: list[Any]) -> None:
    """dt is computed in float32 while x, B and C are 16-bit, as rounding dt changes every decay."""
    model, _ = mvar.build(2, width=64, bidirectional=bidirectional)
    layer = prepared_model(model, dtype).get_submodule("blocks.0.mamba")
    exact = model.get_submodule("blocks.0.mamba")
    x = torch.randn(2, 5, 64).to(dtype)
    with torch.no_grad():
        layer(x, (1, 4), None, "reference")
        want = exact.in_proj.double()(x.double())
    ((projected, dt),) = mixer_inputs
    assert projected.dtype == dtype and dt.dtype == torch.float32
    assert (dt.flatten(2) - want[..., projected.shape[-1] :]).abs().max() < 1e-6
    assert (projected - want[..., : projected.shape[-1]]).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


def test_inference_mode_weights_are_not_stale() -> None:
    """Inference tensors have no version counter, so changes go unnoticed and the copy is rebuilt for each call."""
    sizes = mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1,), num_res_blocks=1)
    with torch.inference_mode():
        model, _ = mvar.build(1, num_classes=2, tokenizer=sizes)
        before = prepared_model(model, torch.float32).pos_1LC.clone()
        model.pos_1LC.mul_(2)
        torch.testing.assert_close(prepared_model(model, torch.float32).pos_1LC, 2 * before)


@pytest.mark.parametrize("sizes", [{}, {"architecture": "var"}, {"architecture": "var", "shared_adaln": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tabulated", [False, True])
def test_modulation(sizes: dict[str, Any], dtype: torch.dtype, tabulated: bool) -> None:
    """The copy's modulation equals the model's, with rows expanded after the product; so does a table of classes."""
    tokenizer = mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1,), num_res_blocks=1)
    model, _ = mvar.build(3, num_classes=4, tokenizer=tokenizer, **sizes)
    mvar.init_weights(model, alng=1.0, seed=1)
    labels = torch.tensor([0, 3, 4])
    with torch.no_grad():
        taken_over = plain_module(model)
        taken_over.load_state_dict(model.state_dict(), assign=True)
        prepared = InferenceModel(taken_over, dtype, labels=[3, 0, 3] if tabulated else None)
        assert (prepared.modulation_table is not None) == tabulated
        exact = model.modulation(labels, model.class_emb(labels))
        copied = prepared.modulation(labels, prepared.class_emb(labels), lambda rows: rows[[0, 1, 2, 2]])
    for kind, expected in zip(copied, exact, strict=True):
        assert len(kind) == len(expected)
        for got, want in zip(kind, expected, strict=True):
            assert got.shape == (4, 192) and torch.equal(got[2], got[3])
            assert (got[:3] - want).abs().max() <= rounding(dtype, 192) * want.abs().max()
