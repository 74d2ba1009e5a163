"""Who generates in the throughput suite: the engine, the public algorithm, VAR; and what each must compute at least."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import mvar
from benchmarks import growth, public
from benchmarks.growth import OURS, PUBLIC, VAR
from benchmarks.measure import DEVICE, interleaved
from benchmarks.parts import decoder_flops
from mvar.layers import Mamba2
from mvar.tokenizer import Tokenizer
from mvar_kernels.ops.mamba2 import reference
from mvar_kernels.precision import restore, settings

CHUNKS = (32, 64, 256)  # of the public side's scan: the fastest one of every size; mamba_ssm's kernels take 256
Pair = tuple[mvar.Model, Tokenizer]
Build = Callable[[int, int, str], Pair]
"""(depth, resolution, architecture) → a model and its tokenizer"""


@dataclass(frozen=True)
class Side:
    """name: in results. algorithm: whose FLOPs it has. The rest: what differs from the default.

    compiled: by torch.compile, the public algorithm's blocks or the engine's decoder. products: torch's float32 ones.
    decoded: to images; else the tokens are all that is made.
    """

    name: str
    algorithm: str = OURS
    backend: str = "auto"
    graph: bool | None = None
    compiled: bool = False
    products: str | None = None
    decoded: bool = True

    @property
    def architecture(self) -> str:
        return "var" if self.algorithm == VAR else "mvar"

    def on(self, backend: str) -> "Side":
        """The same on a backend by name; "auto" is the default."""
        return self if backend == "auto" else replace(self, name=f"{self.name}, {backend}", backend=backend)


SIDES: Mapping[str, Side] = {
    "mvar": Side("mvar"),
    "no-graph": Side("mvar without a graph", graph=False),
    "tokens": Side("mvar without its decoder", decoded=False),
    "var-tokens": Side("VAR without its decoder", VAR, decoded=False),
    "compiled-decoder": Side("mvar with a compiled decoder", compiled=True),
    "var": Side("VAR", VAR),
    "public": Side("public algorithm", PUBLIC),
    "public-compiled": Side("public algorithm, torch.compile", PUBLIC, compiled=True),
    "public-default": Side("public algorithm, torch's default products", PUBLIC, products="highest"),
}
"""By their names on the command line. VAR is of the same width, in the engine."""


@torch.no_grad()
def random_pair(
    depth: int, resolution: int, architecture: str, tokenizer: mvar.TokenizerConfig | None = None, **sizes: Any
) -> Pair:
    """A model and its tokenizer in float32, made on the device: `mvar.build` draws on the host, minutes for d30.

    tokenizer: its sizes; None for the published one's of this resolution. sizes: further ones of the model.
    """
    torch.manual_seed(0)
    images = tokenizer or mvar.TokenizerConfig(mvar.SCHEDULES[resolution])
    with DEVICE:
        decoder = Tokenizer(images)
        config = mvar.ModelConfig(
            depth,
            images.patch_nums,
            num_codes=images.num_codes,
            code_dim=images.code_dim,
            architecture=architecture,
            **sizes,
        )
        model = mvar.from_config(config)
    for parameter in (model.pos_start, model.pos_1LC):
        parameter.normal_(std=0.02)
    for mixer in (module for module in model.modules() if isinstance(module, Mamba2)):
        mixer.A_log.uniform_(0, 2.7)  # decays of 1 to 16, as Mamba-2's
        mixer.dt_bias.uniform_(-7, -2)
    return model.eval(), decoder.eval()


@torch.no_grad()
def generate(
    side: Side, pair: Pair, labels: Tensor, dtype: torch.dtype, *, chunk: int = CHUNKS[-1], **options: Any
) -> Tensor:
    """The tokens (B, L) of one batch of images. options: of drawing. chunk: of the public side's scan."""
    if side.algorithm != PUBLIC:
        run = partial(mvar.generate, backend=side.backend, graph=side.graph, compile_decoder=side.compiled)
        with nullcontext(pair) if side.decoded else _undecoded(pair) as parts:
            return run(*parts, labels, dtype=dtype, **options).tokens
    run_block = compiled_block() if side.compiled else None
    _, attend = public_attention(dtype)
    with public_arithmetic(dtype, chunk), products(side.products):
        return public.generate(*pair, labels, attend=attend, run_block=run_block, **options)[1]


