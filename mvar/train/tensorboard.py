"""What TensorBoard is shown: metrics that VAR's trainer has too under its names and in its units."""

import threading
from collections.abc import Callable, Mapping
from math import log2
from pathlib import Path
from typing import Any

Shown = tuple[str, Callable[[float], float]]


def _percent(share: float) -> float:
    return 100 * share


def _same(value: float) -> float:
    return value


NAMES: Mapping[str, Shown] = {
    "loss": ("AR_ep_loss/L_mean", _same),
    "loss_last": ("AR_ep_loss/L_tail", _same),
    "accuracy": ("AR_ep_loss/acc_mean", _percent),
    "accuracy_last": ("AR_ep_loss/acc_tail", _percent),
    "val_loss": ("AR_ep_loss/vL_mean", _same),
    "val_loss_last": ("AR_ep_loss/vL_tail", _same),
    "val_accuracy": ("AR_ep_loss/vacc_mean", _percent),
    "val_accuracy_last": ("AR_ep_loss/vacc_tail", _percent),
    "code_usage": ("AR_iter_loss/z_voc_usage", _percent),
    "gradient_norm": ("AR_opt_grad/grad/grad_norm", _same),
    "learning_rate": ("AR_opt_lr/lr_max/sche_tlr", _same),
    "weight_decay": ("AR_opt_wd/wd_max/sche_twd", _same),
    "loss_scale": ("AR_opt_grad/fp16/scale_log2", log2),
}
"""Of VAR's train.py and trainer.py; those of single scales have a resolution in their names."""


def summary_writer() -> Any:
    """torch's class. ImportError, with what to install, where TensorBoard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tb=1 needs TensorBoard: pip install 'mvar[train]'") from error
    return SummaryWriter


class Board:
    """Event files in a folder, one value at a time.

    Raises ImportError where TensorBoard is missing, OSError where the folder cannot be written.

    Args:
        done: iterations; what an interrupted run has shown after them is hidden.
        sides: pixels of the picture that each scale's token map stands for.
    """

    def __init__(self, folder: Path, done: int, sides: tuple[int, ...]) -> None:
        writer = summary_writer()
        threading.excepthook = _tell_of_other_threads
        self.names = dict(NAMES)
        for k, side in enumerate(sides):
            self.names |= {
                f"loss_scale{k}": (f"AR_iter_loss/L_{side}", _same),
                f"accuracy_scale{k}": (f"AR_iter_loss/acc_{side}", _percent),
            }
        self.writer = writer(str(folder), purge_step=done + 1)

    def show(self, iteration: int, values: Mapping[str, Any]) -> None:
        """OSError where events could not be written, now or since the last time."""
        for name, value in values.items():
            if value is not None:
                tag, unit = self.names.get(name, (name, _same))
                self.writer.add_scalar(tag, unit(value), iteration)

    def close(self) -> None:
        self.writer.close()


_tell = threading.excepthook


def _tell_of_other_threads(failure: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread cannot write, the next `show` or `close` raises: no traceback besides."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        _tell(failure)
