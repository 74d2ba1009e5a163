"""sample_tokens and soft_embedding: the formulas, the public functions and their checks.

    logits   = (cond + c·(cond − uncond)) / temperature                      classifier-free guidance
    top-k    keeps every logit ≥ the k-th largest (ties stay)
    top-p    then: in ascending order, drops while the cumulative softmax ≤ 1−p, never the largest
             (equal logits in the order of their codes)
    token    = argmax of logits + Gumbel noise over what is left             a sample of the softmax

The order and the rules are VAR's (arXiv 2404.02905). The softmax weights of top-p are multiples
of 2⁻³⁰ of the largest, so that the cut is the same on every backend; noise.py has the noise.

A softmax does not change when a number is added to all logits of a row, and neither does the result here: both rows
count relative to their largest logit before guidance, all logits do before they are divided by a temperature other
than 1, and what is left before the noise.
A code with cond = −∞ is ruled out. With uncond = −∞ alone there is nothing to guide it away from: its logit is cond's.
+∞ counts as the largest finite number.

    soft     = softmax((logits·sharpness + noise) / temperature) · codebook  VAR's `more_smooth`
"""

import torch
from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling

_SAMPLE = Op(
    "sample_tokens",
    __package__,
    {"cpu": "native", "cuda": "native", "triton": "triton", "reference": "reference"},
)
_SOFT = Op("soft_embedding", __package__, {"cpu": "native", "triton": "triton", "reference": "reference"})
MAX_SEED = 2**63 - 1
MAX_WORD = 2**32 - 1
MAX_GUIDANCE = 1e6  # far beyond use, and far from overflow
TEMPERATURES = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal float32 values


def sample_tokens(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: int | Tensor = 0,
    image_index: Tensor | None = None,
    scale_index: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sample a token at every position of one scale.

    Args:
        cond: (B, l, V) logits, float16, bfloat16, float32 or float64. A code at −∞ is never sampled, +∞ counts as the
            largest finite number; with all codes of a row at −∞ the token is 0; with a NaN it is some code, not the
            same one on every backend.
        uncond: as cond, or None where the logits are guided already. Not read where guidance is 0; a code at −∞ here
            alone keeps the logit of cond.
        guidance: c ≥ 0 in (1+c)·cond − c·uncond; VAR's is cfg·k/(K−1) at scale k of K.
        top_k: 0, or V and more, keeps all codes; 1 is the arg-max.
        top_p: in (0, 1]; 1 keeps all codes.
        temperature: above 0, Infinity's tau; the guided logits are divided by it before the filters, so that top-p is
            of the softmax at that temperature. Beyond the normal float32 values, the nearest of them.
        seed: in [0, 2⁶³), or a 0-d int64 tensor on the logits' device, read when the kernel runs, so that a captured
            CUDA graph can be replayed with another seed. Its value is not checked; it counts modulo 2⁶⁴.
        image_index: (B,) int64, which image of the seed's series each row is, modulo 2³²; None: 0 … B−1.
        scale_index: which scale of the pyramid.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, l) int64.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        BackendError: the named backend cannot run on these inputs.
    """
    op = "sample_tokens"
    filters = guidance, top_k, top_p, temperature
    call = _checked(op, cond, uncond, filters, seed, image_index, scale_index, backend)
    return _sample_tokens(call, backend)[0]


def soft_embedding(
    cond: Tensor,
    uncond: Tensor | None,
    codebook: Tensor,
    *,
    guidance: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sharpness: float = 1.0,
    temperature: float = 1.0,
    seed: int | Tensor = 0,
    image_index: Tensor | None = None,
    scale_index: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The Gumbel-softmax mean of the codebook at every position of one scale (no gradients).

    Args:
        codebook: (V, width), floating point.
        sharpness: factor on the logits; VAR's is 1 + k/(K−1).
        temperature: above 0; VAR's is max(0.27·(1 − 0.95·k/(K−1)), 0.005).
        others: as in :func:`sample_tokens`, with the same noise.

    Returns:
        (B, l, width) in the codebook's dtype; NaN where all codes of a row are at −∞.

    Raises:
        as :func:`sample_tokens`.
    """
    op = "soft_embedding"
    filters = guidance, top_k, top_p, 1.0
    call = _checked(op, cond, uncond, filters, seed, image_index, scale_index, backend)
    validation.tensor(op, "codebook", codebook, "V width", {"V": cond.shape[-1]}, like=cond)
    sharpness = validation.positive(op, "sharpness", sharpness)
    temperature = validation.positive(op, "temperature", temperature)
    return _soft_embedding(SoftSampling(codebook, *call[:8], sharpness, temperature), backend)[0]


