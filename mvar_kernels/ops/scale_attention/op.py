"""scale_attention: the formulas, the public function, its checks and autograd.

The sequence is a pyramid of token maps, coarse to fine; `scales` are their lengths.

    diagonal:  tokens of scale k attend to all tokens of scale k             (M-VAR, arXiv 2411.10433)
    causal:    tokens of scale k attend to all tokens of scales ≤ k          (VAR, arXiv 2404.02905)
    full:      all queries attend to all keys: of a text, say, with a length for each sample

    out = softmax(scale · q kᵀ) v

With `log_temperature` τ, one per head, queries and keys are unit vectors (VAR's attn_l2_norm):

    q ← q/‖q‖ · exp(min(τ, log 100)),   k ← k/‖k‖

With `rotary` the rows of q and k, after the norm, are rotated: each pair of channels (x1, x2) becomes

    x1·c1 − x2·s1,   x2·c2 + x1·s2

where c and s are the cosines and sines of its row. Where a pair shares one angle, this is the rotation of RoPE (arXiv
2104.09864); models whose halves are the axes of a token map (HART, Markov-VAR) give each member its own.

At 256×256 the diagonal holds 110k score pairs a head, against 462k of the full 680×680 square.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.scale_attention.inputs import Attention

_OP = Op(
    "scale_attention",
    __package__,
    {"cpu": "native", "cuda": "native", "triton": "triton", "reference": "reference", "flash_attn": "flash_attn"},
)
PATTERNS = ("diagonal", "causal", "full")


def scale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[int, ...] | None = None,
    *,
    pattern: str = "diagonal",
    scale: float | None = None,
    log_temperature: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside each scale, over the scale and all coarser ones, or over all keys.

    Args:
        q: (B, Lq, H, D). Lq is L, or the length of the last few scales (a key/value cache); with pattern "full" any.
        k, v: (B, L, Hkv, D), dtype of q; head h of q uses head h // (H / Hkv). Views into a packed (B, L, 3, H, D) are
            read in place.
        scales: tokens per scale, coarse to fine; they add up to L. None only with pattern "full".
        pattern: "diagonal" (own scale), "causal" (own and coarser scales) or "full" (all keys, as in cross-attention).
        scale: factor on the scores; None for VAR's: 1 with log_temperature, else 0.25/√D.
        log_temperature: (H,), floating point, or None for no q/k norm. ‖q‖² and ‖k‖² must be in float32's range.
        rotary: cosines and sines of a rotary position embedding of q and k, which follows their norm; or None. Both
            (L, D/2), an angle for each pair of channels, or (L, D), one for each channel; float32 or the dtype of q.
            They get no gradient. Keys take all rows, queries the last Lq (with "full" Lq must be L). Rotated rows in
            16 bits are rounded to the dtype of q, as models in PyTorch round them.
        rotary_interleaved: channels 2i and 2i + 1 are a pair, and neighbours in a (L, D) table; else i and i + D/2.
        key_lengths: (B,), int32 or int64, with pattern "full" alone: keys of sample b from key_lengths[b] on are
            padding, which is not attended to, whatever it holds, and gets gradients of 0. Numbers below 0 are as 0,
            those above L as L; a sample of length 0 has outputs and gradients of 0. They are not copied from a GPU to
            the CPU. None: all keys.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, Lq, H, D), contiguous, the dtype of q; softmax and sums in float32 (float64 for float64). A NaN or an
        infinity in k or v reaches the queries that attend to it; of "triton" and "cuda" also queries of other scales
        of the same sample and head, whose tile it shares.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        BackendError: the named backend cannot run on these inputs.
    """
    op = "scale_attention"
    sizes: dict[str, int] = {}
    validation.tensor(op, "q", q, "B Lq H D", sizes)
    validation.tensor(op, "k", k, "B L Hkv D", sizes, like=q)
    if k.shape[2] != q.shape[2] and (k.shape[2] < 1 or q.shape[2] % k.shape[2]):
        raise ValueError(f"{op}: k: expected Hkv that divides H={q.shape[2]}, got Hkv={k.shape[2]}")
    validation.tensor(op, "v", v, "B L Hkv D", sizes, like=q)
    validation.same_dtype(op, "q", q=q, k=k, v=v)
    if log_temperature is not None:
        validation.tensor(op, "log_temperature", log_temperature, "H", sizes, like=q)
    if pattern not in PATTERNS:
        raise ValueError(f"{op}: pattern: expected one of {', '.join(PATTERNS)}; got {pattern!r}")
    lengths = () if pattern == "full" and scales is None else validation.scale_lengths(op, scales, k.shape[1])
    if pattern == "full":
        if q.shape[1] < 1 or k.shape[1] < 1:
            raise ValueError(f"{op}: q and k: expected at least one token, got Lq={q.shape[1]} and L={k.shape[1]}")
        lengths = ()
    elif not any(q.shape[1] == sum(lengths[i:]) for i in range(len(lengths))):  # symbolic sizes are in no set
        raise ValueError(f"{op}: q: expected L or the length of the last few of scales {lengths}, got Lq={q.shape[1]}")
    check_name(backend)
    if q.shape[-1] < 1:
        raise ValueError(f"{op}: q: expected head dimension D of at least 1, got shape {tuple(q.shape)}")
    if scale is None:
        scale = 1.0 if log_temperature is not None else 0.25 * int(q.shape[-1]) ** -0.5
    scale = validation.positive(op, "scale", scale)
    if key_lengths is not None:
        validation.tensor(op, "key_lengths", key_lengths, "B", sizes, q, (torch.int32, torch.int64))
        if pattern != "full":
            raise ValueError(f"{op}: key_lengths: expected None with pattern {pattern!r}, got a tensor")
    cos, sin = (None, None) if rotary is None else _cos_and_sin(rotary, q, k.shape[1])
    if pattern == "full" and cos is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: rotary: expected None with Lq={q.shape[1]} queries of L={k.shape[1]} keys")
    options = pattern == "causal", scale, cos, sin, rotary_interleaved, key_lengths
    return _scale_attention(Attention(q, k, v, log_temperature, lengths, *options), backend)[0]


