"""`mvar sample`: images as PNG files, a grid or an npz; in one process, or in every process of torchrun."""

import argparse
import re
import sys
from pathlib import Path

from mvar.cli.options import (
    add_compile_decoder,
    add_execution,
    add_sampling,
    add_shortcuts,
    add_weights,
    check_images,
    path,
)
from mvar.utils.files import check_writable, is_standard_output

HELP = "generate images from any weights"
EXAMPLES = """\
mvar sample --classes 0-9 --count 8 --grid digits.png
mvar sample --weights d16.pth --tokenizer vae_ch160v4096z32.pth --classes 207,980 --out images
mvar sample --weights d16.pth --tokenizer vae_ch160v4096z32.pth --classes 0-999 --count 50 --npz fid.npz
torchrun --nproc_per_node=8 -m mvar sample --weights d16.pth --tokenizer vae_ch160v4096z32.pth \
--classes 0-999 --count 50 --npz fid.npz"""
IMAGE_NAME = re.compile(r"\d{6,}_\d{4,}\.png")  # <index>_<class>.png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--classes", required=True, help="""such as 3, 1,5,7-9 or, by name, cat,dog or '"a name, with a comma",cat'"""
    )
    group.add_argument("--count", type=int, default=1, metavar="N", help="images per class (default: 1)")
    group.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="images per batch; does not change their random numbers (default: 16)",
    )
    group = parser.add_argument_group("output", "at least one of --out, --grid and --npz")
    group.add_argument("--out", type=path, help="folder for one PNG per image; refused if it has some already")
    group.add_argument("--overwrite", action="store_true", help="remove the images of an earlier run from --out")
    group.add_argument(
        "--grid",
        type=path,
        help="file for a grid of all images, one row per class: .png, .jpg, .webp or .bmp; PNG without a suffix",
    )
    group.add_argument("--npz", type=path, help="npz file with all images, in the format of ADM's evaluator")
    add_weights(parser)
    group = add_sampling(parser, cfg=1.5, top_k=900, top_p=0.96)
    group.add_argument(
        "--smooth", action="store_true", help="average codes by Gumbel-softmax (more_smooth of VAR); not for FID"
    )
    add_shortcuts(group)
    add_compile_decoder(add_execution(parser))


def run(options: argparse.Namespace) -> None:
    """Generate --count images of each class, in order; image i of the run has the random numbers of (seed, i).

    Each process generates complete batches, equal to those of a single process, so that the images do not depend on the
    number of processes.
    """
    import numpy as np
    import torch

    from mvar.cli import class_names, resolve
    from mvar.inference.prefetch import prefetched
    from mvar.utils.distributed import init_distributed, local_device
    from mvar.utils.images import check_image, grid, grid_size, save_image, save_npz, save_pixels
    from mvar.utils.shared_array import shared_array

    outputs = [output for output in (options.out, options.grid, options.npz) if output is not None]
    if not outputs:
        raise ValueError("nowhere to write to: give --out, --grid or --npz")
    requested = class_names.parse(options.classes)
    check_images(options, sum(map(len, requested)))
    if options.grid is not None:
        check_image(options.grid)
    for output in outputs:
        check_writable(output / "000000.png" if output is options.out else output)
    device = local_device(options.device)
    files = resolve.Files(options)
    classes = torch.tensor(class_names.class_indices(requested, files.model), dtype=torch.int64, device="cpu")
    labels = classes.repeat_interleave(options.count)
    side = files.tokenizer.resolution
    if options.grid is not None:
        check_image(options.grid, *grid_size(len(labels), options.count, side, side))
    params = resolve.sampling_params(options, more_smooth=options.smooth)

    shape = (len(labels), side, side, 3)
    with init_distributed() as context, shared_array(options.npz or options.grid, shape, context) as pixels:
        if context.is_main_process and options.out is not None:
            prepare_folder(options.out, overwrite=options.overwrite)
        context.barrier()
        dtype = resolve.common_dtype(options, device, context)
        loaded = files.load(device, dtype, labels=classes)
        launch_batch = resolve.batch_launcher(options, loaded, labels, params)
        starts = context.shard(range(0, len(labels), options.batch), desc="images", unit="batch")
        for start, batch in prefetched(launch_batch, starts):
            if options.out is not None:
                for i, image in enumerate(batch, start):
                    save_pixels(options.out / f"{i:06d}_{int(labels[i]):04d}.png", image)
            if pixels is not None:
                pixels[start : start + len(batch)] = batch.numpy()
        if pixels is not None:
            pixels.flush()
        context.barrier()
        if pixels is not None and context.is_main_process:
            if options.npz is not None:
                save_npz(options.npz, shape, [pixels], labels)
            if options.grid is not None:
                images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
                save_image(options.grid, grid(images, options.count))
    if not context.is_main_process:
        return
    log = sys.stderr if any(map(is_standard_output, outputs)) else sys.stdout
    print(f"{len(labels)} images in {', '.join(map(str, outputs))}", file=log)


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError if the folder has images of an earlier run; with `overwrite`, remove them."""
    earlier = sorted(image for image in folder.glob("*.png") if IMAGE_NAME.fullmatch(image.name))
    if earlier and not overwrite:
        raise ValueError(
            f"--out: {folder} has {len(earlier)} images of an earlier run, such as {earlier[0].name}; give another "
            "folder, or --overwrite, which removes them"
        )
    for image in earlier:
        image.unlink()
