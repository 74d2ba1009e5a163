"""Tests that sample_tokens' Triton kernel matches the reference bit for bit."""

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import interpreted, unavailable
from mvar_kernels.ops.sample_tokens import noise, reference
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling
from tests.kernels.test_sample_tokens_native import finite_rows, image_indices, infinite_rows

REASON = unavailable("triton")
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from mvar_kernels.ops.sample_tokens.triton import common as parts  # noqa: E402
from mvar_kernels.ops.sample_tokens.triton import sample_tokens_triton, soft_embedding_triton  # noqa: E402

# Infinite logits overflow as intended; NumPy, which the interpreter uses, warns about it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 2**20 if interpreted() else 1024  # an interpreted operation takes about as long for any size
SEED, SCALE = torch.tensor(2**63 - 5), 2**32 - 1
FILTERS = [(0, 1.0), (1, 1.0), (0.2, 1.0), (0, 0.96), (0.6, 0.5), (0, 1e-20)]  # of V, and top_p


def moved(call: Sampling) -> Sampling:
    return Sampling(*(value.to(DEVICE) if isinstance(value, Tensor) else value for value in call))


def draw(call: Sampling) -> Tensor:
    tokens: Tensor = sample_tokens_triton.forward(moved(call))[0]
    return tokens.cpu()


@triton.jit
def _map_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if FUNCTION == "third":
        y = parts.divide(x, 3.0, 4.0)
    elif FUNCTION == "fifth":
        y = parts.divide(x, 5.0, 4.0)
    elif FUNCTION == "seventh":
        y = parts.divide(x, 7.0, 8.0)
    elif FUNCTION == "softmax_weight":
        y = parts.softmax_weight(x)
    elif FUNCTION == "gumbel":
        y = parts.gumbel(x.to(tl.uint32))
    else:
        y = parts.near_exponential(x.to(tl.uint32))
    tl.store(y_ptr + offs, y)


