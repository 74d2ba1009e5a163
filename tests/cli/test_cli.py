"""Tests of the command line: its output files, and one-line errors with exit code 2 for invalid use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar.cli.main import COMMANDS, main


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with code 2 and return its one-line error message."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        assert f"examples:\n  mvar {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("sample", "--help"), ("train", "--help")], ids=" ".join
)
def test_help_imports_no_torch(arguments: tuple[str, ...]) -> None:
    # Importing torch takes seconds; printing the help takes less than one.
    code = (
        "import sys; from mvar.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.exit(sorted({'torch', 'numpy'} & sys.modules.keys()) or None)"
    )
    paths = os.environ | {"PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", code, *arguments], env=paths, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and "mvar" in result.stdout


def test_package_names_are_imported_lazily() -> None:
    """`mvar.generate` and `mvar.build` remain functions after submodules with the same name are imported."""
    code = (
        "import sys, mvar\n"
        "assert 'torch' not in sys.modules and set(mvar.__all__) <= set(dir(mvar))\n"
        "import mvar.inference.api, mvar.models.factory\n"
        "from mvar import generate\n"
        "assert callable(mvar.generate) and mvar.generate is generate and callable(mvar.build)\n"
        "assert all(getattr(mvar, name) is not None for name in mvar.__all__)\n"
        "assert not hasattr(mvar, 'quantise')"
    )
    paths = os.environ | {"PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"mvar {mvar.__version__}\n"


def test_info_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    out = capsys.readouterr().out
    for name, reason in mvar_backends().items():
        assert f"{name:<11} {'available' if reason is None else 'not available: ' + reason}" in out
    assert torch.__version__ in out and mvar.__version__ in out


def mvar_backends() -> dict[str, str | None]:
    from mvar_kernels import backends

    return backends()


def test_sample_writes_requested_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--classes", "3,5-6", "--count", "2", "--dtype", "fp32", "--seed", "4"]
    everything = ["--out", f"{tmp_path}/all", "--grid", f"{tmp_path}/grid.png", "--npz", f"{tmp_path}/all.npz"]
    main([*arguments, *everything, "--batch", "4"])
    assert "6 images in" in capsys.readouterr().out
    files = sorted(p.name for p in (tmp_path / "all").iterdir())
    assert files == [f"{i:06d}_{c:04d}.png" for i, c in enumerate((3, 3, 5, 5, 6, 6))]
    content = np.load(tmp_path / "all.npz")
    assert content["arr_0"].shape == (6, 32, 32, 3) and content["arr_0"].dtype == np.uint8
    assert content["labels"].tolist() == [3, 3, 5, 5, 6, 6]
    first = np.asarray(Image.open(tmp_path / "all" / files[0]))
    assert np.array_equal(first, content["arr_0"][0])
    assert Image.open(tmp_path / "grid.png").size == (2 * 34 + 2, 3 * 34 + 2)

    main([*arguments, "--npz", f"{tmp_path}/again.npz", "--batch", "1"])
    assert np.abs(np.load(tmp_path / "again.npz")["arr_0"].astype(int) - content["arr_0"]).max() <= 1


def test_sample_from_emoji_in_the_package(tmp_path: Path) -> None:
    """By class name. The emoji of the training are on white, with their colors."""
    arguments = "--weights emoji --classes face,purple_button --count 4 --dtype fp32".split()
    main(["sample", *arguments, "--npz", str(tmp_path / "out.npz")])
    images = np.load(tmp_path / "out.npz")["arr_0"].astype(int)
    assert images.shape == (8, 64, 64, 3)
    assert images[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 240
    red, green, blue = images[:, 16:48, 16:48].mean((1, 2)).T
    assert (red[:4] > blue[:4] + 40).all() and (blue[4:] > green[4:] + 20).all(), "yellow faces, purple buttons"


def test_sample_from_given_weights(tmp_path: Path) -> None:
    model, tokenizer = mvar.build(
        1,
        num_classes=2,
        tokenizer=mvar.TokenizerConfig((1, 2), num_codes=16, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False),
    )
    weights, codes = tmp_path / "model.safetensors", tmp_path / "tokenizer.pth"
    mvar.save(weights, model)
    torch.save(tokenizer.state_dict(), codes)  # like the published file, without the token map sizes
    grid = tmp_path / "grid.png"
    main(
        [
            "sample",
            "--weights",
            str(weights),
            "--tokenizer",
            str(codes),
            "--classes",
            "0-1",
            "--grid",
            str(grid),
            "--smooth",
        ]
    )
    assert Image.open(grid).size == (8, 14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "mvar: error: the following arguments are required: command"),
        (("draw",), "invalid choice: 'draw'"),
        (("sample", "--grid", "x.png"), "--classes"),
        (("sample", "--classes", "3"), "nowhere to write to: give --out, --grid or --npz"),
        (("sample", "--classes", "3-", "--grid", "x.png"), "unknown class '3-'; the model has no class names"),
        (
            ("sample", "--classes", "7-3", "--grid", "x.png"),
            "--classes: expected classes such as 3, 1,5,7-9 or cat,dog",
        ),
        (
            ("sample", "--classes", "", "--grid", "x.png"),
            "--classes: expected classes such as 3, 1,5,7-9 or cat,dog, got ''",
        ),
        (("sample", "--classes", '1,"2', "--grid", "x.png"), "--classes: expected classes such as 3"),
        (("sample", "--classes", "1,,2", "--grid", "x.png"), "--classes: expected classes such as 3"),
        (("sample", "--classes", "0-99999999999", "--grid", "x.png"), "--count: expected at most 100000000 images"),
        (("sample", "--classes", "0-99", "--grid", "x.png"), "--classes: expected numbers from 0 to 9, got 99"),
        (("sample", "--classes", f"{10**30}", "--grid", "x.png"), f"--classes: unknown class '{10**30}'"),
        (("sample", "--classes", "1", "--grid", "x.png", "--count", f"{10**30}"), "--count: expected at most"),
        (("sample", "--classes", "1", "--grid", "x.png", "--better"), "mvar sample: error: unrecognized arguments"),
        (("sample", "--classes", "1", "--grid", "x.png", "--weights", ""), "argument --weights: expected a path"),
        (("evaluate", "--out", "x", "--tokenizer", ""), "argument --tokenizer: expected a path"),
        (("tokenize", "--data_path", ".", "--tokenizer", "", "--out", "x"), "argument --tokenizer: expected a path"),
        (("convert", "", "x.pth"), "argument source: expected a path, got an empty text"),
        (("evaluate", "--out", "x", "--count", f"{10**30}"), "--count: expected at most 100000000 images"),
        (("demo", "--checked", f"{10**30}"), "--checked: expected from 20 to 100000, got 1000"),
        (("sample", "--classes", "3", "--grid", ""), "argument --grid: expected a path, got an empty text"),
        (("train", "--preset", "digits", "--out", ""), "--out: expected a path, got an empty text"),
        (("sample", "--classes", "10", "--grid", "x.png"), "--classes: expected numbers from 0 to 9, got 10"),
        (("sample", "--classes", "1", "--grid", "x.png", "--top-k", "-3"), "top_k"),
        (("sample", "--classes", "1", "--grid", "x.png", "--top-p", "nan"), "top_p"),
        (("sample", "--classes", "1", "--grid", "x.png", "--cfg", "nan"), "cfg"),
        (("sample", "--classes", "1", "--grid", "x.png", "--count", "0"), "--count: expected at least 1"),
        (("sample", "--classes", "1", "--grid", "x.png", "--device", "cuda:99"), "--device"),
        (("sample", "--classes", "1", "--grid", "x.png", "--backend", "cuda"), "backend 'cuda' requested"),
        (("sample", "--classes", "1", "--grid", "x.png", "--backend", "quick"), "backend: expected one of"),
        (("sample", "--classes", "1", "--grid", "x.png", "--weights", "d16.pth"), "give both, or neither"),
        (
            ("sample", "--classes", "1", "--grid", "x.png", "--weights", "no.pth", "--tokenizer", "no.pth"),
            "no such file",
        ),
        (("sample", "--classes", "1", "--out", "/proc/mvar"), "cannot write /proc/mvar"),
        (("train", "--preset", "imagenet", "--out", "x"), "invalid choice: 'imagenet'"),
        (("train", "--preset", "digits", "--out", "x", "--shorten", "2"), "--shorten"),
        (("train", "--preset", "digits", "--out", "/proc/mvar"), "--out: cannot write into /proc/mvar"),
        (("train", "--preset", "digits", "--out", "x", "--seed", "-5"), "--seed"),
        (("demo", "--out", "/proc/mvar"), "cannot write /proc/mvar/emoji.png"),
        (("sample", "--classes", "1", "--grid", "."), "cannot write .: a folder is in its place"),
        (("demo", "--checked", "3"), "--checked: expected from 20 to 100000, got 3"),
    ],
)
def test_bad_use(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_writes_images_and_passes_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--out", str(tmp_path), "--dtype", "fp32"])
    out = capsys.readouterr().out
    assert out.count("ok  ") == 4 and "FAIL" not in out and out.count("seconds per image") == 2
    assert "backend: auto" in out
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes == {
        "digits.png": (10 * 66 + 2, 10 * 66 + 2),
        "emoji.png": (12 * 66 + 2, 10 * 66 + 2),
        "scales.png": (6 * 130 + 2, 132),
        "edit.png": (10 * 130 + 2, 132),
    }
    edit = np.asarray(Image.open(tmp_path / "edit.png")).astype(int)
    kept, new = (edit[rows, 2:1300].reshape(-1, 1298, 3) for rows in (slice(2, 66), slice(66, 130)))
    results = [kept[:, 130 * i : 130 * i + 128] for i in range(10)]
    assert all(np.array_equal(results[0], other) for other in results[1:]), "the upper half is kept"
    assert not np.array_equal(new[:, 260:388], new[:, 390:518])


@pytest.mark.slow
def test_demo_with_bidirectional_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--out", str(tmp_path), "--dtype", "fp32", "--bidirectional"])
    assert capsys.readouterr().out.count("ok  ") == 4


def test_shipped_weights_are_small() -> None:
    sizes = {"digits": 0, "emoji": 0}
    for path in (Path(mvar.__file__).parent / "assets").iterdir():
        sizes[path.stem.partition("_")[0]] += path.stat().st_size
    assert sizes["digits"] <= 8 * 2**20 and sizes["emoji"] <= 16 * 10**6


@pytest.mark.slow
def test_training_decreases_loss_and_writes_loadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundredth of the preset: the loss decreases, and the written weights generate images."""
    main(["train", "--preset", "digits", "--out", str(tmp_path), "--shorten", "0.01"])
    out = capsys.readouterr().out
    for name, expected in (("tokenizer: step", 7), ("model: iteration", 2)):
        losses = [float(loss) for loss in re.findall(rf"^{name} .*?\bloss ([0-9.]+)", out, re.MULTILINE)]
        assert len(losses) == expected and losses[-1] < losses[0] - 0.1 and max(losses[1:]) < losses[0]
    model = mvar.load_model(tmp_path / "model.safetensors")
    tokenizer = mvar.load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert mvar.generate(model, tokenizer, [3], dtype=torch.float32).images.shape == (1, 3, 32, 32)
