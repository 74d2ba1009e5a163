"""The patches that `accelerate` applies: the same computation as a module of VAR or mamba_ssm, on the kernels.

A patch is a mixin: `accelerate` sets the class of a module to a subclass of the patch and of the module's own class
(api.py), so that `super().forward` is the original forward, which runs wherever the kernels do not support a call. A
patch defines the attributes by which a module is recognized, the sizes and options that it does not support, and the
calls by which it is compared with the original.

Some submodules are read but not called, or called with other inputs, so that hooks on them would have no effect. Every
call checks that they have not changed since the comparison, and otherwise runs the original forward.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.ops.mamba2.mixer import Mamba2State, mamba2_mixer
from mvar_kernels.ops.scale_attention.op import scale_attention
from mvar_kernels.patching.cache import cached_call, schedule_of
from mvar_kernels.validation import accumulator

Randn = Callable[..., Tensor]
"""randn(*shape): normal inputs of the comparison, the same for original and patched module."""


class Patch:
    """A mixin in front of the original class."""

    ops: ClassVar[str]
    """the ops that run instead"""
    arguments: ClassVar[str]
    """of the original forward"""
    attributes: ClassVar[tuple[str, ...]]
    """by which a module is recognized"""
    bypassed: ClassVar[tuple[str, ...]] = ()
    """submodules that are not called, or with other inputs"""
    unpatched: ClassVar[dict[str, str]] = {}
    """submodules that stay as they are, and why"""

    # Of the subclass of a patch and an original class (api.py):
    original: ClassVar[type]
    original_forward: ClassVar[Any]
    checked: ClassVar[dict[str, tuple[type, bool]]]
    """name → :func:`kind_of` of the bypassed submodules at the time of the comparison"""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Why this module cannot be patched: a size or an option that the kernels do not support; or None."""
        raise NotImplementedError

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        """Outputs of calls by which original and patched module are compared."""
        raise NotImplementedError

    def is_valid(self: Any) -> bool:
        """Whether forward and bypassed submodules are as they were at the comparison. Takes 2 µs."""
        if self.original.forward is not self.original_forward or has_global_hooks():
            return False
        children = self._modules
        for name, kind in self.checked.items():
            child = children.get(name)
            if child is None or kind_of(child) != kind or has_hooks(child):
                return False
        return True


def has_global_hooks() -> bool:
    """Whether there are hooks for all modules, or transforms that patches do not support: torch.func, forward mode."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def kind_of(module: nn.Module) -> tuple[type, bool]:
    """A module's class, and whether it has a weight: a LayerNorm may have none."""
    return type(module), module._parameters.get("weight") is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, or a forward on the instance."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


