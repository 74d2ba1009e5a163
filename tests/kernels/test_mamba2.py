"""Tests of the Mamba-2 references against the recurrence, the carried state, the dtype of dt, and mamba_ssm's call."""

import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import mvar_kernels as mk
from mvar.models import layers
from mvar.models.blocks import MVARBlock
from mvar.models.config import ModelConfig
from mvar_kernels.ops.mamba2 import mamba_ssm, reference
from mvar_kernels.ops.mamba2.inputs import Scan
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER, PARAMETERS, SSD_SCAN, VARIANTS
from mvar_kernels.testing.spec import Case

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # float64 arithmetic in a different order


def of_heads(shared: Tensor, H: int) -> Tensor:
    """(B, L, N) or (B, L, G, N) → (B, L, H, N): what each head has of B or C."""
    shared = shared[:, :, None] if shared.dim() == 3 else shared
    return shared.repeat_interleave(H // shared.shape[2], 2)


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t, y_t = h_t C_t: one token at a time."""
    B, C, outs = of_heads(B, x.shape[2]), of_heads(C, x.shape[2]), []
    for t in range(x.shape[1]):
        added = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], B[:, t])
        state = (dt[:, t] * A).exp()[..., None, None] * state + added
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(outs, 1), state


def backward_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, scales: tuple[int, ...]) -> Tensor:
    """r_t = a_t (r_{t+1} + Δ_{t+1} x_{t+1} ⊗ B_{t+1}) with r = 0 at each scale's last token; y_t = r_t C_t."""
    y, B, C = torch.zeros_like(x), of_heads(B, x.shape[2]), of_heads(C, x.shape[2])
    end = x.shape[1]
    for length in reversed(scales):
        r = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
        for t in range(end - 2, end - length - 1, -1):
            added = torch.einsum("bhp,bhn->bhpn", dt[:, t + 1, :, None] * x[:, t + 1], B[:, t + 1])
            r = (dt[:, t] * A).exp()[..., None, None] * (r + added)
            y[:, t] = torch.einsum("bhpn,bhn->bhp", r, C[:, t])
        end -= length
    return y


@pytest.mark.parametrize("case", SSD_SCAN.cases, ids=lambda case: case.name)
def test_ssd_scan_matches_recurrence(case) -> None:  # type: ignore[no-untyped-def]
    t = SSD_SCAN.inputs(case, torch.Generator().manual_seed(0))
    y, state = SSD_SCAN.call(t, case, "reference")
    scales = case.options["scales"]
    dt, A = (t["dt"][:, :, 0], t["A"][0]) if scales else (t["dt"], t["A"])
    expected, last = recurrence(t["x"], dt, A, t["B"], t["C"], t["initial_state"])
    expected = expected + (t["D"] if t["D"].dim() == 2 else t["D"][:, None]) * t["x"]
    if scales:
        expected += backward_recurrence(t["x"], t["dt"][:, :, 1], t["A"][1], t["B"], t["C"], scales)
    torch.testing.assert_close(y, expected, **TIGHT)
    torch.testing.assert_close(state, last, **TIGHT)


def test_bidirectional_matches_flipped_scan() -> None:
    """Flips each scale, runs the recurrence from a zero state, flips back and subtracts each token's own term."""
    case = next(c for c in SSD_SCAN.cases if c.name == "bidirectional")
    t = SSD_SCAN.inputs(case, torch.Generator().manual_seed(0))
    scales = case.options["scales"]
    y, _ = SSD_SCAN.call(t, case, "reference")
    forward = mk.ssd_scan(
        t["x"], t["dt"][:, :, 0], t["A"][0], t["B"], t["C"], t["D"], initial_state=t["initial_state"]
    )[0]
    outs = []
    pieces = [v.split(scales, 1) for v in (t["x"], t["dt"][:, :, 1], t["B"], t["C"])]
    for x, dt, B, C in zip(*pieces, strict=True):
        flipped, _ = recurrence(
            *(v.flip(1) for v in (x, dt)), t["A"][1], B.flip(1), C.flip(1), torch.zeros(2, 2, 64, 64, dtype=x.dtype)
        )
        own = torch.einsum("blh,blhp,bln,bln->blhp", dt, x, B, C)
        outs.append(flipped.flip(1) - own)
    torch.testing.assert_close(y - forward, torch.cat(outs, 1), **TIGHT)


@pytest.mark.parametrize("name", ["chunks", "bidirectional"])
def test_state_carries_across_scales(name: str) -> None:
    """One call over the sequence equals one call per scale with the state passed on."""
    case = next(c for c in MAMBA2_MIXER.cases if c.name == name)
    t = MAMBA2_MIXER.inputs(case, torch.Generator().manual_seed(0))
    params = [t[p] for p in PARAMETERS]
    scales = case.options["scales"] or (1, 3, 2, 40, 54)
    whole, last = mk.mamba2_mixer(t["zxbcdt"], *params, scales=scales)
    state, outs = None, []
    for piece in t["zxbcdt"].split(scales, 1):
        y, state = mk.mamba2_mixer(piece, *params, state=state, scales=(piece.shape[1],))
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole, **TIGHT)
    assert state is not None
    torch.testing.assert_close(state, last, **TIGHT)


