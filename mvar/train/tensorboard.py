"""Metrics as TensorBoard events, with the names and units of VAR's trainer for the metrics that it has."""

import threading
from collections.abc import Callable, Mapping
from math import log2
from pathlib import Path
from typing import Any

from torch import Tensor

Tag = tuple[str, Callable[[float], float]]
"""A tag, and the conversion from our unit to VAR's."""


def _percent(fraction: float) -> float:
    return 100 * fraction


def _same(value: float) -> float:
    return value


TAGS: Mapping[str, Tag] = {
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
"""By our names, from VAR's train.py and trainer.py; the tags of single scales contain a resolution."""


def summary_writer() -> Any:
    """The class torch.utils.tensorboard.SummaryWriter. Raises ImportError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tb=1 requires TensorBoard: pip install 'mvar[train]'") from error
    return SummaryWriter


def tags(resolutions: tuple[int, ...]) -> Mapping[str, Tag]:
    """TAGS and those of single scales; `resolutions`: image side in pixels that corresponds to each token map."""
    found = dict(TAGS)
    for k, resolution in enumerate(resolutions):
        found[f"loss_scale{k}"] = (f"AR_iter_loss/L_{resolution}", _same)
        found[f"accuracy_scale{k}"] = (f"AR_iter_loss/acc_{resolution}", _percent)
    return found


class TensorBoardWriter:
    """Event files in a folder.

    Raises ImportError if TensorBoard is not installed, OSError if the folder cannot be written.

    Args:
        iteration: completed iterations; events of an interrupted run after them are hidden.
        tags: the tags of metrics that are not written under their own name.
    """

    def __init__(self, folder: Path, iteration: int, tags: Mapping[str, Tag]) -> None:
        writer = summary_writer()
        threading.excepthook = _ignore_tensorboards_thread
        self.tags = tags
        self.writer = writer(str(folder), purge_step=iteration + 1)

    def add(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Write all values that are not None. Raises OSError if these or earlier values could not be written."""
        for name, value in values.items():
            if value is not None:
                tag, unit = self.tags.get(name, (name, _same))
                self.writer.add_scalar(tag, unit(value), iteration)

    def add_image(self, iteration: int, name: str, image: Tensor) -> None:
        """Write an image, (3, H, W) in [0, 1]. Raises as :meth:`add`."""
        self.writer.add_image(name, image, iteration)

    def close(self) -> None:
        self.writer.close()


_excepthook = threading.excepthook


def _ignore_tensorboards_thread(failure: threading.ExceptHookArgs) -> None:
    """No traceback for an error in TensorBoard's writer thread: the next `add` or `close` raises it."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        _excepthook(failure)
