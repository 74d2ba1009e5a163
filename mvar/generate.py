"""Images from a model, a tokenizer and labels: what may be asked for, and how it is run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mvar.config import unboxed
from mvar.engine import counts_changes, own_dtype, prepared_model, prepared_tokenizer, used_itself
from mvar.errors import message
from mvar.graphs import CaptureError, Graphs, has_graphs, padded_batch, warn_of
from mvar.model import Model
from mvar.sampling import SamplingParams, sample_batch
from mvar.tokenizer import Tokenizer
from mvar.weights import unwrapped
from mvar_kernels.precision import true_float32

MAX_CFG = 1e6  # far beyond use, and far from overflow in float32
GRAPHS = Graphs()


@dataclass(frozen=True)
class Generated:
    """images (B, 3, R, R) in [0, 1] float32; tokens (B, L) int64; scales: one (B, 3, R, R) a scale, if asked for."""

    images: Tensor
    tokens: Tensor
    scales: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class PendingResult:
    """A generation that the device may still be at."""

    generated: Generated
    finite: Tensor
    """() bool: whether the generation is of any use."""
    dtype: torch.dtype

    def result(self) -> Generated:
        """Wait for the device. FloatingPointError: logits or images are not finite."""
        if not bool(self.finite):
            raise FloatingPointError(
                f"logits or images in {self.dtype} are not finite: NaN in the weights, or overflow"
            )
        return self.generated


def generate(
    model: Model,
    tokenizer: Tokenizer,
    labels: Sequence[int] | Tensor,
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    first_index: int = 0,
    more_smooth: bool = False,
    return_scales: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    graph: bool | None = None,
    compile_decoder: bool = False,
) -> Generated:
    """Generate one image a label.

    What runs are copies of the model and the tokenizer, made at the first call and anew when weights or layers change.
    Wrappers (torch.compile, DataParallel, DistributedDataParallel) are looked through; parametrized, weight-normed,
    pruned and (by fully_shard) sharded weights are taken as a forward pass has them. A model or a tokenizer that has
    layers of another class (adapters, quantized ones), other settings, forward hooks, or methods replaced on an
    instance is used itself: slower, in the dtype it has, without a graph. Never called are `forward` of the model and
    of the tokenizer as a whole, hooks of these, and backward hooks.

    Args:
        model, tokenizer: that fit together, on one device.
        labels: classes in [0, num_classes).
        cfg: classifier-free guidance; at scale k of K the weight is cfg·k/(K−1). 0 switches it off.
        top_k: 0 keeps all codes, 1 is the arg-max. top_p: in (0, 1], 1 keeps all codes.
        seed, first_index: image i has the random numbers of (seed, first_index + i) and no others, whatever the
            batch. (The model's own rounding can depend on the batch: in 16-bit dtypes a token may then differ.)
        more_smooth: Gumbel-softmax means of codes instead of codes; nicer pictures, not for FID.
        return_scales: also the picture after each scale, coarse to fine.
        dtype: float32, bfloat16, float16, or None for the device's fastest, also under autocast. The quantizer and
            the draw stay in float32. On a CPU float32 products are true float32, whatever torch's settings say; on a
            GPU TF32 is left to them.
        backend: of every op; "auto" or a name of :func:`mvar_kernels.backends`, which then must take all ops.
        graph: replay the whole generation as one CUDA graph, captured at the first call with these sizes and options
            (:mod:`mvar.graphs`); other labels and seeds replay the same one. None: on a GPU, where it can be captured;
            a warning says where it cannot. The tokens are the same: with or without a graph, a GPU draws batches that
            are padded to a few sizes.
        compile_decoder: run the decoder through torch.compile; costs a minute at the first call of each batch size.

    Raises:
        ValueError, TypeError: an argument out of range, a model and a tokenizer that do not fit together, or a layer
            that cannot be used, by its name.
        FloatingPointError: logits or images are not finite (NaN in the weights, or overflow).
        RuntimeError: graph=True, and there is no GPU or the capture failed; or a layer of its own that cannot take the
            place of the plain one, by its name.
    """
    how = SamplingParams(cfg, top_k, top_p, more_smooth, return_scales, backend)
    return launch(
        model,
        tokenizer,
        labels,
        how,
        seed=seed,
        first_index=first_index,
        dtype=dtype,
        graph=graph,
        compile_decoder=compile_decoder,
    ).result()


@torch.inference_mode(False)  # what is made here may be used anywhere
@torch.no_grad()
def launch(
    model: Model,
    tokenizer: Tokenizer,
    labels: Sequence[int] | Tensor,
    how: SamplingParams,
    *,
    seed: int = 0,
    first_index: int = 0,
    dtype: torch.dtype | None = None,
    graph: bool | None = None,
    compile_decoder: bool = False,
) -> PendingResult:
    """:func:`generate` without waiting for the device."""
    model, tokenizer = unwrapped(model, Model), unwrapped(tokenizer, Tokenizer)
    check_fit(model, tokenizer)
    device = model.lvl_1L.device
    rows = _labels(labels, model.config.num_classes, device)
    how = replace(how, **{name: unboxed(getattr(how, name)) for name in ("cfg", "top_k", "top_p")})
    seed, first_index = unboxed(seed), unboxed(first_index)
    if isinstance(how.cfg, bool) or not isinstance(how.cfg, int | float) or not 0 <= how.cfg <= MAX_CFG:
        raise ValueError(f"cfg: expected a number from 0 to {MAX_CFG:g}, got {how.cfg!r}")
    for name, value, bits in (("seed", seed, 63), ("first_index", first_index, 32)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
            raise ValueError(f"{name}: expected a whole number from 0 to 2^{bits} − 1, got {value}")
    if graph and not has_graphs(device):
        raise RuntimeError(f"graph: CUDA graphs need a GPU, and the model is on {device}")

    parts: tuple[Model, Tokenizer] = model, tokenizer
    with true_float32(device), torch.autocast(device.type, enabled=False):
        model, tokenizer = prepared_model(model, dtype), prepared_tokenizer(tokenizer, dtype, compile_decoder)
    uncopied = [part for part in parts if part is model or part is tokenizer]
    if graph and uncopied:
        raise RuntimeError(f"graph: copies can be replayed, and one is used itself: {used_itself(uncopied[0])}")
    # Where changes are not counted copies are made anew, and graphs of them would be.
    kept = not uncopied and all(counts_changes(part) for part in parts)
    B = len(rows)
    image_index = torch.arange(first_index, first_index + B, dtype=torch.int64, device=device)
    if has_graphs(device):
        # What is padded is the last image again: not finite only where that one is not.
        missing = padded_batch(B) - B
        rows, image_index = (torch.cat([t, t[-1:].expand(missing)]) for t in (rows, image_index))
    inputs = (rows, image_index, torch.full((), seed, dtype=torch.int64, device=device))
    use_graph = (has_graphs(device) and kept and not how.return_scales) if graph is None else graph
    with _used_themselves(uncopied), true_float32(device), torch.autocast(device.type, enabled=False):
        tokens, finite, *images = (
            _replayed(model, tokenizer, how, inputs, required=bool(graph))
            if use_graph
            else sample_batch(model, tokenizer, how, *inputs)
        )
    pictures = tuple(t[:B] for t in images)
    return PendingResult(
        Generated(pictures[-1], tokens[:B], pictures if how.return_scales else None), finite, own_dtype(model)
    )


@contextmanager
def _used_themselves(modules: Sequence[Model | Tokenizer]) -> Iterator[None]:
    """In evaluation mode. An error says which layers they are used with, as one of these may be its cause."""
    training = [layer for module in modules for layer in module.modules() if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, RuntimeError) as error:
        if reasons := [reason for module in modules if (reason := used_itself(module)) is not None]:
            raise RuntimeError(f"{'; '.join(reasons)}, and cannot generate: {message(error)}") from error
        raise
    finally:
        for layer in training:
            layer.training = True


def _replayed(
    model: Model, tokenizer: Tokenizer, how: SamplingParams, inputs: tuple[Tensor, Tensor, Tensor], required: bool
) -> tuple[Tensor, ...]:
    draw = partial(sample_batch, model, tokenizer, how)
    try:
        return GRAPHS.run((model, tokenizer), how, draw, inputs)
    except CaptureError as error:
        if required:
            raise
        warn_of(error)
        return draw(*inputs)


def check_fit(model: Model, tokenizer: Tokenizer) -> None:
    """ValueError unless model and tokenizer agree on codes, code width, token maps and device."""
    for name in ("num_codes", "code_dim", "patch_nums"):
        of_model, of_tokenizer = getattr(model.config, name), getattr(tokenizer, name)
        if of_model != of_tokenizer:
            raise ValueError(f"model and tokenizer do not fit together: {name} {of_model} against {of_tokenizer}")
    devices = model.lvl_1L.device, next(tokenizer.quantize.parameters()).device
    if "meta" in (devices[0].type, devices[1].type):
        raise ValueError("model and tokenizer: expected weights, got modules without storage, on the meta device")
    if devices[0] != devices[1]:
        raise ValueError(f"model and tokenizer do not fit together: on devices {devices[0]} and {devices[1]}")


def _labels(labels: Sequence[int] | Tensor, num_classes: int, device: torch.device) -> Tensor:
    try:
        if isinstance(labels, list | tuple):  # torch takes no list of some of NumPy's numbers
            labels = [unboxed(label) for label in labels]
        rows = torch.as_tensor(labels, device=labels.device if isinstance(labels, Tensor) else "cpu")
        whole = rows.dim() == 1 and len(rows) > 0 and not (rows.is_floating_point() or rows.is_complex())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        whole = False
    if not whole or rows.dtype == torch.bool:
        raise ValueError(f"labels: expected at least one whole number in a row, got {labels!r}")
    rows = rows.to(torch.int64)  # of unsigned numbers torch has no extremes
    lowest, highest = torch.stack(rows.aminmax()).tolist()  # one wait, where labels are on a GPU
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, got {lowest} to {highest}")
    return rows.to(device, torch.int64, non_blocking=True)  # waiting would be for all that runs there
