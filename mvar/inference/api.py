"""`generate`: images from a model, a tokenizer and labels."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from mvar.inference.cuda_graphs import CaptureError, Graphs, has_graphs, padded_batch, warn_once
from mvar.inference.labels import class_rows
from mvar.inference.model import InferenceModel
from mvar.inference.prepare import custom_layer_of, has_version_counters, own_dtype, prepared_model, prepared_tokenizer
from mvar.inference.results import Generated, PendingResult
from mvar.inference.sampling import SamplingParams, SourceImages, sample_batch
from mvar.inference.tokenizer import InferenceTokenizer
from mvar.models.config import ModelConfig, checked_int, unboxed
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar.models.weights import unwrapped
from mvar.utils.errors import message
from mvar_kernels.precision import true_float32

MAX_CFG = 1e6  # far above useful values, without overflow in float32
GRAPHS = Graphs()


class HasClasses(Protocol):
    """A model, or a file with one."""

    config: ModelConfig
    class_names: tuple[str, ...] | None


class HasCodes(Protocol):
    """The configuration of a model or a tokenizer."""

    @property
    def num_codes(self) -> int: ...
    @property
    def code_dim(self) -> int: ...
    @property
    def patch_nums(self) -> tuple[int, ...]: ...


def generate(
    model: Model | InferenceModel,
    tokenizer: Tokenizer,
    labels: Sequence[int] | Tensor,
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    first_index: int = 0,
    more_smooth: bool = False,
    refiner: Model | InferenceModel | None = None,
    refine_from: int | None = None,
    guidance_until: int | None = None,
    return_scales: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    graph: bool | None = None,
    compile_decoder: bool = False,
) -> Generated:
    """Generate one image per label.

    Generation runs on copies of the model and the tokenizer that are prepared at the first call, and again after a
    change of weights or layers. Wrappers (torch.compile, DataParallel, DistributedDataParallel, peft's PeftModel) are
    unwrapped; parametrized, weight-normed, pruned and (by fully_shard) sharded weights are used as in a forward pass. A
    model or tokenizer with layers of another class (adapters, quantized layers), changed settings, forward hooks, or
    methods replaced on an instance is used without a copy: slower, in its own dtype, without a CUDA graph. Modules that
    were loaded with a dtype are used as they are. Generation
    calls neither `forward` of the model and the tokenizer nor their hooks.

    Args:
        model, tokenizer: with the same codes and token maps, on one device.
        labels: classes in [0, num_classes).
        cfg: classifier-free guidance scale; at scale k of K it is cfg·k/(K−1). 0 disables guidance.
        top_k: number of codes to sample from; 0 for all, 1 for the arg-max.
        top_p: cumulative probability of the codes to sample from, in (0, 1]; 1 for all.
        seed, first_index: image i uses the random numbers of (seed, first_index + i), in any batch. (In 16-bit
            dtypes the model's rounding can depend on the batch size, and so can a token.)
        more_smooth: average codes by Gumbel-softmax instead of sampling one (VAR's more_smooth); not for FID.
        refiner, refine_from: a smaller model, M-VAR or VAR, for the scales from index `refine_from` on (CoDe, arXiv
            2411.17787). The model generates the coarser ones, of which the refiner then computes its own states in one
            pass. A model that refines itself generates the same images.
        guidance_until: number of coarsest scales with guidance; from then on the unconditional rows, half of the
            computation, are omitted. None for all scales.
        return_scales: also return the image after each scale.
        dtype: float32, bfloat16, float16, or None for the device's fastest, also under autocast. The quantizer and
            sampling stay in float32. On a CPU float32 matmuls are true float32, independent of torch's settings, which
            determine the use of TF32 on a GPU.
        backend: for all ops; "auto" or a name of :func:`mvar_kernels.backends`.
        graph: replay the generation as one CUDA graph (:mod:`mvar.inference.cuda_graphs`), captured at the first call
            with these sizes and options; other labels and seeds replay the same one. None: on a GPU, where it can be
            captured, with a warning where it cannot. The tokens are the same with and without a graph: both pad
            batches on a GPU to a few sizes.
        compile_decoder: run the decoder through torch.compile, which takes a minute at the first call with each batch
            size; on a CPU with each size of the parts in which a batch is decoded, one image at 256×256 and above.

    Raises:
        ValueError, TypeError: an argument out of range, a model and a tokenizer that do not fit together, or a layer
            that cannot be used, by its name.
        FloatingPointError: logits or images are not finite (NaN in the weights, or overflow).
        RuntimeError: graph=True without a GPU or where the capture failed; or a custom layer that fails, by its name.
    """
    params = SamplingParams(cfg, top_k, top_p, more_smooth, return_scales, backend, guidance_until)
    return launch(
        model,
        tokenizer,
        labels,
        params,
        refiner=refiner,
        refine_from=refine_from,
        seed=seed,
        first_index=first_index,
        dtype=dtype,
        graph=graph,
        compile_decoder=compile_decoder,
    ).result()


@torch.inference_mode(False)  # cached tensors must be usable outside of inference mode
@torch.no_grad()
def launch(
    model: Model | InferenceModel,
    tokenizer: Tokenizer,
    labels: Sequence[int] | Tensor,
    params: SamplingParams,
    *,
    refiner: Model | InferenceModel | None = None,
    refine_from: int | None = None,
    seed: int = 0,
    first_index: int = 0,
    dtype: torch.dtype | None = None,
    graph: bool | None = None,
    compile_decoder: bool = False,
    source: SourceImages | None = None,
) -> PendingResult:
    """:func:`generate` without waiting for the device.

    Args:
        source: images to edit, one per label; the labels may then include num_classes, the unconditional class.
    """
    tokenizer = unwrapped(tokenizer, Tokenizer)
    model = unwrapped(model, Model, InferenceModel)
    check_fit(model, tokenizer)
    refiner = checked_refiner(refiner, refine_from, model, tokenizer)
    models: dict[int, Model | InferenceModel] = {0: model}  # each by the index of the first scale that it generates
    if refiner is not None:
        models |= {checked_int("refine_from", refine_from, 0, len(model.config.scales)): refiner}
        models.pop(len(model.config.scales), None)
    device = model.lvl_1L.device
    rows = class_rows(labels, model.config.num_classes + (source is not None), device)
    for one in models.values():
        if isinstance(one, InferenceModel):
            one.check_labels(rows, "refiner" if one is refiner else "model")
    params = replace(params, **{name: unboxed(getattr(params, name)) for name in ("cfg", "top_k", "top_p")})
    seed, first_index = unboxed(seed), unboxed(first_index)
    check_cfg(params.cfg)
    guided = len(model.config.scales)
    if params.guidance_until is not None:
        guided = checked_int("guidance_until", params.guidance_until, 0, guided)
    params = replace(params, guidance_until=guided)
    for name, value, bits in (("seed", seed, 63), ("first_index", first_index, 32)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
            raise ValueError(f"{name}: expected a whole number from 0 to 2^{bits} − 1, got {value}")
    if graph and not has_graphs(device):
        raise RuntimeError(f"graph: CUDA graphs need a GPU, and the model is on {device}")

    with true_float32(device), torch.autocast(device.type, enabled=False):
        prepared = {
            first: prepared_model(one, dtype, "refiner" if one is refiner else "model") for first, one in models.items()
        }
        decoder = prepared_tokenizer(tokenizer, dtype, compile_decoder)
    originals, owners = (*models.values(), tokenizer), (*prepared.values(), decoder)
    unprepared = [
        module
        for module, copy in zip(originals, owners, strict=True)
        if copy is module and not isinstance(module, InferenceModel | InferenceTokenizer)
    ]
    if graph and unprepared:
        raise RuntimeError(f"graph: only copies can be captured: {custom_layer_of(unprepared[0])}")
    # Without version counters each call makes new copies, which no graph outlives.
    cacheable = not unprepared and all(map(has_version_counters, originals))
    B = len(rows)
    per_image = [rows, torch.arange(first_index, first_index + B, dtype=torch.int64, device=device), *(source or ())]
    if has_graphs(device):
        # Padding repeats the last image, so that it is finite where that one is.
        missing = padded_batch(B) - B
        per_image = [torch.cat([t, t[-1:].expand(missing, *t.shape[1:])]) for t in per_image]
    inputs = (*per_image[:2], torch.full((), seed, dtype=torch.int64, device=device), *per_image[2:])
    use_graph = (has_graphs(device) and cacheable and not params.return_scales) if graph is None else graph
    sample = partial(sample_batch, prepared, decoder, params)
    with evaluation_mode(unprepared), true_float32(device), torch.autocast(device.type, enabled=False):
        if use_graph:
            tokens, finite, *images = _replay(owners, (params, *models), sample, inputs, required=bool(graph))
        else:
            tokens, finite, *images = sample(*inputs)
    scales = tuple(t[:B] for t in images)
    generated = Generated(scales[-1], tokens[:B], scales if params.return_scales else None)
    return PendingResult(generated, finite, own_dtype(prepared[0]))


def checked_refiner(
    refiner: Model | InferenceModel | None,
    refine_from: int | None,
    model: Model | InferenceModel,
    tokenizer: Tokenizer,
) -> Model | InferenceModel | None:
    """The unwrapped refiner.

    Raises:
        TypeError: not a model.
        ValueError: `refiner` without `refine_from` or the reverse, or a refiner that does not fit the model and the
            tokenizer.
    """
    if (refiner is None) != (refine_from is None):
        raise ValueError("refiner and refine_from: expected both or neither")
    if refiner is None:
        return None
    refiner = unwrapped(refiner, Model, InferenceModel)
    check_fit(refiner, tokenizer, "refiner")
    check_same_classes(refiner, model)
    return refiner


def check_same_classes(refiner: HasClasses, model: HasClasses) -> None:
    """Raise ValueError unless both have the same number of classes and, where both have names, the same names."""
    counts = refiner.config.num_classes, model.config.num_classes
    if counts[0] != counts[1]:
        raise ValueError(f"refiner: expected the {counts[1]} classes of the model, got {counts[0]}")
    if refiner.class_names and model.class_names and tuple(refiner.class_names) != tuple(model.class_names):
        raise ValueError("refiner: expected the class names of the model, got others")


@contextmanager
def evaluation_mode(modules: Sequence[Model | Tokenizer]) -> Iterator[None]:
    """Evaluation mode for modules with custom layers; an error in here names these layers."""
    training = [layer for module in modules for layer in module.modules() if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, RuntimeError) as error:
        if reasons := [reason for module in modules if (reason := custom_layer_of(module)) is not None]:
            raise RuntimeError(f"{'; '.join(reasons)}, and cannot generate: {message(error)}") from error
        raise
    finally:
        for layer in training:
            layer.training = True


def _replay(
    owners: Sequence[nn.Module],
    options: Hashable,
    sample: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    *,
    required: bool,
) -> tuple[Tensor, ...]:
    """`sample(*inputs)` by a CUDA graph, or without one where it cannot be captured and is not required."""
    try:
        return GRAPHS.run(owners, options, sample, inputs)
    except CaptureError as error:
        if required:
            raise
        warn_once(error)
        return sample(*inputs)


def check_cfg(cfg: float) -> None:
    """Raise ValueError unless cfg is in range."""
    cfg = unboxed(cfg)
    if isinstance(cfg, bool) or not isinstance(cfg, int | float) or not 0 <= cfg <= MAX_CFG:
        raise ValueError(f"cfg: expected a number from 0 to {MAX_CFG:g}, got {cfg!r}")


def check_codes(model: HasCodes, tokenizer: HasCodes, name: str = "model") -> None:
    """Raise ValueError unless both have the same codes, code width and token maps."""
    for size in ("num_codes", "code_dim", "patch_nums"):
        of_model, of_tokenizer = getattr(model, size), getattr(tokenizer, size)
        if of_model != of_tokenizer:
            raise ValueError(f"{name} and tokenizer do not fit together: {size} {of_model} against {of_tokenizer}")


def check_fit(model: Model | InferenceModel, tokenizer: Tokenizer, name: str = "model") -> None:
    """Raise ValueError unless model and tokenizer agree on codes, code width, token maps and device.

    Args:
        name: of the model, for messages.
    """
    check_codes(model.config, tokenizer.config, name)
    devices = model.lvl_1L.device, next(tokenizer.quantize.parameters()).device
    if "meta" in (devices[0].type, devices[1].type):
        raise ValueError(f"{name} and tokenizer: expected weights, got modules without storage, on the meta device")
    if devices[0] != devices[1]:
        raise ValueError(f"{name} and tokenizer do not fit together: on devices {devices[0]} and {devices[1]}")
