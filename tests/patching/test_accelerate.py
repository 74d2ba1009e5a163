"""Tests of accelerate and restore."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar
import mvar_kernels as mk
from mvar.models.tokenizer import Tokenizer
from mvar_kernels.dispatch import native
from mvar_kernels.patching.cache import cached_call, schedule_of
from mvar_kernels.patching.patches import block as patched_block
from mvar_kernels.testing.spec import PER_HEAD_SUM
from tests.helpers.plain_mamba2 import PlainMamba2
from tests.helpers.plain_var import PlainVAR, SelfAttention, randomised

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")
SMALL = (1, 2, 3)
LABELS = torch.tensor([3, 7])
KINDS = [{}, {"attn_l2_norm": False}, {"shared_aln": True}]
IDS = ["qk_norm", "no_qk_norm", "shared_aln"]
# For float32, relative to the largest value. The original and the replacement add up to 2,240 products in different
# orders, in two blocks whose softmax has temperatures up to 100: √2240 · 100 · 2⁻²⁴ = 3·10⁻⁴.
TOLERANCE = 3e-4


def plain(patch_nums: tuple[int, ...] = SMALL, heads: int = 2, **sizes: Any) -> PlainVAR:
    torch.manual_seed(0)
    return randomised(PlainVAR(2, patch_nums, heads=heads, **sizes))


def inputs_of(model: PlainVAR, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, sum(model.scales) - 1, 32, generator=generator)


def logits_and_grads(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradient of each parameter, with the same random seed at every call."""
    torch.manual_seed(2)
    model.zero_grad()
    out = model(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    (out * weights).sum().backward()
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name


def small_tokenizer(patch_nums: tuple[int, ...]) -> Tokenizer:
    config = mvar.TokenizerConfig(patch_nums, num_codes=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    return mvar.build(1, num_classes=2, tokenizer=config)[1]


@pytest.mark.parametrize(
    ("resolution", "batch", "sizes"), [*((256, 2, kind) for kind in KINDS), (512, 1, {})], ids=[*IDS, "512"]
)
def test_accelerate_matches_original(resolution: int, batch: int, sizes: dict[str, bool]) -> None:
    """Uses VAR's published schedules; in training mode, stochastic depth draws the same random numbers."""
    model = plain(mvar.SCHEDULES[resolution], heads=1, drop_path=0.3, **sizes)
    tokenizer, inputs, labels = small_tokenizer(model.patch_nums), inputs_of(model, batch), LABELS[:batch]
    before = [logits_and_grads(model.train(mode), labels, inputs) for mode in (False, True)]
    tokens, drawn_from = model.eval().generate(tokenizer, labels)

    report = mk.accelerate(model)
    assert len(report.replaced) == 5 and set(report.left) == {"blocks.0.ffn", "blocks.1.ffn"}
    for mode, expected in zip((False, True), before, strict=True):
        assert_same(logits_and_grads(model.train(mode), labels, inputs), expected)
    again, drawn_again = model.eval().generate(tokenizer, labels)
    assert torch.equal(again, tokens)
    assert (drawn_again - drawn_from).abs().max() <= TOLERANCE * drawn_from.abs().max()

    mk.restore(model)
    assert_same(logits_and_grads(model, labels, inputs), before[0], tolerance=0.0)


def test_accelerate_preserves_parameters_hooks_and_state_dict() -> None:
    model = plain()
    classes = [type(module) for module in model.modules()]
    parameters, state = dict(model.named_parameters()), model.state_dict()
    seen: list[str] = []
    model.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append("hook"))
    random_state = torch.get_rng_state()
    mk.accelerate(model)
    assert seen == [] and torch.equal(random_state, torch.get_rng_state())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state) and not model.training
    assert isinstance(model.blocks[0].attn, SelfAttention)
    model(LABELS, inputs_of(model))
    assert seen == ["hook"]

    other = copy.deepcopy(model)
    assert isinstance(other.blocks[0].attn, type(model.blocks[0].attn))
    assert mk.accelerate(model).replaced.keys() == mk.accelerate(other).replaced.keys()  # accelerate is idempotent
    mk.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert type(other.blocks[0].attn) is not SelfAttention


