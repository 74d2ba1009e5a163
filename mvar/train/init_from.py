"""Fine-tuning: a run that starts from the weights of another model, with other classes or another resolution."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.checkpoint import load_model
from mvar.models.config import ModelConfig
from mvar.models.transformer import Model
from mvar.train.checkpoint import STATE_FILE, Checkpoints, read_model
from mvar.train.distributed import TrainContext
from mvar.train.flags import Flags
from mvar.utils.errors import message

SCHEDULE_BUFFERS = ("lvl_1L", "patch_nums")


@dataclass
class Origin:
    """What --init_from determines: the architecture and, unless the run resumes from a checkpoint, the weights."""

    path: str
    config: ModelConfig
    model: Model | None


def read_origin(flags: Flags, context: TrainContext) -> Origin | None:
    """Read the model of --init_from, None without it. A run that has a checkpoint is resumed, and the file not read.

    Raises:
        ValueError: the file cannot be read.
    """
    path = flags.init_from
    if path is None:
        return None
    checkpoints = Checkpoints(Path(flags.out), context)
    config = checkpoints.config()
    if config is not None:
        return Origin(f"the run in {flags.out}", config, None)
    try:
        model = read_model(Path(path)) if (Path(path) / STATE_FILE).is_file() else load_model(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--init_from: {message(error)}") from error
    return Origin(path, model.config, model)


@torch.no_grad()
def adapt(target: Model, source: Model) -> str:
    """Copy the weights of one model to another, which may have other classes and token maps.

    Class embedding: if both models have `class_names`, the rows of equal names are copied; if one has none and the
    numbers of classes are equal, all rows are. Other classes begin from the row of the unconditional class.

    Position embeddings are copied for scales of equal size and otherwise interpolated (bicubic), scale by scale; level
    embeddings are copied. If the numbers of scales differ, scale k of K takes both from the scale of the source that
    is nearest to it in k/(K − 1).

    Args:
        target: written in place.
        source: of the same architecture and sizes.

    Returns:
        One line on what was copied and interpolated.

    Raises:
        RuntimeError: a weight has another shape or is missing (from `load_state_dict`).
    """
    state = source.state_dict()
    state |= {n: b for n, b in target.named_buffers() if n.rpartition(".")[2] in SCHEDULE_BUFFERS}

    rows, classes = _class_rows(source, target)
    state["class_emb.weight"] = source.class_emb.weight[[*rows, source.config.num_classes]]

    sides, targets = source.config.patch_nums, target.config.patch_nums
    scales = _nearest_scales(len(sides), len(targets))
    positions = source.pos_1LC.split(source.config.scales, 1)
    resized = [_resized(positions[k], side) for k, side in zip(scales, targets, strict=True)]
    state["pos_1LC"] = torch.cat(resized, 1)
    state["pos_start"] = _resized(source.pos_start, targets[0])
    state["lvl_embed.weight"] = source.lvl_embed.weight[scales]
    target.load_state_dict(state)

    interpolated = sum(sides[k] != side for k, side in zip(scales, targets, strict=True))
    return f"{classes}; positions of {len(targets) - interpolated} scales kept, of {interpolated} interpolated"


def _class_rows(source: Model, target: Model) -> tuple[list[int], str]:
    """The row of the source's class embedding for each class of the target, and a description."""
    names, wanted, unconditional = source.class_names, target.class_names, source.config.num_classes
    count = target.config.num_classes
    if names is not None and wanted is not None:
        # A name that several classes have (ImageNet's "crane") identifies none of them.
        row_of = {name: names.index(name) for name, n in Counter(names).items() if n == 1}
        rows, how = [row_of.get(name, unconditional) for name in wanted], "by name"
    elif count == unconditional:
        rows, how = list(range(count)), "by number, as there are no names to compare"
    else:
        rows, how = [unconditional] * count, f"as there are no names to compare and the file has {unconditional}"
    new = rows.count(unconditional)
    kept = f"{count - new} of {count} classes kept ({how})"
    return rows, kept + (f", {new} begun from the unconditional class" if new else "")


def _nearest_scales(sources: int, targets: int) -> list[int]:
    """For each of so many scales the index of one of the source, nearest by its fraction of the last index."""
    return [round(k * (sources - 1) / max(targets - 1, 1)) for k in range(targets)]


def _resized(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, p², C) of a p×p token map as those of a side×side map, (1, side², C)."""
    own = round(positions.shape[1] ** 0.5)
    if own == side:
        return positions
    grid = positions.transpose(1, 2).unflatten(2, (own, own))
    return F.interpolate(grid, (side, side), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
