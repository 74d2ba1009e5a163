"""What patched modules cache for a tensor: the schedule of a mask, the modulation of a class embedding.

An entry lives as long as its tensor and is computed again when the tensor's version counter says that it has changed.
Inference tensors have no version counter, and writes through `.data` are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mvar_kernels.dispatch import capturing

_readings: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor → its version, and what was read from it


class Schedule(NamedTuple):
    """What attention attends to: a pattern of :func:`mvar_kernels.scale_attention`, and tokens per scale."""

    pattern: str
    scales: tuple[int, ...]

    def after(self, earlier: int) -> "Schedule":
        """The same for queries that also see all of so many earlier tokens, which a cache has."""
        return Schedule("causal", (earlier, *self.scales)) if earlier else self


def version_of(t: Tensor) -> tuple[int, ...]:
    """Changes when the tensor does, as far as PyTorch counts; comparable as long as the tensor is kept alive."""
    return (t.data_ptr(),) if t.is_inference() else (t.data_ptr(), t._version)


@torch.compiler.disable
def schedule_of(mask: Tensor) -> Schedule | None:
    """The schedule of a mask (1, …, 1, L, L) under which a token sees its own scale, or that and all coarser ones.

    The mask is boolean (True: attend) or added to the scores (0 or −∞). Read once for each tensor and version: once in
    a training step, as all layers of a model share one mask. None for another mask, for one that requires gradients,
    and during capture of a CUDA graph for one that has not been read.
    """
    return None if mask.requires_grad else _read_once(mask, _read_mask)


@torch.compiler.disable
def block_schedule(attention: Any) -> Schedule | None:
    """The schedule of HMAR's BlockSparseAttention, whose `row_starts` and `row_ends` (L,) bound what a token sees."""
    starts, ends = (getattr(attention, name, None) for name in ("row_starts", "row_ends"))
    if not isinstance(starts, Tensor) or not isinstance(ends, Tensor) or starts.shape != ends.shape:
        return None
    return _read_once(ends, lambda ends: _schedule_of_rows(starts.tolist(), ends.tolist()))


@torch.compiler.disable
def scale_lengths(lengths: Tensor) -> tuple[int, ...]:
    """A tensor of tokens per scale as numbers; () during capture of a CUDA graph if it has not been read."""
    return _read_once(lengths, lambda lengths: tuple(map(int, lengths.flatten().tolist()))) or ()


@torch.compiler.disable
def computed_from(t: Tensor, key: Any, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute()`, once for each key and version of the tensor that it depends on; in a CUDA graph's capture each time,
    unless it is known from before: the memory of what is computed there is the graph's."""
    known: dict[Any, tuple[Tensor, ...]] | None = _read_once(t, lambda _: {})
    if known is not None and key in known:
        return known[key]
    with torch.inference_mode(False):
        values = compute()
    if known is not None and not capturing(values[0].device):
        known[key] = values
    return values


def _read_once(t: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """`read(t)`, which waits for the device: once for each version, and never while a CUDA graph is captured."""
    entry = _readings.get(t)
    if entry is None or t.is_inference() or entry[0] != version_of(t):
        if capturing(t.device):
            return None
        entry = _readings[t] = version_of(t), read(t)
    return entry[1]


def _read_mask(mask: Tensor) -> Schedule | None:
    L = mask.shape[-1] if mask.dim() else 0
    if mask.dim() < 2 or mask.numel() != L * L or mask.shape[-2] != L or L == 0:
        return None
    mask = mask.detach().reshape(L, L)
    attend, masked = (mask, ~mask) if mask.dtype == torch.bool else (mask == 0, mask == -torch.inf)
    starts = attend.int().argmax(-1)
    ends = starts + attend.sum(-1)
    columns = torch.arange(L, dtype=ends.dtype, device=mask.device)
    valid = (attend == ((columns >= starts[:, None]) & (columns < ends[:, None]))).all() & (attend | masked).all()
    *rows, is_valid = torch.cat([starts, ends, valid[None]]).tolist()  # the only synchronization with the device
    return _schedule_of_rows(rows[:L], rows[L:]) if is_valid else None


def _schedule_of_rows(starts: list[int], ends: list[int]) -> Schedule | None:
    """The schedule under which token i sees the tokens from starts[i] up to ends[i], or None."""
    firsts, end = [], 0
    while end < len(ends) and end < ends[end] <= len(ends):
        firsts.append(end)
        end = ends[end]
    if end != len(ends) or not firsts:
        return None
    scales = tuple(b - a for a, b in zip(firsts, [*firsts[1:], end], strict=True))
    own = [(first, first + n) for first, n in zip(firsts, scales, strict=True) for _ in range(n)]
    if ends != [last for _, last in own]:
        return None
    if not any(starts):
        return Schedule("causal", scales)
    return Schedule("diagonal", scales) if starts == [first for first, _ in own] else None


class _Output(NamedTuple):
    weights: tuple[Tensor, ...]  # kept alive, so that no other tensor gets the id of one
    state: tuple[object, ...]
    value: Tensor


@dataclass
class _Entry:
    """The outputs of layers for one class embedding, and a copy of an embedding that has no version counter."""

    copy: Tensor | None
    outputs: dict[nn.Module, _Output] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)  # since the last comparison with the copy

    def changed(self, cond: Tensor, layer: nn.Module) -> bool:
        """Whether an embedding without version counter has changed.

        On a CPU compared in every call: 2 µs, where a layer takes 100 and more. On a GPU, where it is a
        synchronization, once in a pass over the layers of the model: when a layer is called again.
        """
        if self.copy is None or (cond.device.type != "cpu" and layer not in self.called):
            return False
        self.called.clear()
        return not torch.equal(cond, self.copy)


_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # class embedding → its _Entry
_DETERMINISTIC = {nn.Sequential, nn.Identity, nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Linear}


@torch.compiler.disable
def cached_call(layer: nn.Module, cond: Tensor, *, refresh: bool = False) -> Tensor:
    """layer(cond), computed once for each `cond`: a generation passes the same tensor at every scale.

    Computed again when `cond` or the weights have changed, at the start of a generation (`refresh`), and always where
    changes cannot be detected: weights without version counter, layers other than linear ones and activations, capture
    of a CUDA graph (which would not contain the layer).
    """
    weights = tuple(layer.parameters())
    deterministic = all(type(m) in _DETERMINISTIC and "forward" not in vars(m) for m in layer.modules())
    if not deterministic or any(w.is_inference() for w in weights) or capturing(cond.device):
        return layer(cond)
    without_version = cond.is_inference()
    entry: _Entry | None = _entries.get(cond)
    if entry is None or entry.changed(cond, layer):
        entry = _entries[cond] = _Entry(cond.clone() if without_version else None)
    entry.called.add(layer)
    autocast = torch.is_autocast_enabled(cond.device.type), torch.get_autocast_dtype(cond.device.type)
    versioned = weights if without_version else (cond, *weights)
    state = (*((id(t), t._version, t.data_ptr()) for t in versioned), autocast)
    output = entry.outputs.get(layer)
    if refresh or output is None or output.state != state:
        output = entry.outputs[layer] = _Output(weights, state, layer(cond))
    return output.value