def test_report_str() -> None:
    assert str(mk.accelerate(plain())).splitlines() == [
        "replaced blocks.* (2): by adaln and gated_adaln",
        "replaced blocks.*.attn (2): by scale_attention",
        "replaced head_nm: by adaln",
        "left blocks.*.ffn (2): its two linear layers are the library's own already",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients keep their dtypes, and the errors against float32 are less than twice the original's;
    branches of 16 bits go beside the residual stream in float32 as they are."""
    model, found, dtypes = plain(), [], set()

    def noted(x: Tensor, branch: Tensor, *vectors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        dtypes.add((x.dtype, branch.dtype))
        return mk.gated_adaln(x, branch, *vectors, **options)

    inputs = inputs_of(model)
    exact = logits_and_grads(model, LABELS, inputs)
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            found.append(logits_and_grads(model, LABELS, inputs))
        mk.accelerate(model)
        monkeypatch.setattr(patched_block, "gated_adaln", noted)
    assert dtypes == {(torch.float32, dtype)}
    for name, value in exact.items():
        errors = [float((out[name] - value).norm() / value.norm()) for out in found]
        slack = PER_HEAD_SUM[0] if name.endswith("scale_mul_1H11") else 1
        assert found[0][name].dtype == found[1][name].dtype and errors[1] < 2 * slack * errors[0], (name, errors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = plain()
    exact = model(LABELS, inputs_of(model))
    model, inputs = model.to(dtype), inputs_of(model).to(dtype)
    before = model(LABELS, inputs)
    mk.accelerate(model)
    after = model(LABELS, inputs)
    assert after.dtype == before.dtype
    difference, rounding = (after - before).norm() / exact.norm(), (before - exact).norm() / exact.norm()
    assert difference <= 2 * rounding


def test_compile() -> None:
    model = plain(drop_path=0.3).train()
    mk.accelerate(model)
    expected = logits_and_grads(model, LABELS, inputs_of(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {n.removeprefix("_orig_mod."): g for n, g in logits_and_grads(compiled, LABELS, inputs_of(model)).items()}
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["strictly causal", "sliding", "soft", "of another length"])
def test_unsupported_mask_uses_original_forward(kind: str) -> None:
    model = plain()
    attention, x = model.blocks[0].attn, torch.randn(2, 14, 128, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.arange(14)[:, None], torch.arange(14)
    mask = {
        "strictly causal": torch.where(rows >= columns, 0.0, -torch.inf),
        "sliding": torch.where((rows - columns).abs() < 3, 0.0, -torch.inf),
        "soft": torch.where(rows // 7 >= columns // 7, 0.0, -10.0),
        "of another length": torch.zeros(1, 14),
    }[kind][None, None]
    expected = attention(x, mask)
    mk.accelerate(model)
    torch.testing.assert_close(attention(x, mask), expected, rtol=TOLERANCE, atol=1e-5)


def test_mask_modified_in_place() -> None:
    model = plain()
    mk.accelerate(model)
    before = model(LABELS, inputs_of(model))
    model.attn_bias_for_masking.zero_()  # every query now attends to every key
    after = model(LABELS, inputs_of(model))
    mk.restore(model)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, model(LABELS, inputs_of(model)), rtol=TOLERANCE, atol=1e-4)


def test_schedule_of() -> None:
    level = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    seen = level[:, None] >= level
    added = torch.where(seen, 0.0, -torch.inf)
    assert schedule_of(seen) == schedule_of(added[None, None].bfloat16()) == ("causal", (1, 4, 9))
    assert schedule_of(added[:5, :5]) == ("causal", (1, 4))  # a prefix of a larger mask
    assert schedule_of(level[:, None] == level) == ("diagonal", (1, 4, 9))
    assert schedule_of(torch.zeros(1, 1, 3, 3)) == ("causal", (3,))
    assert schedule_of(torch.zeros(2, 1, 3, 3)) is None  # one mask per sample
    assert schedule_of(added.T) is None and schedule_of(added.nan_to_num(neginf=-1e4)) is None
    assert schedule_of(torch.ones(3, 3).tril().bool()) == ("causal", (1, 1, 1))
    assert schedule_of(torch.eye(3).bool()) == ("diagonal", (1, 1, 1))
    two_back = (level[:, None] >= level) & (level[:, None] - level < 2)
    assert schedule_of(two_back) is None  # neither pattern
    assert schedule_of(torch.full((2, 2), -torch.inf)) is None and schedule_of(torch.zeros(0, 0)) is None


def test_modulation_is_cached_per_generation() -> None:
    """The modulation is recomputed when the class embedding or a weight has changed."""
    model, rows = plain(), []
    mk.accelerate(model)
    model.blocks[0].ada_lin.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for _ in range(2):
        model.generate(small_tokenizer(SMALL), LABELS)
    assert rows == [4, 4]

    layer, cond = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    with torch.no_grad():
        for change in (cond, layer[0].weight):
            before = cached_call(layer, cond)
            assert cached_call(layer, cond) is before
            change.add_(1)
            assert torch.equal(cached_call(layer, cond), layer(cond)) and not torch.equal(before, layer(cond))


class OtherOrder(nn.Module):
    """A block with VAR's attribute names whose modulation parameters are in a different order."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn, self.ffn, self.ln_wo_grad, self.drop_path = block.attn, block.ffn, block.ln_wo_grad, block.drop_path
        self.ada_lin = block.ada_lin

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        s1, g1, t1, s2, g2, t2 = self.ada_lin(cond_BD)[:, None].chunk(6, -1)
        x = x + g1 * self.attn(self.ln_wo_grad(x) * (1 + s1) + t1, attn_bias)
        return x + g2 * self.ffn(self.ln_wo_grad(x) * (1 + s2) + t2)


class Rotated(SelfAttention):
    """VAR's attention applied to rolled channels."""

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        return super().forward(x.roll(1, -1), attn_bias)


class OtherArguments(SelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None, *frequencies: Tensor) -> Tensor:
        return super().forward(x, attn_bias)


class MoreArguments(SelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None, factor: float = 1.0) -> Tensor:
        return factor * super().forward(x, attn_bias)


class Capped(SelfAttention):
    """Attention whose scores are capped at 20, which makes no difference when scores are small."""

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.caching and self.cached_k is not None:
            k, v = torch.cat([self.cached_k, k], 2), torch.cat([self.cached_v, v], 2)
        self.cached_k, self.cached_v = (k, v) if self.caching else (None, None)
        scores = 20 * torch.tanh(self.scale * (q @ k.mT) / 20)
        out = (scores if attn_bias is None else scores + attn_bias).softmax(-1) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def test_attention_with_capped_scores_is_not_replaced() -> None:
    model = plain(attn_l2_norm=False)
    model.blocks[0].attn.__class__ = Capped
    report = mk.accelerate(model)
    assert "does not compute" in report.left["blocks.0.attn"] and "blocks.1.attn" in report.replaced


def test_accelerate_preserves_rng_state(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    model = plain()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    assert mk.accelerate(model).replaced and not seeded
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_without_parameters_is_not_replaced() -> None:
    model = plain()
    for block in model.blocks:
        for module in block.attn.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())
    assert mk.accelerate(model).left["blocks.0.attn"] == "it has no parameters"


def test_modified_modules_are_not_replaced() -> None:
    model = plain()
    model.blocks[0] = OtherOrder(model.blocks[0])
    model.blocks[0].attn.__class__ = Rotated
    model.blocks[1].attn.__class__ = OtherArguments
    model.head_nm.forward = lambda x, cond: x
    inputs = inputs_of(model)
    expected = logits_and_grads(model, LABELS, inputs)
    report = mk.accelerate(model)
    assert set(report.replaced) == {"blocks.1"}
    assert report.left["blocks.0"] == "it does not compute what adaln and gated_adaln does, in evaluation"
    assert report.left["blocks.0.attn"] == "it does not compute what scale_attention does, in evaluation"
    assert "takes (x, attn_bias, frequencies), not (x, attn_bias)" in report.left["blocks.1.attn"]
    assert "on the instance" in report.left["head_nm"]
    assert_same(logits_and_grads(model, LABELS, inputs), expected)


def test_argument_not_at_its_default_uses_original_forward() -> None:
    attention, x = plain().blocks[0].attn, torch.randn(2, 3, 128)
    attention.__class__ = MoreArguments
    expected = attention(x, None)
    assert mk.accelerate(attention).replaced
    for out in (attention(x, None), attention(x, attn_bias=None, factor=1.0), attention(x, None, 3.0) / 3):
        torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=1e-5)


