"""The quality of edits: `python -m benchmarks.bench_editing`.

Held-out digits with the digits model of the package. In-painting: the right half is generated anew, given the digit's
class, another class or none. It is blank in the images that are edited, except where the method says that it is
visible. Variations: the coarsest scales are kept, and all finer tokens are sampled for the class or another one.

agreement: share of results that a support-vector classifier of real digits assigns to the class that was asked for, or
without one to the class of the digit. seam: mean absolute difference of the two columns of pixels on both sides of the
mask's edge, that of the real digits being the value to reach. Baseline: an image generated for the class, and the
unmasked half pasted over it.
"""

from typing import Any

import torch
from torch import Tensor

import mvar
from benchmarks.common.environment import DEVICE, argument_parser
from benchmarks.common.results import save
from mvar import digits

METHODS: dict[str, dict[str, Any]] = {
    "`edit`, `fill=True`": {"fill": True},
    "`edit`": {},
    "`edit`, the masked half visible": {},
    "`edit`, `fill=True, reencode=False`": {"fill": True, "reencode": False},
}
PASTE = "generate and paste"


def measure(count: int, seed: int) -> dict[str, Any]:
    model, tokenizer = digits.pretrained()
    model, tokenizer = model.to(DEVICE), tokenizer.to(DEVICE)
    _, held_out = digits.load()
    index = torch.arange(count, dtype=torch.int64) % len(held_out.labels)
    real, own = (held_out.images[index] + 1) / 2, held_out.labels[index]
    offsets = torch.randint(1, digits.NUM_CLASSES, own.shape, generator=torch.Generator().manual_seed(seed))
    other = (own + offsets) % digits.NUM_CLASSES
    side = real.shape[-1]
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:, side // 2 :] = True
    blank = torch.where(mask, 0.0, real)
    options: dict[str, Any] = {"seed": seed, "dtype": torch.float32}

    def edited(source: Tensor, mask: Tensor | None, labels: Tensor | None, **how: Any) -> Tensor:
        return mvar.edit(model, tokenizer, source, mask, labels, **how, **options).images.cpu()

    inpainting: dict[str, dict[str, Any]] = {}
    for asked, labels in (("the digit's class", own), ("another class", other), ("no class", None)):
        results = {
            name: edited(real if "visible" in name else blank, mask, labels, **how) for name, how in METHODS.items()
        }
        if labels is not None:
            results[PASTE] = torch.where(mask, mvar.generate(model, tokenizer, labels, **options).images.cpu(), real)
        inpainting[asked] = {name: row(images, own if labels is None else labels) for name, images in results.items()}
        print(asked, inpainting[asked], flush=True)
    variations = []
    for k in range(len(model.config.scales)):
        kept = {
            name: digits.agreement(edited(real, None, labels, keep_scales=k) * 2 - 1, labels)
            for name, labels in (("the digit's class", own), ("another class", other))
        }
        variations.append({"keep_scales": k, **kept})
    return {
        "model": "digits",
        "images": count,
        "options": "cfg=1.5, top_k=900, top_p=0.96, float32",
        "real": row(real, own),
        "inpainting": inpainting,
        "variations": variations,
    }


def row(images: Tensor, labels: Tensor) -> dict[str, float]:
    return {"agreement": digits.agreement(images * 2 - 1, labels), "seam": seam(images)}


def seam(images: Tensor) -> float:
    middle = images.shape[-1] // 2
    return float((images[..., middle] - images[..., middle - 1]).abs().mean())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=500, help="images (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(save("editing_digits", measure(options.count, options.seed)))


if __name__ == "__main__":
    main()
