"""Sources of batches: the same items and pixels for any number of ranks and workers and from any start."""

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


def test_an_epoch_holds_every_item_and_is_filled_up_from_its_beginning() -> None:
    rows = sum(items(10, batch=4), [])
    assert sorted(rows[:10]) == list(range(10)) and rows[10:] == rows[:2]
    assert num_batches(10, 4) == 3 and num_batches(12, 4) == 3 and num_batches(12, 2, world_size=3) == 2
    assert len(items(3, batch=8)[0]) == 8  # fewer items than rows


def test_ranks_together_see_what_one_sees_and_a_start_skips() -> None:
    whole = items(50, batch=6)
    parts = [items(50, batch=2, rank=r, world_size=3) for r in range(3)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == whole
    assert items(50, batch=6, start=4) == whole[4:] and items(50, batch=6, start=9) == []


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [items(50, batch=50, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_is_the_same_on_every_machine() -> None:
    """A run that goes on under another NumPy must find the items where it left them."""
    assert words(2, Purpose.CROP, seed=1, epoch=2, item=3).tolist() == [11495521497382154385, 7794970853663849782]
    assert items(8, batch=8) == [[0, 2, 1, 5, 4, 3, 6, 7]]
    purposes = {"ORDER": 0, "CROP": 1, "REPLACEMENT": 2, "CROP_OF_STORE": 3}
    assert {name: int(purpose) for name, purpose in Purpose.__members__.items()} == purposes


def test_words_are_spread_evenly() -> None:
    drawn = [below(w, 6) for w in words(6000, Purpose.CROP).tolist()]
    counts = np.bincount(drawn, minlength=6)
    assert len(counts) == 6 and abs(counts - 1000).max() < 5 * 1000**0.5  # five standard deviations
    assert below(0, 6) == 0 and below(2**64 - 1, 6) == 5


def test_validation_has_every_item_once_in_as_many_batches_a_rank() -> None:
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
def test_order_says_what_is_wrong(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        items(5, **options)
    with pytest.raises(ValueError, match="has no items"):
        items(0, batch=1)


# Tensors


def test_tensors_are_a_source() -> None:
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


def test_tensors_that_do_not_fit() -> None:
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


def test_validation_takes_the_classes_of_training(small: ImageFolder, tmp_path: Path) -> None:
    val = write_images(tmp_path / "val", {"b": 2})
    assert next(ImageFolder(val, 8, classes=small.classes).once(batch=2)).labels.tolist() == [1, 1]
    write_images(val, {"c": 1})
    with pytest.raises(ValueError, match="classes that are not in training, the first is c"):
        ImageFolder(val, 8, classes=small.classes)


def test_what_is_no_folder_of_classes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "train", 8)
    with pytest.raises(ValueError, match="expected one folder per class, got none"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images of class empty"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match="no images in any class"):  # not after the last epoch
        ImageFolder(tmp_path, 8, classes=["empty"])
    with pytest.raises(ValueError, match="mid_resolution: expected from 1"):
        ImageFolder(tmp_path, 8, mid_resolution=0.5)


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (27, 27)])
def test_images_are_resized_and_cropped_as_pillow_does(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_images(tmp_path / "train", {"a": 1}, size)
    folder = ImageFolder(path, 16)  # the shorter side becomes 18
    longer = 18 * max(size) // min(size)
    expected_size = (longer, 18) if size[0] > size[1] else (18, longer)
    resized = Image.open(path / folder.name(0)).resize(expected_size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 * 2 - 1
    height, width = pixels.shape[1:]
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    assert torch.equal(middle(folder)[0], pixels[:, top : top + 16, left : left + 16])

    windows = pixels.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4)
    places = {place_of(crop, windows) for crop in crops(folder, range(80))}
    assert len(places) > 5 and {p[0] for p in places} >= {0, height - 16} and {p[1] for p in places} >= {0, width - 16}


def middle(folder: ImageFolder) -> Tensor:
    images = next(folder.once(batch=1)).images
    assert images is not None
    return images


def crops(folder: ImageFolder, epochs: range, seed: int = 0) -> Tensor:
    """The first batch's first image in these epochs."""
    images = [next(folder.batches(batch=1, seed=seed, epoch=epoch)).images for epoch in epochs]
    return torch.cat([i for i in images if i is not None])


def place_of(crop: Tensor, windows: Tensor) -> tuple[int, int]:
    """Where the crop lies; windows: (rows, columns, 3, R, R)."""
    found = (windows == crop).all(-1).all(-1).all(-1).nonzero()
    assert len(found) == 1
    return int(found[0, 0]), int(found[0, 1])


def test_half_of_all_images_are_flipped_where_asked_for(tmp_path: Path) -> None:
    path = write_images(tmp_path / "train", {"a": 1}, (16, 16))
    plain = middle(ImageFolder(path, 16, mid_resolution=1))[0]
    flipped = [
        torch.equal(c, plain.flip(-1)) for c in crops(ImageFolder(path, 16, mid_resolution=1, flip=True), range(64))
    ]
    assert 12 <= sum(flipped) <= 52  # five standard deviations
    assert all(torch.equal(c, plain) for c in crops(ImageFolder(path, 16, mid_resolution=1), range(64)))
    assert torch.equal(middle(ImageFolder(path, 16, mid_resolution=1, flip=True))[0], plain)


def test_pixels_span_minus_one_to_one_and_grey_becomes_rgb(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1)).save(tmp_path / "a" / "0.png")
    image = middle(ImageFolder(tmp_path, 8, mid_resolution=1))[0]
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8)
    assert (image[:, :, :4] == -1).all() and (image[:, :, 4:] == 1).all()


def test_batches_are_the_same_for_any_ranks_workers_and_start(small: ImageFolder) -> None:
    run = {"seed": 5, "epoch": 3}
    before = torch.get_rng_state()
    whole = list(small.batches(batch=4, **run))
    assert_same(whole, joined([small.batches(batch=2, rank=r, world_size=2, **run) for r in range(2)]))
    assert_same(whole, list(small.batches(batch=4, workers=2, **run)))
    assert_same(whole[2:], list(small.batches(batch=4, workers=1, start=2, **run)))
    assert_same(
        list(small.once(batch=4)), joined([small.once(batch=2, rank=r, world_size=2, workers=r) for r in range(2)])
    )
    assert torch.equal(before, torch.get_rng_state())  # which is the training's
    assert all(a.images is not None for a in whole)
    others = [list(small.batches(batch=4, **(run | change))) for change in ({"seed": 6}, {"epoch": 4})]
    assert not any(torch.equal(a.images, whole[0].images) for a in (others[0][0], others[1][0]))


# Images that cannot be read


def spoil(folder: ImageFolder, item: int) -> str:
    """Cut the file short; returns its name."""
    path = folder.path / folder.name(item)
    path.write_bytes(path.read_bytes()[:100])
    return folder.name(item)


@pytest.fixture
def folder_of_200(tmp_path: Path) -> ImageFolder:
    return ImageFolder(write_images(tmp_path / "train", {"a": 100, "b": 100}), 8)


def test_a_corrupt_image_is_named_counted_and_replaced(
    folder_of_200: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of_200
    run = {"batch": 50, "seed": 0, "epoch": 0}
    before = list(folder.batches(**run))
    names = {spoil(folder, 7), spoil(folder, 130)}  # just 1 %
    with caplog.at_level(logging.WARNING, "mvar"):
        after = list(folder.batches(**run))
    assert set(folder.unreadable) == names and all("truncated" in reason for reason in folder.unreadable.values())
    assert all(any(name in message for message in caplog.messages) for name in names) and len(caplog.messages) == 2

    rows = torch.from_numpy(np.concatenate(list(shuffled(200, **(ONE | run)))))
    changed = torch.cat([(a.images != b.images).flatten(1).any(1) for a, b in zip(before, after, strict=True)])
    assert set(rows[changed].tolist()) == {7, 130}
    for row, item in zip(changed.nonzero().flatten().tolist(), rows[changed].tolist(), strict=True):
        stand_in = next(i for i in folder_module.candidates(item, 200) if i not in (7, 130))
        at = int((rows == stand_in).nonzero()[0])  # its own place: pixels and class are as there
        images, labels = (torch.cat([getattr(b, n) for b in after]) for n in ("images", "labels"))
        assert torch.equal(images[row], images[at]) and labels[row] == labels[at]

    again = ImageFolder(folder.path, 8)  # counts come back from worker processes
    assert_same(after, list(again.batches(workers=2, **run)))
    assert again.unreadable == folder.unreadable


def test_readers_outlive_the_end_of_their_process_group(small: ImageFolder) -> None:
    """Ctrl-C, or SIGTERM for all, is for the run, which saves before it leaves."""
    run = {"batch": 1, "seed": 0, "epoch": 0}
    whole = list(small.batches(**run))
    batches = small.batches(workers=1, **run)
    read = [next(batches)]
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(reader.pid, number)
    assert_same(whole, read + list(batches))


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_per_cent_stop_the_run(folder_of_200: ImageFolder, workers: int) -> None:
    names = [spoil(folder_of_200, item) for item in (3, 90, 150)]
    with pytest.raises(UnreadableImages, match="3 of the first 160 images cannot be read") as error:
        list(folder_of_200.once(batch=40, workers=workers))
    assert all(name in str(error.value) for name in names)


def test_the_share_is_of_what_was_read_so_far(folder_of_200: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MIN_DENOMINATOR", 50)
    spoil(folder_of_200, 120)
    assert len(list(folder_of_200.once(batch=40))) == 5  # one of 160: fine, and after 40 nothing was wrong yet
    spoil(folder_of_200, 10)
    with pytest.raises(UnreadableImages, match="1 of the first 40 images cannot be read"):
        list(folder_of_200.once(batch=40))


def test_the_search_for_a_stand_in_ends(folder_of_200: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_TRIES", 1)
    spoil(folder_of_200, 0)
    with pytest.raises(UnreadableImages, match="1 of the first 10 images"):
        next(folder_of_200.once(batch=10))


def test_a_folder_without_any_readable_image_ends(small: ImageFolder) -> None:
    for item in range(len(small)):
        spoil(small, item)
    with pytest.raises(UnreadableImages, match="cannot be read"):
        next(small.batches(batch=2, seed=0, epoch=0, workers=1))