def apply(function: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    padded = torch.cat([x, x.new_zeros(-len(x) % BLOCK)]).to(DEVICE)
    y = torch.empty_like(padded, dtype=dtype)
    _map_kernel[(len(padded) // BLOCK,)](padded, y, function, BLOCK, enable_fp_fusion=False)
    return y[: len(x)].cpu()


def test_divide() -> None:
    x = (torch.arange(2**23, dtype=torch.int32) + 0x3F000000).view(torch.float32)
    for function, divisor in (("third", 3), ("fifth", 5), ("seventh", 7)):
        assert torch.equal(apply(function, x), x / divisor)


def words() -> Tensor:
    """Return 32-bit words: the smallest, the largest, those near powers of two, and random ones."""
    near = torch.arange(2**16)
    powers = (2 ** torch.arange(16, 32))[:, None] + torch.arange(-300, 300)
    anything = torch.randint(2**32, (2**19,), generator=torch.Generator().manual_seed(0))
    return torch.cat([near, 2**32 - 1 - near, powers.flatten(), anything])


def test_weights_and_noise_are_bitwise_equal() -> None:
    x = torch.cat([-torch.logspace(-8, 2.5, 400_001), -torch.linspace(0, 90, 400_001), torch.tensor([-torch.inf])])
    want = (noise.exp_negative(x) * reference.WEIGHT_ONE).to(torch.int32)
    assert torch.equal(apply("softmax_weight", x, torch.int32), want)
    word = words()
    u = word.to(torch.float32) * 2.0**-32 + 2.0**-33
    lost = u - (1 - (1 - u))
    exponential = torch.where(u < 1, lost - noise.log((1 - u).clamp_min(2.0**-24)), 17.328679513998633)
    assert torch.equal(apply("gumbel", word), -noise.log(exponential))
    near = apply("near_exponential", word)
    assert ((near / exponential).log().abs()).max() < 2.0**-11


@pytest.mark.parametrize("V", [1, 259])
def test_tokens_match_reference(V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    cond = torch.cat([finite_rows(V, 1, generator), infinite_rows(V, 1, generator)])
    index = image_indices(len(cond)) + 2**40  # counted modulo 2³²
    for share, top_p in FILTERS:
        top_k = int(share * V) if isinstance(share, float) else share
        call = Sampling(cond, None, index, 0.0, top_k, top_p, SEED, SCALE)
        assert torch.equal(draw(call), reference.sample_tokens(call)[0]), (top_k, top_p)


def test_single_finite_logit() -> None:
    cond = torch.full((1, 3, 70), -torch.inf)
    for position, code in enumerate((0, 33, 69)):
        cond[0, position, code] = -5.0
    for filters in ((0, 1.0), (3, 1.0), (3, 0.5)):
        call = Sampling(cond, None, torch.zeros(1).long(), 0.0, *filters, SEED, 2)
        assert draw(call).tolist() == [[0, 33, 69]]


@pytest.mark.parametrize("guidance", [0.75, 1e6])
def test_guided_tokens_match_reference(guidance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.cat([rows(130, 1, generator) for rows in (finite_rows, infinite_rows)]) for _ in range(2))
    for top_k, top_p in ((0, 1.0), (30, 0.96)):
        call = Sampling(cond, uncond, image_indices(len(cond)), guidance, top_k, top_p, SEED, 1)
        assert torch.equal(draw(call), reference.sample_tokens(call)[0]), (top_k, top_p)


def test_near_ties() -> None:
    """The scores of the two codes differ by at most a rounding error, for small and for large logits."""
    index = torch.tensor([1, -1])
    values = noise.gumbel(index, (2, 16, 2), SCALE, SEED)
    for offset in (0.0, 2.0**20):
        cond = torch.stack([torch.zeros(2, 16), values[..., 0] - values[..., 1]], -1) + offset
        call = Sampling(cond, None, index, 0.0, 0, 1.0, SEED, SCALE)
        want = reference.sample_tokens(call)[0]
        assert 0 < want.sum() < want.numel()
        assert torch.equal(draw(call), want)


def test_guidance_is_bitwise_equal() -> None:
    """The guided logits of the two codes differ by their noise, so any bit of a guided logit matters."""
    index = torch.tensor([1, -1])
    values = noise.gumbel(index, (2, 16, 2), SCALE, SEED)
    uncond = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    cond = torch.stack([torch.zeros(2, 16), values[..., 0] - values[..., 1]], -1)
    cond = (cond + 1.3 * uncond) / 2.3
    call = Sampling(cond, uncond, index, 1.3, 0, 1.0, SEED, SCALE)
    want = reference.sample_tokens(call)[0]
    assert 0 < want.sum() < want.numel()
    assert torch.equal(draw(call), want)


def test_top_p_threshold() -> None:
    """The second code is dropped or kept, depending on one unit of its weight."""
    second = -torch.logspace(-3, 1, 6)
    weights = (noise.exp_negative(second) * 2**30).long().tolist()
    for x, weight in zip(second.tolist(), weights, strict=True):
        cond = torch.tensor([[[0.0, x]]])
        for limit, kept in ((weight + 0.5, False), (weight - 0.5, True)):
            call = Sampling(cond, None, torch.zeros(1).long(), 0.0, 0, 1 - limit / (2**30 + weight), SEED, 0)
            mean = soft_embedding_triton.forward(
                SoftSampling(torch.eye(2, device=DEVICE), *moved(call)[:8], 1e-38, 100.0)
            )[0]
            assert (mean[0, 0, 1] > 0) == kept, x


def test_nan_logits() -> None:
    cond = torch.randn(1, 6, 67, generator=torch.Generator().manual_seed(0))
    cond[0, 1:, ::3] = torch.nan
    cond[0, 3] = torch.nan
    cond[0, 4, 0] = -torch.inf
    for filters in ((0, 1.0), (5, 1.0), (5, 0.5)):
        call = Sampling(cond, None, torch.zeros(1).long(), 0.0, *filters, SEED, 0)
        tokens = draw(call)
        assert ((tokens >= 0) & (tokens < 67)).all()
        assert torch.equal(tokens, draw(call))
