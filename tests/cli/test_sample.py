"""Tests of `mvar sample`: multiple processes, interruption, output files and batch prefetching."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar import digits
from mvar.cli import resolve
from mvar.cli.main import main
from mvar.inference.prefetch import prefetched
from mvar.inference.results import Generated, PendingResult
from mvar.inference.sampling import SamplingParams
from mvar.utils import distributed
from mvar.utils.distributed import DistContext
from mvar.utils.images import to_bytes
from tests.cli.test_cli import fails

pytestmark = pytest.mark.slow

ARGUMENTS = ["--classes", "3,5-8", "--seed", "4", "--batch", "2", "--dtype", "fp32", "--device", "cpu"]


def outputs(folder: Path) -> list[str]:
    return ["--out", f"{folder}/all", "--npz", f"{folder}/all.npz", "--grid", f"{folder}/grid.png"]


def test_images_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Two torchrun processes with three batches, the last one smaller, write the same files as one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    main(["sample", *ARGUMENTS, *outputs(one)])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "mvar",
        "sample",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
    result = subprocess.run([*command, *ARGUMENTS, *outputs(two)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("5 images in") == 1
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 7 and files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for name in (name for name in files if name.suffix == ".png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    contents = [np.load(folder / "all.npz") for folder in (one, two)]
    assert np.array_equal(contents[0]["arr_0"], contents[1]["arr_0"])
    for i, path in enumerate(sorted((two / "all").iterdir())):
        assert np.array_equal(np.asarray(Image.open(path)), contents[0]["arr_0"][i])


DIGITS = Path(mvar.__file__).parent / "assets" / "digits.safetensors"
LaunchCall = tuple[list[int], SamplingParams, dict[str, object]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[LaunchCall]:
    """Record the labels and options of every launched batch and return black images."""
    calls: list[LaunchCall] = []

    def record_launch(
        model: object, tokenizer: object, labels: torch.Tensor, how: SamplingParams, **options: object
    ) -> PendingResult:
        calls.append((labels.tolist(), how, options))
        images = torch.zeros(len(labels), 3, 32, 32)
        return PendingResult(Generated(images, labels[:, None]), torch.tensor(True), torch.float32)

    monkeypatch.setattr(resolve, "launch", record_launch)
    return calls


PLANTED = """
import os, sys, time
import torch
from mvar.cli import resolve
from mvar.cli.main import main
from mvar.utils.distributed import DistContext

launch, meet = resolve.launch, DistContext.barrier

def launched(*args, first_index, **options):
    if first_index == 1:
        {planted}
    return launch(*args, first_index=first_index, **options)

def met(processes):
    print("meets", flush=True)
    meet(processes)

resolve.launch, DistContext.barrier = launched, met
resolve.fastest_dtype = lambda device: (torch.bfloat16, torch.float32)[int(os.environ["RANK"])]
main(["sample", "--classes", "1,2", "--batch", "1", "--device", "cpu", "--npz", sys.argv[1]])
"""
"""A program that runs the planted statement in its second batch, which belongs to the second process.

