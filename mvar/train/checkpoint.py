"""A run on disk: `<out>/checkpoints/<iteration>/`, safetensors of every process's part and one state.json.

Tensors go through torch.distributed.checkpoint, so a run can go on with another number of processes, sharded or not.
Its safetensors storage is used, not its own, whose index is a pickle. A checkpoint is written beside its place and
renamed, and the one before it is kept until the next: whatever happens, the last whole one is there.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    load,
    save,
)

from mvar.config import ModelConfig
from mvar.files import make_folder
from mvar.model import Model, from_config
from mvar.train.distributed import World

KEPT = 2
FACTS = "state.json"
KINDS: Mapping[str, type] = {
    "iteration": int,
    "seed": int,
    "items": int,
    "images": int,
    "tokenizer": str,
    "data": str,
    "stepper": dict,
    "flags": dict,
    "model": dict,
}
"""What it holds; see the trainer."""
FAILURES = (OSError, ValueError, KeyError, SafetensorError, CheckpointException)


class Checkpoints:
    """The checkpoints of one run. All methods are called by all processes alike."""

    def __init__(self, out: Path, world: World) -> None:
        self.folder, self.world = out / "checkpoints", world

    def paths(self) -> list[Path]:
        """Whole checkpoints, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p for p in found if p.name.isdigit() and (p / FACTS).is_file()), key=lambda p: -int(p.name))

    def write(self, iteration: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the last two. OSError where that fails: the older ones stay."""
        aside, target = self.folder / f".{iteration:08d}", self.folder / f"{iteration:08d}"

        def prepare() -> None:
            for left_over in self.folder.glob(".[0-9]*"):
                shutil.rmtree(left_over, ignore_errors=True)
            make_folder(aside)

        def write() -> None:
            writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
            save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())

        def publish() -> None:
            (aside / FACTS).write_text(json.dumps(dict(facts), indent=1))
            for path in (*aside.iterdir(), aside, self.folder):
                _sync(path)
            shutil.rmtree(target, ignore_errors=True)  # there only where it could not be read
            aside.rename(target)
            _sync(self.folder)
            for old in self.paths()[KEPT:]:
                shutil.rmtree(old)

        try:
            self._all(prepare if self.world.leads else None)
            self._all(write)
            self._all(publish if self.world.leads else None)
        except OSError as error:
            if self.world.leads:
                shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"cannot write {target}: {error}") from error

    def _all(self, action: Callable[[], None] | None) -> None:
        """Do it, and raise OSError in all processes where it failed in one."""
        problem: BaseException | None = None
        try:
            with warnings.catch_warnings():
                # That a single process saves alone is what is meant.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                if action is not None:
                    action()
        except FAILURES as error:
            problem = error
        if self.world.any(problem is not None):
            raise OSError(_last_line(problem) if problem else "another process could not") from problem

    def facts(self, path: Path) -> dict[str, Any]:
        """What was saved beside the tensors. OSError where it is damaged."""
        try:
            loaded: dict[str, Any] = json.loads((path / FACTS).read_text())
            for name, kind in KINDS.items():
                if not isinstance(loaded, dict) or not isinstance(loaded.get(name), kind):
                    raise ValueError(f"{name!r} is missing or no {kind.__name__}")
        except ValueError as error:
            raise OSError(f"{path / FACTS}: cannot be used: {error}") from error
        return loaded

    def read(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` from a checkpoint. OSError where it is damaged or of another model."""

        def look() -> None:  # torch itself would tell of a damaged file in tracebacks, and not which it is
            for file in sorted(path.glob("*.safetensors")):
                try:
                    with safe_open(file, "pt"):
                        pass
                except SafetensorError as error:
                    raise OSError(f"{file.name}: truncated or damaged: {error}") from error

        def read() -> None:
            reader = HuggingFaceStorageReader(str(path))
            load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())

        try:
            self._all(look)
            self._all(read)
        except OSError as error:
            raise OSError(f"{path}: cannot be used: {error}") from error


def read_model(path: Path) -> Model:
    """The model in one checkpoint, its averaged weights where it has them, in evaluation mode.

    Raises OSError where it is no checkpoint of a run, or damaged.
    """
    if not (path / FACTS).is_file():
        raise FileNotFoundError(f"{path}: no {FACTS} there; expected a folder in a run's checkpoints/")
    checkpoints = Checkpoints(path.parent.parent, World(0, 1, torch.device("cpu")))
    facts = checkpoints.facts(path)
    model = from_config(ModelConfig(**facts["model"]))
    kind = "average" if facts["flags"]["average"] else "model"
    names = facts.get("class_names")  # not in older ones
    model.class_names = None if names is None else tuple(map(str, names))
    checkpoints.read(path, {f"{kind}.{name}": value.detach() for name, value in model.named_parameters()})
    return model.eval()


def _sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself: a name that a power cut leaves has its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
