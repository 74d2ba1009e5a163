"""Creates small image folders."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    """Write `counts[name]` distinct PNG images of noise, of size (width, height), per class. Returns the folder."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder
