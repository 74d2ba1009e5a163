"""Checkpoints of a run: folders `<out>/checkpoints/<iteration>/` with safetensors of all processes and state.json.

Tensors are saved by torch.distributed.checkpoint, so that a run can be resumed with another number of processes, with
or without sharding. The safetensors storage is used because the index of the default storage is a pickle. A checkpoint
is written to a temporary folder, which is then renamed; the last two checkpoints are kept, so that a complete one
always exists.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
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

from mvar.models.config import ModelConfig
from mvar.models.transformer import Model, from_config
from mvar.stored import CONFIGS
from mvar.train.distributed import TrainContext
from mvar.utils.files import make_folder

MAX_KEPT = 2
STATE_FILE = "state.json"
_COMMON: Mapping[str, type] = {
    "iteration": int,
    "seed": int,
    "items": int,
    "images": int,
    "data": str,
    "optimizer": dict,
    "flags": dict,
}
STATE_TYPES: Mapping[str, Mapping[str, type]] = {
    "model": {**_COMMON, "model": dict, "tokenizer": str},
    "tokenizer": {**_COMMON, "tokenizer": dict},
}
"""Keys and types of state.json by what is trained, whose key is that of its configuration; see :meth:`Loop._save`."""
FAILURES = (OSError, ValueError, KeyError, SafetensorError, CheckpointException)


class Checkpoints:
    """The checkpoints of one run. :meth:`write` and :meth:`read` are collective: every process calls them.

    Args:
        kind: what the run trains, "model" or "tokenizer".
    """

    def __init__(self, out: Path, context: TrainContext, kind: str = "model") -> None:
        self.folder, self.context, self.kind = out / "checkpoints", context, kind

    def paths(self) -> list[Path]:
        """Complete checkpoints, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p for p in found if p.name.isdigit() and (p / STATE_FILE).is_file()), key=lambda p: -int(p.name))

    def write(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the last two. If it raises OSError, the older ones are kept."""
        temporary, target = self.folder / f".{iteration:08d}", self.folder / f"{iteration:08d}"

        def prepare() -> None:
            for stale in self.folder.glob(".[0-9]*"):
                shutil.rmtree(stale, ignore_errors=True)
            make_folder(temporary)

        def write() -> None:
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())

        def publish() -> None:
            (temporary / STATE_FILE).write_text(json.dumps(dict(state), indent=1))
            for path in (*temporary.iterdir(), temporary, self.folder):
                _fsync(path)
            shutil.rmtree(target, ignore_errors=True)  # exists only if it could not be read
            temporary.rename(target)
            _fsync(self.folder)
            for old in self.paths()[MAX_KEPT:]:
                shutil.rmtree(old)

        try:
            self._run_on_all(prepare if self.context.is_main_process else None)
            self._run_on_all(write)
            self._run_on_all(publish if self.context.is_main_process else None)
        except OSError as error:
            if self.context.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"cannot write {target}: {error}") from error

    def _run_on_all(self, action: Callable[[], None] | None) -> None:
        """Run the action, and raise OSError in all processes if it failed in any."""
        failure: BaseException | None = None
        try:
            with warnings.catch_warnings():
                # Expected: a single process saves without a process group.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                if action is not None:
                    action()
        except FAILURES as error:
            failure = error
        if self.context.any(failure is not None):
            raise OSError(_last_line(failure) if failure else "failed in another process") from failure

    def state(self, path: Path) -> dict[str, Any]:
        """Read state.json. Raises OSError if it is damaged, ValueError if it is of a run of another kind."""
        try:
            loaded: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
            if not isinstance(loaded, dict):
                raise ValueError("not an object")
            wrong = [name for name, kind in STATE_TYPES[self.kind].items() if not isinstance(loaded.get(name), kind)]
        except ValueError as error:
            raise OSError(f"{path / STATE_FILE}: cannot be used: {error}") from error
        other = next(kind for kind in STATE_TYPES if kind != self.kind)
        if wrong and isinstance(loaded.get(other), dict):
            raise ValueError(f"{path}: expected the checkpoint of a {self.kind}, got that of a {other}")
        if wrong:
            expected = STATE_TYPES[self.kind][wrong[0]].__name__
            raise OSError(f"{path / STATE_FILE}: cannot be used: {wrong[0]!r}: missing, or not of type {expected}")
        return loaded

    def config(self) -> Any:
        """The configuration of the model or tokenizer in the newest checkpoint that has a valid one, or None."""
        for path in self.paths():
            with suppress(OSError, TypeError, ValueError):
                return CONFIGS[self.kind](**self.state(path)[self.kind])
        return None

    def read(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Load a checkpoint into `tensors`. Raises OSError if it is damaged or of another model."""

        def check_files() -> None:  # torch's error for a damaged file is a traceback without the file name
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
            self._run_on_all(check_files)
            self._run_on_all(read)
        except OSError as error:
            raise OSError(f"{path}: cannot be used: {error}") from error


def read_model(path: Path) -> Model:
    """Load the model of a checkpoint, with the moving averages if it has them, in evaluation mode.

    Raises:
        OSError: the folder is not a checkpoint, or it is damaged.
        ValueError: it is a tokenizer's checkpoint.
    """
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(f"{path}: no {STATE_FILE} there; expected a folder in a run's checkpoints/")
    checkpoints = Checkpoints(path.parent.parent, TrainContext(0, 1, torch.device("cpu")))
    state = checkpoints.state(path)
    model = from_config(ModelConfig(**state["model"]))
    kind = "average" if state["flags"]["average"] else "model"
    names = state.get("class_names")  # not in older checkpoints
    model.class_names = None if names is None else tuple(map(str, names))
    checkpoints.read(path, {f"{kind}.{name}": value.detach() for name, value in model.named_parameters()})
    return model.eval()


def _fsync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk: a renamed checkpoint is complete, even after a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