def test_attention_dropout_uses_original_forward_in_training() -> None:
    model = plain().train()
    for block in model.blocks:
        block.attn.attn_drop = 0.2
    attention, x = model.blocks[0].attn, torch.randn(2, 14, 128)
    mask = model.attn_bias_for_masking

    class Dropping(SelfAttention):
        def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
            return F.dropout(super().forward(x, attn_bias), self.attn_drop, self.training)

    attention.__class__ = Dropping
    torch.manual_seed(0)
    expected = attention(x, mask)
    assert "blocks.0.attn" in mk.accelerate(model).replaced
    torch.manual_seed(0)
    assert torch.equal(attention(x, mask), expected)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 1, 1)), mvar.VAR], ids=str)
def test_model_without_matching_modules(model: Any) -> None:
    if not isinstance(model, nn.Module):
        model = model(mvar.ModelConfig(1, (1, 2), architecture="var"))
    report = mk.accelerate(model)
    assert report.replaced == {}
    assert "lacks kv_caching" in str(report) if len(report.left) > 1 else "no part that looks like" in str(report)


def test_device_without_kernel() -> None:
    with torch.device("meta"):
        model = PlainVAR(1, SMALL)
    report = mk.accelerate(model)
    assert report.replaced == {} and "no kernel for its device meta" in str(report)


