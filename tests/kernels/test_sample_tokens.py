"""Tests of the noise, the filters and the distribution of sample_tokens and soft_embedding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mvar_kernels as mk
from mvar_kernels.ops.sample_tokens import noise
from mvar_kernels.ops.sample_tokens.inputs import Sampling
from mvar_kernels.ops.sample_tokens.reference import filtered_logits, guided_logits, relative_logits, sample_tokens
from mvar_kernels.validation import FLOATS
from tests.kernels.test_sample_tokens_native import finite_rows, infinite_rows


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # known answers published with the Random123 library
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((noise.MASK,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    got = noise.philox(tuple(torch.tensor(c) for c in counter), seed)  # type: ignore[arg-type]
    assert tuple(int(w) for w in got) == words


def test_log_and_exp_accuracy() -> None:
    x = torch.logspace(-12, 3, 200_001, base=10.0)
    near_one = 1 + torch.linspace(-1e-3, 1e-3, 20_001)
    for values in (x, near_one):
        exact = values.double().log()
        ulp = torch.finfo(torch.float32).eps * exact.abs().clamp_min(1e-30)
        assert ((noise.log(values) - exact).abs() / ulp).max() <= 2
    below = torch.linspace(-87, 0, 200_001)
    assert (noise.exp_negative(below) / below.double().exp() - 1).abs().max() <= 2 * torch.finfo(torch.float32).eps
    assert noise.exp_negative(torch.tensor([-1e30, -torch.inf])).tolist() == [0.0, 0.0]


class Divisors(TorchDispatchMode):
    """Records the divisors of all divisions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.div:
            self.found.append(args[1])
        return func(*args, **kwargs or {})


def test_divisors_are_tensors() -> None:
    """On a GPU, torch divides by a Python number by multiplying by its inverse, which would change the weights."""
    with Divisors() as divisors:
        sample_tokens(Sampling(torch.zeros(2, 3, 5), None, torch.arange(2), 0.0, 2, 0.5, torch.tensor(7), 0))
    assert divisors.found and all(isinstance(divisor, Tensor) for divisor in divisors.found)


def test_gumbel_moments() -> None:
    g = noise.gumbel(torch.arange(4), (4, 64, 4096), 3, seed=11).double()
    count = g.numel()
    assert g.isfinite().all()
    # Mean Euler's gamma, variance π²/6, fourth central moment 27/5·σ⁴: within four standard errors.
    variance = math.pi**2 / 6
    assert abs(g.mean() - 0.5772156649) < 4 * math.sqrt(variance / count)
    assert abs(g.var() - variance) < 4 * variance * math.sqrt((27 / 5 - 1) / count)


def test_noise_is_counter_based() -> None:
    whole = noise.gumbel(torch.arange(5), (5, 6, 10), 2, seed=3)
    assert torch.equal(noise.gumbel(torch.tensor([3]), (1, 4, 7), 2, seed=3), whole[3:4, :4, :7])
    for draw in ((2, 3 + 2**32), (1, 3)):
        other = noise.gumbel(torch.arange(5), (5, 6, 10), *draw)
        assert not (other == whole).any()
    assert whole.unique().numel() == whole.numel()


def sort_based(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return which codes VAR's sort-based filters keep, in float64."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k:
        kept = logits >= logits.sort(-1, descending=True).values[..., top_k - 1, None]
    if top_p < 1:
        masked = logits.double().masked_fill(~kept, -torch.inf)
        ascending, order = masked.sort(dim=-1, stable=True)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        kept = kept & ~torch.zeros_like(drop).scatter(-1, order, drop)
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (30, 0.5), (900, 0.96), (1, 0.3), (40, 0.001)])
@pytest.mark.parametrize("ties", [False, True])
def test_filters_match_var(top_k: int, top_p: float, ties: bool) -> None:
    logits = 2 * torch.randn(4, 8, 1000, generator=torch.Generator().manual_seed(0))
    if ties:
        logits = logits.round()
    kept = filtered_logits(logits, top_k, top_p).isfinite()
    assert torch.equal(kept, sort_based(logits, top_k, top_p))
    assert kept.any(-1).all()


