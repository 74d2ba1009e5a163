"""Where a generation spends its time, by part, and the least that each part could take."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mvar_kernels as mk
from benchmarks.measure import interleaved
from mvar.engine import prepared_tokenizer
from mvar.layers import Linear
from mvar.packed import PackedLinear, packs
from mvar.tokenizer import Tokenizer, TokenizerConfig
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case

PARTS = ("linear layers", "attention", "mixer", "adaLN", "drawing", "quantizer", "decoder")


@dataclass
class Part:
    """One part of a generation: the time it took, and the bytes and FLOPs that it cannot do without."""

    seconds: float = 0.0
    moved_bytes: float = 0.0
    flops: float = 0.0

    def floor_ms(self, peak_gflops: float, copy_gbps: float) -> float:
        return 1e3 * max(self.flops / peak_gflops, self.moved_bytes / copy_gbps) / 1e9


def _linear_work(layer: PackedLinear | nn.Linear, x: Tensor, *others: Any) -> tuple[int, int]:
    rows = x.numel() // x.shape[-1]
    numbers = x.numel() + layer.out_features * (x.shape[-1] + rows)
    return numbers * x.element_size(), 2 * x.numel() * layer.out_features


def _attention_work(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[int, ...], *, pattern: str = "diagonal", **others: Any
) -> tuple[int, int]:
    B, queries, H, D = q.shape
    new = next(n for n in range(1, len(scales) + 1) if sum(scales[-n:]) == queries)
    case = Case("", {"B": B, "H": H, "D": D}, {"scales": scales, "pattern": pattern, "query_scales": new})
    return SPECS["scale_attention"].work(case, q.element_size())


def _mixer_work(zxbcdt: Tensor, conv_weight: Tensor, *params: Tensor, **options: Any) -> tuple[int, int]:
    D, norm_weight = params[-2:]
    H, E = len(D), len(norm_weight)
    sizes = {"B": zxbcdt.shape[0], "L": zxbcdt.shape[1], "H": H, "P": E // H, "N": (conv_weight.shape[0] - E) // 2}
    return SPECS["mamba2_mixer"].work(Case("", sizes, {"scales": None}), zxbcdt.element_size())


def _adaln_work(x: Tensor, *others: Any, **options: Any) -> tuple[int, int]:
    return SPECS["adaln"].work(Case("", dict(zip("BLC", x.shape, strict=True))), x.element_size())


def _gated_adaln_work(x: Tensor, *others: Any, **options: Any) -> tuple[int, int]:
    return SPECS["gated_adaln"].work(Case("", dict(zip("BLC", x.shape, strict=True))), x.element_size())


def _drawing_work(logits: Tensor, **others: Any) -> tuple[int, int]:
    case = Case("", dict(zip(("B", "l", "V"), logits.shape, strict=True)), {"guided": False})
    return SPECS["sample_tokens"].work(case, logits.element_size())


def _uncounted(*others: Any, **options: Any) -> tuple[int, int]:
    return 0, 0


# Where each part is called, and what its calls must do at least.
CALLS: tuple[tuple[Any, str, str, Callable[..., tuple[int, int]]], ...] = (
    (PackedLinear, "forward", "linear layers", _linear_work),
    (nn.Linear, "forward", "linear layers", _linear_work),
    (Linear, "forward", "linear layers", _linear_work),
    (mk, "scale_attention", "attention", _attention_work),
    (mk, "mamba2_mixer", "mixer", _mixer_work),
    (mk, "adaln", "adaLN", _adaln_work),
    (mk, "gated_adaln", "adaLN", _gated_adaln_work),
    (mk, "sample_tokens", "drawing", _drawing_work),
    (Tokenizer, "scale_features", "quantizer", _uncounted),
    (Tokenizer, "next_input", "quantizer", _uncounted),
    (Tokenizer, "embed", "quantizer", _uncounted),
    (Tokenizer, "decode_features", "decoder", _uncounted),
)


@contextmanager
def observed_parts(
    around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
) -> Iterator[dict[str, Part]]:
    """Add up, by part, what the calls of a generation take on the host and must do; each call inside `around(part)`.

    A part inside another (the decoder's packed product) counts for the outer one.
    """
    parts: dict[str, Part] = {name: Part() for name in PARTS}
    inside: list[str] = []

    def timed(original: Callable[..., Any], name: str, work: Callable[..., tuple[int, int]]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return original(*args, **kwargs)
            inside.append(name)
            start = time.perf_counter()
            with around(name):
                result = original(*args, **kwargs)
            parts[name].seconds += time.perf_counter() - start
            inside.pop()
            moved, flops = work(*args, **kwargs)
            parts[name].moved_bytes += moved
            parts[name].flops += flops
            return result

        return run

    with ExitStack() as stack:
        for owner, attribute, name, work in CALLS:
            replacement = timed(getattr(owner, attribute), name, work)
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        yield parts


def breakdown(generate: Callable[[], Any], tokenizer: Tokenizer, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by part of the median of three generations, beside the floor of each part."""
    runs = []
    for _ in range(3):
        with observed_parts() as parts:
            start = time.perf_counter()
            generate()
            runs.append((time.perf_counter() - start, parts))
    total, parts = sorted(runs, key=lambda run: run[0])[1]
    parts["decoder"].flops = decoder_flops(tokenizer.config, batch)
    peak, copy = peak_gflops(dtype), copy_gbps()
    spent = {name: 1e3 * part.seconds for name, part in parts.items()}
    return {
        "total_ms": 1e3 * total,
        "parts_ms": spent | {"rest": 1e3 * total - sum(spent.values())},
        "gflop": {name: part.flops / 1e9 for name, part in parts.items()},
        "moved_mb": {name: part.moved_bytes / 1e6 for name, part in parts.items()},
        "peak_gflops": peak,
        "copy_gbps": copy,
        "floor_ms": {name: part.floor_ms(peak, copy) for name, part in parts.items()},
    }


@cache
def decoder_flops(config: TokenizerConfig, batch: int, prepared: bool = True) -> float:
    """Of the decoder's convolutions and products, as the engine prepares it or as it is published."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder = Tokenizer(config)
        if prepared:  # which needs weights with storage, of any value
            decoder = prepared_tokenizer(decoder.to_empty(device="cpu"), torch.float32).to("meta")
        decoder.eval()
        decoder.decode_features(torch.empty(batch, config.code_dim, *2 * config.patch_nums[-1:]))
    return float(counter.get_total_flops())


def peak_gflops(dtype: torch.dtype) -> float:
    """The best rate of a large linear layer here, packed where it can be: what the floors are counted with."""
    linear = torch.nn.Linear(2048, 4096).to(dtype)
    layer = PackedLinear(linear) if packs(linear.weight.device, dtype) else linear
    x = torch.randn(2048, 2048).to(dtype)
    ms = interleaved({"linear": lambda: layer(x)}, rounds=9, seconds=1.0)["linear"]
    return 2 * 2048 * 2048 * 4096 / ms / 1e6


def copy_gbps() -> float:
    """Of a copy far larger than the caches, bytes read and written: what the other floors are counted with."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    ms = interleaved({"copy": lambda: target.copy_(source)}, rounds=9, seconds=1.0)["copy"]
    return 2 * source.nbytes / ms / 1e6