The processes find different dtypes to be the fastest.
"""


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Callable[[str], list[subprocess.Popen[str]]]]:
    """Return a function that starts the `PLANTED` program in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared["PYTHONPATH"] = str(Path(mvar.__file__).parent.parent)
    with ExitStack() as running:

        def start(planted: str) -> list[subprocess.Popen[str]]:
            command = [sys.executable, "-c", PLANTED.format(planted=planted), f"{tmp_path}/all.npz"]
            started = []
            for rank in range(2):
                process = subprocess.Popen(
                    command,
                    env=os.environ | shared | {"RANK": str(rank)},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                running.callback(process.communicate)
                running.callback(process.kill)
                started.append(process)
            return started

        yield start


def test_processes_use_the_dtype_of_the_main_process(planted: Callable[[str], list[subprocess.Popen[str]]]) -> None:
    for process in reversed(planted("print(options['dtype'], flush=True)")):
        out, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
        assert ("torch.bfloat16" in out) == ("images in" not in out), out


def test_failed_process_leaves_no_partial_files(
    planted: Callable[[str], list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    first, second = planted("raise ValueError('planted')")
    assert "mvar sample: error: planted" in second.communicate(timeout=100)[1] and second.returncode == 2
    assert "mvar sample: error: " in first.communicate(timeout=100)[1] and first.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_waiting_at_barrier(
    planted: Callable[[str], list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    # The first process reaches its third barrier once its own batch is complete.
    first, _ = planted("time.sleep(600)")
    assert first.stdout is not None
    for _ in range(3):
        assert first.stdout.readline() == "meets\n"
    assert len(list(tmp_path.iterdir())) == 1
    first.terminate()
    assert first.wait(timeout=25) == -signal.SIGTERM and list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_before_sampling(
    launches: list[LaunchCall], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    error = fails(capsys, "sample", *ARGUMENTS, "--npz", f"{tmp_path}/all.npz")
    assert f"cannot write {tmp_path}/all.npz: No space left on device" in error
    assert launches == [] and list(tmp_path.iterdir()) == []


SELF_SIGNAL = """
import os, sys
from mvar.cli import resolve
from mvar.cli.main import main

def launched(*_, **__):
    print(len(os.listdir(sys.argv[1])), flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))

resolve.launch = launched
main(["sample", "--classes", "3", "--npz", f"{sys.argv[1]}/all.npz"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_no_partial_files(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM from a job queue or SIGHUP from a closed terminal removes the temporary array of the batches."""
    environment = os.environ | {"PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
    command = [sys.executable, "-c", SELF_SIGNAL, str(tmp_path), str(int(number))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert (result.returncode, result.stdout) == (-number, "1\n") and list(tmp_path.iterdir()) == []


def test_classes_by_name(launches: list[LaunchCall], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = digits.pretrained()
    model.class_names = ("cat", "dog", "eel", "eel", "fox 2", "5", "6, or six", "7", "Käfer", "5")
    mvar.save(tmp_path / "model.safetensors", model)
    mvar.save(tmp_path / "tokenizer.safetensors", tokenizer)
    files = ["--weights", f"{tmp_path}/model.safetensors", "--tokenizer", f"{tmp_path}/tokenizer.safetensors"]
    target = ["--npz", f"{tmp_path}/all.npz"]
    main(["sample", "--classes", 'dog, fox 2,7-8,"6, or six",cat,5,Käfer', *target, *files])
    assert launches[0][0] == [1, 4, 7, 8, 6, 0, 5, 8]
    error = fails(capsys, "sample", "--classes", "1,cow", *target, *files)
    assert "--classes: unknown class 'cow'; the model has cat, dog, eel, eel, fox 2, …" in error
    assert "ambiguous class 'eel'" in fails(capsys, "sample", "--classes", "eel", *target, *files)
    error = fails(capsys, "sample", "--classes", "cat", *target)
    assert "unknown class 'cat'; the model has no class names" in error


def test_batches_are_split_between_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: list[LaunchCall]
) -> None:
    monkeypatch.setattr(DistContext, "barrier", lambda processes: None)
    monkeypatch.setattr(DistContext, "broadcast", lambda processes, value: value or torch.float32)
    for rank in range(3):
        monkeypatch.setattr(distributed, "init_distributed", lambda rank=rank: nullcontext(DistContext(rank, 3)))
        main(["sample", "--classes", "0-8", "--batch", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert [labels for labels, *_ in launches] == [[0, 1], [6, 7], [2, 3], [8], [4, 5]]


@pytest.mark.parametrize(
    ("arguments", "how", "options"),
    [
        (  # the recipe of VAR
            "",
            SamplingParams(1.5, 900, 0.96, False, False, "auto"),
            {"seed": 0, "dtype": torch.float16, "graph": None, "compile_decoder": False, "refine_from": None},
        ),
        (
            "--cfg 2 --top-k 7 --top-p 0.5 --smooth --backend reference --seed 3 --dtype bf16 --no-graph "
            f"--compile-decoder --guidance-until 3 --refiner {DIGITS} --refine-from 2",
            SamplingParams(2, 7, 0.5, True, False, "reference", guidance_until=3),
            {"seed": 3, "dtype": torch.bfloat16, "graph": False, "compile_decoder": True, "refine_from": 2},
        ),
    ],
    ids=["defaults", "others"],
)
def test_options_are_passed_to_launch(
    arguments: str,
    how: SamplingParams,
    options: dict[str, object],
    tmp_path: Path,
    launches: list[LaunchCall],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolve, "fastest_dtype", lambda device: torch.float16)
    target = ["--grid", f"{tmp_path}/grid.png", "--device", "cpu"]
    main(["sample", "--classes", "3,5", "--count", "2", "--batch", "3", *target, *arguments.split()])
    refiners = [given.pop("refiner") for *_, given in launches]
    assert all((refiner is None) == (options["refine_from"] is None) for refiner in refiners)
    assert launches == [([3, 3, 5], how, options | {"first_index": 0}), ([5], how, options | {"first_index": 3})]


@pytest.mark.parametrize("target", ["--out", "--grid", "--npz"])
def test_unwritable_output_is_reported_before_sampling(target: str, launches: list[LaunchCall]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--classes", "1", target, "/proc/mvar/images", "--device", "cpu"])
    assert launches == []


def test_images_of_an_earlier_run_are_rejected_without_overwrite(
    tmp_path: Path, launches: list[LaunchCall], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", "--out", str(tmp_path), "--device", "cpu", "--classes"]
    main([*arguments, "1-3"])
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "holiday.png").write_text("kept")
    drawn = len(launches)
    error = fails(capsys, *arguments, "5")
    assert "has 3 images of an earlier run, such as 000000_0001.png; give another folder, or --overwrite" in error
    assert len(launches) == drawn and len(list(tmp_path.iterdir())) == 5
    main([*arguments, "5", "--overwrite"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000_0005.png", "holiday.png", "notes.txt"]


def test_grid_format_follows_file_extension(
    tmp_path: Path, launches: list[LaunchCall], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", "--classes", "1", "--device", "cpu", "--grid"]
    for name, expected in (("g.jpg", "JPEG"), ("g.webp", "WEBP"), ("g", "PNG")):
        main([*arguments, str(tmp_path / name)])
        with Image.open(tmp_path / name) as grid:
            assert grid.format == expected
    drawn = len(launches)
    assert "expected a name that ends in one of .png, .jpg" in fails(capsys, *arguments, str(tmp_path / "g.gif"))
    tall = [*arguments[:2], "0-9,0-9", "--count", "1000", "--device", "cpu"]
    assert "expected at most 16383 pixels per side for WEBP" in fails(
        capsys, *tall, "--grid", str(tmp_path / "g2.webp")
    )
    assert len(launches) == drawn and len(list(tmp_path.iterdir())) == 3


def test_home_is_expanded_in_paths(tmp_path: Path, launches: list[LaunchCall], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = mvar.build(1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1, 1)))
    monkeypatch.setenv("HOME", str(tmp_path))
    mvar.save("~/model.safetensors", model)
    mvar.save("~/codes.safetensors", tokenizer)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inputs = ["--weights=~/model.safetensors", "--tokenizer=~/codes.safetensors", "--device=cpu"]
    outputs = ["--grid=~/g.png", "--npz=~/deep/all.npz", "--out=~/all"]
    monkeypatch.setattr(resolve, "launch", mvar.generate.__globals__["launch"])
    main(["sample", "--classes=1", *inputs, *outputs])
    main(["convert", "~/model.safetensors", "~/model.pth"])
    for name in ("g.png", "deep/all.npz", "all/000000_0001.png", "model.pth"):
        assert (tmp_path / name).is_file()
    assert not list((tmp_path / "here").iterdir())


def test_pixels_are_rounded_to_nearest() -> None:
    levels = torch.tensor([-1, 0.4, 0.6, 127.4, 254.6, 300])
    pixels = to_bytes(levels.view(1, 1, 2, 3).expand(-1, 3, -1, -1) / 255)
    assert pixels.shape == (1, 2, 3, 3) and pixels[0, ..., 0].flatten().tolist() == [0, 0, 1, 127, 255, 255]


def test_prefetched_starts_next_batch_before_yielding() -> None:
    started_batches: list[int] = []

    def start_batch(start: int) -> PendingResult:
        started_batches.append(start)
        images = torch.full((2, 3, 4, 4), start / 255)
        finite = torch.tensor(start != 4)
        return PendingResult(Generated(images, torch.zeros(2, 1, dtype=torch.int64)), finite, torch.float32)

    batches = prefetched(start_batch, (0, 2, 4, 6))
    for expected in (0, 2):
        start, pixels = next(batches)
        assert start == expected and started_batches[-1] == start + 2
        assert pixels.shape == (2, 4, 4, 3) and pixels.dtype == torch.uint8 and bool((pixels == start).all())
    with pytest.raises(FloatingPointError, match="not finite"):
        next(batches)


def test_shortcuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images are those of `generate` with the same options."""
    shortcuts = ["--guidance-until", "3", "--refiner", "digits_refiner", "--refine-from", "2"]
    arguments = ["sample", "--classes", "3,5", "--dtype", "fp32", "--device", "cpu", "--npz", f"{tmp_path}/all.npz"]
    main([*arguments, *shortcuts])
    refiner = mvar.load_model(DIGITS.with_name("digits_refiner.safetensors"))
    options: dict[str, Any] = {"guidance_until": 3, "refiner": refiner, "refine_from": 2, "dtype": torch.float32}
    want = mvar.generate(*digits.pretrained(), [3, 5], **options)
    with np.load(tmp_path / "all.npz") as stored:
        # The table of modulations is computed for other rows, which moves the last bits.
        assert np.abs(stored["arr_0"].astype(int) - to_bytes(want.images).numpy()).max() <= 1
    assert "--refiner and --refine-from: give both or neither" in fails(capsys, *arguments, *shortcuts[:4])
    out = ["--out", f"{tmp_path}/out", "--overwrite"]
    main([*arguments, *out])
    for wrong, message in (
        ([*shortcuts[:5], "9"], "--refine-from: expected a whole number from 0 to 4, got 9"),
        (["--guidance-until", "9"], "--guidance-until: expected a whole number from 0 to 4, got 9"),
        (["--top-p", "5"], "top_p: expected"),
        (["--cfg", "-1"], "cfg: expected"),
        (["--refiner", "emoji", "--refine-from", "2"], "refiner: expected the 10 classes of the model, got 40"),
    ):
        assert message in fails(capsys, *arguments, *out, *wrong)
        assert len(list((tmp_path / "out").iterdir())) == 2  # the images of the earlier run
