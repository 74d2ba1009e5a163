"""Tests of examples/emoji/prepare.py on small archives."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.emoji.prepare import main, on_white, points, prepare, split_key

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def picture(number: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """A WebP of its own for every number: random 4×4 blocks."""
    blocks = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert("RGBA").save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def entry(unified: str, name: str, subcategory: str, tones: bool = False) -> dict[str, Any]:
    first, *rest = unified.split("-")
    variations = {tone: {"unified": "-".join([first, tone, *rest])} for tone in TONES} if tones else {}
    return {"unified": unified, "short_name": name, "subcategory": subcategory, "skin_variations": variations}


def run(tmp_path: Path, entries: list[dict[str, Any]], pictures: dict[str, bytes]) -> Path:
    names = archive(tmp_path / "names.tgz", {"package/emoji.json": json.dumps(entries).encode()})
    files = {f"package/assets/{name}.webp": content for name, content in pictures.items()}
    prepare(archive(tmp_path / "pictures.tgz", files), names, tmp_path / "emoji", verify=False)
    return tmp_path / "emoji"


def found(folder: Path) -> list[str]:
    """class/name of all images, of both parts."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in folder.glob("*/*/*.png"))


def test_names_match_with_and_without_zeros_and_presentation_selector(tmp_path: Path) -> None:
    entries = [
        entry("0023-FE0F-20E3", "hash", "keycap"),
        entry("002A-FE0F-20E3", "keycap_star", "keycap"),
        entry("00A9-FE0F", "copyright", "other-symbol"),
        entry("2764-FE0F", "heart", "heart"),
        entry("1F48C", "love_letter", "heart"),  # left out by name
        entry("1F1E6-1F1E8", "flag-ac", "country-flag"),  # left out by subcategory
    ]
    names = ["23-20e3", "002a-fe0f-20e3", "a9-fe0f", "2764", "1f48c", "1f1e6-1f1e8", "1f999"]
    folder = run(tmp_path, entries, {name: picture(i) for i, name in enumerate(names)})
    assert found(folder) == [
        "digit_button/0023-fe0f-20e3",
        "digit_button/002a-fe0f-20e3",
        "glyph/00a9-fe0f",
        "heart/2764-fe0f",
    ]


def test_one_picture_under_two_names_is_kept_once(tmp_path: Path) -> None:
    entries = [entry("0023-FE0F-20E3", "hash", "keycap"), entry("1F431", "cat", "animal-mammal")]
    entries.append(entry("1F63A", "smiley_cat", "cat-face"))
    pictures = {"0023-fe0f-20e3": picture(0), "23-20e3": picture(1), "1f431": picture(2), "1f63a": picture(2)}
    assert found(run(tmp_path, entries, pictures)) == ["animal_face/1f431", "digit_button/0023-fe0f-20e3"]


@pytest.mark.parametrize(
    ("code", "key"),
    [
        ("1F44D-1F3FD", "1f44d"),
        ("1F64B-1F3FF-200D-2640-FE0F", "1f64b"),
        ("1F469-1F3FB-200D-1F680", "1f9d1-200d-1f680"),
        ("1F468-200D-1F680", "1f9d1-200d-1f680"),
        ("1F469", "1f469"),  # a drawing of its own
        ("1F469-1F3FB-200D-2764-FE0F-200D-1F468-1F3FF", "1f469-200d-2764-200d-1f468"),
        ("2640-FE0F", "2640"),
    ],
)
def test_the_key_of_the_split_has_neither_skin_tone_nor_gender(code: str, key: str) -> None:
    assert split_key(code) == key


def test_an_emoji_is_on_one_side_with_all_its_tones_and_genders(tmp_path: Path) -> None:
    entries = []
    for i in range(10):
        code = f"1F9{i:02X}"
        entries += [entry(code, f"gesture{i}", "person-gesture", tones=True)]
        entries += [entry(f"{code}-200D-2640-FE0F", f"woman{i}", "person-gesture", tones=True)]
        entries += [entry(f"1F4{i:02X}", f"bird{i}", "animal-bird")]
    codes = [form["unified"] for e in entries for form in (e, *e["skin_variations"].values())]
    folder = run(tmp_path, entries, {code.lower(): picture(i) for i, code in enumerate(codes)})
    assert len(found(folder)) == len(codes) == 130
    keys = {part: {split_key(path.stem) for path in folder.glob(f"{part}/*/*.png")} for part in ("train", "val")}
    assert not keys["train"] & keys["val"]
    for label, pictures in (("gesture", 24), ("bird", 2)):  # two of ten emoji; a gesture has twelve pictures
        assert len(list(folder.glob(f"val/{label}/*.png"))) == pictures


def test_an_image_is_composited_on_white_inside_a_white_border() -> None:
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[:, :, 0] = 200  # transparent red outside
    pixels[64:192, 64:192] = (0, 0, 255, 128)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    image = np.asarray(on_white(stream.getvalue(), 72)).astype(int)
    assert image.shape == (72, 72, 3)
    assert (image[:4] == 255).all() and (image[0:18, 0:18] == 255).all()
    np.testing.assert_allclose(image[36, 36], [127, 127, 255], atol=1)  # 255 · (1 − 128/255) in red and green
    # The square of 128 pixels of 256 is 32 wide, from 4 + 16.
    assert (image[36, 24:48, 0] < 130).all() and (image[36, :17, 0] == 255).all() and (image[36, 55:, 0] == 255).all()


def test_a_picture_that_is_not_square_keeps_its_shape() -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (64, 128), "black").save(stream, "PNG")
    dark = np.asarray(on_white(stream.getvalue(), 72)).max(2) < 128
    assert dark.any(1).sum() == 64 and dark.any(0).sum() == 32


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="--out: expected a new or empty folder"):
        run(tmp_path, [entry("1F986", "duck", "animal-bird")], {"1f986": picture(0)})
    assert [path.name for path in (tmp_path / "emoji").iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    content = {"1f986": picture(0), "1f985": picture(1)}
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, [entry("1F986", "duck", "animal-bird"), entry("1F985", "eagle", "animal-bird")], content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.tgz", "pictures.tgz"]


def test_another_archive_is_refused_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = archive(tmp_path / "names.tgz", {"package/emoji.json": b"[]"})
    arguments = ["prepare.py", str(tmp_path / "none.tgz"), str(names), "--out", str(tmp_path / "emoji")]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 1
    assert f"prepare.py: {names}: expected the archive with SHA-512 fea1caa8" in capsys.readouterr().err
    assert not (tmp_path / "emoji").exists()


def test_points_of_a_name() -> None:
    assert points("0023-FE0F-20E3") == points("23-20e3") == ("23", "20e3")
    assert points("1f3f4-e0067_e0062") == ("1f3f4", "e0067", "e0062")
