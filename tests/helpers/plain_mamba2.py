"""A plain PyTorch Mamba-2 layer with the names, shapes and inference cache of mamba_ssm (state-spaces/mamba)."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedRMSNorm(nn.Module):
    def __init__(self, width: int, group_size: int | None = None, norm_before_gate: bool = False) -> None:
        super().__init__()
        self.eps, self.weight = 1e-5, nn.Parameter(torch.ones(width))
        self.group_size, self.norm_before_gate = group_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if self.norm_before_gate:
            return self._normalized(x) * F.silu(z)
        return self._normalized(x * F.silu(z))

    def _normalized(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group_size or x.shape[-1]))
        return F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class PlainMamba2(nn.Module):
    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        headdim: int = 32,
        layer_idx: int = 0,
        *,
        ngroups: int = 1,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        conv_bias: bool = True,
        group_size: int | None = -1,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, 4, headdim, ngroups
        self.d_inner = self.d_ssm = 2 * d_model
        self.nheads = self.d_ssm // headdim
        self.layer_idx, self.process_group = layer_idx, None
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.activation = dt_limit, "silu"
        channels = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(
            channels, channels, self.d_conv, groups=channels, padding=self.d_conv - 1, bias=conv_bias
        )
        self.dt_bias = nn.Parameter(torch.randn(self.nheads) - 2)
        self.A_log = nn.Parameter(torch.linspace(1, 16, self.nheads).log())
        self.D = nn.Parameter(torch.randn(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            size = self.d_ssm // ngroups if group_size == -1 else group_size
            self.norm = GatedRMSNorm(self.d_ssm, size, norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: SimpleNamespace | None = None,
    ) -> Tensor:
        """(B, L, C) → (B, L, C); states in a cache are updated in place."""
        if seqlen is not None:
            u = u.unflatten(0, (-1, seqlen))
        conv_state, ssm_state = self.allocate_inference_cache(len(u))
        if inference_params is not None:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, len(u))
            if inference_params.seqlen_offset > 0:
                return self.step(u, conv_state, ssm_state)[0]
            conv_state.zero_()
            ssm_state.zero_()
        out = self._run(u, conv_state, ssm_state)
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert hidden_states.shape[1] == 1
        return self._run(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def _run(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Process the tokens one by one, starting from the states, which are updated in place."""
        z, xbc, dt = self.in_proj(u).split([self.d_ssm, self.conv1d.in_channels, self.nheads], -1)
        rows = torch.cat([conv_state.transpose(1, 2), xbc], 1)  # (B, width + L, channels)
        convolved = F.silu(
            F.conv1d(rows[:, 1:].transpose(1, 2), self.conv1d.weight, self.conv1d.bias, groups=xbc.shape[-1])
        )
        widths = [self.d_ssm, self.ngroups * self.d_state, self.ngroups * self.d_state]
        x, B, C = convolved.transpose(1, 2).split(widths, -1)
        heads = self.nheads // self.ngroups
        B, C = (t.unflatten(-1, (self.ngroups, -1)).repeat_interleave(heads, 2) for t in (B, C))  # (B, L, H, N)
        x, dt = x.unflatten(-1, (self.nheads, -1)), F.softplus(dt + self.dt_bias).clamp(*self.dt_limit)
        D = self.D.view(self.nheads, -1)
        h, ys = ssm_state.clone(), []
        for t in range(u.shape[1]):
            decay = torch.exp(-dt[:, t] * self.A_log.exp())[..., None, None]
            h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1) + D * x[:, t])
        with torch.no_grad():
            conv_state.copy_(rows[:, -self.d_conv :].transpose(1, 2))
            ssm_state.copy_(h)
        y = torch.stack(ys, 1).flatten(2)
        return self.out_proj(self.norm(y, z) if self.rmsnorm else y * F.silu(z))

    def allocate_inference_cache(self, batch_size: int) -> tuple[Tensor, Tensor]:
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_conv, self.conv1d.in_channels).transpose(1, 2)
        return conv_state, weight.new_zeros(batch_size, self.nheads, self.headdim, self.d_state)

    def _get_states_from_cache(self, inference_params: SimpleNamespace, batch_size: int) -> tuple[Tensor, Tensor]:
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch_size)
        states: tuple[Tensor, Tensor] = memory[self.layer_idx]
        return states
