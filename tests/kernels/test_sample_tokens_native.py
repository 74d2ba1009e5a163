"""Tests that the C++ kernels of sample_tokens and soft_embedding match the reference."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import native as import_native
from mvar_kernels.ops.sample_tokens import native, reference
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling

extension = import_native()
pytestmark = pytest.mark.skipif(extension is None, reason="the C++ extension was not built")

SCALE = 2**32 - 1
SEED = torch.tensor(2**63 - 5)
SMALL_SEED = torch.tensor(3)
CODES = [1, 2, 3, 4, 5, 63, 64, 65, 259, 4096, 16384]
TOP_P = [1.0, 1 - 1e-12, 0.96, 0.5, 0.01, 1e-9, 1e-20]


def instruction_sets() -> Iterator[str]:
    """Select each instruction set that this machine supports in turn."""
    assert extension is not None
    before = extension.instruction_set()
    for name in extension.build_info()["instruction_sets"]:
        try:
            extension.use_instruction_set(name)
        except ValueError:
            continue  # not supported by this machine
        yield name
    extension.use_instruction_set(before)


def finite_rows(V: int, count: int, generator: torch.Generator) -> Tensor:
    """Return (kinds, count, V) logits: normal, tied, equal, sorted, far apart and close together."""
    normal = 2 * torch.randn(count, V, generator=generator)
    kinds = [
        normal,
        normal.bfloat16().float(),
        normal.round(),
        (normal / 4).round() * -0.0 + (normal / 4).round(),  # zeros of both signs
        torch.full_like(normal, -1.5),
        normal.sort(-1).values,
        normal.sort(-1, descending=True).values.round(),
        1 + normal * 2.0**-22,
        normal * 8,
        normal.sign() * (normal.abs() * 20).exp().clamp_max(1e30),
        normal * 1e-42,  # subnormal numbers
        normal + 1e6,
        normal.round() - 1e7,
        normal.masked_fill(normal > 0, torch.finfo(torch.float32).min),
    ]
    return torch.stack(kinds)


def infinite_rows(V: int, count: int, generator: torch.Generator) -> Tensor:
    normal = 2 * torch.randn(count, V, generator=generator)
    coin = torch.rand(count, V, generator=generator)
    kinds = [
        normal.masked_fill(coin < 0.5, -torch.inf),
        normal.round().masked_fill(coin < 0.9, -torch.inf),
        torch.full_like(normal, -torch.inf),
        normal.masked_fill(coin < 0.1, torch.inf),
        normal.masked_fill(coin < 0.1, torch.inf).masked_fill(coin > 0.5, -torch.inf),
    ]
    return torch.stack(kinds)


def image_indices(B: int) -> Tensor:
    return torch.arange(B) * (2**30 + 1) - 3  # counted modulo 2³²


def top_ks(V: int) -> list[int]:
    return sorted({0, 1, 2, V // 5, V // 2 + 1, max(V - 1, 0), V, V + 5, 2**70})


@pytest.mark.parametrize("V", CODES)
def test_tokens_match_reference(V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    count = 24 if V < 63 else 1 if V > 4096 else 2
    cond = torch.cat([finite_rows(V, count, generator), infinite_rows(V, count, generator)])
    index = image_indices(len(cond))
    few = V >= 4096  # the reference is slow
    for top_k in (0, V // 5) if few else top_ks(V):
        for top_p in TOP_P[:4] if few else TOP_P:
            call = Sampling(cond, None, index, 0.0, top_k, top_p, SEED, SCALE)
            want = reference.sample_tokens(call)[0]
            for name in instruction_sets():
                got = native.sample_tokens_cpu.forward(call)[0]
                assert torch.equal(got, want), (name, top_k, top_p, (got != want).nonzero()[:5].tolist())


@pytest.mark.parametrize("V", [1, 4, 65, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [0.0, 0.75, 1e6])
def test_guided_tokens_match_reference(V: int, dtype: torch.dtype, guidance: float) -> None:
    generator = torch.Generator().manual_seed(V)
    kinds = (finite_rows, infinite_rows)
    cond, uncond = (torch.cat([rows(V, 8 if V < 100 else 1, generator) for rows in kinds]).to(dtype) for _ in range(2))
    index = image_indices(len(cond))
    for top_k, top_p in ((0, 1.0), (V // 5, 1.0), (0, 0.9), (V // 4, 0.96)):
        call = Sampling(cond, uncond, index, guidance, top_k, top_p, SMALL_SEED, 1)
        want = reference.sample_tokens(call)[0]
        for name in instruction_sets():
            assert torch.equal(native.sample_tokens_cpu.forward(call)[0], want), (name, top_k, top_p)


@pytest.mark.parametrize("V", [2, 5, 64, 131])
def test_kept_codes_match_reference(V: int) -> None:
    """Checks all kept codes, not only the sampled one: at a high temperature each has a weight in the soft mean."""
    generator = torch.Generator().manual_seed(V)
    cond = torch.cat([finite_rows(V, 4, generator), infinite_rows(V, 4, generator)[:1]])
    index = image_indices(len(cond))
    for top_k in top_ks(V):
        for top_p in TOP_P:
            want = reference.filtered_logits(cond, top_k, top_p).isfinite()
            for name in instruction_sets():
                call = Sampling(cond, None, index, 0.0, top_k, top_p, SEED, SCALE)
                mean = native.soft_embedding_cpu.forward(SoftSampling(torch.eye(V), *call[:8], 1e-38, 100.0))[0]
                some = want.any(-1)  # excludes rows of −∞ only
                assert torch.equal((mean > 0)[some], want[some]), (name, top_k, top_p)


def test_noise_is_bitwise_equal() -> None:
    """The scores of the two codes differ by at most a rounding error, so any bit of the noise matters."""
    index = torch.tensor([1, -1])
    noise = reference.noise.gumbel(index, (2, 4000, 2), SCALE, SEED)
    cond = torch.stack([torch.zeros(2, 4000), noise[..., 0] - noise[..., 1]], -1)
    call = Sampling(cond, None, index, 0.0, 0, 1.0, SEED, SCALE)
    want = reference.sample_tokens(call)[0]
    assert 0.1 < want.double().mean() < 0.9
    for name in instruction_sets():
        assert torch.equal(native.sample_tokens_cpu.forward(call)[0], want), name


def test_weights_are_bitwise_equal() -> None:
    """The second code is dropped or kept, depending on one unit of its top-p weight."""
    # The results for the first few differ if a division is replaced by multiplication by the inverse.
    divided = [-2.982736110687256, -1.7156157493591309, -2.588618755340576, -1.6945607662200928, -2.3122620582580566]
    second = torch.cat([torch.tensor(divided), -torch.logspace(-6, 1, 200)])
    weights = (reference.noise.exp_negative(second) * 2**30).long().tolist()
    for x, weight in zip(second.tolist(), weights, strict=True):
        cond = torch.tensor([[[0.0, x]]])
        for limit, kept in ((weight + 0.5, False), (weight - 0.5, True)):
            filters = (0, 1 - limit / (2**30 + weight))
            assert reference.filtered_logits(cond, *filters).isfinite()[0, 0, 1] == kept
            for name in instruction_sets():
                call = Sampling(cond, None, torch.zeros(1).long(), 0.0, *filters, SEED, 0)
                mean = native.soft_embedding_cpu.forward(SoftSampling(torch.eye(2), *call[:8], 1e-38, 100.0))[0]
                assert (mean[0, 0, 1] > 0) == kept, (name, x)


@pytest.mark.parametrize("width", [1, 3, 32, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_soft_embedding(width: int, dtype: torch.dtype, codebook_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    cond, uncond = (torch.randn(3, 4, 301, generator=generator).to(dtype) for _ in range(2))
    codebook = torch.randn(301, width, generator=generator).to(codebook_dtype)
    for top_k, temperature in ((0, 1.0), (40, 0.27), (3, 0.005)):
        call = Sampling(cond, uncond, image_indices(3), 1.5, top_k, 0.9, SMALL_SEED, 2)
        want = reference.soft_embedding(SoftSampling(codebook, *call[:8], 1.7, temperature))[0]
        for _ in instruction_sets():
            got = native.soft_embedding_cpu.forward(SoftSampling(codebook, *call[:8], 1.7, temperature))[0]
            tolerance = 4 * torch.finfo(codebook_dtype).eps
            torch.testing.assert_close(got, want, rtol=tolerance, atol=20 * torch.finfo(torch.float32).eps)


def test_nan_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    payloads = torch.tensor([-1, 0x7FC00000, 0x7FFFFFFF, -0x3FFFFF], dtype=torch.int32).view(torch.float32)
    for V in (1, 5, 67):
        cond = torch.cat([finite_rows(V, 4, generator), infinite_rows(V, 4, generator), torch.zeros(1, 4, V)])
        cond[:-1][torch.rand(cond[:-1].shape, generator=generator) < 0.3] = torch.nan
        cond[-1] = payloads[:, None]
        for top_k in top_ks(V):
            for top_p in TOP_P:
                call = Sampling(cond, None, image_indices(len(cond)), 0.0, top_k, top_p, SEED, 0)
                results = [native.sample_tokens_cpu.forward(call)[0] for _ in instruction_sets()]
                assert ((results[0] >= 0) & (results[0] < V)).all()
                assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("V", [67, 4096])
def test_num_threads_is_bitwise_deterministic(V: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, codebook = torch.randn(5, 60, V, generator=generator), torch.randn(V, 32, generator=generator)
    index = image_indices(5)
    before = torch.get_num_threads()
    try:
        for _ in instruction_sets():
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                call = Sampling(cond, None, index, 0.0, V // 4, 0.9, SEED, 2)
                tokens = native.sample_tokens_cpu.forward(call)[0]
                results.append(
                    (tokens, native.soft_embedding_cpu.forward(SoftSampling(codebook, *call[:8], 1.5, 0.3))[0])
                )
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_strided_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(6, 7, 67, generator=generator)
    wide_index = torch.arange(6)
    strided = (both[::2], both[1::2].transpose(0, 1).contiguous().transpose(0, 1), wide_index[::2])
    same = tuple(t.contiguous() for t in strided)
    options = (1.0, 20, 0.9, SEED, 2)
    got = native.sample_tokens_cpu.forward(Sampling(*strided, *options))[0]
    assert torch.equal(got, native.sample_tokens_cpu.forward(Sampling(*same, *options))[0])
    expanded = Sampling(both[:1, :1].expand(3, 7, 67), None, same[2], *options)
    got = native.sample_tokens_cpu.forward(expanded)[0]
    assert torch.equal(got, native.sample_tokens_cpu.forward(expanded._replace(cond=expanded.cond.contiguous()))[0])