def test_mamba2() -> None:
    """Compares training, and generation with the cache, one or several tokens at a time, with the original layer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mixer": PlainMamba2(64)})
    layer, u = model["mixer"], torch.randn(2, 30, 64)
    expected = logits_and_grads(layer, u)

    def cached(*lengths: int) -> list[Tensor]:
        cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        outs = []
        with torch.no_grad():
            for length in lengths:
                start = cache.seqlen_offset
                outs.append(layer(u[:, start : start + length], inference_params=cache))
                cache.seqlen_offset += length
        return [torch.cat(outs, 1), *cache.key_value_memory_dict[0]]

    by_token = cached(2, *[1] * 28)
    packed = layer(u.flatten(0, 1), seqlen=30)
    assert mk.accelerate(model).replaced == {"mixer": "mamba2_mixer"}
    assert_same(logits_and_grads(layer, u), expected)
    for lengths in ((2, *[1] * 28), (30,), (1, 4, 25)):  # the original cannot start from a state with several tokens
        for got, want in zip(cached(*lengths), by_token, strict=True):
            assert got.dtype == want.dtype and (got - want).abs().max() <= TOLERANCE * want.abs().max()
    assert torch.equal(layer(u.flatten(0, 1), seqlen=30), packed)  # uses the original forward
    mk.restore(model)
    assert type(layer) is PlainMamba2


MIXERS: dict[str, dict[str, Any]] = {
    "groups": {"ngroups": 2},
    "groups without norm": {"ngroups": 4, "rmsnorm": False, "conv_bias": False},
    "groups, norm over all": {"ngroups": 2, "group_size": None},  # Mamba2Simple
    "no norm": {"rmsnorm": False},
    "norm before gate": {"norm_before_gate": True, "ngroups": 2},
    "limits": {"dt_limit": (0.05, 0.3)},
    "D of a channel": {"D_has_hdim": True, "conv_bias": False},
}


@pytest.mark.parametrize("kind", MIXERS)
def test_mamba2_variants(kind: str) -> None:
    """The layer's own step has neither limits nor a D of each channel, so that its cache then stays its own affair."""
    torch.manual_seed(0)
    layer, u = PlainMamba2(64, **MIXERS[kind]), torch.randn(2, 30, 64)

    def cached() -> Tensor:
        cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        outs = []
        with torch.no_grad():
            for start, end in ((0, 29), (29, 30)):
                outs.append(layer(u[:, start:end], inference_params=cache))
                cache.seqlen_offset = end
        return torch.cat(outs, 1)

    expected, tokens = logits_and_grads(layer, u), cached()
    assert mk.accelerate(layer).replaced == {"": "mamba2_mixer"}
    assert_same(logits_and_grads(layer, u), expected)
    assert (cached() - tokens).abs().max() <= TOLERANCE * tokens.abs().max()


@pytest.mark.parametrize(
    ("option", "value"), [("process_group", 0), ("d_ssm", 64), ("activation", "relu"), ("learnable_init_states", True)]
)
def test_mamba2_unsupported_options(option: str, value: Any) -> None:
    layer = PlainMamba2(64)
    setattr(layer, option, value)
    report = mk.accelerate(layer)
    assert option in report.left[""] and str(value) in report.left[""]