ONE_DIRECTION = [case for case in (*MAMBA2_MIXER.cases[:2], *VARIANTS) if not case.options["scales"]]


@pytest.mark.parametrize("case", ONE_DIRECTION, ids=lambda case: case.name)
def test_mixer_matches_unfused(case: Case) -> None:
    """Compares with the convolution, softplus, recurrence, gate and RMSNorm computed separately."""
    t = MAMBA2_MIXER.inputs(case, torch.Generator().manual_seed(0))
    B, L, H, P, N = (case.sizes[d] for d in "BLHPN")
    E, G = H * P, case.options.get("groups", 1)
    z, xbc, dt = t["zxbcdt"].split([E, E + 2 * G * N, H], -1)
    rows = torch.cat([t["conv"], xbc], 1)
    conv = sum(rows[:, i : i + L] * t["conv_weight"][:, i] for i in range(4)) + t.get("conv_bias", 0)
    x, Bt, Ct = (conv * torch.sigmoid(conv)).split([E, G * N, G * N], -1)
    delta = (1 + (dt + t["dt_bias"]).exp()).log()
    low, high = case.options.get("dt_limit", (0.0, math.inf))
    delta = torch.where(delta < low, low, torch.where(delta > high, high, delta))
    heads = x.reshape(B, L, H, P)
    y, _ = recurrence(heads, delta, -t["A_log"].exp(), Bt.reshape(B, L, G, N), Ct.reshape(B, L, G, N), t["ssm"])
    y = (y + t["D"].reshape(H, -1) * heads).reshape(B, L, E)
    gate, before = z * torch.sigmoid(z), case.options.get("norm_before_gate", False)

    def norm(v: Tensor) -> Tensor:
        if "norm_weight" not in t:
            return v
        groups = v.reshape(B, L, G, E // G)
        return (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(B, L, E) * t["norm_weight"]

    expected = norm(y) * gate if before else norm(y * gate)
    torch.testing.assert_close(MAMBA2_MIXER.call(t, case, "reference")[0], expected, **TIGHT)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_groups_are_mixers_of_their_own(backend: str) -> None:
    """A call with two groups equals a call on the channels of each, states and gradients included."""
    if backend == "cpu" and mk.backends()["cpu"] is not None:
        pytest.skip(str(mk.backends()["cpu"]))
    case = next(c for c in MAMBA2_MIXER.cases if c.name == "groups")
    inputs = MAMBA2_MIXER.inputs(case, torch.Generator().manual_seed(0))
    t = {name: v.float().requires_grad_() for name, v in inputs.items()}
    H, P, N = (case.sizes[d] for d in "HPN")
    E, one = H * P, replace(case, sizes=case.sizes | {"H": H // 2}, options={"scales": None})
    outs, parts = MAMBA2_MIXER.call(t, case, backend), []
    for g in range(2):
        x, heads = range(g * E // 2, (g + 1) * E // 2), slice(g * H // 2, (g + 1) * H // 2)
        xbc = [*x, *range(E + g * N, E + (g + 1) * N), *range(E + (2 + g) * N, E + (3 + g) * N)]
        columns = [*x, *(E + c for c in xbc), *range(2 * E + 4 * N, t["zxbcdt"].shape[-1])[heads]]
        of_group = {name: t[name][heads] for name in ("dt_bias", "A_log", "D")}
        of_group |= {"zxbcdt": t["zxbcdt"][..., columns], "conv": t["conv"][..., xbc], "ssm": t["ssm"][:, heads]}
        of_group |= {"conv_weight": t["conv_weight"][xbc], "conv_bias": t["conv_bias"][xbc]}
        of_group["norm_weight"] = t["norm_weight"][list(x)]
        y, conv, ssm = MAMBA2_MIXER.call(of_group, one, backend)
        parts.append((y, ssm))
        torch.testing.assert_close(outs[1][..., xbc], conv)
    y, ssm = torch.cat([y for y, _ in parts], -1), torch.cat([ssm for _, ssm in parts], 1)
    torch.testing.assert_close((outs[0], outs[2]), (y, ssm))
    leaves = list(t.values())
    grads = [torch.autograd.grad(a.square().sum() + b.square().sum(), leaves, allow_unused=True)
             for a, b in ((outs[0], outs[2]), (y, ssm))]  # fmt: skip
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_errors_name_the_argument() -> None:
    case = next(c for c in SSD_SCAN.cases if c.name == "bidirectional")
    t = SSD_SCAN.inputs(case, torch.Generator().manual_seed(0))
    args = [t[n] for n in ("x", "dt", "A", "B", "C")]
    with pytest.raises(ValueError, match="scales: expected tokens per scale"):
        mk.ssd_scan(*args)
    with pytest.raises(ValueError, match=r"scales: expected to add up to L=30, got \(1, 4\)"):
        mk.ssd_scan(*args, scales=(1, 4))
    with pytest.raises(TypeError, match="B: expected dtype float64 as x, got float32"):
        mk.ssd_scan(*args[:3], args[3].float(), args[4], scales=case.options["scales"])
    with pytest.raises(TypeError, match="dt: expected dtype float64, got float32"):
        mk.ssd_scan(args[0], args[1].float(), *args[2:], scales=case.options["scales"])
    with pytest.raises(TypeError, match="dt: expected dtype bfloat16 or float32, got float64"):
        mk.ssd_scan(args[0].bfloat16(), *args[1:], scales=case.options["scales"])
    with pytest.raises(ValueError, match=r"C: expected shape \(B=2, L=30, N=64\)"):
        mk.ssd_scan(*args[:4], args[4][:, :, :3], scales=case.options["scales"])
    with pytest.raises(ValueError, match="B: expected groups that divide H=2, got 3"):
        grouped = args[3][:, :, None].expand(-1, -1, 3, -1)
        mk.ssd_scan(*args[:3], grouped, grouped, scales=case.options["scales"])
    with pytest.raises(ValueError, match=r"C: expected shape \(B=2, L=30, G=1, N=64\)"):
        mk.ssd_scan(*args[:3], args[3][:, :, None], args[4], scales=case.options["scales"])
    with pytest.raises(TypeError, match="initial_state: expected dtype float64"):
        mk.ssd_scan(*args, initial_state=t["initial_state"].float(), scales=case.options["scales"])

    case = MAMBA2_MIXER.cases[0]
    t = MAMBA2_MIXER.inputs(case, torch.Generator().manual_seed(0))
    params = [t[p] for p in PARAMETERS]
    with pytest.raises(ValueError, match="zxbcdt: expected"):
        mk.mamba2_mixer(t["zxbcdt"][..., 1:], *params)
    for ngroups in (3, 0, 1.5):
        with pytest.raises(ValueError, match=f"ngroups: expected groups that divide H=2, got {ngroups}"):
            mk.mamba2_mixer(t["zxbcdt"], *params, ngroups=ngroups)
    for limit in ((0.2, 0.1), (-1.0, 1.0), (math.nan, 1.0), (0.1,), 0.1):
        with pytest.raises(ValueError, match="dt_limit: expected two numbers"):
            mk.mamba2_mixer(t["zxbcdt"], *params, dt_limit=limit)
    with pytest.raises(ValueError, match=r"D: expected shape \(H=2, P=64\), got \(2, 3\)"):
        mk.mamba2_mixer(t["zxbcdt"], *params[:4], torch.ones(2, 3), params[5])
    with pytest.raises(ValueError, match="state.ssm: expected shape"):
        mk.mamba2_mixer(t["zxbcdt"], *params, state=mk.Mamba2State(t["conv"], t["ssm"][:1]))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_keeps_dt_in_float32(bidirectional: bool, mixer_inputs: list[Any]) -> None:
    """x, B and C are 16-bit; an in_proj with a hook is called as one projection, which rounds dt."""
    torch.manual_seed(0)
    layer = MVARBlock(ModelConfig(2, (1, 2, 4), num_classes=2, bidirectional=bidirectional)).mamba
    x, scales = torch.randn(2, 21, layer.in_proj.in_features), (1, 4, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x, scales, None, "reference")
        layer.in_proj.register_forward_hook(lambda *_: None)
        layer(x, scales, None, "reference")
    (projected, dt), (whole, none) = mixer_inputs
    with torch.no_grad():
        exact = layer.in_proj.double()(x.double())[..., projected.shape[-1] :]
    assert projected.dtype == whole.dtype == torch.bfloat16 and dt is not None and none is None
    assert dt.dtype == torch.float32 and (dt.flatten(2) - exact).abs().max() < 1e-6
    assert (whole[..., projected.shape[-1] :] - exact).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("device", "dtype", "separate"),
    [
        ("cpu", torch.float32, False),
        ("cpu", torch.float64, False),
        ("cpu", torch.bfloat16, True),
        ("cuda", torch.float32, True),
        ("cuda", torch.float16, True),
    ],
)
def test_separate_dt(device: str, dtype: torch.dtype, separate: bool) -> None:
    assert layers.separate_dt(torch.device(device), dtype) == separate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separate_dt_matches_single_projection(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output and the gradient of in_proj match those of a single projection up to rounding."""
    torch.manual_seed(0)
    config = ModelConfig(depth=3, patch_nums=(1, 2), num_classes=2)
    layer = MVARBlock(config).mamba.to(dtype)
    x, found = torch.randn(2, 5, config.channels, dtype=dtype), []
    for separate in (False, True):
        monkeypatch.setattr(layers, "separate_dt", lambda *_, separate=separate: separate)
        y, _ = layer(x, (1, 4), None, "reference")
        (of_weight,) = torch.autograd.grad(y.square().sum(), layer.in_proj.weight)
        found.append((y, of_weight))
        projected, dt = layer.project(x)
        assert (dt is not None) == separate and (not separate or (projected.shape[-1] % 64 == 0 and dt.dtype == dtype))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 8 * torch.finfo(dtype).eps * one.abs().max() * config.channels**0.5


def test_bfloat16_model_keeps_dt_in_float32(mixer_inputs: list[Any]) -> None:
    layer = MVARBlock(ModelConfig(2, (1, 2), num_classes=2)).mamba.bfloat16()
    with torch.no_grad():
        layer(torch.randn(1, 5, layer.in_proj.in_features).bfloat16(), (1, 4), None, "reference")
    ((projected, dt),) = mixer_inputs
    assert projected.dtype == torch.bfloat16 and dt is not None and dt.dtype == torch.float32


def test_mamba_ssm_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls a fake mamba_chunk_scan_combined of the same signature, with inputs whose strides its backward refuses."""

    def scan(x, dt, A, B, C, chunk_size, *, D, initial_states, return_final_states):  # type: ignore[no-untyped-def]
        assert return_final_states and all(t.stride(-1) == 1 for t in (x, dt, B, C, initial_states))
        return reference.ssd_scan(Scan(x, dt, A, B.flatten(2), C.flatten(2), D, initial_states, (x.shape[1],)))

    fake_module = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    fake_module.mamba_chunk_scan_combined = scan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake_module.__name__, fake_module)
    generator = torch.Generator().manual_seed(0)

    def column_major(*shape: int) -> Tensor:
        return torch.randn(shape[::-1], generator=generator).permute(*reversed(range(len(shape))))

    x, dt, A = column_major(2, 5, 4, 3), column_major(2, 5, 4).exp(), -column_major(4).exp()
    B, C, D, state = (column_major(*shape) for shape in ((2, 5, 16), (2, 5, 16), (4, 3), (2, 4, 3, 8)))
    call = Scan(x, dt, A, B, C, D, state, (5,))
    peer, own = mamba_ssm.ssd_scan_mamba_ssm, reference.ssd_scan_reference
    torch.testing.assert_close(peer.forward(call), own.forward(call))
    assert peer.backward is not None and own.backward is not None
    grads = [column_major(2, 5, 4, 3), column_major(2, 4, 3, 8)]
    torch.testing.assert_close(peer.backward(grads, call), own.backward(grads, call))
    assert peer.unsupported_reason(call) == "inputs are on cpu"
