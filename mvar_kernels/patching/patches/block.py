"""Blocks: branches, each behind an adaLN and a gate whose vectors come from one modulation layer."""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.ops.mamba2.mixer import Mamba2State
from mvar_kernels.patching.cache import cached_call, version_of
from mvar_kernels.patching.patches.base import (
    NORM_EXPECTED,
    Patch,
    Randn,
    argument_names,
    has_hooks,
    lacks_gradient,
    modulation_unsupported,
    norm_options,
    norm_width,
    roll_tokens,
    scale_options,
)
from mvar_kernels.patching.patches.mamba2 import Mamba2
from mvar_kernels.patching.patches.rotary import context_options


class ModulatedBlock(Patch):
    """What the blocks share. Stochastic depth scales the branch of a sample; with the same random numbers it scales
    the gate instead."""

    ops = "adaln and gated_adaln"
    required: ClassVar[tuple[str, ...]] = ("x", "cond_BD", "attn_bias")
    optional: ClassVar[tuple[str, ...]] = (
        *("using_block_sparse_attn", "si", "context_position_ids", "context_mask", "m_maskgit"),
    )
    bypassed: ClassVar[tuple[str, ...]] = ("ln_wo_grad", "drop_path")
    unpatched = {"ffn": "its two linear layers are the library's own already"}
    attention: ClassVar[str] = "attn"
    """name of the submodule"""
    vectors: int
    """modulation vectors: gates, then scales, then shifts"""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        C = norm_width(module.ln_wo_grad)
        if C is None:
            return NORM_EXPECTED
        if getattr(module, "cross_attn", None) is not None:
            return "cross_attn: expected none"
        if "attn_bias" in cls.required and "attn_bias" not in argument_names(module._modules[cls.attention]):
            return f"{cls.attention}: expected a forward with an argument attn_bias"
        for name, expected in (("ada_gss", (1, 1, cls.vectors, C)), ("scale_shift_table", (cls.vectors, C))):
            if hasattr(module, name):
                shape = tuple(getattr(module, name).shape)
                return None if shape == expected else f"{name}: expected shape {expected}, got {shape}"
        return modulation_unsupported(module, cls.vectors, C)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        x, cond = cls._inputs(module, randn, 2, 5)
        if hasattr(module.attn, "kv_caching"):
            module.attn.kv_caching(False)
        if isinstance(getattr(module.attn, "patch_nums", None), tuple):  # for a position embedding of all scales
            module.attn.patch_nums = (1, 2)
        options = context_options(module.attn, 2)
        if options:  # a text of three tokens instead of the first scale, which gives the condition
            x, cond = torch.cat((x, x[:, :2]), 1), torch.stack((cond, 2 * cond.roll(1, 0), cond.roll(1, 1)), 1)
            options["context_mask"] = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.int64, device=x.device)
        yield module(x=x, cond_BD=cond, attn_bias=None, **options)
        yield x.new_tensor(_runs_under_autocast(module, x=x, cond_BD=cond, attn_bias=None, **options))

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        x, cond = cls._inputs(module, randn, 1, length)
        roll_tokens(module.attn, module.ffn)
        for options in scale_options(module):
            yield module(x=x, cond_BD=cond, attn_bias=None, **options)

    @classmethod
    def _inputs(cls, module: Any, randn: Randn, batch: int, length: int) -> tuple[Tensor, Tensor]:
        C = norm_width(module.ln_wo_grad)
        shape = (1, cls.vectors, C) if hasattr(module, "ada_gss") else (C,)
        cond = randn(batch, *((module.ada_lin[-1].in_features,) if hasattr(module, "ada_lin") else shape))
        return randn(batch, length, C), cond

    def _modulation(self: Any, cond: Tensor, *, generating: bool, first_scale: bool) -> Tensor:
        """(B or 1, 1, vectors, C)"""
        if hasattr(self, "ada_gss"):
            shared: Tensor = self.ada_gss + cond
            return shared
        if hasattr(self, "scale_shift_table"):
            return (self.scale_shift_table + cond[:, None])[:, None]
        output = cached_call(self.ada_lin, cond, refresh=first_scale) if generating else self.ada_lin(cond)
        return output.view(-1, 1, self.vectors, output.shape[-1] // self.vectors)

    def supported_arguments(self: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any] | None:
        """As of a patch; what attention does not name as an argument, as a wrapper, has to be at its default. None also
        for a modulation of another batch or per token."""
        values: dict[str, Any] | None = super().supported_arguments(args, options)
        if values is None:
            return None
        taken, of_attention = argument_names(self._modules[self.attention]), ("attn_bias", *self.optional)
        lost = (name for name in of_attention if name in values and name not in taken)
        cond = values["cond_BD"]
        if any(name not in self.defaults or values[name] is not self.defaults[name] for name in lost):
            return None
        if not isinstance(cond, Tensor) or len(cond) not in (1, len(values["x"])):
            return None
        per_token = hasattr(self, "ada_gss") and cond.dim() == 4 and cond.shape[1] != 1
        return None if per_token else values

    def _attended(self: Any, h: Tensor, values: dict[str, Any]) -> Tensor:
        taken = argument_names(self.attn)
        options = {name: values[name] for name in ("attn_bias", *self.optional) if name in values and name in taken}
        out: Tensor = self.attn(h, **options)
        return out


class Block(ModulatedBlock):
    """Attention and feed-forward network: FoundationVision/VAR and its forks, ControlVAR, HMAR, Markov-VAR, HART."""

    attributes = ("attn", "ffn", "ln_wo_grad", "drop_path")
    vectors = 6

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        cond = None if values is None or lacks_gradient(self.ln_wo_grad) else self._condition(values)
        if values is None or cond is None or not values["x"].numel():
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        generating = getattr(self.attn, "caching", False) and not torch.is_grad_enabled() and cond is values["cond_BD"]
        first_scale = getattr(self.attn, "cached_k", None) is None
        six = self._modulation(cond, generating=generating, first_scale=first_scale)
        x, (g1, g2, s1, s2, t1, t2) = in_common_dtype(values["x"], six)
        norm = norm_options(self.ln_wo_grad, x.dtype)
        branch = self._attended(adaln(x, s1[:, 0], t1[:, 0], **norm), values)
        x, h = gated_adaln(x, beside(x, branch), self.drop_path(g1)[:, 0], s2[:, 0], t2[:, 0], **norm)
        return torch.addcmul(x, self.ffn(h).to(x.dtype), self.drop_path(g2))

    def _condition(self: Any, values: dict[str, Any]) -> Tensor | None:
        """HART's condition (B, D) of text tokens (B, n, D): their mean where the mask is set, or their maximum. None
        for what the original does not accept; others' conditions as they are."""
        cond: Tensor = values["cond_BD"]
        if "context_mask" not in values or cond.dim() == 2:
            return cond
        mode, mask = "avg" if hasattr(self, "scale_shift_table") else self.sep_aln_pooling_mode, values["context_mask"]
        if cond.dim() != 3 or cond.shape[1] < 2 or mode not in ("avg", "max") or (mode == "avg" and mask is None):
            return None
        if mode == "max":
            return cond.max(1).values
        total = mask.sum(1).clamp(min=1)[:, None, None]
        return (cond * mask[..., None].to(cond.dtype) / total).sum(1)


class MambaBlock(ModulatedBlock):
    """Attention, Mamba-2 and feed-forward network: OliverRensu/MVAR.

    The original keeps the inputs of its mixer in `cache` in evaluation mode, and runs the mixer over all of them at
    every scale. Here the mixer continues from its state after the cached tokens, and `cache` stays what it was, so
    that calls with and without the kernels can alternate.
    """

    ops = "adaln and gated_adaln, the state of its mixer carried from scale to scale"
    attributes = ("attn", "mamba", "ffn", "ln_wo_grad", "drop_path")
    continued = ("mamba",)
    vectors = 9

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        if module.training:
            L = int(module.attn.patch_nums.sum()) if hasattr(module.attn, "patch_nums") else 5
            x, cond = cls._inputs(module, randn, 2, L)
            yield module(x=x, cond_BD=cond, attn_bias=None)
            yield x.new_tensor(_runs_under_autocast(module, x=x, cond_BD=cond, attn_bias=None))
            return
        x, cond = cls._inputs(module, randn, 2, 14)
        module.cache = None
        with torch.no_grad():
            for scale in x.split((1, 4, 9), 1):
                yield module(x=scale, cond_BD=cond, attn_bias=None)
        yield module.cache

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        module.cache = None
        roll_tokens(module.mamba)
        yield from super().long_calls(module, randn, length)

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        generating = not self.training
        if values is None or not values["x"].numel() or (generating and torch.is_grad_enabled()):
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        first_scale = generating and self.cache is None
        nine = self._modulation(values["cond_BD"], generating=generating, first_scale=first_scale)
        x, (g1, g2, g3, s1, s2, s3, t1, t2, t3) = in_common_dtype(values["x"], nine)
        norm = norm_options(self.ln_wo_grad, x.dtype)
        branch = self._attended(adaln(x, s1[:, 0], t1[:, 0], **norm), values)
        x, h = gated_adaln(x, beside(x, branch), self.drop_path(g1)[:, 0], s2[:, 0], t2[:, 0], **norm)
        branch = self._resumed(x, h, nine, s2, t2) if generating else self.mamba(h)
        x, h = gated_adaln(x, beside(x, branch), self.drop_path(g2)[:, 0], s3[:, 0], t3[:, 0], **norm)
        return torch.addcmul(x, self.ffn(h).to(x.dtype), self.drop_path(g3))

    def _resumed(self: Any, x: Tensor, h: Tensor, nine: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The mixer's output for the new tokens, whose adaLN is h, after those in `cache`, to which x is appended."""
        earlier = self.cache
        self.cache = x if earlier is None else torch.cat((earlier, x), 1)
        mamba: Any = self.mamba
        carried = isinstance(mamba, Mamba2) and mamba.is_valid() and not has_hooks(mamba)
        depends_on = (nine, *mamba.parameters())
        state = _state_after(earlier, depends_on) if carried and earlier is not None else None
        if earlier is not None and state is None:
            h = adaln(self.cache, scale[:, 0], shift[:, 0], **norm_options(self.ln_wo_grad, x.dtype))
        if carried:
            branch, state = mamba.resumed(h, state)
            _keep_state(self.cache, depends_on, state)
        else:
            branch = mamba(h)
        return branch[:, -x.shape[1] :]


class _Carried(NamedTuple):
    """The state of a mixer after the tokens of a MambaBlock's cache."""

    versions: tuple[tuple[int, ...], ...]
    depends_on: tuple[Tensor, ...]  # kept alive, so that no other tensor gets the memory of one
    state: Mamba2State


_carried: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cache → _Carried


@torch.compiler.disable
def _state_after(cache: Tensor, depends_on: tuple[Tensor, ...]) -> Mamba2State | None:
    """The state after the cached tokens, unless these, the modulation or the weights have changed since."""
    known: _Carried | None = _carried.get(cache)
    unchanged = known is not None and known.versions == tuple(map(version_of, (cache, *depends_on)))
    return known.state if known is not None and unchanged else None


@torch.compiler.disable
def _keep_state(cache: Tensor, depends_on: tuple[Tensor, ...], state: Mamba2State) -> None:
    _carried[cache] = _Carried(tuple(map(version_of, (cache, *depends_on))), depends_on, state)


def _runs_under_autocast(module: nn.Module, **arguments: Any) -> bool:
    """Whether a call runs where branches have 16 bits: a branch that turns autocast off cannot take an input of 16."""
    x = arguments["x"]
    try:
        with torch.autocast(x.device.type, torch.bfloat16), torch.no_grad():
            module(**arguments)
    except RuntimeError:
        return False
    return True


def in_common_dtype(x: Tensor, modulation: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x and the vectors of (B or 1, 1, vectors, C), each (B, 1, C), in the dtype that PyTorch promotes them to."""
    x = x.to(torch.promote_types(modulation.dtype, x.dtype))
    return x, modulation.to(x.dtype).expand(len(x), -1, -1, -1).unbind(2)


def beside(x: Tensor, branch: Tensor) -> Tensor:
    """A branch in a dtype that gated_adaln takes beside the residual stream x: its own under autocast, where it has 16
    bits and x is float32. The input of the next branch, whose linear layers take that dtype, then has it, too."""
    under_autocast = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
    return branch if under_autocast and branch.dtype.itemsize == 2 else branch.to(x.dtype)
