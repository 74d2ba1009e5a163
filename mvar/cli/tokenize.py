"""`mvar tokenize`: the tokens of a data set, so that training needs no encoder."""

import argparse

from mvar.cli.options import WEIGHTS, WORKERS, add_device, add_token_maps, path, source

HELP = "write the tokens of a data set once, for training without an encoder"
EXAMPLES = """\
mvar tokenize --data_path imagenet --tokenizer vae_ch160v4096z32.pth --out tokens --crops 4
torchrun --nproc_per_node=8 -m mvar tokenize --data_path imagenet --tokenizer vae_ch160v4096z32.pth --out tokens"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--data_path",
        type=path,
        required=True,
        help="folder with train/class/image and, optionally, val/class/image",
    )
    group.add_argument("--tokenizer", type=source, required=True, help=f"the tokenizer: {WEIGHTS}")
    group.add_argument(
        "--out",
        type=path,
        required=True,
        help="folder for train/ and val/; an interrupted run in it is continued",
    )
    group = parser.add_argument_group("crops")
    group.add_argument(
        "--crops", type=int, default=1, metavar="N", help="random crops of each training image (default: 1)"
    )
    group.add_argument("--hflip", action="store_true", help="flip training images at random")
    group.add_argument(
        "--mid_reso",
        type=float,
        default=1.125,
        metavar="F",
        help="size of the shorter side before the crop, relative to the resolution (default: 1.125)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the crops (default: 0)")
    add_token_maps(group)
    group = parser.add_argument_group("execution")
    group.add_argument("--batch", type=int, default=64, metavar="N", help="crops per batch (default: 64)")
    group.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help=f"processes that read images (default: {WORKERS})"
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the encoder (default: fp32)")
    add_device(group)


def run(options: argparse.Namespace) -> None:
    """Write the tokens of <data_path>/train, and of <data_path>/val if it exists, to folders of the same names."""
    from mvar.checkpoint import load_tokenizer
    from mvar.cli.resolve import DTYPES
    from mvar.data.encode import write_tokens
    from mvar.data.folder import ImageFolder
    from mvar.data.source import skipped_summary
    from mvar.utils.distributed import context_from_environment, local_device

    context = context_from_environment()
    tokenizer = load_tokenizer(
        options.tokenizer,
        resolution=options.resolution,
        patch_nums=options.patch_nums,
        device=local_device(options.device),
    )
    side, mid_resolution = tokenizer.resolution, options.mid_reso
    train = ImageFolder(options.data_path / "train", side, mid_resolution=mid_resolution, flip=options.hflip)
    folders = {"train": train}
    if (options.data_path / "val").is_dir():
        classes = train.classes
        folders["val"] = ImageFolder(options.data_path / "val", side, mid_resolution=mid_resolution, classes=classes)
    for name, folder in folders.items():
        written = write_tokens(
            folder,
            tokenizer,
            options.out / name,
            crops=options.crops if name == "train" else None,
            seed=options.seed,
            batch=options.batch,
            dtype=DTYPES[options.dtype],
            workers=options.workers,
            rank=context.rank,
            world_size=context.world_size,
        )
        part = f" (process {context.rank} of {context.world_size})" if context.world_size > 1 else ""
        print(
            f"{options.out / name}{part}: {len(folder)} images of {folder.num_classes} classes, "
            f"{written} files written, {len(folder.unreadable)} unreadable images{skipped_summary(folder)}"
        )
