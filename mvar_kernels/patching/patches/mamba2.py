"""mamba_ssm's Mamba2 layer."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mvar_kernels.ops.adaln.op import adaln
from mvar_kernels.ops.mamba2.mixer import Mamba2State, mamba2_mixer
from mvar_kernels.patching.patches.base import Patch, Randn
from mvar_kernels.validation import accumulator

LONGEST = 300
"""Tokens of the longest call of a comparison: more than one of mamba_ssm's chunks of 256."""


class Mamba2(Patch):
    """A Mamba-2 layer with its inference cache, from which any number of new tokens continues."""

    ops = "mamba2_mixer"
    attributes = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "out_proj", "d_state", "headdim")
    required, optional = ("u",), ("inference_params",)
    bypassed = ("conv1d", "norm", "act")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        H, G, N, P = module.nheads, module.ngroups, module.d_state, module.headdim
        E = module.d_inner
        for name, expected in (("process_group", None), ("d_ssm", E), ("learnable_init_states", False)):
            if getattr(module, name, expected) != expected:
                return f"{name}: expected {expected}, got {getattr(module, name)}"
        if getattr(module, "activation", "silu") not in ("silu", "swish"):
            return f"activation: expected silu or swish, got {module.activation}"
        features, channels = 2 * E + 2 * G * N + H, E + 2 * G * N
        if module.in_proj.out_features != features or module.conv1d.in_channels != channels or H * P != E:
            return f"in_proj and conv1d: expected {features} features and {channels} channels, and {H} heads of {P}"
        return None

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        u = randn(2, 5, module.in_proj.in_features)
        yield module(u)
        # mamba_ssm's step takes one group without Triton; Mamba2Simple has no cache
        if module.ngroups > 1 or not _has_supported_step(module):
            return
        module.layer_idx = 0
        cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        with torch.no_grad():
            yield module(u[:, :4], inference_params=cache)
            cache.seqlen_offset = 4
            yield module(u[:, 4:], inference_params=cache)
        yield from cache.key_value_memory_dict[0]

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        yield module(randn(1, min(length, LONGEST), module.in_proj.in_features))

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        if values is None or not values["u"].numel():
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        u, inference_params = values["u"], values.get("inference_params")
        if inference_params is None:
            return self.resumed(u, None)[0]
        if not _has_supported_step(self):
            return super().forward(*args, **options)  # type: ignore[misc]
        conv_state, ssm_state = self._get_states_from_cache(inference_params, u.shape[0])
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        return self.step(u, conv_state, ssm_state)[0]

    def step(self: Any, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens (B, L, C) from its cache, which is updated in place: conv_state (B, E+2GN, width) has one row
        more than the convolution needs."""
        if not self.is_valid() or not _has_supported_step(self):
            out: tuple[Tensor, Tensor, Tensor] = super().step(hidden_states, conv_state, ssm_state)  # type: ignore[misc]
            return out
        zxbcdt = self.in_proj(hidden_states)
        rows = torch.cat((conv_state.transpose(1, 2), zxbcdt[..., self.d_inner : -self.nheads]), 1)
        y, after = self._mixed(zxbcdt, Mamba2State(conv_state[..., 1:].transpose(1, 2), ssm_state))
        conv_state.copy_(rows[:, -conv_state.shape[-1] :].transpose(1, 2))
        ssm_state.copy_(after.ssm)
        return self.out_proj(y), conv_state, ssm_state

    def resumed(self: Any, u: Tensor, state: Mamba2State | None) -> tuple[Tensor, Mamba2State]:
        """The layer's output for new tokens u (B, L, C) after those of `state` (None: none), and the new state."""
        y, state = self._mixed(self.in_proj(u), state)
        return self.out_proj(y), state

    def _mixed(self: Any, zxbcdt: Tensor, state: Mamba2State | None) -> tuple[Tensor, Mamba2State]:
        if state is not None:
            state = Mamba2State(state.conv.to(zxbcdt.dtype), state.ssm.to(accumulator(zxbcdt.dtype)))
        conv, norm = self.conv1d, self.norm if getattr(self, "rmsnorm", True) else None
        D = self.D.view(self.nheads, -1) if getattr(self, "D_has_hdim", False) else self.D
        options = {
            "ngroups": self.ngroups,
            "dt_limit": None if _has_no_limit(self) else tuple(self.dt_limit),
            "norm_before_gate": getattr(self, "norm_before_gate", False),
        }
        # Mamba2Simple's norm is over all channels, whatever the number of groups, except in its fused path.
        fused = getattr(self, "use_mem_eff_path", False)
        size = self.d_inner if norm is None else getattr(norm, "group_size", None) or self.d_inner
        over_all = norm is not None and self.ngroups > 1 and size == self.d_inner and not fused
        weight, eps = (None, 1e-5) if norm is None else (norm.weight, norm.eps)
        parameters = (conv.weight.flatten(1), conv.bias, self.dt_bias, self.A_log, D)
        y, state = mamba2_mixer(zxbcdt, *parameters, None if over_all else weight, eps=eps, state=state, **options)
        return adaln(y, norm="rms", weight=weight, eps=eps) if over_all else y, state


def _has_no_limit(module: Any) -> bool:
    return tuple(module.dt_limit) == (0.0, float("inf"))


def _has_supported_step(module: Any) -> bool:
    """Whether the layer has a cache, and its step the options of its forward: mamba_ssm's has neither `dt_limit` nor a
    D for each channel."""
    has_cache = hasattr(module, "_get_states_from_cache")
    return has_cache and _has_no_limit(module) and not getattr(module, "D_has_hdim", False)
