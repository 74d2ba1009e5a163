"""Tests of listing image folders: symbolic links, system files, read errors and images with extreme aspect ratios."""

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvar.data import ImageFolder, UnreadableImages
from mvar.data import crops as crops_module
from mvar.data import folder as folder_module
from mvar.data.crops import center_crop, read_image
from mvar.data.listing import images_by_class
from tests.helpers.images import write_images


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_images(tmp_path / "train", {"a": 2, "b": 1}, (8, 8))


def test_cyclic_links_are_skipped(train: Path, tmp_path: Path) -> None:
    (train / "a" / "deep").mkdir()
    (train / "a" / "000.png").rename(train / "a" / "deep" / "000.png")
    for link, target in {
        "a/self": ".",
        "a/up": "../..",
        "a/deep/top": "../../a",
        "a/copy": "deep",
        "loop": ".",
        "above": "..",
        "a/lost.png": "nowhere",
        "a/ring.png": "ring.png",
        "b/ring": "ring",
    }.items():
        (train / link).symlink_to(target)
    images, skipped = images_by_class(train)
    assert images["a"] == ["a/001.png", "a/lost.png", "a/ring.png", "a/deep/000.png"]
    assert images["b"] == ["b/000.png"] and set(images) == {"a", "b"}
    assert sorted(skipped) == ["a/copy", "a/deep/top", "a/self", "a/up", "above", "loop"]


def test_external_links_are_followed(train: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (train / "b" / "000.png").rename(tmp_path / "disk" / "0.png")
    (tmp_path / "disk" / "back").symlink_to(train / "b")
    (tmp_path / "disk" / "again").symlink_to(".")
    for link, target in {"b/one": tmp_path / "disk", "b/two": tmp_path / "disk", "c": train / "a"}.items():
        (train / link).symlink_to(target)
    (train / "b" / "x.png").symlink_to(tmp_path / "disk" / "0.png")
    images, skipped = images_by_class(train)
    assert images["b"] == ["b/x.png", "b/two/0.png"] or images["b"] == ["b/x.png", "b/one/0.png"]
    assert images["c"] == ["c/000.png", "c/001.png"]
    assert len(skipped) == 3


def test_system_files_are_skipped_and_reported(train: Path) -> None:
    folder = ImageFolder(train, 8)
    digest = folder.digest()
    assert folder.skipped == ()
    system_files = [
        "._a",
        ".DS_Store",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/x.png",
        "a/._000.png",
        "a/Thumbs.db",
        "a/.git/x.png",
    ]
    for name in (*system_files, "a/@eaDir/x.png", "a/notes.txt"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"")
    os.mkfifo(train / "b" / "pipe.png")
    folder = ImageFolder(train, 8)
    assert folder.classes == ("a", "b") and folder.digest() == digest
    expected = {name.removesuffix("/x.png") for name in (*system_files, "a/@eaDir")} | {"b/pipe.png"}
    assert set(folder.skipped) == expected and len(folder.skipped) == len(expected)
    assert ImageFolder(train, 8, classes=["a", "b"]).skipped == folder.skipped


def test_unreadable_folder_raises(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def raise_error(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", raise_error)
    with pytest.raises(PermissionError, match="Permission denied"):
        ImageFolder(train, 8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.EACCES])
def test_environmental_errors_are_raised(
    train: Path, monkeypatch: pytest.MonkeyPatch, number: int, workers: int
) -> None:
    def raise_error(path: Path, side: int) -> object:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(folder_module, "read_image", raise_error)
    folder = ImageFolder(train, 8)
    with pytest.raises(OSError) as raised:
        next(folder.once(batch=2, workers=workers))
    assert raised.value.errno == number and str(raised.value.filename).endswith("a/000.png")
    assert not folder.unreadable


def test_dangling_link_is_an_unreadable_image(train: Path) -> None:
    for name in ("lost", "ring"):
        (train / "a" / f"{name}.png").symlink_to("ring.png")
    with pytest.raises(UnreadableImages, match="2 of the first 5 images cannot be read"):
        next(ImageFolder(train, 8).once(batch=5))


# Extreme aspect ratios


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 1), (3, 9000)])
def test_thin_image_resize_is_bounded(tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resized_sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def record_resize(self: Image.Image, size: tuple[int, int], *arguments: object) -> Image.Image:
        resized_sizes.append(size)
        return resize(self, size, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", record_resize)
    (tmp_path / "a").mkdir()
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "a" / "0.png")
    folder = ImageFolder(tmp_path, 256)
    for batch in (next(folder.once(batch=1)), next(folder.batches(batch=1, seed=0, epoch=0))):
        assert batch.images is not None
        expected = torch.tensor([10.0, 20, 30]).div(255).mul(2).sub(1).view(1, 3, 1, 1)
        assert torch.equal(batch.images, expected.expand(1, 3, 256, 256))
    assert all(width * height <= crops_module.MAX_RESIZED_PIXELS for width, height in resized_sizes)


@pytest.mark.parametrize("size", [(40, 30), (12, 90), (90, 12)])
def test_direct_crops_match_resized_image(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crops are bitwise equal to Pillow's below the pixel limit and equal up to rounding above it.

    The rounding error is half a level after the first pass, times the weights of the second pass (absolute sum below
    1.7), plus half a level at the end: below 1.35 each, and so at most 2 between two. No pixel is clipped.
    """
    pixels = np.random.default_rng(0).integers(100, 156, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    full = read_image(tmp_path / "0.png", 18)
    resized = Image.fromarray(pixels).resize(full.size, Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(full.source), np.asarray(resized))
    monkeypatch.setattr(crops_module, "MAX_RESIZED_PIXELS", 0)
    cropped = read_image(tmp_path / "0.png", 18)
    assert cropped.source.size == size and cropped.size == full.size
    right, bottom = full.size[0] - 16, full.size[1] - 16
    for system_files, top in ((0, 0), (right, bottom), (right // 2, bottom // 3)):
        a, b = (np.asarray(image.crop(system_files, top, 16)).astype(int) for image in (full, cropped))
        assert a.shape == b.shape == (16, 16, 3) and np.abs(a - b).max() <= 2
    assert (center_crop(full, 16) - center_crop(cropped, 16)).abs().max() <= 4.001 / 255


def test_oversized_header_is_an_unreadable_image(train: Path) -> None:
    path = train / "a" / "000.png"
    content = bytearray(path.read_bytes())
    content[16:24] = (60000).to_bytes(4, "big") * 2  # width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    folder = ImageFolder(train, 8)
    with pytest.raises(UnreadableImages, match="3600000000 pixels"):
        next(folder.once(batch=3))