def _checked(
    op: str,
    cond: Tensor,
    uncond: Tensor | None,
    filters: tuple[float, int, float, float],
    seed: int | Tensor,
    image_index: Tensor | None,
    scale_index: int,
    backend: str,
) -> Sampling:
    """Everything the two ops share, checked; image indices and seed as tensors, made here if need be."""
    sizes: dict[str, int] = {}
    validation.tensor(op, "cond", cond, "B l V", sizes)
    if uncond is not None:
        validation.tensor(op, "uncond", uncond, "B l V", sizes, like=cond)
        validation.same_dtype(op, "cond", cond=cond, uncond=uncond)
    if image_index is None:
        image_index = torch.arange(cond.shape[0], dtype=torch.int64, device=cond.device)
    validation.tensor(op, "image_index", image_index, "B", sizes, like=cond, dtypes=(torch.int64,))
    guidance, top_k, top_p, temperature = filters
    c, k, p = validation.number(guidance), validation.integer(top_k), validation.number(top_p)
    if c is None or not 0 <= c <= MAX_GUIDANCE:
        raise ValueError(f"{op}: guidance: expected a number from 0 to {MAX_GUIDANCE:g}, got {guidance!r}")
    if c and uncond is None:
        raise ValueError(f"{op}: uncond: expected logits to guide away from, as guidance is {c}; got None")
    if sizes["V"] < 1:
        raise ValueError(f"{op}: cond: expected at least one code, got shape {tuple(cond.shape)}")
    if k is None or k < 0:
        raise ValueError(f"{op}: top_k: expected an integer of at least 0 (0 keeps all), got {top_k}")
    if p is None or not 0 < p <= 1:
        raise ValueError(f"{op}: top_p: expected a number above 0 and up to 1 (all), got {top_p!r}")
    if temperature != 1:
        least, most = TEMPERATURES
        temperature = min(max(validation.positive(op, "temperature", temperature), least), most)
    scale_index = _whole(op, "scale_index", scale_index, MAX_WORD)
    if isinstance(seed, Tensor):
        validation.tensor(op, "seed", seed, "", sizes, like=cond, dtypes=(torch.int64,))
    else:
        seed = image_index.new_full((), _whole(op, "seed", seed, MAX_SEED))  # a GPU's kernel writes it: nothing waits
    check_name(backend)
    uncond, k = uncond if c else None, min(k, sizes["V"])
    return Sampling(cond, uncond, image_index, float(c), k, float(p), seed, scale_index, float(temperature))


def _whole(op: str, name: str, value: object, most: int) -> int:
    known = validation.integer(value)
    if known is None or not 0 <= known <= most:
        raise ValueError(f"{op}: {name}: expected an integer from 0 to {most}, got {value!r}")
    return known


def _fake(call: Sampling) -> tuple[Tensor]:
    return (call.cond.new_empty(call.cond.shape[:2], dtype=torch.int64),)


def _soft_fake(call: SoftSampling) -> tuple[Tensor]:
    return (call.codebook.new_empty(*call.cond.shape[:2], call.codebook.shape[1]),)


_sample_tokens = RegisteredOp(_SAMPLE, Sampling, _fake, outputs=1, differentiable=False)
_soft_embedding = RegisteredOp(
    _SOFT, SoftSampling, _soft_fake, outputs=1, differentiable=False, reference_gradients=True
)