def test_filters_with_ties() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]])
    assert filtered_logits(logits, 2, 1.0).isfinite().tolist() == [[[False, True, True, True, True, False]]]
    assert filtered_logits(logits, 0, 1e-9).isfinite().sum() == 1
    far = torch.tensor([[[0.0, -1000.0, -torch.inf]]])
    assert filtered_logits(far, 0, 0.99).isfinite().tolist() == [[[True, False, False]]]


def test_sampling_distribution() -> None:
    """Chi-square test of 40,000 draws against the softmax, at a significance level of about 10⁻⁴."""
    logits = torch.linspace(-2, 2, 8).expand(200, 200, 8)
    tokens = mk.sample_tokens(logits, seed=5)
    expected = 40_000 * logits[0, 0].double().softmax(-1)
    observed = tokens.flatten().bincount(minlength=8)
    assert ((observed - expected) ** 2 / expected).sum() < 30.0  # 7 degrees of freedom
    only = mk.sample_tokens(logits, seed=5, top_k=3)
    assert set(only.unique().tolist()) == {5, 6, 7}


def test_argmax_and_guidance() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(3, 4, 50, generator=generator) for _ in range(2))
    guided = 2.5 * cond - 1.5 * uncond
    assert torch.equal(mk.sample_tokens(cond, uncond, guidance=1.5, top_k=1), guided.argmax(-1))
    torch.testing.assert_close(relative_logits(guided_logits(cond, uncond, 1.5)), relative_logits(guided))


BACKENDS = ("reference", "cpu")  # other tests compare the others with the reference, bit for bit
FILTERS = [(0, 1.0), (9, 1.0), (0, 0.8), (1, 1.0)]  # top_k, top_p


