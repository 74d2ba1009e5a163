"""Cases, bytes and FLOPs of scale_attention."""

from dataclasses import replace

import torch

from mvar_kernels.ops.scale_attention import reference
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.op import scale_attention
from mvar_kernels.testing.spec import PER_HEAD_SUM, Case, Inputs, Spec

VAR_256 = tuple(n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
SMALL = (1, 4, 9, 16)
# One head below the bound of log 100 and one above: the latter's temperature is clamped and gets no gradient.
HOT = (4.605, 5.0)
# exp underflows: scores of 0, and no gradient.
COLD = (-104.0, -1e3)


def _case(name: str, scales: tuple[int, ...], B: int, H: int, D: int, **options: object) -> Case:
    return Case(name, {"B": B, "H": H, "D": D}, {"scales": scales, "pattern": "diagonal", "norm": False} | options)


CASES = (
    _case("one_token", (1,), 1, 1, 64),
    _case("diagonal", SMALL, 2, 3, 64),
    _case("diagonal_norm", SMALL, 2, 3, 64, norm=True),
    _case("causal", SMALL, 2, 3, 64, pattern="causal"),
    _case("causal_norm", SMALL, 2, 3, 64, pattern="causal", norm=True),
    _case("odd", (3, 1, 17, 5), 3, 2, 24, scale=0.3),
    _case("cache", SMALL, 2, 2, 64, pattern="causal", query_scales=2, norm=True),
    _case("packed", SMALL, 2, 3, 64, packed=True),
    _case("last_scales", SMALL, 2, 2, 128, query_scales=2, packed=True, norm=True),
    _case("d16_256", VAR_256, 1, 2, 64, norm=True),
    # Backward of one program a scale: of one block, of two and of several, whole and partial, beside packed scales.
    _case("100_tokens", (100,), 1, 2, 64),
    _case("169_tokens", (1, 4, 169), 1, 1, 64, norm=True, packed=True),
    _case("256_tokens", (9, 256), 1, 1, 64),
    # Beside scales that are longer than one program takes.
    _case("mixture", (4, 16, 289, 64), 1, 1, 32, norm=True),
    # Rotary position embedding: one angle for a pair of channels, or one for each of its channels.
    _case("rotary", SMALL, 2, 3, 64, rotary="pairs"),
    _case("rotary_causal_norm", SMALL, 2, 3, 64, pattern="causal", norm=True, rotary="channels", packed=True),
    _case("rotary_odd", (3, 1, 17, 5), 3, 2, 24, scale=0.3, rotary="channels", interleaved=True),
    _case(
        "rotary_cache", SMALL, 2, 2, 128, pattern="causal", query_scales=2, norm=True, rotary="pairs", interleaved=True
    ),
    replace(_case("rotary_256_tokens", (9, 256), 1, 1, 64, norm=True, rotary="pairs"), keeps_dtype=("cos", "sin")),
    _case("rotary_narrow", SMALL, 1, 2, 6, norm=True, heat=(1.0, 3.0), rotary="channels"),
    # All keys, more or fewer than the queries, or as many of them as a sample has.
    _case("full", (29,), 2, 3, 64, pattern="full", queries=70),
    _case("full_norm", (300,), 1, 2, 64, pattern="full", queries=35, norm=True),
    _case("key_lengths", (40,), 4, 2, 64, pattern="full", queries=18, key_lengths=(0, 7, 40, 39)),
    _case(
        "key_lengths_norm",
        (80,),
        3,
        2,
        24,
        pattern="full",
        norm=True,
        heat=(0.5, 1.5),
        rotary="pairs",
        key_lengths=(70, -1, 999),
    ),
    # Heads of queries that share one of keys.
    _case("grouped", SMALL, 2, 6, 64, norm=True, key_heads=2, packed=True),
    _case("grouped_causal", (3, 1, 17, 5), 2, 4, 24, pattern="causal", scale=0.3, key_heads=2, rotary="pairs"),
    _case(
        "grouped_full",
        (40,),
        3,
        3,
        64,
        pattern="full",
        queries=18,
        norm=True,
        heat=(0.5, 1.5, 1.0),
        key_heads=1,
        key_lengths=(40, 0, 9),
    ),
    # The ends of the softmax and of the numbers, see _values.
    _case("saturated", SMALL, 1, 2, 64, values="one_key_ahead", scale=1.0),
    _case(
        "saturated_causal_norm", SMALL, 1, 2, 64, values="one_key_ahead", pattern="causal", norm=True, heat=(2.5, 3.0)
    ),
    # The gradient of q is scale·Σ dS·k with Σ dS = 0, dS being the scores' gradients.
    replace(_case("equal_keys", SMALL, 1, 2, 64, values="equal_keys"), cancelled={"grad of q": 3.1}),
    replace(
        _case("equal_keys_norm", SMALL, 1, 2, 64, values="equal_keys", norm=True, heat=HOT),
        cancelled={"grad of q": 45.2},
    ),
    _case("hottest", SMALL, 1, 2, 64, norm=True, heat=HOT),
    _case("coldest", SMALL, 1, 2, 64, norm=True, heat=COLD),
    _case("large_scores", SMALL, 1, 2, 64, values="large_scores", scale=1.0),
    _case("large_values", SMALL, 1, 2, 64, values="large_values"),
)
BENCH = (
    _case("d16_256", VAR_256, 2, 16, 64, packed=True),
    _case("d16_256_causal", VAR_256, 2, 16, 64, packed=True, pattern="causal"),
)

BENCH_CUDA = (
    # With the scale that all third-party backends support.
    _case("d16_256_training", VAR_256, 32, 16, 64, packed=True, scale=0.125),
    _case("d16_256_training_norm", VAR_256, 32, 16, 64, packed=True, norm=True),
    _case("d16_256_training_causal", VAR_256, 32, 16, 64, packed=True, pattern="causal", scale=0.125),
    _case("d16_256_last_scale", VAR_256[-1:], 16, 16, 64, packed=True, scale=0.125),
)


def _set_values(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Make of the case's normal q, k and v what its option `values` says, in place."""
    match case.options.get("values"):
        case "one_key_ahead":
            # The first key of every scale scores some 15 (half of the heads) or 50 above the others.
            q.mul_(0.5)[..., 0] = 8.0
            k.mul_(0.125)[..., 0] = 0.0
            starts = [sum(case.options["scales"][:i]) for i in range(len(case.options["scales"]))]
            k[:, starts] = 0.0
            k[:, starts, ::2, 0], k[:, starts, 1::2, 0] = 2.0, 6.0
        case "equal_keys":
            k.copy_(k[:, :1].expand_as(k))
        case "large_scores":
            q.mul_(6e3)  # with keys as large, scores of 1e10
            k.mul_(6e3)
        case "large_values":
            v.copy_(torch.where(v < 0, -6e4, 6e4))


def _queries(case: Case) -> int:
    scales = case.options["scales"]
    chosen: int = case.options.get("queries", sum(scales[-case.options.get("query_scales", len(scales)) :]))
    return chosen


def _key_lengths(t: Inputs, case: Case) -> torch.Tensor | None:
    lengths = case.options.get("key_lengths")
    if lengths is None:
        return None
    B = t["q"].shape[0]
    return torch.tensor((lengths * B)[:B], device=t["q"].device, dtype=torch.int32 if B % 2 else torch.int64)


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    B, H, D = (case.sizes[d] for d in "BHD")
    scales = case.options["scales"]
    L, Lq = sum(scales), _queries(case)
    device = generator.device
    packed = 2.0 * torch.randn(B, max(L, Lq), 3, H, D, generator=generator, dtype=torch.float64, device=device)
    # q, k, v leave here as views into the packed projection; the test keeps their strides for "packed".
    q, k, v = packed.unbind(2)
    _set_values(case, q, k, v)
    key_heads = case.options.get("key_heads", H)
    inputs = {"q": q[:, -Lq:], "k": k[:, :L, :key_heads], "v": v[:, :L, :key_heads]}
    if not case.options.get("packed"):
        inputs = {name: t.contiguous() for name, t in inputs.items()}
    if case.options["norm"]:
        # One head above the bound of log 100: its temperature is clamped and gets no gradient.
        evenly = torch.linspace(1.0, 5.0, H, dtype=torch.float64, device=device)
        heat = case.options.get("heat")
        inputs["log_temperature"] = evenly if heat is None else evenly.new_tensor(heat)
    if angles := case.options.get("rotary"):
        shape = 2, L, D if angles == "channels" else D // 2
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        # Of any size where each channel has its own: what is tested is a linear map.
        inputs["cos"], inputs["sin"] = drawn if angles == "channels" else (drawn[0].cos(), drawn[0].sin())
    return inputs


def score_scale(case: Case) -> float:
    """The factor on the scores: the case's, or the op's default."""
    default = 1.0 if case.options["norm"] else 0.25 * case.sizes["D"] ** -0.5
    scale: float = case.options.get("scale", default)
    return scale


def _reference(t: Inputs, case: Case) -> tuple[torch.Tensor, ...]:
    scales, pattern = case.options["scales"], case.options["pattern"]
    options = () if pattern == "full" else scales, pattern == "causal", score_scale(case)
    rotary = t.get("cos"), t.get("sin"), case.options.get("interleaved", False)
    tensors = t["q"], t["k"], t["v"], t.get("log_temperature")
    out, _ = reference.scale_attention(Attention(*tensors, *options, *rotary, _key_lengths(t, case)))
    return (out,)


def _work(case: Case, itemsize: int) -> tuple[int, int]:
    B, H, D = (case.sizes[d] for d in "BHD")
    scales = case.options["scales"]
    L, Lq = sum(scales), _queries(case)
    spans = reference.spans(scales, Lq, case.options["pattern"] == "causal")
    pairs = sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in spans)
    if case.options["pattern"] == "full":
        pairs = Lq * L
    return 2 * (L * case.options.get("key_heads", H) + Lq * H) * B * D * itemsize, 4 * pairs * B * H * D


def _work_backward(case: Case, itemsize: int) -> tuple[int, int]:
    """q, k, v, out and its gradient are read, three gradients written; five matmuls where the forward has two."""
    moved, flops = _work(case, itemsize)
    return 2 * moved, 5 * flops // 2


SPECS = (
    Spec(
        op="scale_attention",
        cases=CASES,
        inputs=_inputs,
        call=lambda t, case, backend: (
            scale_attention(
                t["q"],
                t["k"],
                t["v"],
                None if case.options["pattern"] == "full" else case.options["scales"],
                pattern=case.options["pattern"],
                scale=case.options.get("scale"),
                log_temperature=t.get("log_temperature"),
                rotary=(t["cos"], t["sin"]) if "cos" in t else None,
                rotary_interleaved=case.options.get("interleaved", False),
                key_lengths=_key_lengths(t, case),
                backend=backend,
            ),
        ),
        reference=_reference,
        outputs=("out",),
        grads=("q", "k", "v", "log_temperature"),
        keeps_dtype=("log_temperature",),
        slack={"grad of log_temperature": PER_HEAD_SUM},
        bench=BENCH,
        bench_cuda=BENCH_CUDA,
        work=_work,
        work_backward=_work_backward,
    ),
)
