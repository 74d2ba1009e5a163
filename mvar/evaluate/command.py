"""`mvar evaluate`: a model's images by the published recipe, their figures, and a record of both in one file."""

import argparse
import hashlib
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

import mvar
from mvar.arguments import check_images, load, sampling_params
from mvar.evaluate.images import Recipe, draw_images, write_pngs
from mvar.evaluate.inception import Sources, check, figures, sources
from mvar.files import write_json
from mvar.generate import PendingResult, launch
from mvar.machine import version
from mvar.model import Model
from mvar.processes import joined, own_device
from mvar.sampling import SamplingParams
from mvar.tokenizer import Tokenizer
from mvar.weights import weights
from mvar_kernels.dispatch import backends, fastest_dtype

PACKAGES = ("numpy", "triton", "torchvision", "torch-fidelity")


def evaluate(options: argparse.Namespace) -> None:
    """Sample `count` images a class, go on where a run was stopped, measure them, write evaluation.json."""
    check_images(options, 1)
    found = sources(options.inception, options.reference)
    device = own_device(options.device)
    model, tokenizer = load(options.weights, options.tokenizer, device)
    check_images(options, model.config.num_classes)
    shared = sampling_params(options)
    how = SamplingParams(
        more_smooth=False,
        return_scales=False,
        **{name: shared.pop(name) for name in ("cfg", "top_k", "top_p", "backend")},
    )
    recipe = Recipe(
        model=fingerprint(model),
        tokenizer=fingerprint(tokenizer),
        classes=model.config.num_classes,
        per_class=options.count,
        resolution=tokenizer.resolution,
        cfg=how.cfg,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=options.seed,
        batch=options.batch,
        dtype=str(shared["dtype"] or fastest_dtype(device)).removeprefix("torch."),
        backend=how.backend,
        graph=options.graph,
        compiled_decoder=options.compile_decoder,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )
    labels = recipe.labels()

    def begin(start: int) -> PendingResult:
        rows = labels[start : start + recipe.batch]
        compiled = recipe.compiled_decoder
        return launch(model, tokenizer, rows, how, first_index=start, compile_decoder=compiled, **shared)

    with joined() as processes:
        if processes.leads:
            _tell_missing(found, "before the images are drawn, for there will be no such figure without")
            check(found, device, recipe.resolution)
        here = {"versions": versions(), "machine": machine(device) | {"processes": processes.size}}
        npz = draw_images(options.out, recipe, begin, processes, here)
        if options.png:
            write_pngs(options.out, recipe, processes)
    if not processes.leads:
        return
    measured = {} if found.missing else figures(npz, found, device)
    record = {
        "recipe": asdict(recipe) | {"images": recipe.images, "image i": "class i mod classes, noise of (seed, i)"},
        "files": {name: value and str(value) for name, value in _given(options).items()} | {"npz": str(npz)},
        "figures": measured,
        "missing": [*found.missing, *([found.unreferenced] if found.unreferenced else [])],
        "drawn by": json.loads((options.out / "drawn_by.json").read_text()),
        "measured by": here,
    }
    write_json(options.out / "evaluation.json", record)
    print(f"{recipe.images} images in {npz}")
    for name in ("fid", "inception_score_mean", "precision", "recall"):
        if name in measured:
            print(f"{name}: {measured[name]:.4g}")
    _tell_missing(found, f"then the same command again; or ADM's own evaluator, which reads {npz}")
    print(f"recipe, versions and figures: {options.out / 'evaluation.json'}")


def _tell_missing(found: Sources, why: str) -> None:
    wanted = [*found.missing, *([found.unreferenced] if found.unreferenced else [])]
    if wanted:
        print(f"not there ({why}):", *(f"  {line}" for line in wanted), sep="\n", flush=True)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("weights", "tokenizer", "inception", "reference")}


def fingerprint(module: Model | Tokenizer) -> str:
    """SHA-256 of all weights: names, shapes, dtypes, bits."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(module).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backends": {name: reason or "available" for name, reason in backends().items()},
    }


def versions() -> dict[str, str | None]:
    return {
        "mvar": mvar.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in PACKAGES},
    }