def drawn(cond: Tensor, uncond: Tensor | None, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the sampled tokens and the soft weight of each code."""
    codebook = torch.eye(cond.shape[-1], dtype=torch.float32 if backend != "reference" else cond.dtype)
    options |= {"seed": 3, "backend": backend}
    return mk.sample_tokens(cond, uncond, **options), mk.soft_embedding(cond, uncond, codebook, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("offset", [1e6, -1e7])
def test_logits_offset_invariance(offset: float, guidance: float, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 6, 20, generator=generator).mul(2).round() for _ in range(2))
    of_each_row = torch.arange(6.0)[:, None] * 1e5
    for top_k, top_p in FILTERS:
        how: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
        want = drawn(cond, uncond, backend, **how)
        got = drawn(cond + offset, uncond - offset + of_each_row, backend, **how)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (top_k, top_p)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_logits_are_sampled_uniformly(dtype: torch.dtype) -> None:
    for value in (0.0, 1e7, -1e7) if dtype != torch.float16 else (0.0, 6e4, -6e4):
        tokens = mk.sample_tokens(torch.full((100, 1000, 2), value, dtype=dtype), seed=11)
        assert abs(tokens.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(tokens.numel()), value


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, "reference") for dtype in FLOATS] + [(dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_minus_infinity_is_never_sampled(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 40, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    excluded = torch.rand(2, 40, 16, generator=generator) < 0.7
    excluded[..., 5] = False
    lowest = torch.finfo(dtype).min  # a common substitute for −∞
    for of_cond, of_uncond in ((-torch.inf, -torch.inf), (-torch.inf, 0.0), (lowest, lowest), (-torch.inf, lowest)):
        for guidance in (0.0, 1.5, 1e6) if of_cond == -torch.inf else (0.0, 1.5):
            rows = (cond.masked_fill(excluded, of_cond), uncond.masked_fill(excluded, of_uncond))
            for top_k, top_p in FILTERS:
                how: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
                tokens, weights = drawn(*rows, backend, **how)
                assert not excluded.gather(-1, tokens[..., None]).any(), (of_cond, of_uncond, how)
                assert weights.isfinite().all() and bool((weights[excluded] == 0).all()), (of_cond, of_uncond, how)


def test_minus_infinity_in_uncond_only() -> None:
    """The code keeps its cond logit, as if both rows had the same logit relative to their maximum."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (relative_logits(torch.randn(2, 6, 20, generator=generator)) for _ in range(2))
    some = torch.rand(2, 6, 20, generator=generator) < 0.3
    some[..., :2] = False
    uncond[..., 0] = 0.0
    guided = guided_logits(cond, uncond.masked_fill(some, -torch.inf), 1.5)
    assert torch.equal(guided, guided_logits(cond, torch.where(some, cond, uncond), 1.5))


def test_uncond_unused_without_guidance() -> None:
    cond = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    for value in (-torch.inf, torch.nan, torch.inf):
        assert torch.equal(mk.sample_tokens(cond, torch.full_like(cond, value)), mk.sample_tokens(cond))


def test_infinite_logits() -> None:
    logits = torch.randn(1, 20_000, 8, generator=torch.Generator().manual_seed(0))
    logits[..., [2, 6]] = torch.inf
    tokens = mk.sample_tokens(logits)
    assert set(tokens.unique().tolist()) == {2, 6}
    assert abs((tokens == 2).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(tokens.numel())
    nothing = torch.full((1, 3, 8), -torch.inf)
    for filters in FILTERS:
        assert mk.sample_tokens(nothing, top_k=filters[0], top_p=filters[1]).tolist() == [[0, 0, 0]]
    assert mk.soft_embedding(nothing, None, torch.eye(8)).isnan().all()


def test_soft_embedding_low_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, codebook = torch.randn(2, 6, 40, generator=generator), torch.randn(40, 8, generator=generator)
    tokens = mk.sample_tokens(logits, top_k=10, top_p=0.9, seed=2)
    soft = mk.soft_embedding(logits, None, codebook, top_k=10, top_p=0.9, seed=2, temperature=1e-4)
    torch.testing.assert_close(soft, codebook[tokens], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": -1}, r"top_k: expected an integer of at least 0 \(0 keeps all\), got -1"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"num_samples": 0}, "num_samples: expected an integer from 1 to 1431655765, got 0"),
        ({"num_samples": 2**31}, "num_samples"),
        ({"num_samples": 2.0}, "num_samples"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"scale_index": -1}, "scale_index"),
        ({"image_index": torch.arange(3)}, r"image_index: expected shape \(B=2\)"),
        ({"guidance": 1e39}, "guidance: expected a number from 0 to"),
        ({"guidance": "1"}, "guidance"),
        ({"guidance": 1.0}, "uncond: expected logits to guide away from"),
        ({"uncond": torch.zeros(2, 3, 4)}, r"uncond: expected shape \(B=2, l=3, V=5\)"),
        ({"backend": "fast"}, "backend: expected one of"),
    ],
)
def test_errors_name_the_argument(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.sample_tokens(torch.zeros(2, 3, 5), **wrong)  # type: ignore[arg-type]


def test_named_backend_does_not_fall_back() -> None:
    with pytest.raises(mk.BackendError, match="backend 'cuda' requested"):
        mk.sample_tokens(torch.zeros(2, 3, 5), backend="cuda")


@pytest.mark.parametrize("backend", [name for name, reason in mk.backends().items() if reason is None])
def test_tensor_seed(backend: str) -> None:
    """A tensor seed gives the same result as its value as an int, and a compiled call reads it at every call."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 67, generator=generator).to(device)
    codebook = torch.randn(67, 3, generator=generator).to(device)

    def call(seed: int | Tensor) -> tuple[Tensor, Tensor]:
        tokens = mk.sample_tokens(logits, seed=seed, backend=backend)
        return tokens, mk.soft_embedding(logits, None, codebook, seed=seed, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    seeds = torch.tensor([[-1, 7], [0, 5 + 2**40]], device=device)
    seed = seeds[1, 1]
    drawn = []
    for value in (5 + 2**40, 5, 2**63 - 1):
        seed.fill_(value)
        want = call(value)
        for got in (call(seed), compiled(seed)):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        drawn.append(want[0])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert seeds.flatten().tolist() == [-1, 7, 0, 2**63 - 1]


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (torch.tensor([1]), ValueError, r"seed: expected shape \(\), got \(1,\)"),
        (torch.tensor(1, dtype=torch.int32), TypeError, "seed: expected dtype int64, got int32"),
        (torch.tensor(1, device="meta"), ValueError, "seed: expected device cpu"),
        (1.0, ValueError, "seed: expected an integer from 0 to 9223372036854775807, got 1.0"),
    ],
)
def test_tensor_seed_errors(seed: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.sample_tokens(torch.zeros(2, 3, 5), seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature(backend: str) -> None:
    """As if the guided logits had been divided before; exact, as powers of two are."""
    generator = torch.Generator().manual_seed(0)
    logits = relative_logits(2 * torch.randn(3, 50, 40, generator=generator))
    logits = logits.masked_fill(torch.rand(3, 50, 40, generator=generator) < 0.1, -torch.inf)
    logits[..., 7] = 0.0
    draws = []
    for temperature in (1.0, 0.5, 4.0):
        for top_k, top_p in ((0, 1.0), (9, 1.0), (20, 0.8)):
            how: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seed": 3, "backend": backend}
            tokens = mk.sample_tokens(logits + 64.0 * (logits > -1.0), temperature=temperature, **how)
            divided = relative_logits(logits + 64.0 * (logits > -1.0)) / temperature
            assert torch.equal(tokens, mk.sample_tokens(divided, **how)), (temperature, top_k, top_p)
            draws.append(tokens)
    assert not torch.equal(draws[0], draws[3]) and not torch.equal(draws[3], draws[6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_temperatures(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 200, 20, generator=generator) for _ in range(2))
    cond[..., 3] = -torch.inf
    how: dict[str, Any] = {"guidance": 1.5, "backend": backend}
    cold = mk.sample_tokens(cond, uncond, temperature=1e-320, **how)
    assert torch.equal(cold, mk.sample_tokens(cond, uncond, top_k=1, **how))
    hot = mk.sample_tokens(cond, uncond, temperature=1e308, **how)
    assert torch.equal(hot, mk.sample_tokens(torch.zeros_like(cond).masked_fill(cond == -torch.inf, -torch.inf)))
    nothing = torch.full((1, 3, 8), -torch.inf)
    assert mk.sample_tokens(nothing, temperature=0.5, top_k=3, top_p=0.5, backend=backend).tolist() == [[0, 0, 0]]


PARAMETERS: dict[str, tuple[Tensor, ...]] = {
    "guidance": (torch.tensor([0.0, 0.4, 1.5, 0.0]), torch.tensor([0.0, 0.3, 2.0, 0.0], dtype=torch.float64)),
    "top_k": (torch.tensor([0, 1, 9, 40]), torch.tensor([67, 70, 5, 30], dtype=torch.int32)),
    "top_p": (torch.tensor([1.0, 0.9, 0.7, 1e-9]), torch.tensor([0.5, 1.0, 1.0, 0.8], dtype=torch.float64)),
    "temperature": (torch.tensor([1.0, 0.6, 1.0, 1.7]), torch.tensor([1.3, 1.0, 0.4, 1.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_per_image_equal_numbers(backend: str) -> None:
    """All as tensors, and each alone beside numbers."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (2 * torch.randn(4, 30, 67, generator=generator) for _ in range(2))
    cond[:, ::2], uncond[:, ::2] = cond[:, ::2].round() + 2.0**20, uncond[:, ::2].round() - 1e5
    cond[torch.rand(cond.shape, generator=generator) < 0.1] = -torch.inf
    codebook, numbers = torch.randn(67, 5, generator=generator), {"top_k": 30, "top_p": 0.9}
    how: dict[str, Any] = {"seed": 3, "scale_index": 2, "backend": backend}
    for some in (PARAMETERS.keys(), *([name] for name in PARAMETERS)):
        for choice in (0, 1):
            tensors = {name: torch.stack([PARAMETERS[name][choice]] * 2, -1)[:, 0] for name in some}
            soft = {name: value for name, value in tensors.items() if name != "temperature"}
            got = mk.sample_tokens(cond, uncond, **numbers | how | tensors)
            got_soft = mk.soft_embedding(cond, uncond, codebook, **numbers | how | soft)
            for i in range(4):
                of_image = numbers | how | {"image_index": torch.tensor([i])}
                of_image |= {name: value[i].item() for name, value in tensors.items()}
                rows = cond[i : i + 1], uncond[i : i + 1]
                assert torch.equal(got[i : i + 1], mk.sample_tokens(*rows, **of_image)), (some, choice, i)
                of_image.pop("temperature", None)
                of_numbers = mk.soft_embedding(*rows, codebook, **of_image)  # a matmul of another size
                torch.testing.assert_close(got_soft[i : i + 1], of_numbers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_codes_per_image_equal_numbers(backend: str) -> None:
    """All kept codes, not only the sampled one: at a high temperature each has a weight in the soft mean.

    Neutral values leave logits as they are: relative to the largest of a row, some would become equal.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = (finite_rows, infinite_rows)
    cond, uncond = (torch.cat([rows(67, 3, generator) for rows in kinds]) for _ in range(2))
    how: dict[str, Any] = {"sharpness": 1e-38, "temperature": 100.0, "backend": backend}
    for guidance, top_k, top_p in (
        (0.0, 67, 1.0),
        (0.0, 30, 1.0),
        (1.5, 67, 1.0),
        (0.0, 67, 1 - 1e-12),
        (1.5, 30, 0.9),
    ):
        numbers = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
        tensors = {name: torch.full((len(cond),), value) for name, value in numbers.items()}
        tensors["top_p"] = torch.full((len(cond),), top_p, dtype=torch.float64)
        got, want = (
            mk.soft_embedding(cond, uncond, torch.eye(67), **how, **options) > 0 for options in (tensors, numbers)
        )
        assert torch.equal(got, want), numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_per_image_out_of_range(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(3, 40, 20, generator=generator) for _ in range(2))
    for name, values, same in (
        ("guidance", (-1.0, math.nan, math.inf), (0.0, 0.0, 1e6)),
        ("top_k", (-5, 2**60, -(2**63)), (0, 0, 0)),
        ("top_p", (0.0, math.nan, 7.0), (1e-30, 1e-30, 1.0)),
        ("temperature", (-1.0, math.nan, math.inf), (1e-60, 1e-60, 1e300)),
    ):
        how: dict[str, Any] = {"seed": 3, "backend": backend} | {"guidance": 1.5, name: torch.tensor(values)}
        got = mk.sample_tokens(cond, uncond, **how)
        for i, value in enumerate(same):
            how |= {"image_index": torch.tensor([i]), name: value}
            assert torch.equal(got[i : i + 1], mk.sample_tokens(cond[i : i + 1], uncond[i : i + 1], **how)), (name, i)


def test_parameters_per_image_are_not_read_on_the_host() -> None:
    """Under torch.compile a value read on the host is a graph break; a compiled call reads new values."""
    cond, uncond = (torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(i)) for i in range(2))
    torch.compiler.reset()
    compiled = torch.compile(mk.sample_tokens, fullgraph=True, backend="aot_eager")
    for top_k, share in (((1, 5, 0), 0.9), ((0, 1, 3), 0.5)):
        how: dict[str, Any] = {"guidance": torch.tensor([0.0, 1.0, 1.5]), "top_k": torch.tensor(top_k)}
        how |= {"top_p": torch.full((3,), share), "temperature": torch.tensor([1.0, 0.5, 2.0])}
        assert torch.equal(compiled(cond, uncond, **how), mk.sample_tokens(cond, uncond, **how))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"top_p": torch.ones(3)}, ValueError, r"top_p: expected shape \(B=2\), got \(3,\)"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k: expected dtype int64 or int32, got float32"),
        (
            {"temperature": torch.ones(2, dtype=torch.int64)},
            TypeError,
            "temperature: expected dtype float32 or float64",
        ),
        ({"top_p": torch.ones(2, device="meta")}, ValueError, "top_p: expected device cpu"),
        (
            {"guidance": torch.ones(2)},
            ValueError,
            "uncond: expected logits to guide away from, as guidance is a tensor",
        ),
        ({"top_p": torch.ones(2), "top_k": -1}, ValueError, "top_k: expected an integer"),
    ],
)
def test_parameters_per_image_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.sample_tokens(torch.zeros(2, 3, 5), **wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_samples(backend: str) -> None:
    """Sample s of l positions is that of positions s·l and on: independent of all others, and the first that of one."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 5, 67, generator=generator) for _ in range(2))
    how: dict[str, Any] = {"guidance": torch.tensor([0.5, 1.5]), "top_p": 0.9, "temperature": 1.5, "backend": backend}
    how |= {"seed": 3, "scale_index": 4, "image_index": torch.tensor([7, 2])}
    got = mk.sample_tokens(cond, uncond, num_samples=3, **how)
    assert got.shape == (2, 5, 3) and got.is_contiguous()
    want = mk.sample_tokens(cond.repeat(1, 3, 1), uncond.repeat(1, 3, 1), **how)
    assert torch.equal(got, want.view(2, 3, 5).transpose(1, 2))
    assert torch.equal(got[..., 0], mk.sample_tokens(cond, uncond, num_samples=1, **how))
    assert mk.sample_tokens(cond[:, :0], num_samples=3, backend=backend).shape == (2, 0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_distributed_as_the_softmax(backend: str) -> None:
    """Chi-square test of pairs of samples of 40,000 positions, at a significance level of about 10⁻⁴."""
    logits = torch.linspace(-1, 1, 4).expand(200, 200, 4)
    first, _, third = mk.sample_tokens(logits, seed=5, num_samples=3, backend=backend).unbind(-1)
    share = logits[0, 0].double().softmax(-1)
    expected = 40_000 * torch.outer(share, share).flatten()
    observed = (4 * first + third).flatten().bincount(minlength=16)
    assert ((observed - expected) ** 2 / expected).sum() < 44.3  # 15 degrees of freedom


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_head(backend: str) -> None:
    """Logits (B, l, d, 2) of the d bits of a token, as Infinity's: each bit is a position, and has its own noise."""
    generator = torch.Generator().manual_seed(0)
    bits = 2 * torch.randn(2, 300, 16, 2, generator=generator)
    how: dict[str, Any] = {"seed": 3, "temperature": 0.5, "backend": backend}
    got = mk.sample_tokens(bits.flatten(1, 2), **how).view(2, 300, 16)
    share = (2 * (bits[..., 1] - bits[..., 0]).double()).sigmoid()
    assert abs((got - share).sum()) < 4 * (share * (1 - share)).sum().sqrt()
    best = mk.sample_tokens(bits.flatten(1, 2), top_k=1, **how).view(2, 300, 16)
    assert torch.equal(best, bits.argmax(-1))
    sure = mk.sample_tokens(bits.flatten(1, 2), top_p=0.8, **how).view(2, 300, 16)
    assert torch.equal(sure, torch.where((share - 0.5).abs() >= 0.3, best, got))
    assert torch.equal(
        sure, mk.sample_tokens(bits.flatten(1, 2), top_p=0.8, **how | {"backend": "reference"}).view_as(sure)
    )


def test_many_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (2 * torch.randn(2, 2, 65536, generator=generator) for _ in range(2))
    cond[..., 1::2] = -torch.inf
    for filters in ({}, {"top_k": 900, "top_p": 0.96}, {"top_k": torch.tensor([2000, 0]), "top_p": 0.5}):
        how: dict[str, Any] = {"guidance": 1.5, "temperature": 0.9, "num_samples": 2, **filters}
        want = mk.sample_tokens(cond, uncond, **how, backend="reference")
        assert torch.equal(mk.sample_tokens(cond, uncond, **how, backend="cpu"), want)
        assert not (want % 2).any()
