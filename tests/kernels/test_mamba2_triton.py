"""Tests of Mamba-2's Triton kernels: tiles, convolution widths, and steps Δ of 5, where one token dominates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels import tiling
from mvar_kernels.dispatch import unavailable
from mvar_kernels.ops.mamba2 import reference
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan
from mvar_kernels.ops.mamba2.spec import LAST_STATE, SSD_SCAN
from mvar_kernels.testing import contract
from mvar_kernels.testing.spec import Case

if unavailable("triton") is not None:
    pytest.skip(str(unavailable("triton")), allow_module_level=True)

from mvar_kernels.ops.mamba2.triton import backward, mamba2_mixer_triton, ssd_scan_triton
from mvar_kernels.ops.mamba2.triton.forward import SCAN
from mvar_kernels.ops.mamba2.triton.mixer_forward import MIXER

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 16


def mixer_inputs(B: int, L: int, H: int, P: int, taps: int, both: bool, dt_bias: float) -> list[list[Tensor]]:
    """Return [zxbcdt], the parameters and the states of mamba2_mixer in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    E, heads = H * P, (2, H) if both else (H,)
    columns = H * len(heads)
    params = [0.5 * normal(E + 2 * N, taps), normal(E + 2 * N), dt_bias + normal(*heads), 2 + 0.5 * normal(*heads)]
    states = [normal(B, taps - 1, E + 2 * N), normal(B, H, P, N)]
    return [[normal(B, L, 2 * E + 2 * N + columns)], [*params, normal(H), normal(E)], states]


