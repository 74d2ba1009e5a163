"""Attention with a rotary position embedding (RoPE)."""

from collections.abc import Iterator
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mvar_kernels.ops.scale_attention.reference import rotated
from mvar_kernels.patching.cache import Schedule, computed_from
from mvar_kernels.patching.patches.attention import LONGEST, Attention, example_mask
from mvar_kernels.patching.patches.base import Randn, argument_names, is_linear


class _RotaryAttention(Attention):
    """Without the cache the kernel normalizes and rotates. With it, keys are cached as the original caches them,
    normalized and rotated, so PyTorch does both to the new q and k; likewise where samples have different positions."""

    interleaved: ClassVar[bool]
    """neighbouring channels are a pair, not those of the two halves"""

    def _schedule(self: Any, values: dict[str, Any]) -> Schedule | None:
        """As in Attention; adds `rotary` to the values. None also where there are not as many positions as tokens."""
        schedule: Schedule | None = super()._schedule(values)
        if schedule is None:
            return None
        tables = values["rotary"] = self._tables(values)
        return schedule if tables is None or tables[0].shape[-2] == values["x"].shape[1] else None

    def _tables(self: Any, values: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """Cosines and sines in float32, as :func:`mvar_kernels.scale_attention` takes them, or (B, L, D) for each
        sample; None where nothing is rotated."""
        raise NotImplementedError

    def _output(self: Any, values: dict[str, Any], schedule: Schedule) -> Tensor:
        q, k, v = self._projected(values["x"])
        tables = values["rotary"]
        if not self.caching and (tables is None or tables[0].dim() == 2):
            options = {} if tables is None else {"rotary": tables, "rotary_interleaved": self.interleaved}
            return self._attended(q.to(v.dtype), k.to(v.dtype), v, schedule, **options)
        q, k = self._normalized(q, k)
        if tables is not None:
            q, k = (self._rotated(t, tables, v.dtype) for t in (q, k))
        if self.caching:
            k, v, schedule = self._cached(k, v, schedule)
        return self._attended(q.to(v.dtype), k.to(v.dtype), v, schedule, log_temperature=None)

    def _rotated(self: Any, t: Tensor, tables: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """q or k rotated, as the original rotates it before it is cached; `dtype` is that of v."""
        return rotated(t, tables[0], tables[1], self.interleaved).to(t.dtype)


class MapRotaryAttention(_RotaryAttention):
    """VAR's attention whose q and k are rotated after their norm, by the row and the column of a token in the largest
    map: luokairo/Markov-VAR and mit-han-lab/hart.

    `rotary_emb` gives cosines and sines for positions (B, L, 2), in which the two channels of a pair have different
    angles: they change the norm of a cached key, which the kernel therefore cannot normalize again. With a
    `context_rotary_emb`, the first scale is a text, and the positions of the maps follow its last one in each sample.
    csguoh/FastVAR's has an argument `idx_fn`, which gives the tokens that it keeps of a scale.
    """

    interleaved = False
    projection = "qkv_proj"
    attributes = ("qkv_proj", "q_bias", "v_bias", "zero_k_bias", "proj", "kv_caching", "caching", "rotary_emb")
    required = ("x", "attn_bias")
    optional = ("si", "context_position_ids", "context_mask", "m_maskgit", "idx_fn", "is_later_layer")
    bypassed = (projection, "rotary_emb", "context_rotary_emb")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and isinstance(getattr(module, "patch_nums", None), tuple)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        module.kv_caching(False)
        x, options, first = cls._inputs(module, randn, 2, 2)
        yield module(x, attn_bias=example_mask(x), **options)
        yield module(x, attn_bias=example_mask(x, diagonal=True), **options)
        yield module(8 * x[:, first:], attn_bias=None, si=1, **options)
        if options:
            some = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.int64, device=x.device).nonzero(as_tuple=True)
            yield module(x[:, -2:], attn_bias=None, si=1, m_maskgit=some, **options)
        if "idx_fn" in argument_names(module):
            kept = torch.tensor([[0, 3], [2, 1]], dtype=torch.int64, device=x.device)[..., None]
            pruned = {"idx_fn": lambda: kept, "is_later_layer": True}
            yield module(x[:, -2:], attn_bias=None, si=1, **pruned, **options)

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        module.kv_caching(False)
        x, options, first = cls._inputs(module, randn, 1, isqrt(min(length, LONGEST) - 1))
        yield module(x, attn_bias=example_mask(x), **options)
        module.kv_caching(True)
        yield module(x[:, :first], attn_bias=None, si=0, **options)
        yield module(x[:, first:], attn_bias=None, si=1, **options)
        yield from (module.cached_k, module.cached_v)
        module.kv_caching(False)

    @classmethod
    def _inputs(cls, module: Any, randn: Randn, batch: int, n: int) -> tuple[Tensor, dict[str, Any], int]:
        """x of maps of 1 and n² tokens, of which a text may replace the first; options; tokens of the first."""
        module.patch_nums = (1, n)
        options = context_options(module, batch)
        first = 3 if options else 1
        return randn(batch, first + n * n, module.q_bias.numel()), options, first

    def _tables(self: Any, values: dict[str, Any]) -> tuple[Tensor, ...]:
        x, si, some = values["x"], values.get("si", -1), values.get("m_maskgit")
        text = values["context_position_ids"] if hasattr(self, "context_rotary_emb") else None
        like, kept = x.new_empty(1, dtype=torch.float32), kept_tokens(values.get("idx_fn"))
        if text is None and some is None and kept is None:

            def compute() -> tuple[Tensor, ...]:
                cos, sin = self.rotary_emb(like, map_positions(self.patch_nums, si, x.device)[None])
                return cos[0], sin[0]

            return computed_from(self.rotary_emb.inv_freq, (self.patch_nums, si), compute)
        tables = [self.context_rotary_emb(like, text)] if text is not None and si <= 0 else []
        if text is None or si != 0:
            maps = (self.patch_nums, si) if text is None else (self.patch_nums[1:], max(si - 1, -1))
            positions = map_positions(*maps, x.device).expand(len(x), -1, -1)
            if some is not None:
                positions = positions[some].view(len(x), -1, 2)
            tables.append(self.rotary_emb(like, positions if text is None else positions + text[:, -1:, None]))
        rows = [torch.cat(t, 1) for t in zip(*tables, strict=True)]
        return tuple(rows if kept is None else (t.gather(1, kept.expand(-1, -1, t.shape[-1])) for t in rows))

    def _rotated(self: Any, t: Tensor, tables: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return rotated(t, tables[0].to(dtype), tables[1].to(dtype), self.interleaved)


class ComplexRotaryAttention(_RotaryAttention):
    """Attention with a LayerNorm over the channels of all heads of q and of k, whose pairs of neighbouring channels are
    multiplied with complex numbers: yandex-research/switti."""

    interleaved = True
    attributes = ("to_qkv", "q_norm", "k_norm", "qk_norm", "proj", "kv_caching", "caching")
    required, optional = ("x", "attn_bias", "freqs_cis"), ()
    bypassed = ()

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        C = module.num_heads * module.head_dim
        if is_linear(module.to_qkv, C, 3 * C) and is_linear(module.proj, C, C):
            return None
        return f"to_qkv and proj: expected linear layers C→3C and C→C with C={C}"

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        module.kv_caching(False)
        x = randn(2, 5, module.proj.in_features)
        yield module(x, example_mask(x), _angles(module, x, 5))
        yield module(x, example_mask(x, diagonal=True), _angles(module, x, 5))
        yield module(8 * x, None, _angles(module, x, 7))
        yield module(x, None, None)

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        module.kv_caching(False)
        x = randn(1, min(length, LONGEST), module.proj.in_features)
        freqs_cis = _angles(module, x, x.shape[1])
        yield module(x, example_mask(x), freqs_cis)
        module.kv_caching(True)
        yield module(x[:, :1], None, freqs_cis[:, :1])
        yield module(x[:, 1:], None, freqs_cis[:, 1:])
        yield from (module.cached_k, module.cached_v)
        module.kv_caching(False)

    def _schedule(self: Any, values: dict[str, Any]) -> Schedule | None:
        """None also for complex numbers that are not (1, L or more, D/2)."""
        freqs_cis, L = values["freqs_cis"], values["x"].shape[1]
        if freqs_cis is not None:
            plain = freqs_cis.is_complex() and not freqs_cis.requires_grad and freqs_cis.dim() == 3
            if not plain or freqs_cis.shape[0] != 1 or freqs_cis.shape[1] < L:
                return None
            if freqs_cis.shape[2] != self.head_dim // 2:
                return None
        schedule: Schedule | None = super()._schedule(values)
        return schedule

    def _projected(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        return q, k, v

    def _tables(self: Any, values: dict[str, Any]) -> tuple[Tensor, ...] | None:
        freqs_cis, L, device = values["freqs_cis"], values["x"].shape[1], values["x"].device
        if freqs_cis is None:
            return None

        def compute() -> tuple[Tensor, ...]:
            numbers = freqs_cis[0, :L].to(device, torch.complex64)
            return numbers.real.contiguous(), numbers.imag.contiguous()

        return computed_from(freqs_cis, (L, device), compute)


def _angles(module: Any, x: Tensor, rows: int) -> Tensor:
    """Complex numbers (1, rows, D/2) of length 1, of as many different angles."""
    angles = torch.arange(rows * module.head_dim // 2, dtype=torch.float32, device=x.device)
    return torch.polar(torch.ones_like(angles), angles).view(1, rows, -1)


def context_options(attention: Any, batch: int) -> dict[str, Any]:
    """Options of a comparison for attention to a text of three tokens, {} for attention without a text."""
    if not hasattr(attention, "context_rotary_emb"):
        return {}
    starts = torch.arange(batch, dtype=torch.int64, device=attention.q_bias.device)
    positions = starts[:, None] + torch.arange(3, dtype=torch.int64, device=starts.device)
    return {"context_position_ids": positions, "context_mask": torch.ones_like(positions)}


def kept_tokens(select: Any) -> Tensor | None:
    """FastVAR's numbers (B, n, 1) of the tokens that it keeps, or None where it keeps all."""
    everything = select is None or getattr(select, "__name__", None) == "do_nothing"
    return None if everything else select()


def map_positions(patch_nums: tuple[int, ...], si: int, device: torch.device) -> Tensor:
    """Row and column of each token of scale `si`, or of all scales (−1), in units of the largest map: (L, 2)."""
    of_maps = []
    for n in patch_nums if si == -1 else patch_nums[si : si + 1]:
        numbers = torch.arange(n, dtype=torch.int64, device=device)
        of_maps.append(torch.cartesian_prod(numbers, numbers).view(n * n, 2) / n * patch_nums[-1])
    return torch.cat(of_maps)
