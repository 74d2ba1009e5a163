"""What replacements work out once for a tensor: the schedule of a mask, the modulation of a class embedding.

Kept as long as the tensor lives, and worked out anew when it has changed. PyTorch counts a tensor's changes in its
version; inference tensors have none, and writes through `.data` are not counted.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mvar_kernels.dispatch import capturing

_schedules: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask → its version, and its schedule


@torch.compiler.disable
def schedule_of(mask: Tensor) -> tuple[int, ...] | None:
    """Tokens per scale of a mask (1, …, 1, L, L) under which a token sees its own and all coarser scales, else None.

    The mask is boolean (True: seen) or added to the scores (0 or −∞). Read once for each tensor and each version of
    it: once in a training step, as a model hands one mask to all its layers. None also for a mask that learns, and for
    one that a CUDA graph under capture would have to read.
    """
    if mask.requires_grad:
        return None
    version = None if mask.is_inference() else (mask._version, mask.data_ptr())
    known = _schedules.get(mask)
    if known is None or version is None or known[0] != version:
        if capturing(mask.device):
            return None
        known = _schedules[mask] = version, _read_schedule(mask)
    schedule: tuple[int, ...] | None = known[1]
    return schedule


def _read_schedule(mask: Tensor) -> tuple[int, ...] | None:
    L = mask.shape[-1] if mask.dim() else 0
    if mask.dim() < 2 or mask.numel() != L * L or mask.shape[-2] != L or L == 0:
        return None
    mask = mask.detach().reshape(L, L)
    seen, hidden = (mask, ~mask) if mask.dtype == torch.bool else (mask == 0, mask == -torch.inf)
    ends = seen.sum(-1)
    expected = torch.arange(L, dtype=ends.dtype, device=mask.device) < ends[:, None]
    right = (seen == expected).all() & (seen | hidden).all()
    *lasts, is_right = torch.cat([ends, right[None]]).tolist()  # the one moment of waiting for the device
    rows: list[int] = []
    while is_right and sum(rows) < L:
        rows.append(lasts[sum(rows)] - sum(rows))
        if rows[-1] < 1 or len(set(lasts[sum(rows[:-1]) : sum(rows)])) > 1:
            return None
    return tuple(rows) or None


class _Made(NamedTuple):
    weights: tuple[Tensor, ...]  # kept, so that no other tensor gets the id of one
    state: tuple[object, ...]
    value: Tensor


@dataclass
class _Modulations:
    """What layers made of one class embedding; `copy`: of one that counts no versions, to compare it with."""

    copy: Tensor | None
    of: dict[nn.Module, _Made] = field(default_factory=dict)
    asked: set[nn.Module] = field(default_factory=set)  # since the last comparison

    def changed(self, cond: Tensor, layer: nn.Module) -> bool:
        """Whether an embedding without versions has other values than it had.

        On a CPU at every call: 2 µs of 100 and more that the layer takes. A GPU would be waited for, so there once a
        pass over the model's layers: a layer that was asked before begins another.
        """
        if self.copy is None or (cond.device.type != "cpu" and layer not in self.asked):
            return False
        self.asked.clear()
        return not torch.equal(cond, self.copy)


_made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # class embedding → its _Modulations
_REPEATABLE = {nn.Sequential, nn.Identity, nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Linear}


@torch.compiler.disable
def made_once(layer: nn.Module, cond: Tensor, *, anew: bool = False) -> Tensor:
    """layer(cond), once for each `cond`: a generation asks for it at every scale, with one and the same tensor.

    Forgotten with the tensor; made anew when it or the weights have changed, at a generation's start (`anew`), and
    always where that cannot be known: weights that count no versions, layers other than linear ones and activations,
    a CUDA graph under capture (which would not hold the layer).
    """
    weights = tuple(layer.parameters())
    repeatable = all(type(m) in _REPEATABLE and "forward" not in vars(m) for m in layer.modules())
    if not repeatable or any(w.is_inference() for w in weights) or capturing(cond.device):
        return layer(cond)
    without_version = cond.is_inference()
    known: _Modulations | None = _made.get(cond)
    if known is None or known.changed(cond, layer):
        known = _made[cond] = _Modulations(cond.clone() if without_version else None)
    known.asked.add(layer)
    autocast = torch.is_autocast_enabled(cond.device.type), torch.get_autocast_dtype(cond.device.type)
    counted = weights if without_version else (cond, *weights)
    state = (*((id(t), t._version, t.data_ptr()) for t in counted), autocast)
    before = known.of.get(layer)
    if anew or before is None or before.state != state:
        before = known.of[layer] = _Made(weights, state, layer(cond))
    return before.value