def assert_right(inputs: list[list[Tensor]], scales: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Compare with float64, within the tolerance of test_contract.py."""

    def run(forward, kind: torch.dtype, device: str) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
        acc = torch.float64 if kind == torch.float64 else torch.float32
        (x,), params, (conv, ssm) = inputs
        rounded = [t.to(dtype).to(device, kind) for t in (x, conv)]
        single = [t.float().to(device, acc) for t in (*params, ssm)]
        return forward(Mixer(rounded[0], None, *single[:-1], rounded[1], single[-1], scales, 1e-5))

    got = run(mamba2_mixer_triton.forward, dtype, DEVICE)
    same, exact = (run(reference.mamba2_mixer, kind, "cpu") for kind in (dtype, torch.float64))
    assert_as_near(got, same, exact, LAST_STATE[0] if dtype.itemsize == 2 else 1.0)


def assert_as_near(
    got: Sequence[Tensor], same: Sequence[Tensor], exact: Sequence[Tensor], state_slack: float = 1.0
) -> None:
    """Compare within the tolerance of test_contract.py; `same` is the reference in the dtype of `got`."""
    slack = [1.0] * (len(got) - 1) + [state_slack]
    for value, near, true, factor in zip(got, same, exact, slack, strict=True):
        if not value.numel():
            continue
        error, reference_error = ((t.double().cpu() - true).abs().max() for t in (value, near))
        assert error <= factor * (2 * reference_error + torch.finfo(value.dtype).eps * true.abs().max())


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_steps(dtype: torch.dtype, both: bool) -> None:
    """Log decays are −100 per token; y is the token's own term plus the skip, which nearly cancel in some rows."""
    assert_right(mixer_inputs(2, 70, 2, 16, 4, both, 5.0), (3, 67), dtype)


def test_scales_aligned_with_chunks() -> None:
    """The state that enters the last chunk of a scale from the right is zero."""
    assert_right(mixer_inputs(2, 70, 2, 16, 4, True, -3.0), (16, 16, 32, 6))


@pytest.mark.parametrize(("taps", "L"), [(1, 20), (2, 1), (6, 2), (6, 40)])
def test_conv_widths(taps: int, L: int) -> None:
    """Covers fewer new tokens than the convolution state holds."""
    assert_right(mixer_inputs(2, L, 2, 16, taps, False, -3.0), (L,))


def distinct(table: Mapping[str, Sequence[tiling.Tile]]) -> list[tuple[str, dict[str, int]]]:
    """Return the kinds of a table and the different sizes of their tiles."""
    found = [(kind.split()[0], dict(tile.sizes)) for kind, tiles in table.items() for tile in tiles]
    return [each for i, each in enumerate(found) if each not in found[:i]]


@pytest.mark.parametrize(("kind", "sizes"), distinct(MIXER))
def test_mixer_tiles(kind: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With P = 40, the last block of channels is partially filled; with more rows, norms follow in several groups."""
    monkeypatch.setattr(tiling, "chosen", lambda *_: tiling.Tile(sizes))
    L = 11 if kind == "short" else 70
    assert_right(mixer_inputs(3, L, 2, 40, 4, kind == "both", -3.0), (4, L - 4))


@pytest.mark.parametrize(("kind", "sizes"), distinct(SCAN))
def test_scan_tiles(kind: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "chosen", lambda *_: tiling.Tile(sizes))
    case = Case("", {"B": 1, "L": 11 if kind == "short" else 70, "H": 2, "P": 40, "N": N}, {"scales": None})
    if kind == "both":
        case = replace(case, options={"scales": (4, 66)})
    exact_inputs = list(SSD_SCAN.inputs(case, torch.Generator().manual_seed(0)).values())
    scales = case.options["scales"] or (case.sizes["L"],)

    def call(dtype: torch.dtype, device: str) -> Scan:
        return Scan(*(t.to(device, dtype) for t in exact_inputs), scales)  # type: ignore[call-arg, arg-type]

    got = ssd_scan_triton.forward(call(torch.float32, DEVICE))
    same, exact = (reference.ssd_scan(call(dtype, "cpu")) for dtype in (torch.float32, torch.float64))
    assert_as_near(got, same, exact)


@pytest.mark.parametrize("both", [False, True])
def test_empty_batch(both: bool) -> None:
    (zxbcdt,), params, states = mixer_inputs(0, 5, 2, 16, 4, both, -3.0)
    inputs = [t.float().to(DEVICE).requires_grad_() for t in (zxbcdt, *params, *states)]
    y, state = mk.mamba2_mixer(
        *inputs[:7], state=mk.Mamba2State(*inputs[7:]), scales=(2, 3) if both else None, backend="triton"
    )
    assert y.shape == (0, 5, 32)
    grads = torch.autograd.grad(y.sum() + state.ssm.sum(), inputs)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs, strict=True))


def test_older_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.4 would fail while it compiles, after the dispatcher has chosen it."""
    monkeypatch.setattr("triton.__version__", "3.4.0")
    inputs = SSD_SCAN.inputs(SSD_SCAN.cases[0], torch.Generator().manual_seed(0))
    with pytest.raises(mk.BackendError, match=r"Triton 3\.4\.0: expected 3\.5 or newer"):
        SSD_SCAN.call({n: t.float().to(DEVICE) for n, t in inputs.items()}, SSD_SCAN.cases[0], "triton")


@pytest.mark.parametrize(("P", "N"), [(256, 256), (512, 16), (16, 512)])
def test_large_states_are_refused(P: int, N: int) -> None:
    """Otherwise the backward would raise when it is launched, as it needs more shared memory than there is."""
    x, dt, B = (torch.ones(shape, device=DEVICE) for shape in ((1, 2, 1, P), (1, 2, 1), (1, 2, N)))
    with pytest.raises(mk.BackendError, match=f"P={P}, N={N}: above"):
        mk.ssd_scan(x, dt, -torch.ones(1, device=DEVICE), B, B, backend="triton")


@pytest.mark.parametrize("both", [False, True])
def test_groups_of_heads(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program adds dB and dC of two heads, the last one of the third alone. In small batches each takes one head."""
    monkeypatch.setattr(backward, "HEAD_GROUPS", (2,))
    monkeypatch.setattr(backward, "PROGRAMS", 1)
    scales = (4, 16) if both else None
    case = Case("", {"B": 1, "L": 20, "H": 3, "P": 16, "N": N}, {"scales": scales})
    inputs = contract.prepared(SSD_SCAN, case, torch.float32, DEVICE)
    got = contract.evaluate(SSD_SCAN, case, inputs, "triton")
    same, exact = (
        contract.evaluate(SSD_SCAN, case, {n: t.cpu().to(kind) for n, t in inputs.items()}, None)
        for kind in (torch.float32, torch.float64)
    )
    ratios = contract.error_ratios(SSD_SCAN, case, got, same, exact)
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm_80", "mma.sync"), ("sm_89", "mma.sync"), ("sm_90", "wgmma"), ("sm_103", "tcgen05"), ("sm_120", "mma.sync")],
)
def test_matmul_instruction(arch: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "architecture", lambda device: arch)
    assert tiling.matmul_instruction(torch.device("cuda")) == expected
