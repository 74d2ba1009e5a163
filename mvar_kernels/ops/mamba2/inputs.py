"""What every kernel of ssd_scan and mamba2_mixer takes, checked by the public functions."""

import math
from typing import NamedTuple

from torch import Tensor


class Scan(NamedTuple):
    """x (B, L, H, P); dt (B, L, H); A (H); D (H) or (H, P); B and C (B, L, G·N); state (B, H, P, N). In both
    directions dt is (B, L, 2, H) and A (2, H). All else as in :func:`mvar_kernels.ssd_scan`.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    state: Tensor
    scales: tuple[int, ...]

    @property
    def groups(self) -> int:
        """G: groups of H/G heads each, which share B and C."""
        N = self.state.shape[-1]
        return self.B.shape[-1] // N if N else 1


class Mixer(NamedTuple):
    """zxbcdt (B, L, 2E+2GN+directions·H), or without these columns and dt (B, L, directions·H); the state conv and ssm.

    All else as in :func:`mvar_kernels.mamba2_mixer`.
    """

    zxbcdt: Tensor
    dt: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor | None
    conv: Tensor
    ssm: Tensor
    scales: tuple[int, ...]
    eps: float
    dt_min: float = 0.0
    dt_max: float = math.inf
    norm_before_gate: bool = False

    @property
    def groups(self) -> int:
        """G: groups of H/G heads each, which share B, C and an RMSNorm."""
        _, H, P, N = self.ssm.shape
        return (self.conv_weight.shape[0] - H * P) // (2 * N)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:10]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """From conv_weight to D."""
        return self[2:7]

    @property
    def limits_dt(self) -> bool:
        return self.dt_min > 0 or self.dt_max < math.inf

    @property
    def y_shape(self) -> tuple[int, int, int]:
        """(B, L, E)"""
        _, H, P, _ = self.ssm.shape
        return *self.zxbcdt.shape[:2], H * P

    @property
    def steps(self) -> Tensor:
        """dt before its bias, (B, L, directions·H): where it is among the columns a view of them."""
        return self.steps_of(self.zxbcdt, self.dt)

    def steps_of(self, zxbcdt: Tensor, dt: Tensor | None) -> Tensor:
        """The same of tensors of these shapes, as their gradients are."""
        return zxbcdt[..., zxbcdt.shape[-1] - self.dt_bias.numel() :] if dt is None else dt
