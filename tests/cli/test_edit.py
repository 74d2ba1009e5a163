"""Tests of `mvar edit`: masks from files, boxes and margins, images of any format and size, and its output."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar import digits
from mvar.cli.main import main
from mvar.utils import canvas
from tests.cli.test_cli import fails


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right and green to the bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def digit(path: Path) -> Path:
    pixels = ((digits.load()[1].images[0] + 1) * 127.5).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB")))


@pytest.mark.slow
def test_results_and_strip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Result i is that of `mvar.edit` with index i, in any batch; the strip shows image, mask and results."""
    source, out = digit(tmp_path / "in.png"), tmp_path / "out"
    command = ["edit", "--image", str(source), "--box", "16,0,32,32", "--class", "7", "--count", "3", "--dtype", "fp32"]
    main([*command, "--out", str(out), "--batch", "2", "--seed", "4"])
    assert "32 × 32 pixels\n" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [*(f"00000{i}_0007.png" for i in range(3)), "strip.png"]
    image = read(source)
    results = [read(out / f"00000{i}_0007.png") for i in range(3)]
    for result in results:
        assert torch.equal(result[:, :16], image[:, :16]) and not torch.equal(result, image)
    strip = read(out / "strip.png")
    tiles = [strip[2:34, 2 + 34 * i : 34 + 34 * i] for i in range(5)]
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, 16:] = True
    assert strip.shape[1] == 5 * 34 + 2 and torch.equal(tiles[0], image)
    assert torch.equal(tiles[1], mask[..., None].expand(-1, -1, 3) * torch.tensor(255, dtype=torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(tiles[2:], results, strict=True))
    pixels = image.permute(2, 0, 1).float() / 255
    right = mvar.edit(
        *digits.pretrained(), pixels[None], mask, 7, first_index=2, seed=4, fill=True, dtype=torch.float32
    )
    assert torch.equal((right.images[0] * 255 + 0.5).byte().permute(1, 2, 0), results[2])

    with pytest.raises(SystemExit):
        main([*command, "--out", str(out)])
    assert "has 3 images of an earlier run" in capsys.readouterr().err
    main([*command[:-4], "--count", "1", "--out", str(out), "--overwrite"])
    assert len(list(out.iterdir())) == 2


@pytest.mark.slow
def test_ways_to_mask(tmp_path: Path) -> None:
    """A mask file equals the box, margins keep the image, and kept scales alone make variations."""
    source = digit(tmp_path / "in.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")

    def edited(*arguments: str) -> torch.Tensor:
        out = tmp_path / "out"
        main(["edit", "--image", str(source), "--out", str(out), "--overwrite", "--dtype", "fp32", *arguments])
        return read(next(out.glob("0*.png")))

    strokes = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (16, 0, 32, 32))
    strokes.save(tmp_path / "strokes.png")
    box = edited("--box", "16,0,32,32")
    for name in ("mask.png", "strokes.png"):
        assert torch.equal(box, edited("--mask", str(tmp_path / name)))
    assert not torch.equal(box, edited("--box", "16,0,32,32", "--smooth"))
    assert not torch.equal(box, edited("--box", "16,0,32,32", "--no-reencode"))
    assert not torch.equal(box[:, :16], edited("--box", "16,0,32,32", "--no-blend")[:, :16])
    margins = edited("--outpaint", "32,32,0,0", "--class", "3")
    image = Image.open(source).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)
    # Away from the edge, beyond which Lanczos takes three pixels of the result from the margin.
    assert (margins[19:, 19:].int() - torch.from_numpy(np.array(image))[3:, 3:].int()).abs().max() <= 1
    kept = ["--outpaint", "32,32,0,0", "--class", "3", "--keep-scales", "1"]
    assert torch.equal(edited(*kept), edited(*kept, "--fill")) and not torch.equal(
        edited(*kept), edited(*kept, "--no-fill")
    )
    variations = [edited("--keep-scales", str(k), "--class", "3") for k in (1, 4)]
    assert not torch.equal(*variations)


