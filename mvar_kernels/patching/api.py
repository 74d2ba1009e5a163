"""accelerate and restore: patch the modules of a live VAR model to use the kernels, in place.

A module is recognized by the names of its parameters and options, whatever repository it is from, and then checked
(equivalence.py): a copy with random weights and its patched version get the same inputs and random numbers, in
evaluation and in training mode, and the module is patched only if outputs and gradients agree.

To patch a module is to set its `__class__` to a subclass of its class (as torch's parametrizations do): parameters,
buffers, hooks, names and the state dict stay, and `restore` sets the class back. All modules are checked before the
first is patched.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from mvar_kernels.dispatch import PREFERENCE, error_message, unavailable
from mvar_kernels.patching.class_swap import with_ancestor
from mvar_kernels.patching.equivalence import EquivalenceCheck
from mvar_kernels.patching.patches import PATCHES
from mvar_kernels.patching.patches.base import Patch, arguments_of, has_global_hooks, has_hooks, kind_of
from mvar_kernels.patching.patches.sampling import Sampling, methods_of, unsupported_reason
from mvar_kernels.patching.unrecognized import unrecognized_parts


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: name of module → the ops that replaced it, or why it was left as it is."""

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {names}: by {what}" for names, what in _grouped(self.replaced)]
        return "\n".join(lines + [f"left {names}: {why}" for names, why in _grouped(self.left)])


def accelerate(model: nn.Module, *, sampling: bool = False) -> Report:
    """Patch the modules of a model that the kernels support, and report what was done.

    Supported are attention, blocks and the norm before the head of FoundationVision/VAR and of its relatives (M-VAR,
    ControlVAR, HMAR, Markov-VAR, HART, Switti, Infinity and what is built on it: docs/accelerate.md), and mamba_ssm's
    Mamba2 and Mamba2Simple. They keep their parameters and their state dict; outputs and gradients stay the same up to
    rounding, in training and in generation with their caches. Call it when the model is on its device, and before
    `fully_shard`. Modules are checked on copies with random weights; random states and global settings stay what they
    are, and if an exception is raised, no module has been patched.

    With `sampling`, methods that call VAR's `sample_with_top_k_top_p_` sample with :func:`mvar_kernels.sample_tokens`
    instead: the same distribution without a sort, but other random numbers, so other images for a seed. The seed is
    taken from the generator that the method passes, once for each generation.

    To save an accelerated model, save its state dict, or call :func:`restore` before: a pickled module would refer to
    classes that are created at run time.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module("accelerate", model)
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    classes: dict[nn.Module, type] = {}
    check = EquivalenceCheck(model)
    for name, module in reversed(list(model.named_modules())):  # children before parents, which may need their patch
        patch = _patch_of(module)
        if patch is None:
            continue
        if isinstance(module, Patch):
            why = _bypass_unsupported(module, patch) or "its class, or that of a child, has changed"
            reason = None if module.is_valid() else f"accelerated, but the original forward runs: {why}"
        else:
            reason = _unsupported(module, patch, check, classes)
        if reason is None:
            replaced[name] = patch.ops
            left |= {f"{name}.{child}".lstrip("."): why for child, why in patch.unpatched.items()}
        else:
            left[name] = reason
    for module, cls in classes.items():
        module.__class__ = cls
    samplers = _patch_sampling(model, sampling)
    replaced |= {name: Sampling.ops for name, reason in samplers.items() if reason is None}
    left |= {name: reason for name, reason in samplers.items() if reason is not None}
    left |= unrecognized_parts(model, {**replaced, **left})
    if not replaced and not left:
        left[type(model).__name__] = "it has no part that looks like VAR's attention, block or norm, or like Mamba2"
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    replaced, left = (
        dict(sorted(d.items(), key=lambda item: order.get(item[0], len(order)))) for d in (replaced, left)
    )
    return Report(replaced, left)


_NOT_REQUESTED = "torch's generator gives its random numbers: sampling=True replaces it"


def _patch_sampling(model: nn.Module, requested: bool) -> dict[str, str | None]:
    """Patch the sampling of all modules that sample, if it is requested; name of a method → why not, or None."""
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        patched = isinstance(module, Sampling)
        methods = methods_of(type(module)).items()
        reasons = {key: unsupported_reason(m) if patched or requested else _NOT_REQUESTED for key, m in methods}
        if None in reasons.values() and not patched:
            module.__class__ = _patched_class(module, Sampling)
        found |= {f"{name}.{key}".lstrip("."): reason for key, reason in reasons.items()}
    return found


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module has its own class again; subclasses that were set later stay.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module("restore", model)
    new_classes: dict[type, type] = {}
    for module in model.modules():
        if isinstance(module, Patch):
            patched = next(cls for cls in type(module).__mro__ if "original_forward" in vars(cls))
            module.__class__ = with_ancestor(type(module), patched, module.original, new_classes)
            _rebind(module, patched)


def _rebind(module: nn.Module, patched: type) -> None:
    """Replace the patch's methods that other programs have kept on the instance, as those do that wrap a forward."""
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            method = value.__func__.__name__
            if value.__func__ is getattr(patched, method, None):
                vars(module)[name] = getattr(type(module), method).__get__(module)


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function}: model: expected a torch.nn.Module, got {got}")


