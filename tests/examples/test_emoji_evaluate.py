"""Tests of examples/emoji/evaluate.py: its figures on cases with a known answer, and whole runs on a small folder."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from examples.emoji import evaluate
from examples.emoji.evaluate import Images, accuracy, balanced_moments, center, main, nearest, sample_page
from mvar.evaluate import moments

STORED = 36  # of resolution 32
COLORS = {"blue": (0, 0, 255), "green": (0, 160, 0), "red": (255, 0, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of rectangles: their color is the class, their size and place are random."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 2)):
        for name, color in COLORS.items():
            (tmp_path / "emoji" / part / name).mkdir(parents=True)
            for i in range(number):
                image = Image.new("RGB", (STORED, STORED), "white")
                left, top, width, height = generator.integers(5, 15, 4)
                image.paste(color, (left, top, left + width, top + height))
                image.save(tmp_path / "emoji" / part / name / f"{i}.png")
    return tmp_path / "emoji"


def as_samples(folder: Path, part: str, out: Path) -> Path:
    """The center crops of a part, named as by `mvar sample --out`."""
    out.mkdir()
    paths = sorted((folder / part).glob("*/*.png"))
    for i, path in enumerate(paths):
        label = sorted(COLORS).index(path.parent.name)
        Image.open(path).crop((2, 2, 34, 34)).save(out / f"{i:06d}_{label:04d}.png")
    return out


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> int:
    out = folder.parent / "out"
    steps = ("--steps", "4", "--out", str(out))
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(folder), *map(str, arguments), *steps])
    return main()


def test_accuracy_over_images_and_over_classes() -> None:
    found = accuracy(torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 0, 0, 2, 2]), num_classes=3)
    assert found == {"images": 0.8, "balanced": 0.75, "of_class": [1.0, None, 0.5]}


def test_nearest_agrees_with_all_crops_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(6, 3, 20, 20, generator=generator)
    images = torch.rand(4, 3, 16, 16, generator=generator)
    images[0] = train[5, :, 4:20, 1:17]
    images[1] = (train[2, :, 0:16, 3:19] * 0.9 + 10 / 255).clamp(0, 1)
    crops = train.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5)  # (6, 5, 5, 3, 16, 16)
    expected = ((crops[None] - images[:, None, None, None]) * 255).square().mean((4, 5, 6)).sqrt().flatten(2).amin(2)
    distances, indices = nearest(images, train)
    assert indices.tolist() == expected.argmin(1).tolist() and indices[:2].tolist() == [5, 2]
    # Float64 throughout, so that only the float32 of the expected values and the square root at 0 remain.
    torch.testing.assert_close(distances, expected.amin(1), rtol=1e-5, atol=1e-3)


def test_every_class_has_the_same_weight_in_the_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(12, 5, generator=generator), torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2)
    for balanced, plain in zip(balanced_moments(rows, labels), moments(rows), strict=True):
        torch.testing.assert_close(balanced, plain)
    more = torch.cat([rows, rows[labels == 1], rows[labels == 1]])
    found = balanced_moments(more, torch.cat([labels, torch.ones(8, dtype=torch.int64)]))
    torch.testing.assert_close(found.mean, rows.double().mean(0))


def test_the_page_shows_every_class() -> None:
    labels = torch.arange(40).repeat(25)
    page = sample_page(Images((labels / 40)[:, None, None, None].expand(-1, 3, 4, 4), labels))
    assert page.shape == (3, 10 * 6 + 2, 12 * 6 + 2)
    assert len(page.unique()) == 41  # 40 classes and the white between


def test_held_out_images_as_generated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folder, "--images", as_samples(folder, "val", tmp_path / "samples")) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["accuracy"]["generated"] == result["accuracy"]["held_out"]
    assert result["ratio_to_held_out"]["generated"] == 1 and result["passed"]
    distances = result["distance_to_training"]
    assert distances["generated"]["median"] == pytest.approx(distances["held_out"]["median"])
    assert distances["generated"]["median"] > 5
    assert result["frechet_to_held_out"]["generated"] == pytest.approx(0, abs=1e-6)
    assert result["frechet_to_held_out"]["training"] > 1e-3
    assert result["classes"] == sorted(COLORS)
    assert Image.open(tmp_path / "out" / "copies.png").size == (6 * 66 + 2, 2 * 66 + 2)
    assert "generated / held-out, balanced: 1.00 (at least 0.85: yes)" in capsys.readouterr().out


def test_copies_of_training_images_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, folder, "--images", as_samples(folder, "train", tmp_path / "samples")) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    generated = result["distance_to_training"]["generated"]
    assert generated["median"] == pytest.approx(0, abs=1e-3) and generated["below_held_out_05"] == 1
    page = np.asarray(Image.open(tmp_path / "out" / "copies.png"))
    np.testing.assert_array_equal(page[2:66], page[68:132])  # eight images above the same images


def test_images_of_the_wrong_class_do_not_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = as_samples(folder, "val", tmp_path / "samples")
    for path in samples.iterdir():
        path.rename(path.with_stem(f"1{path.stem[1:7]}{(int(path.stem[-4:]) + 1) % 3:04d}"))
    monkeypatch.setattr(evaluate.Classifier, "predict", lambda _, images: images.mean((2, 3)).argmax(1).sub(2).abs())
    assert run(monkeypatch, folder, "--images", samples) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["accuracy"]["held_out"]["balanced"] == 1
    assert result["accuracy"]["generated"]["balanced"] == 0 and not result["passed"]
    assert "at least 0.85: NO" in capsys.readouterr().out


def test_images_of_some_classes_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their figures could not be compared with those of held-out images of all classes."""
    samples = as_samples(folder, "val", tmp_path / "samples")
    for path in samples.glob("*_0001.png"):
        path.unlink()
    assert run(monkeypatch, folder, "--images", samples) == 1
    assert "--images: expected images of the classes 0 to 2, got 2 classes from 0 to 2" in capsys.readouterr().err


