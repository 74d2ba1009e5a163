"""Tests of batch order, `tensor_source` and `ImageFolder` for any number of ranks, workers and start batch."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvar.data import Batch, ImageFolder, Source, UnreadableImages, num_batches, tensor_source
from mvar.data import folder as folder_module
from mvar.data.order import Purpose, below, in_order, shuffled, words
from tests.helpers.images import write_images

ONE = {"rank": 0, "world_size": 1, "start": 0}


def items(count: int, **options: int) -> list[list[int]]:
    return [rows.tolist() for rows in shuffled(count, **({"seed": 0, "epoch": 0} | ONE | options))]


def joined(parts: list[Iterator[Batch]]) -> list[Batch]:
    """The batches of all ranks, one after another."""
    batches = []
    for ranks in zip(*parts, strict=True):
        fields = zip(*ranks, strict=True)
        batches.append(Batch(*(None if f[0] is None else torch.cat(f) for f in fields)))
    return batches


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            assert x is y is None or torch.equal(x, y)


# Order


def test_epoch_contains_every_item_and_is_padded_from_its_start() -> None:
    rows = sum(items(10, batch=4), [])
    assert sorted(rows[:10]) == list(range(10)) and rows[10:] == rows[:2]
    assert num_batches(10, 4) == 3 and num_batches(12, 4) == 3 and num_batches(12, 2, world_size=3) == 2
    assert len(items(3, batch=8)[0]) == 8  # fewer items than the batch size


def test_order_with_ranks_and_start() -> None:
    expected = items(50, batch=6)
    parts = [items(50, batch=2, rank=r, world_size=3) for r in range(3)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == expected
    assert items(50, batch=6, start=4) == expected[4:] and items(50, batch=6, start=9) == []


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [items(50, batch=50, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_order_is_fixed() -> None:
    """The order is independent of the NumPy version, so that a resumed run continues with the same items."""
    assert words(2, Purpose.CROP, seed=1, epoch=2, item=3).tolist() == [11495521497382154385, 7794970853663849782]
    assert items(8, batch=8) == [[0, 2, 1, 5, 4, 3, 6, 7]]
    purposes = {"ORDER": 0, "CROP": 1, "REPLACEMENT": 2, "CROP_OF_STORE": 3}
    assert {name: int(purpose) for name, purpose in Purpose.__members__.items()} == purposes


def test_words_are_uniform() -> None:
    drawn = [below(w, 6) for w in words(6000, Purpose.CROP).tolist()]
    counts = np.bincount(drawn, minlength=6)
    assert len(counts) == 6 and abs(counts - 1000).max() < 5 * 1000**0.5  # five standard deviations
    assert below(0, 6) == 0 and below(2**64 - 1, 6) == 5


def test_validation_order_contains_every_item_once() -> None:
    parts = [[rows.tolist() for rows in in_order(10, batch=2, rank=r, world_size=3)] for r in range(3)]
    assert parts == [[[0, 1], [6, 7]], [[2, 3], [8]], [[4, 5], [9]]]
    assert [[r.tolist() for r in in_order(4, batch=1, rank=r, world_size=3)][1] for r in range(3)] == [[3], [], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": 1, "rank": 2, "world_size": 2}, "rank: expected from 0 to below world_size=2, got 2"),
        ({"batch": 1, "seed": -1}, "seed: expected a whole number from 0 to 2⁶³−1, got -1"),
        ({"batch": 1, "start": -1}, "start: expected"),
    ],
)
def test_invalid_order_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        items(5, **options)
    with pytest.raises(ValueError, match="has no items"):
        items(0, batch=1)


# Tensors


def test_tensor_source() -> None:
    labels = torch.tensor([3, 1, 0, 1])
    tokens = torch.arange(8).view(4, 2)
    source: Source = tensor_source(tokens, labels)
    assert source.num_classes == 4 and len(source) == 4
    batch = next(source.batches(batch=4, seed=0, epoch=0))
    assert batch.images is None and batch.tokens is not None
    assert torch.equal(batch.labels, labels[batch.tokens[:, 0] // 2])
    images = tensor_source(torch.rand(4, 3, 8, 8), labels, num_classes=7)
    last = list(images.once(batch=3))[-1]
    assert images.num_classes == 7 and last.tokens is None and last.images is not None and last.images.shape[0] == 1


def test_tensor_source_with_invalid_tensors() -> None:
    with pytest.raises(ValueError, match=r"data: expected .* got torch.int32 \(2, 3\)"):
        tensor_source(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels: expected int64 \(2,\)"):
        tensor_source(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))


# Images in folders


@pytest.fixture
def small(tmp_path: Path) -> ImageFolder:
    return ImageFolder(write_images(tmp_path / "train", {"b": 7, "a": 4}), 8, flip=True)


def test_classes_and_images_are_sorted_by_name(small: ImageFolder, tmp_path: Path) -> None:
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "more").mkdir()
    (tmp_path / "train" / "a" / "000.png").rename(tmp_path / "train" / "a" / "more" / "000.PNG")
    folder = ImageFolder(tmp_path / "train", 8)
    assert folder.classes == ("a", "b") and folder.num_classes == 2 and len(folder) == 11
    assert [folder.name(i) for i in (0, 3, 4)] == ["a/001.png", "a/more/000.PNG", "b/000.png"]
    assert torch.cat([b.labels for b in folder.once(batch=4)]).tolist() == [0] * 4 + [1] * 7
    assert folder.digest() != small.digest()


def test_validation_uses_classes_of_training(small: ImageFolder, tmp_path: Path) -> None:
    val = write_images(tmp_path / "val", {"b": 2})
    assert next(ImageFolder(val, 8, classes=small.classes).once(batch=2)).labels.tolist() == [1, 1]
    write_images(val, {"c": 1})
    with pytest.raises(ValueError, match="classes that are not in training, the first is c"):
        ImageFolder(val, 8, classes=small.classes)


def test_invalid_image_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "train", 8)
    with pytest.raises(ValueError, match="expected one folder per class, got none"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images of class empty"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(
        ValueError, match="no images in any class"
    ):  # raised at construction instead of after the last epoch
        ImageFolder(tmp_path, 8, classes=["empty"])
    with pytest.raises(ValueError, match="mid_resolution: expected from 1"):
        ImageFolder(tmp_path, 8, mid_resolution=0.5)


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (27, 27)])
def test_resize_and_crop_match_pillow(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_images(tmp_path / "train", {"a": 1}, size)
    folder = ImageFolder(path, 16)  # the shorter side becomes 18
    longer = 18 * max(size) // min(size)
    expected_size = (longer, 18) if size[0] > size[1] else (18, longer)
    resized = Image.open(path / folder.name(0)).resize(expected_size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 * 2 - 1
    height, width = pixels.shape[1:]
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    assert torch.equal(center(folder)[0], pixels[:, top : top + 16, left : left + 16])

    windows = pixels.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4)
    positions = {position_of(crop, windows) for crop in crops(folder, range(80))}
    assert (
        len(positions) > 5
        and {p[0] for p in positions} >= {0, height - 16}
        and {p[1] for p in positions} >= {0, width - 16}
    )


def center(folder: ImageFolder) -> Tensor:
    images = next(folder.once(batch=1)).images
    assert images is not None
    return images


def crops(folder: ImageFolder, epochs: range, seed: int = 0) -> Tensor:
    """Return the first image of the first batch of each epoch."""
    images = [next(folder.batches(batch=1, seed=seed, epoch=epoch)).images for epoch in epochs]
    return torch.cat([i for i in images if i is not None])


def position_of(crop: Tensor, windows: Tensor) -> tuple[int, int]:
    """Return the position of the crop in windows of shape (rows, columns, 3, R, R)."""
    found = (windows == crop).all(-1).all(-1).all(-1).nonzero()
    assert len(found) == 1
    return int(found[0, 0]), int(found[0, 1])


def test_random_horizontal_flip(tmp_path: Path) -> None:
    path = write_images(tmp_path / "train", {"a": 1}, (16, 16))
    plain = center(ImageFolder(path, 16, mid_resolution=1))[0]
    flipped = [
        torch.equal(c, plain.flip(-1)) for c in crops(ImageFolder(path, 16, mid_resolution=1, flip=True), range(64))
    ]
    assert 12 <= sum(flipped) <= 52  # five standard deviations
    assert all(torch.equal(c, plain) for c in crops(ImageFolder(path, 16, mid_resolution=1), range(64)))
    assert torch.equal(center(ImageFolder(path, 16, mid_resolution=1, flip=True))[0], plain)


def test_pixel_range_and_grayscale_conversion(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1)).save(tmp_path / "a" / "0.png")
    image = center(ImageFolder(tmp_path, 8, mid_resolution=1))[0]
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8)
    assert (image[:, :, :4] == -1).all() and (image[:, :, 4:] == 1).all()


def test_16_bit_images(tmp_path: Path) -> None:
    """16-bit gray is reduced to 8 bits; of 32-bit pixels the range is not known."""
    (tmp_path / "a").mkdir()
    Image.fromarray(np.tile(np.array([0, 257 * 100, 65535, 257 * 7], np.uint16), (4, 1))).save(tmp_path / "a" / "0.png")
    image = center(ImageFolder(tmp_path, 4, mid_resolution=1))[0]
    assert torch.equal(image[0, 0], torch.tensor([0.0, 100, 255, 7]) / 255 * 2 - 1)
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a" / "1.tiff")
    with pytest.raises(UnreadableImages, match="1.tiff: expected 8 or 16 bits per channel, got pixels of mode F"):
        list(ImageFolder(tmp_path, 4, mid_resolution=1).once(batch=2))


def test_batches_do_not_depend_on_ranks_workers_and_start(small: ImageFolder) -> None:
    run = {"seed": 5, "epoch": 3}
    before = torch.get_rng_state()
    expected = list(small.batches(batch=4, **run))
    assert_same(expected, joined([small.batches(batch=2, rank=r, world_size=2, **run) for r in range(2)]))
    assert_same(expected, list(small.batches(batch=4, workers=2, **run)))
    assert_same(expected[2:], list(small.batches(batch=4, workers=1, start=2, **run)))
    assert_same(
        list(small.once(batch=4)), joined([small.once(batch=2, rank=r, world_size=2, workers=r) for r in range(2)])
    )
    assert torch.equal(before, torch.get_rng_state())  # the RNG state of training is unchanged
    assert all(a.images is not None for a in expected)
    others = [list(small.batches(batch=4, **(run | change))) for change in ({"seed": 6}, {"epoch": 4})]
    assert not any(torch.equal(a.images, expected[0].images) for a in (others[0][0], others[1][0]))


# Unreadable images


def spoil(folder: ImageFolder, item: int) -> str:
    """Truncate the file of an item and return its name."""
    path = folder.path / folder.name(item)
    path.write_bytes(path.read_bytes()[:100])
    return folder.name(item)


@pytest.fixture
def folder_of_200(tmp_path: Path) -> ImageFolder:
    return ImageFolder(write_images(tmp_path / "train", {"a": 100, "b": 100}), 8)


def test_corrupt_image_is_logged_counted_and_replaced(
    folder_of_200: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of_200
    run = {"batch": 50, "seed": 0, "epoch": 0}
    before = list(folder.batches(**run))
    names = {spoil(folder, 7), spoil(folder, 130)}  # exactly 1 %
    with caplog.at_level(logging.WARNING, "mvar"):
        after = list(folder.batches(**run))
    assert set(folder.unreadable) == names and all("truncated" in reason for reason in folder.unreadable.values())
    assert all(any(name in message for message in caplog.messages) for name in names) and len(caplog.messages) == 2

    rows = torch.from_numpy(np.concatenate(list(shuffled(200, **(ONE | run)))))
    changed = torch.cat([(a.images != b.images).flatten(1).any(1) for a, b in zip(before, after, strict=True)])
    assert set(rows[changed].tolist()) == {7, 130}
    for row, item in zip(changed.nonzero().flatten().tolist(), rows[changed].tolist(), strict=True):
        replacement = next(i for i in folder_module.candidates(item, 200) if i not in (7, 130))
        replacement_row = int((rows == replacement).nonzero()[0])  # the replacement's own row: same pixels and class
        images, labels = (torch.cat([getattr(b, n) for b in after]) for n in ("images", "labels"))
        assert torch.equal(images[row], images[replacement_row]) and labels[row] == labels[replacement_row]

    again = ImageFolder(folder.path, 8)  # counts are collected from worker processes
    assert_same(after, list(again.batches(workers=2, **run)))
    assert again.unreadable == folder.unreadable


def test_workers_ignore_sigterm_and_sigint(small: ImageFolder) -> None:
    # Ctrl-C and SIGTERM reach the whole process group; the main process needs its workers to save before it exits.
    run = {"batch": 1, "seed": 0, "epoch": 0}
    expected = list(small.batches(**run))
    batches = small.batches(workers=1, **run)
    read = [next(batches)]
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(reader.pid, number)
    assert_same(expected, read + list(batches))


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_percent_unreadable_images_raise(folder_of_200: ImageFolder, workers: int) -> None:
    names = [spoil(folder_of_200, item) for item in (3, 90, 150)]
    with pytest.raises(UnreadableImages, match="3 of the first 160 images cannot be read") as error:
        list(folder_of_200.once(batch=40, workers=workers))
    assert all(name in str(error.value) for name in names)


def test_unreadable_share_is_of_images_read_so_far(folder_of_200: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MIN_DENOMINATOR", 50)
    spoil(folder_of_200, 120)
    # One of 160 is accepted, and none of the first 40 is unreadable.
    assert len(list(folder_of_200.once(batch=40))) == 5
    spoil(folder_of_200, 10)
    with pytest.raises(UnreadableImages, match="1 of the first 40 images cannot be read"):
        list(folder_of_200.once(batch=40))


def test_replacement_search_is_bounded(folder_of_200: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_TRIES", 1)
    spoil(folder_of_200, 0)
    with pytest.raises(UnreadableImages, match="1 of the first 10 images"):
        next(folder_of_200.once(batch=10))


def test_folder_without_readable_images_raises(small: ImageFolder) -> None:
    for item in range(len(small)):
        spoil(small, item)
    with pytest.raises(UnreadableImages, match="cannot be read"):
        next(small.batches(batch=2, seed=0, epoch=0, workers=1))
