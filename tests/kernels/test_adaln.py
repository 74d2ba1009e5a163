"""Tests of adaln on constant rows, for which it returns the shift, on rows with a large mean, and of its options."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_kernels as mk
from mvar_kernels.testing.contract import prepared
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.validation import FLOATS
from tests.helpers.dispatched import dispatched

BACKENDS = ("reference", "cpu")  # the contract test covers the other backends
VALUES = (0.0, 100.1, -1000.1, 12345.678, 65504.0)


def offered(backend: str) -> tuple[torch.dtype, ...]:
    return FLOATS if backend == "reference" else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [1, 3, 67, 1000, 1024, 1999])
def test_constant_rows(C: int, backend: str) -> None:
    values = torch.tensor(VALUES)[None, :, None]
    for dtype in offered(backend):
        x = values.expand(1, len(VALUES), C).to(dtype)
        scale, shift = (torch.randn(1, C, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
        want = shift[:, None].expand(x.shape)
        assert torch.equal(mk.adaln(x, scale, shift, backend=backend), want), dtype
        half = x / 2
        x_new, out = mk.gated_adaln(half, half, torch.ones_like(scale), scale, shift, backend=backend)
        assert torch.equal(x_new, x) and torch.equal(out, want), dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 1e-2])
def test_large_mean(spread: float, backend: str) -> None:
    """Compares with float64: outputs to 10⁻⁵, gradients, which scale with 1/σ, to 10⁻⁵ of the largest."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.tensor(VALUES)[None, :, None] + spread * torch.randn(1, len(VALUES), 1000, generator=generator)).clone()
    scale, shift = (torch.randn(1, 1000, generator=generator) for _ in range(2))
    cotangent = torch.randn(x.shape, generator=generator)

    def outputs(call: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, scale, shift)]
        out = call(*leaves)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    got = outputs(lambda *leaves: mk.adaln(*leaves, backend=backend), torch.float32)
    want = outputs(lambda x, s, t: F.layer_norm(x, (1000,), eps=1e-6) * (1 + s[:, None]) + t[:, None], torch.float64)
    for value, exact in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max().clamp(min=1)))


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_norms_of_pytorch(backend: str) -> None:
    x, weight, bias = leaves((2, 5, 72), (72,), (72,))
    for got, want in (
        (mk.adaln(x, eps=1e-5, backend=backend), F.layer_norm(x, (72,))),
        (mk.adaln(x, weight=weight, bias=bias, eps=1e-5, backend=backend), F.layer_norm(x, (72,), weight, bias)),
        (mk.adaln(x, norm="rms", weight=weight, eps=1e-5, backend=backend), F.rms_norm(x, (72,), weight, 1e-5)),
    ):
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(out, (x, weight, bias), x.detach(), allow_unused=True) for out in (got, want))
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modulation_of_several_shapes(backend: str) -> None:
    """It is broadcast, and each gradient has the shape of its tensor."""
    x, branch, gate, scale, shift = leaves((3, 5, 72), (3, 5, 72), (3, 72), (3, 5, 72), (1, 72))
    got = mk.gated_adaln(x, branch, gate, scale, shift, backend=backend)
    want = mk.gated_adaln(
        x, branch, gate[:, None].expand(3, 5, 72), scale, shift[:, None].expand(3, 5, 72), backend="reference"
    )
    got_one, want_one = (mk.adaln(x, gate, shift, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close((*got, got_one), (*want, want_one))
    grads = [
        torch.autograd.grad([out.square().sum() for out in outs], (x, branch, gate, scale, shift))
        for outs in ((*got, got_one), (*want, want_one))
    ]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shift_without_scale(backend: str) -> None:
    x, shift = leaves((2, 5, 72), (2, 72))
    out = mk.adaln(x, None, shift, backend=backend)
    torch.testing.assert_close(out, F.layer_norm(x, (72,), eps=1e-6) + shift[:, None])
    (grad,) = torch.autograd.grad(out.sum(), shift)
    assert torch.equal(grad, torch.full_like(shift, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_per_token(backend: str) -> None:
    """A constant row is 0, and times its scale its shift."""
    x = torch.tensor(VALUES)[None, :, None].expand(1, len(VALUES), 1000)
    scale, shift = leaves(x.shape, x.shape)
    assert torch.equal(mk.adaln(x, scale, shift, backend=backend), shift)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str) -> None:
    x, gate, scale, weight = leaves((2, 5, 72), (2, 72), (2, 72), (72,))
    (branch,) = leaves((2, 5, 72), dtype=torch.bfloat16)
    outs = mk.gated_adaln(x, branch, gate, scale, weight=weight, backend=backend)
    assert [out.dtype for out in outs] == [torch.float32, torch.bfloat16]
    inputs = (x, branch, gate, scale, weight)
    grads = torch.autograd.grad([out.sum() for out in outs], inputs)
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float16, torch.float64), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
def test_any_dtype_of_weight_and_bias(of_x: torch.dtype, dtypes: tuple[torch.dtype, ...], backend: str) -> None:
    """They count in float32, and their gradients have their dtype."""
    (x,) = leaves((2, 5, 72), dtype=of_x)
    weight, bias = (
        t.detach().to(dtype).requires_grad_() for t, dtype in zip(leaves((72,), (72,)), dtypes, strict=True)
    )
    got = mk.adaln(x, weight=weight, bias=bias, backend=backend)
    want = mk.adaln(x, weight=weight.float(), bias=bias.float(), backend=backend)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, weight, bias)) for out in (got, want)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"norm": "batch"}, ValueError, "norm: expected 'layer' or 'rms', got 'batch'"),
        ({"gate": None}, TypeError, r"gate: expected a Tensor \(B, C\), got NoneType"),
        ({"gate": torch.zeros(3, 8)}, ValueError, r"gate: expected shape \(B=2, C=8\), got \(3, 8\)"),
        ({"scale": torch.zeros(2, 1, 8)}, ValueError, r"scale: expected shape \(B=2, L=3, C=8\), got \(2, 1, 8\)"),
        ({"shift": torch.zeros(1, 7)}, ValueError, r"shift: expected shape \(1, C=8\), got \(1, 7\)"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \(C=8\), got \(7,\)"),
        ({"weight": torch.zeros(8).int()}, TypeError, "weight: expected dtype float16 or bfloat16 or float32"),
        (
            {"bias": torch.zeros(8).bool()},
            TypeError,
            "bias: expected dtype float16 or bfloat16 or float32 or float64, got",
        ),
        ({"branch": torch.zeros(2, 3, 8).double()}, TypeError, "branch: expected dtype float32 or bfloat16 or float16"),
        ({"scale": torch.zeros(2, 8).half()}, TypeError, "scale: expected dtype float32, got float16"),
        ({"branch": torch.zeros(2, 3, 8).half(), "scale": torch.zeros(2, 8).half()}, TypeError, "as gate, got float16"),
    ],
)
def test_wrong_arguments(changed: dict[str, object], error: type[Exception], message: str) -> None:
    x, gate = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    given = {"x": x, "branch": x, "gate": gate, "scale": gate, "shift": gate} | changed
    with pytest.raises(error, match=f"gated_adaln: {message}" if "as gate" not in message else message):
        mk.gated_adaln(**given)  # type: ignore[arg-type]


