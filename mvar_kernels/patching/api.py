"""accelerate and restore: swap the slow parts of somebody else's live model for the kernels, in place.

A module is recognized by the names of its parameters and options, whatever repository it is from, and then checked
(equivalence.py): a copy with random weights and its patched version get the same inputs and random numbers, in
evaluation and in training mode, and the module is patched only if outputs and gradients agree.

To patch a module is to set its `__class__` to a subclass of its class (as torch's parametrizations do): parameters,
buffers, hooks, names and the state dict stay, and `restore` sets the class back. All modules are checked before the
first is patched.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from mvar_kernels.dispatch import PREFERENCE, unavailable
from mvar_kernels.patching.class_swap import with_ancestor
from mvar_kernels.patching.equivalence import Trials
from mvar_kernels.patching.modules import REPLACEMENTS, Replacement, has_hooks, kind_of, observed


@dataclass(frozen=True)
class Report:
    """What `accelerate` did, by the names of the modules: what was replaced and by what; what was left and why."""

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {names}: by {what}" for names, what in _grouped(self.replaced)]
        return "\n".join(lines + [f"left {names}: {why}" for names, why in _grouped(self.left)])


def accelerate(model: nn.Module) -> Report:
    """Put the kernels in the place of the parts of a model that they know, and say what was done.

    Known are attention (`mat_qkv`, `q_bias`, `v_bias`, `proj`, `kv_caching`, …), blocks (`attn`, `ffn`, `ln_wo_grad`
    with `ada_lin` or `ada_gss`) and the norm before the head as FoundationVision/VAR has them, and mamba_ssm's
    Mamba2. They keep their parameters and their state dict; outputs and gradients stay the same up to rounding, in
    training and in generation with their caches. Move the model to its device before: it is tried there, and call it
    before `fully_shard`. The trials run on copies with random weights; random numbers and settings of the program stay
    what they are, and if anything is raised, no part has been replaced.

    To save an accelerated model, save its state dict, or :func:`restore` it before: whole-module pickles would name
    classes that are made on the fly.

    Raises:
        TypeError: `model` is not a module.
    """
    _check("accelerate", model)
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    classes: list[tuple[nn.Module, type]] = []
    trials = Trials()
    for name, part in model.named_modules():  # parents before children
        replacement = _candidate(part)
        if replacement is None:
            continue
        if isinstance(part, Replacement):
            why = _bypass_unsupported(part, replacement) or "its class, or that of a child, has changed"
            reason = None if part.as_tried() else f"accelerated, but it goes the old way: {why}"
        else:
            reason = _unsupported(part, replacement, trials)
            if reason is None:
                classes.append((part, _accelerated(part, replacement)))
        if reason is not None:
            left[name] = reason
            continue
        replaced[name] = replacement.what
        left |= {f"{name}.{child}".lstrip("."): why for child, why in replacement.left.items()}
    for part, cls in classes:
        part.__class__ = cls
    if hasattr(type(model), "autoregressive_infer_cfg") and replaced:
        left["autoregressive_infer_cfg"] = "its draws are torch's; sample_tokens would give other, equally good ones"
    if not replaced and not left:
        left[type(model).__name__] = "it has no part that looks like VAR's attention, block or norm, or like Mamba2"
    return Report(replaced, left)


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every part has its own class again, and what others have put on top of it stays.

    Raises:
        TypeError: `model` is not a module.
    """
    _check("restore", model)
    made: dict[type, type] = {}
    for part in model.modules():
        if isinstance(part, Replacement):
            accelerated = next(cls for cls in type(part).__mro__ if "original_forward" in vars(cls))
            part.__class__ = with_ancestor(type(part), accelerated, part.original, made)


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function}: model: expected a torch.nn.Module, got {got}")


_classes: dict[tuple[Any, ...], type] = {}


def _accelerated(part: nn.Module, replacement: type[Replacement]) -> type:
    """The part's class with the replacement in it: one for all parts of a kind, so that torch.compile meets one.

    Below parametrizations, which have to be on top: they take themselves off again.
    """
    original: Any = type_before_parametrizations(part) if is_parametrized(part) else type(part)
    children = {name: part._modules.get(name) for name in replacement.bypassed}
    tried = {name: kind_of(child) for name, child in children.items() if child is not None}
    key = (replacement, original, original.forward, *tried.items())
    if key not in _classes:
        record = {"original": original, "original_forward": staticmethod(original.forward), "tried": tried}
        _classes[key] = type(f"Accelerated{original.__name__}", (replacement, original), record)
    return with_ancestor(type(part), original, _classes[key], {})


def _candidate(part: nn.Module) -> type[Replacement] | None:
    """The replacement whose names the part has, or that it has already."""
    for replacement in REPLACEMENTS:
        try:
            if isinstance(part, replacement) or all(hasattr(part, name) for name in replacement.names):
                return replacement
        except Exception:  # somebody else's property, which raises what it likes: it is none of VAR's
            continue
    return None


def _unsupported(part: nn.Module, replacement: type[Replacement], trials: Trials) -> str | None:
    """Why the part stays what it is, or None; the cheapest questions first."""
    try:
        reason = _call_unsupported(part, replacement) or _bypass_unsupported(part, replacement)
        reason = reason or replacement.unsupported_reason(part) or _no_kernel(part)
        return reason or trials.difference(part, replacement, _accelerated(part, replacement))
    except Exception as error:  # somebody else's code: whatever it raises is a reason to leave it
        return f"it lacks what is asked of such a part: {type(error).__name__}: {error}".rstrip(": ")


def _call_unsupported(part: nn.Module, replacement: type[Replacement]) -> str | None:
    """Why the part is called in another way than the replacement, or None."""
    if "forward" in vars(part):
        return "its forward has been replaced already, on the instance"
    if any(cls.__name__ == "FSDPModule" for cls in type(part).__mro__):
        return "it is sharded: accelerate before fully_shard"
    arguments = list(inspect.signature(type(part).forward).parameters)[1:]
    wanted, ellipsis, _ = replacement.takes.partition(", …")
    taken = ", ".join(arguments[: len(wanted.split(", "))] if ellipsis else arguments)
    return None if taken == wanted else f"its forward takes ({', '.join(arguments)}), not ({replacement.takes})"


def _bypass_unsupported(part: Any, replacement: type[Replacement]) -> str | None:
    """What a replacement would hide: which child that it does not call does more than its class says. Or None."""
    if observed():
        return "there are global hooks, torch.func or forward-mode differentiation at work, which want the original"
    for name in replacement.bypassed:
        child = part._modules.get(name)
        if child is not None and has_hooks(child):
            return f"its {name} has hooks or a forward of its own, which the kernels would not call"
    return None


def _no_kernel(part: nn.Module) -> str | None:
    """Why no kernel but the reference runs on the part's device, or None."""
    first = next(part.parameters(), None)
    if first is None:
        return "it has no parameters"
    device = first.device
    kernels = [name for name in PREFERENCE.get(device.type, ()) if name != "reference"]
    reasons = {name: unavailable(name) for name in kernels}
    if any(reason is None for reason in reasons.values()):
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"no kernel for its device {device}" + (f" ({why})" if why else "")


def _grouped(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names that differ in their numbers alone and have the same text, in one line: ("blocks.*.attn (16)", text)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in texts.items():
        groups.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    return [(names[0] if len(names) == 1 else f"{same} ({len(names)})", text) for (same, text), names in groups.items()]