def test_a_model_of_other_classes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assets = files("mvar") / "assets"
    weights = ("--weights", assets / "digits.safetensors", "--tokenizer", assets / "digits_tokenizer.safetensors")
    for given in (weights, ()):  # without weights: the emoji model in the package
        assert run(monkeypatch, folder, *given) == 1
        assert "--weights: expected a model of the 3 classes in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--weights", "m.safetensors"), "--weights and --tokenizer: give both, or neither"),
        (("--tokenizer", "t.safetensors"), "--weights and --tokenizer: give both, or neither"),
        (("--weights", "m.safetensors", "--images", "samples"), "--images and --weights: give at most one"),
    ],
)
def test_wrong_combinations(
    given: tuple[str, ...],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, folder, *given) == 1
    assert message in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


def test_a_model_and_its_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes, as the digits model has; the figures are those of its images as files."""
    for part in ("train", "val"):
        for i in range(7):
            shutil.copytree(folder / part / "red", folder / part / f"red{i}")
    assets = files("mvar") / "assets"
    weights, tokenizer = assets / "digits.safetensors", assets / "digits_tokenizer.safetensors"
    arguments = ("--weights", weights, "--tokenizer", tokenizer, "--count", "2", "--seed", "3", "--cfg", "0")
    assert run(monkeypatch, folder, *arguments, "--top-k", "0", "--top-p", "1") == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["images"] == {"training": 80, "held_out": 20, "generated": 20, "reconstructed": 20}
    assert 0 <= result["accuracy"]["reconstructed"]["balanced"] <= 1
    out = mvar.generate(
        mvar.load_model(str(weights)), mvar.load_tokenizer(str(tokenizer)), [0, 0], cfg=0, top_k=0, top_p=1, seed=3
    )
    shown = np.asarray(Image.open(tmp_path / "out" / "samples.png"))[2:34, 2:34]
    assert np.abs(shown.astype(int) - np.asarray(out.images[0].permute(1, 2, 0) * 255)).max() <= 1


def test_center_is_the_crop_of_validation() -> None:
    pixels = torch.arange(72.0).expand(1, 1, 72, 72)
    assert center(pixels, 64)[0, 0, 0].tolist() == list(range(4, 68))