_classes: dict[tuple[Any, ...], type] = {}


def _patched_class(module: nn.Module, patch: type[Patch]) -> type:
    """The module's class with the patch in it: one for all modules of a kind, so that torch.compile sees one class.

    Below the class of a parametrization, which has to be the most derived one to be removable.
    """
    original: Any = type_before_parametrizations(module) if is_parametrized(module) else type(module)
    children = {name: module._modules.get(name) for name in patch.bypassed}
    checked = {name: kind_of(child) for name, child in children.items() if child is not None}
    key = (patch, original, original.forward, *checked.items())
    if key not in _classes:
        names, defaults = arguments_of(original.forward)
        attributes = {
            "original": original,
            "original_forward": staticmethod(original.forward),
            "checked": checked,
            "names": names,
            "defaults": defaults,
            **patch.overrides(original),
        }
        _classes[key] = type(f"Accelerated{original.__name__}", (patch, original), attributes)
    return with_ancestor(type(module), original, _classes[key], {})


def _patch_of(module: nn.Module) -> type[Patch] | None:
    """The patch that the module has, or whose attributes it has."""
    for patch in PATCHES:
        try:
            if isinstance(module, patch) or patch.matches(module):
                return patch
        except Exception:  # of a property of the module's own code; VAR has none
            continue
    return None


def _unsupported(
    module: nn.Module, patch: type[Patch], check: EquivalenceCheck, classes: dict[nn.Module, type]
) -> str | None:
    """Why the module is not patched, the cheapest checks first; or None, and its new class is in `classes`."""
    try:
        reason = _call_unsupported(module, patch) or _bypass_unsupported(module, patch)
        reason = reason or patch.unsupported_reason(module) or _no_kernel(module)
        if reason is not None:
            return reason
        own = {"": _patched_class(module, patch)}
        children = {name: module._modules.get(name) for name in patch.continued}
        own |= {name: classes[child] for name, child in children.items() if child in classes}
        reason = check.difference(module, patch, own)
    except Exception as error:  # of the model's own code, which may raise anything
        return f"it lacks what such a module has: {error_message(error)}"
    if reason is None:
        classes[module] = own[""]
    return reason


def _call_unsupported(module: nn.Module, patch: type[Patch]) -> str | None:
    """Why the patch's forward cannot be called as the module's is, or None."""
    if "forward" in vars(module):
        return "its forward has been replaced already, on the instance"
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        return "it is sharded: accelerate before fully_shard"
    names, defaults = arguments_of(type(module).forward)
    known = set(patch.required) | set(patch.optional) | set(defaults)
    if set(patch.required) <= set(names) and known >= set(names):
        return None
    return f"its forward takes ({', '.join(names)}), not ({', '.join(patch.required)}) and arguments with a default"


def _bypass_unsupported(module: Any, patch: type[Patch]) -> str | None:
    """Which hooks, or forwards on instances, a patched module would not call, or None."""
    if has_global_hooks():
        return "there are global hooks, torch.func or forward-mode differentiation at work, which want the original"
    for name in patch.bypassed:
        child = module._modules.get(name)
        if child is not None and has_hooks(child):
            return f"its {name} has hooks or a forward of its own, which the kernels would not call"
    return None


def _no_kernel(module: nn.Module) -> str | None:
    """Why there is only the reference on the module's device, or None."""
    first = next(module.parameters(), None)
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
    """One line for names that differ only in numbers and have the same text: ("blocks.*.attn (16)", text)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in texts.items():
        groups.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    return [(names[0] if len(names) == 1 else f"{same} ({len(names)})", text) for (same, text), names in groups.items()]
