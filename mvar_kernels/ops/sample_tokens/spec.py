"""Cases, bytes and FLOPs of sample_tokens and soft_embedding."""

from typing import Any

import torch

from mvar_kernels.ops.sample_tokens import reference
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling
from mvar_kernels.ops.sample_tokens.op import sample_tokens, soft_embedding
from mvar_kernels.testing.spec import Case, Inputs, Spec


def _case(name: str, B: int, length: int, V: int, **options: object) -> Case:
    defaults: dict[str, object] = {"guidance": 0.0, "top_k": 0, "top_p": 1.0, "guided": False, "ties": False}
    defaults |= {"num_samples": 1, "per_image": {}, "temperature": 1.0, "offset": 0.0, "ruled_out": False}
    return Case(name, {"B": B, "l": length, "V": V}, defaults | options)


CASES = (
    _case("one_code", 1, 1, 1),
    _case("all_codes", 2, 3, 67),
    _case("arg_max", 2, 3, 67, top_k=1),
    _case("top_k", 2, 3, 67, top_k=9, guided=True, guidance=1.5),
    _case("top_p", 2, 3, 67, top_p=0.7),
    _case("ties", 2, 3, 130, top_k=40, top_p=0.8, ties=True),
    _case("temperature", 2, 3, 67, top_k=40, top_p=0.8, guided=True, guidance=1.5, temperature=0.6),
    _case("temperature_offset", 1, 3, 130, top_p=0.8, ties=True, temperature=1.7, offset=-1e4),
    _case(
        "per_image",
        3,
        3,
        67,
        guided=True,
        ties=True,
        per_image={
            "guidance": (0.0, 1.5, 0.3),
            "top_k": (9, 0, 40),
            "top_p": (1.0, 0.7, 0.8),
            "temperature": (1.0, 1.0, 0.6),
        },
    ),
    _case("per_image_unguided", 2, 3, 130, top_p=0.9, temperature=1.3, offset=-1e4, per_image={"top_k": (1, 30)}),
    _case("samples", 2, 3, 67, top_k=40, top_p=0.9, guided=True, guidance=1.5, num_samples=3),
    # To a number added to all logits of a row a softmax is blind; this one leaves few bits to a float16.
    _case("offset", 2, 3, 66, guided=True, guidance=1.5, top_k=30, top_p=0.9, offset=3e4),
    _case("offset_unguided", 1, 5, 131, offset=-1e4),
    # In both rows, in one of them, in none; fewer are left than top-k would keep.
    _case("ruled_out", 2, 3, 67, guided=True, guidance=1.5, top_k=40, ruled_out=True),
    _case("ruled_out_top_p", 1, 5, 34, guided=True, guidance=0.75, top_p=0.8, ruled_out=True),
    _case("ruled_out_at_guidance_0", 1, 3, 2, guided=True, ruled_out=True),
    _case("d16_scale", 1, 4, 4096, top_k=900, top_p=0.96, guided=True, guidance=0.75),
)
BENCH = (_case("d16_256_last_scale", 16, 256, 4096, top_k=900, top_p=0.96),)
BENCH_CUDA = (*BENCH, _case("d16_256_guided", 8, 256, 4096, top_k=900, top_p=0.96, guided=True, guidance=1.5))


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    shape = [case.sizes[d] for d in ("B", "l", "V")]

    def logits(offset: float) -> torch.Tensor:
        values = 2 * torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        values = (values.round() if case.options["ties"] else values) + offset
        if case.options["ruled_out"]:
            chance = torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)
            values[..., 1:].masked_fill_(chance[..., 1:] < 0.6, -torch.inf)
        return values

    inputs = {"cond": logits(case.options["offset"])}
    if case.options["guided"]:
        inputs["uncond"] = logits(-case.options["offset"])
    return inputs


def _soft_inputs(case: Case, generator: torch.Generator) -> Inputs:
    shape = (case.sizes["V"], 32)
    codebook = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return _inputs(case, generator) | {"codebook": codebook}


def _image_index(t: Inputs) -> torch.Tensor:
    return torch.arange(7, 7 + t["cond"].shape[0], dtype=torch.int64, device=t["cond"].device)


FILTERS = ("guidance", "top_k", "top_p")
DRAW: dict[str, Any] = {"seed": 2**40 + 3, "scale_index": 5}
SOFT: dict[str, Any] = {"sharpness": 1.5, "temperature": 0.2}


def _options(t: Inputs, case: Case, names: tuple[str, ...]) -> dict[str, Any]:
    options = {name: case.options[name] for name in names}
    for name, values in case.options["per_image"].items():
        if name in names:
            dtype = torch.int32 if name == "top_k" else torch.float64
            options[name] = torch.tensor(values, dtype=dtype, device=t["cond"].device)
    return options


def _draws(t: Inputs, case: Case, names: tuple[str, ...]) -> list[Sampling]:
    """Records with numbers alone, whose outputs make up that of a call: one for each image where its options differ."""
    image_index, per_image = _image_index(t), case.options["per_image"]
    B = len(image_index)
    calls = []
    for images in [slice(i, i + 1) for i in range(B)] if per_image else [slice(B)]:
        options = {name: per_image[name][images.start] if name in per_image else case.options[name] for name in names}
        options |= DRAW | {"seed": image_index.new_full((), DRAW["seed"])}
        uncond = t["uncond"][images] if "uncond" in t else None
        calls.append(Sampling(t["cond"][images], uncond, image_index[images], **options))
    return calls


def _work(case: Case, itemsize: int) -> tuple[int, int]:
    rows, V = case.sizes["B"] * case.sizes["l"], case.sizes["V"]
    return (1 + case.options["guided"]) * rows * V * itemsize + 8 * rows, 20 * rows * V


SPECS = (
    Spec(
        op="sample_tokens",
        cases=CASES,
        inputs=_inputs,
        call=lambda t, case, backend: (
            sample_tokens(
                t["cond"],
                t.get("uncond"),
                **_options(t, case, (*FILTERS, "temperature", "num_samples")),
                **DRAW,
                image_index=_image_index(t),
                backend=backend,
            ),
        ),
        reference=lambda t, case: (
            torch.cat(
                [reference.sample_tokens(call)[0] for call in _draws(t, case, (*FILTERS, "temperature", "num_samples"))]
            ),
        ),
        outputs=("tokens",),
        bench=BENCH,
        bench_cuda=BENCH_CUDA,
        work=_work,
    ),
    Spec(
        op="soft_embedding",
        cases=CASES,
        inputs=_soft_inputs,
        call=lambda t, case, backend: (
            soft_embedding(
                t["cond"],
                t.get("uncond"),
                t["codebook"],
                **_options(t, case, FILTERS),
                **SOFT,
                **DRAW,
                image_index=_image_index(t),
                backend=backend,
            ),
        ),
        reference=lambda t, case: (
            torch.cat(
                [
                    reference.soft_embedding(SoftSampling(t["codebook"], *call[:8], **SOFT))[0]
                    for call in _draws(t, case, FILTERS)
                ]
            ),
        ),
        outputs=("mean",),
        bench=BENCH,
        bench_cuda=BENCH_CUDA,
        work=_work,
    ),
)