class Attention(Patch):
    """Multi-head attention over the own scale and all coarser ones, with its key/value cache.

    The cache keeps the layout and the normalized keys of the original, so that calls with and without the kernel can
    alternate (with the cache on, a call with a mask runs the original forward), and programs can copy, slice or expand
    it.
    """

    ops, arguments = "scale_attention, causal", "x, attn_bias"
    attributes = ("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "kv_caching", "caching")
    bypassed = ("mat_qkv",)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        H, D, C = module.num_heads, module.head_dim, module.q_bias.numel()
        if not _linear(module.mat_qkv, C, 3 * C) or not _linear(module.proj, C, C) or H * D != C:
            return f"mat_qkv and proj: expected linear layers C→3C and C→C with C={C} of {H} heads of {D}"
        temperature = getattr(module, "scale_mul_1H11", None)
        if module.attn_l2_norm and (temperature is None or temperature.numel() != H):
            return f"scale_mul_1H11: expected one number for each of {H} heads, as attn_l2_norm is on"
        return None

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        C = module.q_bias.numel()
        module.kv_caching(False)
        x = randn(2, 5, C)
        yield module(x, attn_bias=_mask(x))
        yield module(x, attn_bias=None)
        # Large scores and a longer sequence, for modules that limit scores or attend to a window.
        x = randn(1, 64, C)
        yield module(x, attn_bias=_mask(x))
        yield module(8 * x, attn_bias=_mask(x))
        module.kv_caching(True)
        yield module(x[:, :1], attn_bias=None)
        yield module(x[:, 1:], attn_bias=None)
        yield from (module.cached_k, module.cached_v)
        module.kv_caching(False)

    def forward(self: Any, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        scales = self._schedule(x, attn_bias)
        if scales is None:
            out: Tensor = super().forward(x, attn_bias)  # type: ignore[misc]
            return out
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(2)
        if self.caching:
            k, v = self._cached(k, v)
            earlier = k.shape[1] - x.shape[1]
            scales = (earlier, *scales) if earlier else scales
        temperature = self.scale_mul_1H11.flatten() if self.attn_l2_norm else None
        attended = scale_attention(
            q, k, v, scales, pattern="causal", scale=float(self.scale), log_temperature=temperature
        )
        return self.proj_drop(self.proj(attended.flatten(2)))

    def _schedule(self: Any, x: Tensor, attn_bias: Tensor | None) -> tuple[int, ...] | None:
        """Tokens per scale of a call that the kernel supports, else None."""
        dropped = self.training and self.attn_drop > 0
        masked = self.caching and attn_bias is not None
        if dropped or masked or not x.numel() or not self.is_valid():
            return None
        scales = (x.shape[1],) if attn_bias is None else schedule_of(attn_bias)
        return scales if scales is not None and sum(scales) == x.shape[1] else None

    def _cached(self: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values to the cache and return all of it, (B, L, H, D).

        The kernel normalizes the cached, normalized keys again, which changes them by a rounding.
        """
        dtype = k.dtype
        # FoundationVision/VAR caches (B, L, H, D) for flash-attn and xformers, and else (B, H, L, D).
        of_flash = getattr(self, "using_flash", False) and dtype != torch.float32
        heads_first = not (of_flash or getattr(self, "using_xform", False))
        if self.attn_l2_norm:
            k = F.normalize(k, dim=-1)
        if heads_first:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.cached_k is not None:
            tokens = 2 if heads_first else 1
            k, v = torch.cat((self.cached_k, k), tokens), torch.cat((self.cached_v, v), tokens)
        self.cached_k, self.cached_v = k, v
        if heads_first:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return k.to(dtype), v.to(dtype)  # under autocast a norm is float32


class Block(Patch):
    """Attention and feed-forward network, each behind an adaLN and a gate, from one six-fold modulation."""

    ops, arguments = "adaln and gated_adaln", "x, cond_BD, attn_bias"
    attributes = ("attn", "ffn", "ln_wo_grad", "drop_path")
    bypassed = ("ln_wo_grad", "drop_path")
    unpatched = {"ffn": "its two linear layers are the library's own already"}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        C = _width(module.ln_wo_grad)
        if C is None:
            return "ln_wo_grad: expected a LayerNorm over the channels without weights"
        if hasattr(module, "ada_gss"):
            shape = tuple(module.ada_gss.shape)
            return None if shape == (1, 1, 6, C) else f"ada_gss: expected shape {(1, 1, 6, C)}, got {shape}"
        return _modulation_unsupported(module, 6 * C)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        C = module.ln_wo_grad.normalized_shape[0]
        if hasattr(module.attn, "kv_caching"):
            module.attn.kv_caching(False)
        cond = randn(2, 1, 6, C) if hasattr(module, "ada_gss") else randn(2, module.ada_lin[-1].in_features)
        x = randn(2, 5, C)
        yield module(x=x, cond_BD=cond, attn_bias=_mask(x))

    def forward(self: Any, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        if not x.numel() or not self.is_valid():
            out: Tensor = super().forward(x, cond_BD, attn_bias)  # type: ignore[misc]
            return out
        if hasattr(self, "ada_gss"):
            six = self.ada_gss + cond_BD  # (B, 1, 6, C)
        else:
            generating = getattr(self.attn, "caching", False) and not torch.is_grad_enabled()
            first_scale = getattr(self.attn, "cached_k", None) is None
            output = cached_call(self.ada_lin, cond_BD, refresh=first_scale) if generating else self.ada_lin(cond_BD)
            six = output.view(-1, 1, 6, x.shape[-1])
        x = x.to(torch.promote_types(six.dtype, x.dtype))
        g1, g2, s1, s2, t1, t2 = six.to(x.dtype).expand(len(x), -1, -1, -1).unbind(2)  # (B, 1, C) each
        eps = self.ln_wo_grad.eps
        h = adaln(x, s1[:, 0], t1[:, 0], eps=eps)
        branch = self.attn(h, attn_bias=attn_bias).to(x.dtype)
        # Stochastic depth scales the branch of a sample; with the same random numbers it can scale the gate instead.
        x, h = gated_adaln(x, branch, self.drop_path(g1)[:, 0], s2[:, 0], t2[:, 0], eps=eps)
        return torch.addcmul(x, self.ffn(h).to(x.dtype), self.drop_path(g2))


class HeadNorm(Patch):
    """The adaLN before the head."""

    ops, arguments = "adaln", "x_BLC, cond_BD"
    attributes = ("ada_lin", "ln_wo_grad")
    bypassed = ("ln_wo_grad",)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        C = _width(module.ln_wo_grad)
        if C is None:
            return "ln_wo_grad: expected a LayerNorm over the channels without weights"
        return _modulation_unsupported(module, 2 * C)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        yield module(randn(2, 5, module.ln_wo_grad.normalized_shape[0]), randn(2, module.ada_lin[-1].in_features))

    def forward(self: Any, x_BLC: Tensor, cond_BD: Tensor) -> Tensor:
        if not x_BLC.numel() or not self.is_valid():
            out: Tensor = super().forward(x_BLC, cond_BD)  # type: ignore[misc]
            return out
        scale, shift = self.ada_lin(cond_BD).chunk(2, -1)
        x_BLC = x_BLC.to(torch.promote_types(scale.dtype, x_BLC.dtype))
        scale, shift = (t.to(x_BLC.dtype).expand(len(x_BLC), -1) for t in (scale, shift))
        return adaln(x_BLC, scale, shift, eps=self.ln_wo_grad.eps)


class Mamba2(Patch):
    """mamba_ssm's Mamba2 layer, with its inference cache, from which any number of new tokens continues."""

    ops, arguments = "mamba2_mixer", "u, …"
    attributes = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "out_proj", "d_state", "headdim")
    bypassed = ("conv1d", "norm", "act")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        expected = {
            "ngroups": 1,
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
            "dt_limit": (0.0, float("inf")),
            "process_group": None,
            "d_ssm": module.d_inner,
        }
        for name, value in expected.items():
            if getattr(module, name) != value:
                return f"{name}: expected {value}, got {getattr(module, name)}"
        E, H, N = module.d_inner, module.nheads, module.d_state
        if module.in_proj.out_features != 2 * E + 2 * N + H or module.conv1d.bias is None:
            return f"in_proj and conv1d: expected {2 * E + 2 * N + H} features and a bias"
        return None

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        u = randn(2, 5, module.in_proj.in_features)
        yield module(u)
        module.layer_idx = 0
        cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        with torch.no_grad():
            yield module(u[:, :4], inference_params=cache)
            cache.seqlen_offset = 4
            yield module(u[:, 4:], inference_params=cache)
        yield from cache.key_value_memory_dict[0]

    def forward(self: Any, u: Tensor, *others: Any, **options: Any) -> Tensor:
        inference_params = options.get("inference_params")
        supported = not others and u.numel() > 0 and self.is_valid()
        if not supported or any(value is not None for name, value in options.items() if name != "inference_params"):
            out: Tensor = super().forward(u, *others, **options)  # type: ignore[misc]
            return out
        if inference_params is None:
            return self.out_proj(self._mixed(self.in_proj(u), None)[0])
        conv_state, ssm_state = self._get_states_from_cache(inference_params, u.shape[0])
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        return self.step(u, conv_state, ssm_state)[0]

    def step(self: Any, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens (B, L, C) from its cache, which is updated in place: conv_state (B, E+2N, width) has one row more
        than the convolution needs."""
        if not self.is_valid():
            out: tuple[Tensor, Tensor, Tensor] = super().step(hidden_states, conv_state, ssm_state)  # type: ignore[misc]
            return out
        zxbcdt = self.in_proj(hidden_states)
        rows = torch.cat((conv_state.transpose(1, 2), zxbcdt[..., self.d_inner : -self.nheads]), 1)
        before = Mamba2State(
            conv_state[..., 1:].transpose(1, 2).to(zxbcdt.dtype), ssm_state.to(accumulator(zxbcdt.dtype))
        )
        y, after = self._mixed(zxbcdt, before)
        conv_state.copy_(rows[:, -conv_state.shape[-1] :].transpose(1, 2))
        ssm_state.copy_(after.ssm)
        return self.out_proj(y), conv_state, ssm_state

    def _mixed(self: Any, zxbcdt: Tensor, state: Mamba2State | None) -> tuple[Tensor, Mamba2State]:
        conv, norm = self.conv1d, self.norm
        parameters = (conv.weight.flatten(1), conv.bias, self.dt_bias, self.A_log, self.D, norm.weight)
        return mamba2_mixer(zxbcdt, *parameters, eps=norm.eps, state=state)


PATCHES: tuple[type[Patch], ...] = (Attention, Block, HeadNorm, Mamba2)
"""The first whose attributes a module has is its patch."""


def _mask(x: Tensor) -> Tensor:
    """VAR's attention mask for the scales (1, L − 1)."""
    mask = x.new_zeros(x.shape[1], x.shape[1])
    mask[0, 1:] = -torch.inf
    return mask[None, None]


def _linear(layer: Any, inputs: int, outputs: int) -> bool:
    return isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (inputs, outputs)


def _width(norm: Any) -> int | None:
    """Channels of a LayerNorm without weights over the last dimension, else None."""
    supported = isinstance(norm, nn.LayerNorm) and not norm.elementwise_affine and len(norm.normalized_shape) == 1
    return norm.normalized_shape[0] if supported else None


def _modulation_unsupported(module: Any, features: int) -> str | None:
    last = module.ada_lin[-1] if isinstance(getattr(module, "ada_lin", None), nn.Sequential) else None
    if isinstance(last, nn.Linear) and last.out_features == features:
        return None
    return f"ada_lin: expected a Sequential that ends in a linear layer of {features} features"
