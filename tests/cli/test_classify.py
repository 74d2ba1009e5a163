"""Tests of `mvar classify`."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar import digits
from mvar.cli.main import main
from tests.cli.test_cli import fails

COUNT = 12


def write_digits(folder: Path) -> torch.Tensor:
    """Held-out digits in one folder per class. Returns their classes in the order of the names."""
    held_out = digits.load()[1]
    for i in range(COUNT):
        path = folder / str(int(held_out.labels[i])) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((held_out.images[i] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)
    return held_out.labels[:COUNT]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_folder_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes are those of `mvar.classify`; subfolders give the accuracy."""
    labels = write_digits(tmp_path / "images")
    out = tmp_path / "classes.csv"
    main(["classify", str(tmp_path / "images"), "--out", str(out), "--batch", "5"])
    said = capsys.readouterr().out
    found = rows(out)
    assert [row["image"] for row in found] == sorted(
        f"{int(label)}/{i:02d}.png" for i, label in enumerate(labels)
    ) and {row["exact"] for row in found} == {"yes"}
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / "images" / r["image"]))) for r in found])
    expected = mvar.classify(*digits.pretrained(), pixels.permute(0, 3, 1, 2).float() / 255)
    assert [row["class"] for row in found] == [str(int(label)) for label in expected.labels]
    bits = -expected.log_likelihood.amax(1) / np.log(2)
    assert all(abs(float(row["bits"]) - float(b)) < 0.02 for row, b in zip(found, bits, strict=True))
    right = sum(row["image"].split("/")[0] == row["class"] for row in found)
    assert right > COUNT / 2 and f"accuracy on the {COUNT} images in folders of" in said
    assert f"{right / COUNT:.2%}" in said

    main(["classify", str(tmp_path / "images"), "--scales", "2", "--keep", "3", "--mid_reso", "1.5", "--out", str(out)])
    pruned = rows(out)
    with Image.open(tmp_path / "images" / pruned[0]["image"]) as file:
        larger = torch.from_numpy(np.array(file.resize((48, 48), Image.Resampling.LANCZOS).crop((8, 8, 40, 40))))
    first = mvar.classify(*digits.pretrained(), larger.permute(2, 0, 1)[None].float() / 255, scales=2, keep=3)
    bits = -float(first.log_likelihood[0, int(first.labels)]) / np.log(2)
    assert pruned[0]["class"] == str(int(first.labels)) and abs(float(pruned[0]["bits"]) - bits) < 0.02
    capsys.readouterr()

    main(["classify", str(tmp_path / "images"), "--scales", "1"])
    printed = capsys.readouterr()
    assert printed.out.startswith("image,class,bits,exact\n") and printed.out.count("\n") == COUNT + 1
    assert "exact arg-max" in printed.err


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in fails(capsys, "classify", str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "no images" in fails(capsys, "classify", str(tmp_path / "empty"))
    assert "--batch: expected at least 1" in fails(capsys, "classify", str(tmp_path), "--batch", "0")
    write_digits(tmp_path / "images")
    assert "--keep: give --scales" in fails(capsys, "classify", str(tmp_path / "images"), "--keep", "2")
    assert "scales: expected a whole number from 1 to 4" in fails(
        capsys, "classify", str(tmp_path / "images"), "--scales", "5"
    )
    (tmp_path / "images" / "broken.png").write_text("no image")
    assert "broken.png: cannot identify" in fails(capsys, "classify", str(tmp_path / "images"))
