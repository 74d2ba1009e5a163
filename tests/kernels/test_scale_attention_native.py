"""Tests of scale_attention's C++ kernels: instruction sets, threads, strides, key blocks and small scales."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import native as import_native
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.native import scale_attention_cpu
from mvar_kernels.ops.scale_attention.reference import scale_attention_reference

native = import_native()
pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
INSTRUCTION_SETS = native.build_info()["instruction_sets"] if native else ()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


class Problem(NamedTuple):
    """A schedule and tensor sizes; the queries are the last `queries` tokens of the sequence."""

    scales: tuple[int, ...]
    queries: int
    causal: bool
    normed: bool
    heads: int = 2
    head_dim: int = 64
    scale: float = 0.1

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.scales) + self.head_dim)

        def normal(length: int) -> Tensor:
            return torch.randn(2, length, self.heads, self.head_dim, generator=generator).to(dtype)

        L = sum(self.scales)
        return {"q": normal(self.queries), "k": normal(L), "v": normal(L), "grad_out": normal(self.queries)}

    def temperature(self, dtype: torch.dtype) -> Tensor | None:
        return torch.linspace(0.5, 3.0, self.heads).to(dtype) if self.normed else None

    def results(self, kernel: object, t: dict[str, Tensor], acc: torch.dtype = torch.float32) -> list[Tensor]:
        """Return out, lse and all gradients."""
        call = Attention(t["q"], t["k"], t["v"], self.temperature(acc), self.scales, self.causal, self.scale)
        out, lse = kernel.forward(call)  # type: ignore[attr-defined]
        return [out, lse, *kernel.backward([t["grad_out"]], call)]  # type: ignore[attr-defined]


PROBLEMS = {
    "one_value": Problem((1,), 1, causal=False, normed=False, head_dim=1),
    "tails": Problem((1, 4, 9, 50), 64, causal=False, normed=True, head_dim=37, scale=1.0),
    "odd_causal": Problem((3, 1, 17, 5), 26, causal=True, normed=False, head_dim=24),
    "wide_head": Problem((5, 33), 38, causal=True, normed=True, head_dim=131, scale=1.0),
    "several_key_blocks": Problem((7, 270, 40), 317, causal=True, normed=False, scale=0.3),
    "long_scale": Problem((300,), 300, causal=False, normed=True, scale=1.0),
    "cached_keys": Problem((1, 4, 9, 16), 25, causal=True, normed=True, scale=1.0),
    "cached_diagonal": Problem((1, 4, 9, 16), 16, causal=False, normed=False),
    "large_scores": Problem((2, 19), 21, causal=False, normed=True, scale=5.0),
    "tiny_scale": Problem((2, 19), 21, causal=True, normed=False, scale=1e-50),
}


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_instruction_set_agrees_with_float64(
    use_instruction_set: Callable[[str], None], instruction_set: str, dtype: torch.dtype, name: str, poisoned: None
) -> None:
    use_instruction_set(instruction_set)
    problem = PROBLEMS[name]
    t = problem.inputs(dtype)
    exact = problem.results(scale_attention_reference, {n: x.double() for n, x in t.items()}, torch.float64)
    same_dtype = problem.results(scale_attention_reference, t)
    for got, same, want in zip(problem.results(scale_attention_cpu, t), same_dtype, exact, strict=True):
        assert got.dtype == same.dtype and got.shape == want.shape and got.is_contiguous()
        # Three times the reference's error and four roundings, not twice and one as in the contract test: without
        # fused multiply-add a little accuracy is lost. A temperature's gradient is a sum of many terms of both signs,
        # for which the reference's error may happen to be small.
        roundings = 40 if got.dim() == 1 else 4
        reference_error = (same.double() - want).abs().max().item()
        rounding = torch.finfo(got.dtype).eps * max(want.abs().max().item(), 1.0)
        assert (got.double() - want).abs().max().item() <= 3 * reference_error + roundings * rounding


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@DTYPES
@pytest.mark.parametrize("causal", [False, True], ids=["diagonal", "causal"])
def test_num_threads_is_bitwise_deterministic(
    use_instruction_set: Callable[[str], None], instruction_set: str, dtype: torch.dtype, causal: bool
) -> None:
    use_instruction_set(instruction_set)
    # Three heads per sample: with two or four threads, a head is shared between threads.
    problem = Problem((1, 4, 9, 16, 64, 100), 194, causal, normed=True, heads=3, scale=1.0)
    t = problem.inputs(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(problem.results(scale_attention_cpu, t))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@DTYPES
def test_packed_and_expanded_inputs_are_not_copied(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS["odd_causal"]
    t = problem.inputs(dtype)
    q, k, v = torch.stack([t["q"], t["k"], t["v"]], 2).unbind(2)
    strided = {"q": q, "k": k, "v": v, "grad_out": t["v"][:1, :1, :1].expand_as(q)}
    want = problem.results(scale_attention_cpu, {n: x.contiguous() for n, x in strided.items()})
    monkeypatch.setattr(Tensor, "contiguous", lambda self, **_: pytest.fail("an input was copied"))
    got = problem.results(scale_attention_cpu, strided)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@DTYPES
def test_nan_in_later_scales(dtype: torch.dtype) -> None:
    """NaN in later scales does not reach earlier ones, even where keys of both are in the same vector or pair."""
    problem = PROBLEMS["odd_causal"]
    t = problem.inputs(dtype)
    clean = problem.results(scale_attention_cpu, t)
    t["k"][:, 4:] = t["v"][:, 4:] = torch.nan
    with_nan = problem.results(scale_attention_cpu, t)
    assert torch.equal(with_nan[0][:, :4], clean[0][:, :4]) and with_nan[0][:, 4:].isnan().all()


def test_zero_rows() -> None:
    problem = PROBLEMS["large_scores"]
    t = problem.inputs(torch.float32)
    t["q"][:, 3] = t["k"][:, 5] = 0.0
    got, same = (problem.results(kernel, t) for kernel in (scale_attention_cpu, scale_attention_reference))
    exact = problem.results(scale_attention_reference, {name: value.double() for name, value in t.items()})
    for a, b, e in zip(got, same, exact, strict=True):
        # The tolerance of test_contract.py, as gradients of zero rows are 1e12 times the others.
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + torch.finfo(a.dtype).eps * e.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_overflowing_norms(causal: bool) -> None:
    problem = PROBLEMS["large_scores"]._replace(causal=causal)
    t = problem.inputs(torch.float32)
    t["k"][:, 5:9] *= 1e19
    t["q"][:, 3] *= 1e19
    got, same = (problem.results(kernel, t) for kernel in (scale_attention_cpu, scale_attention_reference))
    for a, b in zip(got[:2], same[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert all(a.isfinite().all() for a in got)


def test_empty_batch() -> None:
    problem = PROBLEMS["tails"]
    t = {n: x[:0] for n, x in problem.inputs(torch.float32).items()}
    out, lse, *grads = problem.results(scale_attention_cpu, t)
    assert out.numel() == lse.numel() == 0 and (grads[3] == 0).all()


def test_unsupported_dtype() -> None:
    q = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    assert (
        scale_attention_cpu.unsupported_reason(Attention(q, q, q, None, (1,), False, 1.0))
        == "dtype float16 is not float32 or bfloat16"
    )
