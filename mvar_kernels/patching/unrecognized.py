"""The parts of a model that no patch recognizes, so that the report of `accelerate` leaves none out."""

import re
from collections.abc import Mapping

from torch import nn

from mvar_kernels.patching.patches import Attention, Block, HeadNorm, Mamba2, Patch

_ATTENTION, _MIXER, _NORM = (
    re.compile(pattern, re.IGNORECASE)
    for pattern in ("attn|attention", "mamba|mixer|ssm", "layer_?norm|rms_?norm|adaln")
)
_UNMODULATED = "a norm without a modulation of its own: accelerate replaces those with one, and those of blocks"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def unrecognized_parts(model: nn.Module, reported: Mapping[str, str]) -> dict[str, str]:
    """Name → reason, of the attention, mixers, blocks and norms among the modules that are not reported yet.

    They are known by the names of their classes; a block is what contains attention or a mixer. Parts of attention
    that is replaced, and norms that are part of a reported module, are left out.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if not name or name in reported or isinstance(module, _CONTAINERS) or reported.get(parent) == Attention.ops:
            continue
        kind, children = type(module).__name__, [type(child).__name__ for child in module.children()]
        if any(_ATTENTION.search(child) or _MIXER.search(child) for child in children):
            found[name] = _lacking(module, "a block", Block)
        elif _MIXER.search(kind):
            found[name] = _lacking(module, "a mixer", Mamba2)
        elif _NORM.search(kind):
            if parent in reported:
                continue
            modulated = next(module.children(), None) is not None
            found[name] = _lacking(module, "an adaLN", HeadNorm) if modulated else _UNMODULATED
        elif _ATTENTION.search(kind):
            found[name] = _lacking(module, "attention", Attention)
    return found


def _lacking(module: nn.Module, what: str, patch: type[Patch]) -> str:
    lacking = [name for name in patch.attributes if not hasattr(module, name)]
    return f"{what} of a structure that accelerate does not know: it lacks {', '.join(lacking)}"