_others: WeakKeyDictionary[Tokenizer, Tokenizer] = WeakKeyDictionary()


@contextmanager
def _undecoded(pair: Pair) -> Iterator[Pair]:
    """The pair, three channels of whose feature maps are its images: CUDA graphs of it are its own.

    By another tokenizer of the same layers, always the same one, so that what the engine prepares is prepared once.
    """
    model, tokenizer = pair
    if tokenizer not in _others:
        _others[tokenizer] = copy(tokenizer)
    with mock.patch.object(Tokenizer, "decode_features", lambda self, f_hat: f_hat[:, :3]):
        yield model, _others[tokenizer]


@cache
def public_attention(dtype: torch.dtype) -> tuple[str, public.Attend]:
    """Varlen attention where torch has one that runs here, else the one over a batch."""
    if DEVICE.type == "cpu":
        return "scaled_dot_product_attention", public.attend_batch
    q = torch.ones(2, 4, 1, 64, device=DEVICE, dtype=dtype)
    try:
        public.attend_varlen(q, q, q, 1.0)
    except Exception as error:
        print(f"no varlen attention: {str(error).splitlines()[0]}", flush=True)
        return "scaled_dot_product_attention", public.attend_batch
    return "varlen_attn", public.attend_varlen


@cache
def compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(public.block, dynamic=False)


@contextmanager
def public_arithmetic(dtype: torch.dtype, chunk: int) -> Iterator[None]:
    """The public side's: autocast to `dtype`, and its scan in chunks of so many tokens.

    On a GPU the scan, which autocast leaves in float32, multiplies in TF32 beside 16 bits: mamba_ssm's kernels take 16.
    """
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)
    tf32 = DEVICE.type == "cuda" and dtype.itemsize == 2
    with autocast, products("high" if tf32 else None), mock.patch.object(reference, "CHUNK", chunk):
        yield


@contextmanager
def products(name: str | None) -> Iterator[None]:
    """torch's float32 products of that name; None: as they are."""
    before = settings()
    if name is not None:
        torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        restore(before)


@torch.no_grad()
def fastest_chunk(pair: Pair, batch: int, dtype: torch.dtype) -> int:
    """The public side's best chunk for this size, as a favour to it: by one layer over the tokens of all its calls."""
    model, _ = pair
    mixer = next(module for module in model.modules() if isinstance(module, Mamba2))
    x = torch.randn(growth.ROWS * batch, model.config.num_tokens, model.config.channels, device=DEVICE)

    def layer(chunk: int) -> None:
        with public_arithmetic(dtype, chunk):
            for seen in accumulate(model.config.scales):
                public.mamba(mixer, x[:, :seen])

    layer(CHUNKS[-1])
    times = interleaved({str(c): partial(layer, c) for c in CHUNKS}, rounds=2, seconds=0, warm_up=False)
    return int(min(times, key=times.__getitem__))


def flops_per_image(side: Side, pair: Pair) -> float:
    """With guidance: all products and scans of blocks and head, and the decoder as the side runs it.

    Not counted: embeddings, norms, draws, the quantizer.
    """
    model, tokenizer = pair
    decoder = decoder_flops(tokenizer.config, 1, prepared=side.algorithm != PUBLIC) if side.decoded else 0
    return growth.flops(side.algorithm, model.config) + decoder


def parameters(pair: Pair) -> int:
    """Of the model, without its tokenizer."""
    return sum(p.numel() for p in pair[0].parameters())


def weights_gib(pair: Pair) -> float:
    return sum(t.nbytes for module in pair for t in (*module.parameters(), *module.buffers())) / 2**30
