"""Tests the engine's VAR against a plain VAR: checkpoints, training and cached generation."""

from pathlib import Path

import pytest
import torch

import mvar
from mvar.inference.prepare import prepared_model
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import VAR
from tests.helpers.plain_var import PlainVAR, randomised

PATCH_NUMS = (1, 2, 3, 5)
LABELS = torch.tensor([3, 7, 1])
KINDS = [{}, {"attn_l2_norm": False}, {"shared_aln": True}]
IDS = ["qk_norm", "no_qk_norm", "shared_aln"]


def pair(folder: Path, **sizes: bool) -> tuple[PlainVAR, mvar.Model]:
    """A plain VAR with random weights, and the engine's VAR loaded from a file of its state dict."""
    torch.manual_seed(0)
    plain = randomised(PlainVAR(2, PATCH_NUMS, **sizes))
    torch.save(plain.state_dict(), folder / "var.pth")
    return plain, mvar.load_model(folder / "var.pth")


def small_tokenizer(patch_nums: tuple[int, ...] = PATCH_NUMS) -> Tokenizer:
    config = mvar.TokenizerConfig(patch_nums, num_codes=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    return mvar.build(1, num_classes=2, tokenizer=config)[1]


@pytest.mark.parametrize("sizes", KINDS, ids=IDS)
def test_logits_and_gradients_match_plain_var(tmp_path: Path, sizes: dict[str, bool]) -> None:
    """Compares in float64; the engine only rounds its logits to float32 at the end."""
    plain, model = pair(tmp_path, **sizes)
    plain, model = plain.double(), model.double()
    inputs = torch.randn(3, 38, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, logits = plain(LABELS, inputs), model(LABELS, inputs)
    assert isinstance(model, VAR) and logits.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    assert (logits - expected).abs().max() <= eps * expected.abs().max()
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (logits.double() * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        want = theirs.pop(name).grad
        assert want is not None and parameter.grad is not None, name
        # The incoming gradient is rounded to float32, too.
        assert (parameter.grad - want).abs().max() <= 4 * eps * want.abs().max(), name
    assert theirs == {}


@pytest.mark.parametrize("sizes", KINDS, ids=IDS)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_greedy_tokens_match_plain_var(tmp_path: Path, sizes: dict[str, bool], cfg: float) -> None:
    """Preallocated key and value buffers give the same tokens as concatenated keys and values."""
    plain, model = pair(tmp_path, **sizes)
    tokenizer = small_tokenizer()
    expected, guided = plain.double().generate(tokenizer, LABELS, cfg=cfg)
    runner_up, best = guided.sort(-1).values[..., -2:].unbind(-1)
    assert (best - runner_up).min() > 1e-4  # no ties, so float32 must give the same tokens
    out = mvar.generate(model, tokenizer, LABELS, cfg=cfg, top_k=1, dtype=torch.float32)
    assert torch.equal(out.tokens, expected)


@pytest.mark.parametrize("resolution", [256, 512])
def test_cached_generation_matches_teacher_forcing(resolution: int) -> None:
    """With published schedules, greedy tokens are the argmax of the masked pass over the same tokens."""
    patch_nums = mvar.SCHEDULES[resolution]
    tokenizer = small_tokenizer(patch_nums)
    model = mvar.VAR(mvar.ModelConfig(1, patch_nums, num_classes=10, num_codes=64, architecture="var"))
    mvar.init_weights(model, alng=1.0, hd=1.0, seed=3).eval()
    out = mvar.generate(model, tokenizer, [4], cfg=0.0, top_k=1, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([4]), tokenizer.teacher_forcing_inputs(out.tokens))
    best = logits.gather(-1, out.tokens[..., None])[..., 0]
    assert (logits.amax(-1) - best).max() <= 1e-4 * logits.abs().max()


def test_states_are_updated_in_place() -> None:
    model, _ = mvar.build(2, num_classes=10, patch_nums=(1, 2, 3), architecture="var", tokenizer=None)
    states = model.empty_states(4)
    before = [state.buffer for state in states]
    assert all(buffer.shape == (4, 14, 2, 2, 64) for buffer in before)
    labels = torch.zeros(4, dtype=torch.int64)
    modulation = model.modulation(labels, model.class_emb(labels))
    with torch.no_grad():
        for length in (1, 4, 9):
            _, states = model.hidden(torch.randn(4, length, 128), modulation, (length,), states)
    assert [state.scales for state in states] == [(1, 4, 9)] * 2
    assert all(
        state.buffer is buffer and bool(buffer.any(-1).all()) for state, buffer in zip(states, before, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    plain, model = pair(tmp_path, shared_aln=True)
    inputs = torch.randn(3, 38, 32, generator=torch.Generator().manual_seed(0))
    copy = prepared_model(model, dtype)
    with torch.no_grad():
        exact, rough = plain(LABELS, inputs), copy(LABELS, inputs)
    assert (exact - rough).norm() / exact.norm() < 16 * torch.finfo(dtype).eps
    assert copy.blocks[0].attn.scale_mul_1H11.dtype == torch.float32
    out = mvar.generate(model, small_tokenizer(), LABELS, dtype=dtype)
    assert out.images.isfinite().all()


@pytest.mark.slow
def test_compiled_training() -> None:
    model, _ = mvar.build(2, num_classes=10, patch_nums=(1, 2, 3), architecture="var", shared_adaln=True, drop_path=0.3)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    compiled(LABELS, torch.randn(3, 13, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_save_and_load(tmp_path: Path, shared: bool) -> None:
    model, _ = mvar.build(1, num_classes=3, patch_nums=(1, 2), architecture="var", shared_adaln=shared)
    mvar.save(tmp_path / "var.safetensors", model)
    again = mvar.load_model(tmp_path / "var.safetensors")
    assert isinstance(again, VAR) and again.config == model.config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_config_from_published_state_dict() -> None:
    """Covers VAR-d16 at 256 and d36-s at 512, which has a shared modulation layer."""
    for depth, resolution, shared in ((16, 256, False), (36, 512, True)):
        with torch.device("meta"):
            published = PlainVAR(
                depth, mvar.SCHEDULES[resolution], num_classes=1000, num_codes=4096, shared_aln=shared
            ).state_dict()
        levels = torch.arange(10).repeat_interleave(torch.tensor([n * n for n in mvar.SCHEDULES[resolution]]))
        config = mvar.ModelConfig.from_state_dict(published | {"lvl_1L": levels[None]})
        assert config == mvar.ModelConfig(depth, mvar.SCHEDULES[resolution], architecture="var", shared_adaln=shared)
        with torch.device("meta"):
            ours = {name: t.shape for name, t in mvar.from_config(config).state_dict().items()}
        published.pop("attn_bias_for_masking")
        assert ours == {name: t.shape for name, t in published.items()}


@pytest.mark.parametrize(
    ("depth", "shared", "million"),
    [(16, False, 310), (20, False, 600), (24, False, 1000), (30, False, 2000), (36, True, 2300)],
)
def test_published_parameter_counts(depth: int, shared: bool, million: int) -> None:
    with torch.device("meta"):
        model = mvar.VAR(mvar.ModelConfig(depth, mvar.SCHEDULES[256], architecture="var", shared_adaln=shared))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 / million - 1) < 0.08


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["lvl_1L"][0].copy_(torch.tensor([0] * 2 + [1] * 37)), "lvl_1L: expected squares"),
        (lambda s: s["lvl_1L"].add_(1), "lvl_1L: does not follow from the patch numbers"),
        (lambda s: s.pop("lvl_1L"), "'lvl_1L' is missing"),
        (lambda s: s.pop("blocks.1.attn.scale_mul_1H11"), "the first is 'blocks.1.attn.scale_mul_1H11'"),
        (lambda s: s.update({"blocks.0.ada_lin.1.weight": torch.zeros(9 * 128, 128)}), "expected shape"),
    ],
)
def test_invalid_weights(tmp_path: Path, change: object, message: str) -> None:
    state = pair(tmp_path)[0].state_dict()
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(mvar.CheckpointError, match=message):
        mvar.load_model(tmp_path / "changed.pth")


def test_invalid_sizes() -> None:
    with pytest.raises(ValueError, match="architecture: expected one of mvar, var"):
        mvar.ModelConfig(1, (1, 2), architecture="vae")
    with pytest.raises(ValueError, match="bidirectional: VAR has no mixer"):
        mvar.ModelConfig(1, (1, 2), architecture="var", bidirectional=True)
    with pytest.raises(ValueError, match="architecture: expected 'mvar', got 'var'"):
        mvar.MVAR(mvar.ModelConfig(1, (1, 2), architecture="var"))
