"""`mvar evaluate`: images with the published settings, or reconstructions, their metrics, and a record of both."""

import argparse

from mvar.cli.options import (
    WORKERS,
    add_compile_decoder,
    add_execution,
    add_sampling,
    add_shortcuts,
    add_token_maps,
    add_weights,
    check_images,
    path,
)

HELP = (
    "generate 50 images per class with the published settings, and compute FID, Inception score, precision and recall; "
    "or evaluate a tokenizer"
)
EXAMPLES = """\
mvar evaluate --weights d16.pth --tokenizer vae_ch160v4096z32.pth --out d16 \
--reference VIRTUAL_imagenet256_labeled.npz --inception weights-inception-2015-12-05-6726825d.pth
torchrun --nproc_per_node=8 -m mvar evaluate --weights d16.pth --tokenizer vae_ch160v4096z32.pth --out d16
mvar evaluate --reconstruct imagenet/val --tokenizer vae_ch160v4096z32.pth --out vae"""

OF_GENERATION = ("weights", "refiner", "refine-from", "guidance-until", "reference", "png")
OF_RECONSTRUCTION = ("resolution", "patch_nums", "mid_reso", "workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument("--count", type=int, default=50, metavar="N", help="images per class (default: 50)")
    group.add_argument("--batch", type=int, default=50, metavar="N", help="images per batch (default: 50)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=path,
        required=True,
        help="folder for images.npz and evaluation.json; an interrupted run in it is continued. "
        "With --reconstruct: for reconstruction.json and reconstruction.png",
    )
    group.add_argument("--png", action="store_true", help="also write one PNG per image")
    group = parser.add_argument_group("metrics")
    group.add_argument("--reference", type=path, help="ADM's reference npz, or any npz with images or moments")
    group.add_argument(
        "--inception",
        type=path,
        help="Inception weights of torch-fidelity (default: those in torch.hub's folder; never downloaded)",
    )
    group = parser.add_argument_group(
        "reconstruction",
        "in place of generation: PSNR, SSIM, code usage and rFID of --tokenizer. Of the other options only --out, "
        "--batch, --inception, --dtype (default: fp32) and --device apply",
    )
    group.add_argument(
        "--reconstruct", type=path, metavar="FOLDER", help="encode and decode all images of this folder and below"
    )
    group.add_argument(
        "--mid_reso",
        type=float,
        metavar="F",
        help="size of the shorter side before the center crop, relative to the resolution (default: 1)",
    )
    add_token_maps(group)
    group.add_argument("--workers", type=int, metavar="N", help=f"processes that read images (default: {WORKERS})")
    add_weights(parser)
    add_shortcuts(add_sampling(parser, cfg=1.5, top_k=900, top_p=0.96))
    add_compile_decoder(add_execution(parser))


def run(options: argparse.Namespace) -> None:
    """Evaluate generated images, or with --reconstruct a tokenizer."""
    for name in OF_RECONSTRUCTION if options.reconstruct is None else OF_GENERATION:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value is not False:
            applies = "applies to --reconstruct only" if options.reconstruct is None else "not with --reconstruct"
            raise ValueError(f"--{name}: {applies}")
    (_generate if options.reconstruct is None else _reconstruct)(options)


def _generate(options: argparse.Namespace) -> None:
    """Generate the images that --out does not have yet, compute the metrics, write evaluation.json."""
    import json
    from dataclasses import asdict
    from functools import partial

    import torch

    from mvar.cli import resolve
    from mvar.evaluate import inception
    from mvar.evaluate.images import Recipe, generate_images, stored_dtype, write_pngs
    from mvar.utils.distributed import init_distributed, local_device
    from mvar.utils.files import write_json
    from mvar.utils.machine import device_and_backends, versions

    check_images(options, 1)
    sources = inception.find_sources(options.inception, options.reference)
    device = local_device(options.device)
    files = resolve.Files(options)
    check_images(options, files.model.config.num_classes)
    params = resolve.sampling_params(options)
    recipe_with = partial(
        Recipe,
        model=files.model.fingerprint(),
        tokenizer=files.tokenizer.fingerprint(),
        classes=files.model.config.num_classes,
        per_class=options.count,
        resolution=files.tokenizer.resolution,
        cfg=params.cfg,
        top_k=params.top_k,
        top_p=params.top_p,
        refiner=None if files.refiner is None else files.refiner.fingerprint(),
        refine_from=options.refine_from,
        guidance_until=params.guidance_until,
        seed=options.seed,
        batch=options.batch,
        backend=params.backend,
        graph=options.graph,
        compiled_decoder=options.compile_decoder,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )

    with init_distributed() as context:
        dtype = resolve.common_dtype(options, device, context, stored_dtype(options.out))
        recipe = recipe_with(dtype=str(dtype).removeprefix("torch."))
        loaded = files.load(device, dtype, labels=range(recipe.classes))
        launch_batch = resolve.batch_launcher(options, loaded, recipe.labels(), params)
        if context.is_main_process:
            _print_missing(sources.all_missing, "checked before the images are generated; without it, no such metric")
            inception.check(sources, device, recipe.resolution)
        here = {"versions": versions(), "machine": device_and_backends(device) | {"processes": context.world_size}}
        npz = generate_images(options.out, recipe, launch_batch, context, here)
        if options.png:
            write_pngs(options.out, recipe, context)
    if not context.is_main_process:
        return
    metrics = {} if sources.missing else inception.metrics(npz, sources, device)
    given = {name: getattr(options, name) for name in ("weights", "tokenizer", "refiner", "inception", "reference")}
    record = {
        "recipe": asdict(recipe) | {"images": recipe.images, "image i": "class i mod classes, noise of (seed, i)"},
        "files": {name: file and str(file) for name, file in given.items()} | {"npz": str(npz)},
        "metrics": metrics,
        "missing": sources.all_missing,
        "generated by": json.loads((options.out / "generated_by.json").read_text()),
        "measured by": here,
    }
    write_json(options.out / "evaluation.json", record)
    print(f"{recipe.images} images in {npz}")
    for name in ("fid", "inception_score_mean", "precision", "recall"):
        if name in metrics:
            print(f"{name}: {metrics[name]:.4g}")
    _print_missing(sources.all_missing, f"then run the same command again; or use ADM's evaluator, which reads {npz}")
    print(f"recipe, versions and metrics: {options.out / 'evaluation.json'}")


def _reconstruct(options: argparse.Namespace) -> None:
    """Reconstruct the images of a folder, compute the metrics, write reconstruction.json and reconstruction.png."""
    import torch

    from mvar import digits
    from mvar.checkpoint import load_tokenizer
    from mvar.cli.resolve import DTYPES
    from mvar.data.folder import ImageFolder
    from mvar.evaluate import inception
    from mvar.evaluate.reconstruction import preprocessing, reconstruct
    from mvar.models.weights import fingerprint
    from mvar.utils.distributed import context_from_environment, local_device
    from mvar.utils.files import check_writable, write_json
    from mvar.utils.images import grid, save_image
    from mvar.utils.machine import device_and_backends, versions

    if (processes := context_from_environment().world_size) > 1:
        raise ValueError(f"--reconstruct: expected one process, got {processes}")
    check_images(options, 1)
    record, strip = options.out / "reconstruction.json", options.out / "reconstruction.png"
    for output in (record, strip):
        check_writable(output)
    sources = inception.find_sources(options.inception, None)
    missing = list(sources.missing)
    _print_missing(missing, "without it, no rFID")
    device, dtype = local_device(options.device), DTYPES.get(options.dtype, torch.float32)
    maps = {"resolution": options.resolution, "patch_nums": options.patch_nums}
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, device=device, **maps)
    elif any(maps.values()):
        raise ValueError("--resolution, --patch_nums: give --tokenizer; that in the package has one resolution")
    else:
        tokenizer = digits.pretrained()[1].to(device)
    mid_resolution = 1.0 if options.mid_reso is None else options.mid_reso
    folder = ImageFolder(options.reconstruct, tokenizer.resolution, mid_resolution=mid_resolution, labeled=False)
    workers = WORKERS if options.workers is None else options.workers
    network = None if missing else inception.Inception(sources.weights, device)
    found = reconstruct(folder, tokenizer, batch=options.batch, dtype=dtype, workers=workers, network=network)
    content = {
        "images": found.images,
        "metrics": found.metrics | ({"inception_sha256": inception.sha256(sources.weights)} if network else {}),
        "usage": found.usage,
        "preprocessing": preprocessing(folder) | {"sha256 of the pixels": found.sha256},
        "tokenizer": {
            "sha256 of the weights": fingerprint(tokenizer),
            "patch_nums": tokenizer.patch_nums,
            "num_codes": tokenizer.num_codes,
        },
        "settings": {
            "batch": options.batch,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
        },
        "files": {
            "folder": str(options.reconstruct),
            "tokenizer": options.tokenizer,
            "inception": str(sources.weights) if network else None,
        },
        "unreadable": folder.unreadable,
        "skipped": len(folder.skipped),
        "missing": missing,
        "measured by": {"versions": versions(), "machine": device_and_backends(device)},
    }
    save_image(strip, grid(torch.cat(found.shown), columns=len(found.shown[0])))
    write_json(record, content)
    side, unreadable = tokenizer.resolution, len(folder.unreadable)
    print(f"{found.images} images of {options.reconstruct} at {side}×{side}, {unreadable} unreadable")
    for name, unit in (("psnr", " dB"), ("ssim", ""), ("rfid", "")):
        if name in found.metrics:
            value = found.metrics[name]
            print(f"{name}: {'infinite' if value is None else f'{value:.4g}'}{unit}")
    usages = ", ".join(f"{u['side']}×{u['side']}: {u['used']:.1%}" for u in found.usage["scales"])
    print(f"codes used: {found.usage['total']['used']:.1%} ({usages})")
    print(f"settings, versions and metrics: {record}")


def _print_missing(missing: list[str], note: str) -> None:
    if missing:
        print(f"missing ({note}):", *(f"  {line}" for line in missing), sep="\n", flush=True)