def _cos_and_sin(rotary: tuple[Tensor, Tensor], q: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The two tables of `rotary`, checked."""
    op, D = "scale_attention", q.shape[-1]
    if D % 2:
        raise ValueError(f"{op}: rotary: expected an even head dimension, got D={D}")
    if not isinstance(rotary, Sequence) or len(rotary) != 2:
        raise TypeError(f"{op}: rotary: expected (cos, sin), got {type(rotary).__name__}")
    for name, t in zip(("cos", "sin"), rotary, strict=True):
        sizes = {"L": rows, "angles": D if isinstance(t, Tensor) and t.shape[-1:] == (D,) else D // 2}
        validation.tensor(op, f"{name} of rotary", t, "L angles", sizes, q, (torch.float32, q.dtype))
        if t.requires_grad:
            raise ValueError(f"{op}: {name} of rotary: expected a tensor without gradient")
    cos, sin = rotary
    validation.same_dtype(op, "cos of rotary", **{"cos of rotary": cos, "sin of rotary": sin})
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: sin of rotary: expected shape {tuple(cos.shape)} as cos, got {tuple(sin.shape)}")
    return cos, sin


def _fake(call: Attention) -> tuple[Tensor, Tensor]:
    B, Lq, H, _ = call.q.shape
    lse = call.q.new_empty((B, H, Lq), dtype=validation.accumulator(call.q.dtype))
    return call.q.new_empty(call.q.shape), lse


_scale_attention = RegisteredOp(_OP, Attention, _fake, outputs=2, constants=("cos", "sin", "key_lengths"))
