"""The cost of a backend or a dtype in quality: `python -m benchmarks.bench_quality`.

Generates with the same seeds by the reference backend in float32 and by every backend and dtype that is available here:
the share of equal tokens, the error of logits and pixels, and the Fréchet distances of the sets to one another and to
real images, with a bootstrap interval. One token that differs changes all that come after it, so two sets of equal
seeds may differ in every image and yet be equally good; another seed of the reference shows how far apart two equally
good sets are.

Without weights: the digits model of the package, with features of a classifier that is first trained on real digits.
That is no FID. With weights, Inception's and ADM's reference npz: FID.
"""

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import mvar
from benchmarks.analysis import frechet
from benchmarks.analysis.frechet import BATCH, FeatureSpace
from benchmarks.common.environment import DEVICE, argument_parser
from benchmarks.common.results import save
from mvar import digits
from mvar.inference.prepare import prepared_model, prepared_tokenizer
from mvar.models.tokenizer import Tokenizer
from mvar.utils.files import expanded
from mvar.utils.images import to_bytes
from mvar_kernels.dispatch import BackendError, backends

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


class Samples(NamedTuple):
    """tokens (n, L); pixels (n, H, W, 3) uint8."""

    tokens: Tensor
    pixels: Tensor


def generated(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, sampling: dict[str, Any], **options: Any
) -> Samples:
    tokens, pixels = [], []
    for start in range(0, len(labels), BATCH):
        rows = labels[start : start + BATCH]
        out = mvar.generate(model, tokenizer, rows, first_index=start, **sampling, **options)
        tokens.append(out.tokens.cpu())
        pixels.append(to_bytes(out.images).cpu())
    return Samples(torch.cat(tokens), torch.cat(pixels))


@torch.no_grad()
def teacher_forced(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, tokens: Tensor, backend: str, dtype: torch.dtype
) -> Tensor:
    """(B, L, V) float32 logits under teacher forcing."""
    inputs = tokenizer.teacher_forcing_inputs(tokens.to(DEVICE))
    return prepared_model(model, dtype)(labels.to(DEVICE), inputs, backend=backend).cpu()


@torch.no_grad()
def decoded(tokenizer: Tokenizer, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return prepared_tokenizer(tokenizer, dtype).decode(tokens.to(DEVICE)).float().cpu()


def psnr_db(a: Tensor, b: Tensor, span: float) -> float | None:
    """Of all pixels together; None where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return 10 * float(np.log10(span**2 / error)) if error else None


def backends_and_dtypes() -> Iterator[tuple[str, torch.dtype]]:
    """Those of this machine; the first is the one that all others are compared with."""
    available = [name for name, reason in backends().items() if reason is None and name != "reference"]
    yield from product(["reference", *available], DTYPES[DEVICE.type])


def measure(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, sampling: dict[str, Any], space: FeatureSpace, seed: int
) -> list[dict[str, Any]]:
    def generate(backend: str, dtype: torch.dtype, seed: int) -> Samples:
        return generated(model, tokenizer, labels, sampling, seed=seed, backend=backend, dtype=dtype)

    reference = generate("reference", torch.float32, seed)
    features = space.features(reference.pixels)
    forced = labels[:BATCH], reference.tokens[:BATCH]
    logits = teacher_forced(model, tokenizer, *forced, "reference", torch.float32)
    spread = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
    images = decoded(tokenizer, forced[1], torch.float32)
    rows: list[dict[str, Any]] = []
    for backend, dtype in backends_and_dtypes():
        start = time.perf_counter()
        name = {"backend": backend, "dtype": str(dtype)[6:], "seed": seed}
        try:
            samples = generate(backend, dtype, seed)
            error = teacher_forced(model, tokenizer, *forced, backend, dtype) - logits
        except BackendError as unsupported:
            rows.append(name | {"objection": str(unsupported)})
            continue
        equal = (samples.tokens == reference.tokens).float()
        row = name | {
            "equal_tokens": float(equal.mean()),
            "equal_tokens_by_scale": [float(part.mean()) for part in equal.split(model.config.scales, 1)],
            "logit_error_rms": float(error.square().mean().sqrt() / spread),
            "logit_error_max": float(error.abs().max() / spread),
            "psnr_db": psnr_db(samples.pixels, reference.pixels, 255),
            "psnr_of_same_tokens_db": psnr_db(decoded(tokenizer, forced[1], dtype), images, 2),
        }
        rows.append(row | frechet.compare(space, space.features(samples.pixels), features, labels))
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    other = generate("reference", torch.float32, seed + 1)
    name = {"backend": "reference", "dtype": "float32", "seed": seed + 1}
    rows.append(name | frechet.compare(space, space.features(other.pixels), features, labels))
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--weights")
    parser.add_argument("--tokenizer")
    parser.add_argument("--inception", type=expanded)
    parser.add_argument("--reference", type=expanded)
    parser.add_argument("--count", type=int, default=100, help="images per class (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.weights is None:
        model, tokenizer = digits.pretrained()
    else:
        model, tokenizer = mvar.load_model(options.weights), mvar.load_tokenizer(options.tokenizer)
    model.to(DEVICE), tokenizer.to(DEVICE)
    if options.weights is None:
        space, sampling = frechet.digit_features(), dict[str, Any](digits.SAMPLING)
    else:
        space = frechet.inception_features(options.inception, options.reference)
        sampling = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    labels = torch.arange(options.count * model.config.num_classes) % model.config.num_classes
    rows = measure(model, tokenizer, labels, sampling, space, options.seed)
    setup = {"model": options.weights or "digits", "images": len(labels), "drawing": sampling, "judge": space.name}
    name = Path(options.weights).stem if options.weights else "digits"
    print(save(f"parity_{name}", setup | {"sides": rows}))


if __name__ == "__main__":
    main()
