"""Tests of Mamba-2's C++ kernels: instruction sets, numbers of threads, and sizes that do not fill a vector."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.dispatch import native as import_native
from mvar_kernels.ops.mamba2 import native as mamba2_native
from mvar_kernels.ops.mamba2 import reference
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER, PARAMETERS, SSD_SCAN
from mvar_kernels.testing.spec import Case, Spec

native = import_native()
pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
INSTRUCTION_SETS = native.build_info()["instruction_sets"] if native else ()
FLOATS = [torch.float32, torch.bfloat16]
EPS = 1e-5


def _case(B: int, L: int, H: int, P: int, N: int, scales: tuple[int, ...] | None = None) -> Case:
    return Case(f"{B}-{L}-{H}-{P}-{N}-{scales}", {"B": B, "L": L, "H": H, "P": P, "N": N}, {"scales": scales})


# All sizes 1; more tokens than a segment, with tails of vectors and chunks; several chunks and segments in a scale; and
# more samples than are computed together.
CASES = (
    _case(1, 1, 1, 1, 1),
    _case(2, 67, 2, 20, 9),
    _case(1, 131, 3, 33, 16, scales=(1, 17, 113)),
    _case(66, 2, 1, 4, 3),
)


def _tensors(spec: Spec, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    made = spec.inputs(case, torch.Generator().manual_seed(3))
    return {name: t.to(torch.float32 if name in spec.keeps_dtype else dtype) for name, t in made.items()}


def _run(spec: Spec, case: Case, t: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Return outputs and gradients."""
    module = reference if backend == "reference" else mamba2_native
    kernel = getattr(module, f"{spec.op}_{backend}")
    scales = case.options["scales"] or (case.sizes["L"],)
    if spec is SSD_SCAN:
        call: Any = Scan(*t.values(), scales)  # type: ignore[call-arg, arg-type]
    else:
        parameters = {name: t[name] for name in PARAMETERS}
        call = Mixer(t["zxbcdt"], None, **parameters, conv=t["conv"], ssm=t["ssm"], scales=scales, eps=EPS)
    outs = kernel.forward(call)
    return [*outs, *kernel.backward(_grads(outs), call)]


def _grads(outs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    # Values that every dtype represents exactly.
    return [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outs]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("spec", [SSD_SCAN, MAMBA2_MIXER], ids=["ssd_scan", "mamba2_mixer"])
def test_instruction_set_agrees_with_float64(
    use_instruction_set: Callable[[str], None], name: str, dtype: torch.dtype, case: Case, spec: Spec
) -> None:
    use_instruction_set(name)
    t = _tensors(spec, case, dtype)
    exact = _run(spec, case, {k: v.double() for k, v in t.items()}, "reference")
    for got, want in zip(_run(spec, case, t, "cpu"), exact, strict=True):
        assert got.shape == want.shape and got.is_contiguous()
        # Sums of a few hundred terms in float32, rounded once to the dtype of the tensor.
        tolerance = 100 * torch.finfo(torch.float32).eps + torch.finfo(got.dtype).eps
        magnitude = want.abs().max() if want.numel() else torch.zeros(())
        assert (got.double() - want).abs().le(tolerance * magnitude.clamp(min=1)).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [SSD_SCAN, MAMBA2_MIXER], ids=["ssd_scan", "mamba2_mixer"])
@pytest.mark.parametrize(
    ("case", "num_threads"),
    # Threads with samples of their own, and all threads at one sample, or at the first 16 of 17.
    [(_case(3, 90, 4, 33, 17, scales=(1, 5, 70, 14)), (1, 2, 3)), (_case(17, 9, 4, 9, 17), (1, 16))],
    ids=["samples", "groups"],
)
def test_num_threads_is_bitwise_deterministic(
    use_instruction_set: Callable[[str], None],
    name: str,
    dtype: torch.dtype,
    spec: Spec,
    case: Case,
    num_threads: tuple[int, ...],
) -> None:
    use_instruction_set(name)
    t = _tensors(spec, case, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in num_threads:
            torch.set_num_threads(threads)
            results.append(_run(spec, case, t, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("taps", [1, 2, 7])
@pytest.mark.parametrize("L", [1, 3, 40])
def test_conv_widths(taps: int, L: int) -> None:
    """Covers more taps than tokens, and a convolution of one tap, which has no state."""
    case = _case(2, L, 2, 8, 8)
    t = _tensors(MAMBA2_MIXER, case, torch.float32)
    generator = torch.Generator().manual_seed(taps)
    t["conv_weight"] = torch.randn(32, taps, generator=generator)
    t["conv"] = torch.randn(2, taps - 1, 32, generator=generator)
    exact = _run(MAMBA2_MIXER, case, {k: v.double() for k, v in t.items()}, "reference")
    for got, want in zip(_run(MAMBA2_MIXER, case, t, "cpu"), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("both", [False, True])
def test_underflowing_decay(both: bool) -> None:
    """Results are finite and accurate for decays from 1 − 1e-7 down to e^−100, which underflows over any chunk."""
    case = _case(1, 50, 2, 8, 8, scales=(20, 30) if both else None)
    t = _tensors(SSD_SCAN, case, torch.float32)
    steps = torch.logspace(-8, 1, 50).reshape(1, 50, *[1] * (t["dt"].dim() - 2))
    t["dt"] = steps.expand(t["dt"].shape).contiguous()
    t["A"] = torch.full_like(t["A"], -10.0)
    exact = _run(SSD_SCAN, case, {k: v.double() for k, v in t.items()}, "reference")
    for got, want in zip(_run(SSD_SCAN, case, t, "cpu"), exact, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(("step", "rate"), [(0.01, -1e-3), (1.0, -1e-5)])
def test_long_sums(use_instruction_set: Callable[[str], None], name: str, step: float, rate: float) -> None:
    """A state that sums thousands of equal tokens, and its gradients, are as accurate as the reference's."""
    use_instruction_set(name)
    x, B = torch.ones(1, 4096, 1, 8), torch.ones(1, 4096, 8)
    t = [x, torch.full((1, 4096, 1), step), torch.tensor([rate]), B, B, torch.ones(1), torch.zeros(1, 1, 8, 8)]

    def run(kernel: Implementation, dtype: torch.dtype) -> list[Tensor]:
        call = Scan(*(v.to(dtype) for v in t), (4096,))  # type: ignore[call-arg, arg-type]
        outs = kernel.forward(call)
        assert kernel.backward is not None
        return [*outs, *kernel.backward([torch.ones_like(o) for o in outs], call)]

    got, same = run(mamba2_native.ssd_scan_cpu, torch.float32), run(reference.ssd_scan_reference, torch.float32)
    for value, near, exact in zip(got, same, run(reference.ssd_scan_reference, torch.float64), strict=True):
        error, reference_error = ((v.double() - exact).abs().max() for v in (value, near))
        assert error <= 2 * reference_error + torch.finfo(torch.float32).eps * exact.abs().max()