OPTIONS = ("rms_norm", "affine", "all_samples_affine", "per_token_no_shift")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["adaln", "gated_adaln"])
def test_opcheck_and_fullgraph_with_options(op: str, backend: str) -> None:
    spec = SPECS[op]
    for case in (case for case in spec.cases if case.name in (*OPTIONS, "float32_residual")):
        inputs = {n: t.requires_grad_() for n, t in prepared(spec, case, torch.bfloat16).items()}
        arguments = dispatched(op, lambda: spec.call(inputs, case, backend))[op]  # noqa: B023
        torch.library.opcheck(getattr(torch.ops.mvar, op).default, arguments)
        torch.compiler.reset()
        compiled = torch.compile(lambda t: spec.call(t, case, backend), fullgraph=True, backend="aot_eager")  # noqa: B023
        eager, got = (
            [*outs, *gradients(outs, inputs)] for outs in (spec.call(inputs, case, backend), compiled(inputs))
        )
        assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True)), case.name


def gradients(outs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad([out.float().square().sum() for out in outs], list(inputs.values()))


def test_gradgradcheck_with_options() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (2, 3, 4), (1, 4), (1, 4), (4,))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    call = lambda *t: mk.gated_adaln(*t[:4], norm="rms", weight=t[4])  # noqa: E731
    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)
