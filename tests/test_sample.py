"""`mvar sample` in several processes, and one batch ahead of the host."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar.batches import drawn_batches
from mvar.cli import main
from mvar.generate import Generated, Launched

ARGUMENTS = ["--classes", "3,5-8", "--seed", "4", "--batch", "2", "--dtype", "fp32", "--device", "cpu"]


def outputs(folder: Path) -> list[str]:
    return ["--out", f"{folder}/all", "--npz", f"{folder}/all.npz", "--grid", f"{folder}/grid.png"]


def test_images_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """torchrun with two: three batches, the last one short; the same bytes in the same files, and no others."""
    one, two = tmp_path / "one", tmp_path / "two"
    main(["sample", *ARGUMENTS, *outputs(one)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mvar.sample"]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
    done = subprocess.run([*command, *ARGUMENTS, *outputs(two)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images in") == 1
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 7 and files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for name in (name for name in files if name.suffix == ".png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    contents = [np.load(folder / "all.npz") for folder in (one, two)]
    assert np.array_equal(contents[0]["arr_0"], contents[1]["arr_0"])
    for i, path in enumerate(sorted((two / "all").iterdir())):
        assert np.array_equal(np.asarray(Image.open(path)), contents[0]["arr_0"][i])


def test_a_process_that_fails_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Class 11 is in the second batch alone, the second process's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mvar.sample"]
    arguments = ["--classes", "1,11", "--batch", "1", "--device", "cpu", "--npz", f"{tmp_path}/all.npz"]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "labels: expected classes from 0 to 9, got 11 to 11" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_next_batch_is_begun_before_one_is_given() -> None:
    begun: list[int] = []

    def begin(start: int) -> Launched:
        begun.append(start)
        images = torch.full((2, 3, 4, 4), start / 255)
        finite = torch.tensor(start != 4)
        return Launched(Generated(images, torch.zeros(2, 1, dtype=torch.int64)), finite, torch.float32)

    batches = drawn_batches(begin, (0, 2, 4, 6))
    for expected in (0, 2):
        start, pixels = next(batches)
        assert start == expected and begun[-1] == start + 2
        assert pixels.shape == (2, 4, 4, 3) and pixels.dtype == torch.uint8 and bool((pixels == start).all())
    with pytest.raises(FloatingPointError, match="not finite"):
        next(batches)