@pytest.mark.parametrize(
    ("size", "resolution", "steps", "corner"),
    [
        ((64, 64), 64, "64 × 64 pixels", (0, 0)),
        ((640, 480), 64, "640 × 480 pixels, scaled to 85 × 64, cropped to the center 64 × 64", (30, 0)),
        ((48, 200), 64, "48 × 200 pixels, scaled to 64 × 266, cropped to the center 64 × 64", (0, 96)),
        ((3, 2000), 32, "3 × 2000 pixels, scaled to 32 × 21333, cropped to the center 32 × 32", (0, 127)),
    ],
)
def test_fitted(size: tuple[int, int], resolution: int, steps: str, corner: tuple[int, int]) -> None:
    """The position of a pixel is kept, and a single masked pixel stays masked.

    corner: red and green of the top left pixel, from its position.
    """
    image = gradient(*size)
    pixels, mask, said = canvas.everywhere(image).fitted(resolution)
    assert said == steps and mask.all() and pixels.shape == (3, resolution, resolution)
    assert all(abs(float(pixels[c, 0, 0]) * 255 - corner[c]) < 4 + 300 / size[c] for c in range(2))
    left, top = (s // 2 for s in size)
    _, mask, _ = canvas.with_box(image, (left, top, left + 1, top + 1)).fitted(resolution)
    unit = resolution / min(size)
    assert 1 <= mask.sum() <= (unit + 2) ** 2
    middle = slice(resolution // 2 - 1, resolution // 2 + 2)
    assert mask[middle, middle].any()


@pytest.mark.parametrize(
    ("margins", "side", "kept"),
    [
        ((64, 64, 64, 64), 192, (11, 11, 21, 21)),
        ((16, 0, 16, 0), 96, (6, 6, 26, 26)),
        ((0, 32, 0, 0), 96, (6, 11, 26, 32)),
        ((200, 0, 0, 0), 264, (25, 13, 32, 19)),
    ],
)
def test_margins(margins: canvas.Box, side: int, kept: canvas.Box) -> None:
    """All margins are in the result, which is square, and none of them influences the pixels of the image.

    kept: the box of pixels of the result that show nothing but the image.
    """
    pixels, mask, said = canvas.with_margins(Image.new("RGB", (64, 64), "white"), margins).fitted(32)
    left, top, right, bottom = kept
    expected = torch.ones(32, 32, dtype=torch.bool)
    expected[top:bottom, left:right] = False
    assert torch.equal(mask, expected) and said == f"{side} × {side} pixels, scaled to 32 × 32"
    assert float(pixels.min()) == 1


def rotated(image: Image.Image, path: Path) -> None:
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)


def gray_16_bit(image: Image.Image, path: Path) -> None:
    gray = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(path)


READ: list[tuple[str, Callable[[Image.Image, Path], None], Callable[[Image.Image], Image.Image]]] = [
    ("rgb.webp", lambda image, path: image.save(path, lossless=True), lambda image: image),
    ("gray.png", lambda image, path: image.convert("L").save(path), lambda image: image.convert("L").convert("RGB")),
    ("gray16.png", gray_16_bit, lambda image: image.convert("L").convert("RGB")),
    ("palette.gif", lambda image, path: image.quantize(4).save(path), lambda image: image.quantize(4).convert("RGB")),
    ("rotated.jpg", rotated, lambda image: image),
    (
        "clear.png",
        lambda image, path: Image.new("RGBA", image.size, (9, 9, 9, 0)).save(path),
        lambda image: Image.new("RGB", image.size, "white"),
    ),
]


@pytest.mark.parametrize(("name", "write", "expected"), READ, ids=[name for name, _, _ in READ])
def test_formats(
    name: str,
    write: Callable[[Image.Image, Path], None],
    expected: Callable[[Image.Image], Image.Image],
    tmp_path: Path,
) -> None:
    image = gradient(30, 20)
    write(image, tmp_path / name)
    found = canvas.read(tmp_path / name)
    assert found.size == (30, 20) and found.mode == "RGB"
    difference = np.asarray(found).astype(int) - np.asarray(expected(image)).astype(int)
    assert np.abs(difference).max() <= (4 if name.endswith("jpg") else 0)


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.png").write_text("no image")
    source = tmp_path / "in.png"
    gradient(40, 30).save(source)
    (tmp_path / "cut.png").write_bytes(source.read_bytes()[:100])
    gradient(30, 30).save(tmp_path / "small.png")
    Image.new("L", (40, 30), 1).save(tmp_path / "black.png")
    Image.new("F", (40, 30), 0.5).save(tmp_path / "float.tiff")
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (["--image", str(tmp_path / "none.png"), "--keep-scales", "1"], "none.png"),
        (["--image", str(tmp_path / "no.png"), "--keep-scales", "1"], "no.png: not an image"),
        (["--image", str(tmp_path / "cut.png"), "--keep-scales", "1"], "cut.png: "),
        (["--image", str(source)], "nothing of the image would be kept"),
        (["--image", str(source), "--box", "0,0,41,9"], "expected x0,y0,x1,y1 with x0 < x1 ≤ 40"),
        (["--image", str(source), "--box", "5,5,5,9"], "expected x0,y0,x1,y1"),
        (["--image", str(source), "--box", "1,2,3"], "expected four whole numbers"),
        (["--image", str(source), "--box", "0,0,2,2"], "mask: nothing of it is in the center crop"),
        (["--image", str(source), "--outpaint", "0,0,0,0"], "margins: expected"),
        (["--image", str(source), "--outpaint=-1,2,0,0"], "margins: expected"),
        (["--image", str(source), "--outpaint", "90000,0,0,0"], "margins: expected a canvas of at most 8192 pixels"),
        (["--image", str(source), "--mask", str(tmp_path / "small.png")], "expected the size of the image, 40 × 30"),
        (["--image", str(source), "--mask", str(tmp_path / "black.png")], "black.png: expected white pixels"),
        (["--image", str(tmp_path / "float.tiff"), "--keep-scales", "1"], "expected 8 or 16 bits per channel"),
        (["--image", str(source), "--keep-scales", "9"], "keep_scales: expected a whole number from 0 to 4, got 9"),
        (["--image", str(source), "--keep-scales", "1", "--class", "1,2"], "--class: expected one class"),
        (["--image", str(source), "--keep-scales", "1", "--class", "cat"], "--class: unknown class 'cat'"),
        (["--image", str(source), "--keep-scales", "1", "--class", "10"], "--class: expected numbers from 0 to 9"),
        (["--image", str(source), "--keep-scales", "1", "--count", "0"], "--count: expected at least 1"),
    ):
        assert message in fails(capsys, "edit", *arguments, *out), arguments
