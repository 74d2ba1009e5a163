"""What bench_generation compares: the engine, the public algorithm and VAR, and how each generates."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import mvar
from benchmarks.analysis.flops import OURS, PUBLIC, ROWS, VAR, decoder_flops, model_flops
from benchmarks.baselines import eager_generation
from benchmarks.common.environment import DEVICE
from benchmarks.common.timing import interleaved
from mvar.inference.api import launch
from mvar.inference.sampling import SamplingParams
from mvar.models.layers import Mamba2
from mvar.models.tokenizer import Tokenizer
from mvar_kernels.precision import restore, settings

CHUNKS = (32, 64, 256)  # of the public algorithm's scan, of which the fastest is taken; mamba_ssm's kernels take 256
Pair = tuple[mvar.Model, Tokenizer]
Build = Callable[[int, int, str], Pair]
"""(depth, resolution, architecture) → a model and its tokenizer"""


@dataclass(frozen=True)
class Method:
    """name: in result files. algorithm: whose FLOPs it has. The rest: what differs from the default.

    compiled: by torch.compile, the public algorithm's blocks or the engine's decoder. matmul_precision: an argument of
    torch.set_float32_matmul_precision. decoded: to images; else it generates tokens only.
    """

    name: str
    algorithm: str = OURS
    backend: str = "auto"
    graph: bool | None = None
    compiled: bool = False
    matmul_precision: str | None = None
    decoded: bool = True

    @property
    def architecture(self) -> str:
        return "var" if self.algorithm == VAR else "mvar"

    def on(self, backend: str) -> "Method":
        """The same on a named backend; "auto" is the default."""
        return self if backend == "auto" else replace(self, name=f"{self.name}, {backend}", backend=backend)


METHODS: Mapping[str, Method] = {
    "mvar": Method("mvar"),
    "no-graph": Method("mvar without a graph", graph=False),
    "tokens": Method("mvar without its decoder", decoded=False),
    "var-tokens": Method("VAR without its decoder", VAR, decoded=False),
    "compiled-decoder": Method("mvar with a compiled decoder", compiled=True),
    "var": Method("VAR", VAR),
    "public": Method("public algorithm", PUBLIC),
    "public-compiled": Method("public algorithm, torch.compile", PUBLIC, compiled=True),
    "public-default": Method("public algorithm, torch's default products", PUBLIC, matmul_precision="highest"),
}
"""By their names on the command line. VAR is of the same width, in the engine."""


@torch.no_grad()
def random_pair(
    depth: int, resolution: int, architecture: str, tokenizer: mvar.TokenizerConfig | None = None, **sizes: Any
) -> Pair:
    """A model and its tokenizer in float32, initialized on the device: on the host it would take minutes for d30.

    tokenizer: None for the published one of this resolution. sizes: further ones of the model.
    """
    torch.manual_seed(0)
    images = tokenizer or mvar.TokenizerConfig(mvar.SCHEDULES[resolution])
    sizes |= {"num_codes": images.num_codes, "code_dim": images.code_dim, "architecture": architecture}
    with DEVICE:
        decoder = Tokenizer(images)
        model = mvar.from_config(mvar.ModelConfig(depth, images.patch_nums, **sizes))
    for parameter in (model.pos_start, model.pos_1LC):
        parameter.normal_(std=0.02)
    for mixer in (module for module in model.modules() if isinstance(module, Mamba2)):
        mixer.A_log.uniform_(0, 2.7)  # decays of 1 to 16, as Mamba-2's
        mixer.dt_bias.uniform_(-7, -2)
    return model.eval(), decoder.eval()


@torch.no_grad()
def generate(
    method: Method,
    pair: Pair,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    chunk: int = CHUNKS[-1],
    top_k: int = 900,
    top_p: float = 0.96,
) -> Tensor:
    """Generate a batch of images with guidance 1.5; returns the tokens (B, L). chunk: of the public scan."""
    if method.algorithm != PUBLIC:
        how = SamplingParams(1.5, top_k, top_p, False, False, method.backend, decode=method.decoded)
        options: dict[str, Any] = {"graph": method.graph, "compile_decoder": method.compiled}
        return launch(*pair, labels, how, dtype=dtype, **options).result().tokens
    with public_precision(dtype, method.matmul_precision):
        return eager_generation.generate(
            *pair,
            labels,
            top_k=top_k,
            top_p=top_p,
            chunk=chunk,
            attend=public_attention(dtype)[1],
            run_block=compiled_block() if method.compiled else None,
        )[1]


@cache
def public_attention(dtype: torch.dtype) -> tuple[str, eager_generation.Attend]:
    """Varlen attention where torch has one that runs here, else batched attention."""
    if DEVICE.type == "cpu":
        return "scaled_dot_product_attention", eager_generation.attend_batch
    q = torch.ones(2, 4, 1, 64, device=DEVICE, dtype=dtype)
    try:
        eager_generation.attend_varlen(q, q, q, 1.0)
    except Exception as error:
        print(f"no varlen attention: {str(error).splitlines()[0]}", flush=True)
        return "scaled_dot_product_attention", eager_generation.attend_batch
    return "varlen_attn", eager_generation.attend_varlen


@cache
def compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(eager_generation.block, dynamic=False)


@contextmanager
def public_precision(dtype: torch.dtype, matmul_precision: str | None = None) -> Iterator[None]:
    """Autocast to `dtype`, and the precision of float32 matmuls.

    On a GPU beside 16 bits the scan, which autocast leaves in float32, multiplies in TF32: mamba_ssm's kernels take 16.
    """
    before = settings()
    if DEVICE.type == "cuda" and dtype.itemsize == 2:
        matmul_precision = matmul_precision or "high"
    if matmul_precision is not None:
        torch.set_float32_matmul_precision(matmul_precision)
    try:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        restore(before)


@torch.no_grad()
def fastest_chunk(pair: Pair, batch: int, dtype: torch.dtype) -> int:
    """The public algorithm's best chunk for this configuration, by one layer over the tokens of all its calls."""
    model, _ = pair
    mixer = next(module for module in model.modules() if isinstance(module, Mamba2))
    x = torch.randn(ROWS * batch, model.config.num_tokens, model.config.channels, device=DEVICE)

    def layer(chunk: int) -> None:
        with public_precision(dtype):
            for seen in accumulate(model.config.scales):
                eager_generation.mamba(mixer, x[:, :seen], chunk=chunk)

    layer(CHUNKS[-1])
    times = interleaved({str(c): partial(layer, c) for c in CHUNKS}, rounds=2, seconds=0, warm_up=False)
    return int(min(times, key=times.__getitem__))


def flops_per_image(method: Method, pair: Pair) -> float:
    """With guidance: the matmuls and scans of blocks and head, and the decoder as the method runs it."""
    model, tokenizer = pair
    decoder = decoder_flops(tokenizer.config, 1, prepared=method.algorithm != PUBLIC) if method.decoded else 0
    return model_flops(method.algorithm, model.config) + decoder


def weights_gib(pair: Pair) -> float:
    return sum(t.nbytes for module in pair for t in (*module.parameters(), *module.buffers())) / 2**30
