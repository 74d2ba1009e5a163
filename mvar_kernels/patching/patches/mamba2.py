"""mamba_ssm's Mamba2 layer."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

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
        if not hasattr(module, "_get_states_from_cache"):  # as in Mamba2Simple
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
        conv, norm = self.conv1d, self.norm
        parameters = (conv.weight.flatten(1), conv.bias, self.dt_bias, self.A_log, self.D, norm.weight)
        return mamba2_mixer(zxbcdt, *parameters, eps=norm.eps, state=state)
