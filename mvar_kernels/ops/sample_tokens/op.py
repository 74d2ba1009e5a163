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
NEUTRAL: dict[str, float] = {"guidance": 1.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}  # in place of a tensor


def sample_tokens(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    num_samples: int = 1,
    seed: int | Tensor = 0,
    image_index: Tensor | None = None,
    scale_index: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sample a token at every position of one scale.

    guidance, top_k, top_p and temperature: a number, or one for each image in a tensor (B,) on the logits' device,
    int64 or int32 for top_k and float32 or float64 for the others. An image's tokens are the same either way. Tensors
    are not read on the host, so their values are not checked: a guidance below 0 counts as 0, one above 10⁶ as 10⁶; a
    top_k below 1 keeps all codes; a top_p of 0 and less keeps the largest logit alone, one above 1 all codes; a
    temperature of 0 and less is the least there is; and NaN counts as a value below the range.

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
        num_samples: n ≥ 1 independent samples of every position, which is filtered once. The first is that of n = 1.
        seed: in [0, 2⁶³), or a 0-d int64 tensor on the logits' device, read when the kernel runs, so that a captured
            CUDA graph can be replayed with another seed. Its value is not checked; it counts modulo 2⁶⁴.
        image_index: (B,) int64, which image of the seed's series each row is, modulo 2³²; None: 0 … B−1.
        scale_index: which scale of the pyramid.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        (B, l) int64, with num_samples > 1 (B, l, n).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        BackendError: the named backend cannot run on these inputs.
    """
    op = "sample_tokens"
    filters = guidance, top_k, top_p, temperature
    call = _checked(op, cond, uncond, filters, seed, image_index, scale_index, backend)
    if num_samples != 1:
        most = MAX_WORD // max(cond.shape[1], 1)  # each has positions of its own in the noise
        call = call._replace(num_samples=_whole(op, "num_samples", num_samples, most, least=1))
    return _sample_tokens(call, backend)[0]


def soft_embedding(
    cond: Tensor,
    uncond: Tensor | None,
    codebook: Tensor,
    *,
    guidance: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
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
    return _soft_embedding(SoftSampling(codebook, *call[:8], sharpness, temperature, call.per_image), backend)[0]


def _checked(
    op: str,
    cond: Tensor,
    uncond: Tensor | None,
    filters: tuple[float | Tensor, int | Tensor, float | Tensor, float | Tensor],
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
    c, k, p, t = map(validation.number, filters)
    tensors: dict[str, Tensor] = {}
    if None in (c, k, p, t):
        tensors = {n: v for n, v in zip(NEUTRAL, filters, strict=True) if isinstance(v, Tensor) and v.dim()}
        for name, value in tensors.items():
            dtypes = (torch.int64, torch.int32) if name == "top_k" else (torch.float32, torch.float64)
            validation.tensor(op, name, value, "B", sizes, like=cond, dtypes=dtypes)
        c, k, p, t = (NEUTRAL[n] if n in tensors else v for n, v in zip(NEUTRAL, (c, k, p, t), strict=True))
    if c is None or not 0 <= c <= MAX_GUIDANCE:
        raise ValueError(f"{op}: guidance: expected a number from 0 to {MAX_GUIDANCE:g}, got {guidance!r}")
    if c and uncond is None:
        given = "a tensor" if "guidance" in tensors else c
        raise ValueError(f"{op}: uncond: expected logits to guide away from, as guidance is {given}; got None")
    if sizes["V"] < 1:
        raise ValueError(f"{op}: cond: expected at least one code, got shape {tuple(cond.shape)}")
    if not isinstance(k, int) or k < 0:
        raise ValueError(f"{op}: top_k: expected an integer of at least 0 (0 keeps all), got {top_k}")
    if p is None or not 0 < p <= 1:
        raise ValueError(f"{op}: top_p: expected a number above 0 and up to 1 (all), got {top_p!r}")
    if t != 1:
        t = min(max(validation.positive(op, "temperature", temperature), TEMPERATURES[0]), TEMPERATURES[1])
    scale_index = _whole(op, "scale_index", scale_index, MAX_WORD)
    if isinstance(seed, Tensor):
        validation.tensor(op, "seed", seed, "", sizes, like=cond, dtypes=(torch.int64,))
    else:
        seed = image_index.new_full((), _whole(op, "seed", seed, MAX_SEED))  # a GPU's kernel writes it: nothing waits
    check_name(backend)
    uncond, k = uncond if c else None, min(k, sizes["V"])
    per_image = _per_image(tensors, (c, k, p, t), sizes, cond.device) if tensors else None
    return Sampling(cond, uncond, image_index, float(c), k, float(p), seed, scale_index, float(t), per_image)


def _per_image(
    tensors: dict[str, Tensor], numbers: tuple[float, ...], sizes: dict[str, int], device: torch.device
) -> Tensor:
    """The parameters of each image, in range: the tensors, and numbers where there is none."""
    V, (coldest, hottest) = sizes["V"], TEMPERATURES
    # Least and largest value, and what counts in place of one that is below.
    ranges = ((0, MAX_GUIDANCE, 0), (1, V, V), (0, 1, 0), (coldest, hottest, coldest))
    columns = []
    for name, number, (least, most, below) in zip(NEUTRAL, numbers, ranges, strict=True):
        values = torch.full((sizes["B"],), number, dtype=torch.float64, device=device)
        values = tensors.get(name, values).to(torch.float64)
        columns.append(torch.where(values >= least, values, below).clamp(max=most))
    return torch.stack(columns, -1)


def _whole(op: str, name: str, value: object, most: int, least: int = 0) -> int:
    known = validation.integer(value)
    if known is None or not least <= known <= most:
        raise ValueError(f"{op}: {name}: expected an integer from {least} to {most}, got {value!r}")
    return known


def _fake(call: Sampling) -> tuple[Tensor]:
    n, (B, positions, _) = call.num_samples, call.cond.shape
    return (call.cond.new_empty((B, positions) if n == 1 else (B, positions, n), dtype=torch.int64),)


def _soft_fake(call: SoftSampling) -> tuple[Tensor]:
    return (call.codebook.new_empty(*call.cond.shape[:2], call.codebook.shape[1]),)


_sample_tokens = RegisteredOp(_SAMPLE, Sampling, _fake, outputs=1, differentiable=False)
_soft_embedding = RegisteredOp(
    _SOFT, SoftSampling, _soft_fake, outputs=1, differentiable=False, reference_gradients=True
)
