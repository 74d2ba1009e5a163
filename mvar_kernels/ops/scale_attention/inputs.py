"""What every kernel of scale_attention takes, checked by the public function."""

from typing import NamedTuple

from torch import Tensor

from mvar_kernels.ffi import last_dim_contiguous


class Attention(NamedTuple):
    """One call: q (B, Lq, H, D), the last of the sequence's queries; k and v (B, L, Hkv, D); cos and sin of `rotary`
    or None; all else as in :func:`mvar_kernels.scale_attention`. Without scales every query sees all keys, whatever Lq.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_temperature: Tensor | None
    scales: tuple[int, ...]
    causal: bool
    scale: float
    cos: Tensor | None = None
    sin: Tensor | None = None
    rotary_interleaved: bool = False
    key_lengths: Tensor | None = None

    def lengths(self) -> tuple[int, ...]:
        """The scales, or all keys as one."""
        return self.scales or (self.k.shape[1],)

    def readable(self) -> "Attention":
        """The same with the last dimension of every tensor contiguous, cos and sin wholly: in place, or a copy where it
        must be.
        """
        temperature = None if self.log_temperature is None else last_dim_contiguous(self.log_temperature)
        readable = self._replace(
            q=last_dim_contiguous(self.q),
            k=last_dim_contiguous(self.k),
            v=last_dim_contiguous(self.v),
            log_temperature=temperature,
            key_lengths=None if self.key_lengths is None else self.key_lengths.contiguous(),
        )
        if self.cos is None or self.sin is None:
            return readable
        return readable._replace(cos=self.cos.contiguous(), sin=self.sin.contiguous())
