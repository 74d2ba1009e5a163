"""`mvar classify`: the class of highest likelihood of every image in a folder."""

import argparse

from mvar.cli.options import DTYPE_NAMES, add_device, add_weights, path

HELP = "find the class under which each image of a folder is most likely"
EXAMPLES = """\
mvar classify digits --out classes.csv
mvar classify images --weights d16.pth --tokenizer vae_ch160v4096z32.pth --scales 6 --keep 10 --out classes.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, help="folder of images; subfolders named as classes give the accuracy")
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--scales", type=int, metavar="K", help="compare all classes on the K coarsest scales only (default: all)"
    )
    group.add_argument(
        "--keep", type=int, metavar="N", help="then compare the best N on all scales (default: the first scales decide)"
    )
    group = parser.add_argument_group("images and output")
    group.add_argument(
        "--mid_reso",
        type=float,
        default=1.0,
        metavar="F",
        help="size of the shorter side before the center crop, relative to the resolution; training on folders has "
        "1.125 (default: 1)",
    )
    group.add_argument(
        "--out", type=path, help="CSV file: image, class, its bits on the scales compared last, exact or not"
    )
    add_weights(parser)
    group = parser.add_argument_group("execution")
    group.add_argument("--batch", type=int, default=16, metavar="N", help="images read at a time (default: 16)")
    group.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="dtype of the model (default: fp32)")
    group.add_argument("--backend", default="auto", help="backend of every op, see `mvar info` (default: auto)")
    add_device(group)


def run(options: argparse.Namespace) -> None:
    """Print a line for each image, or write them to --out; then the accuracy if the folder has labels."""
    import csv
    import io
    import math
    import sys
    from collections import Counter

    from tqdm import tqdm

    from mvar.cli import resolve
    from mvar.data.folder import CropDataset, ImageFolder
    from mvar.data.order import in_order
    from mvar.inference.likelihood import classify
    from mvar.utils.distributed import DistContext, local_device
    from mvar.utils.files import atomic_write, check_writable, is_standard_output

    if options.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {options.batch}")
    if options.keep is not None and options.scales is None:
        raise ValueError("--keep: give --scales, the scales on which all classes are compared first")
    if options.out is not None:
        check_writable(options.out)
    files, device = resolve.Files(options), local_device(options.device)
    dtype = resolve.common_dtype(options, device, DistContext())
    model, tokenizer, _ = files.load(device, dtype, encoder=True)
    names = model.class_names or tuple(map(str, range(model.config.num_classes)))
    folder = ImageFolder(options.folder, tokenizer.resolution, mid_resolution=options.mid_reso, labeled=False)
    order = in_order(len(folder), batch=options.batch, rank=0, world_size=1)
    rows: list[tuple[str, str, str, str]] = []
    seen: Counter[str] = Counter()
    right: Counter[str] = Counter()
    with tqdm(total=len(folder), desc="images", unit="image", disable=None) as progress:
        for crops in folder.read(CropDataset(folder, replace=False), order, workers=0):
            progress.update(len(crops.indices) + len(crops.failures))
            if not len(crops.indices):
                continue
            images = ((crops.images[:, 0] + 1) / 2).clamp(0, 1)
            found = classify(
                model,
                tokenizer,
                images,
                scales=options.scales,
                keep=options.keep,
                dtype=dtype,
                backend=options.backend,
            )
            for i, label, nats, exact in zip(
                crops.indices.tolist(),
                found.labels.tolist(),
                found.log_likelihood.gather(1, found.labels[:, None])[:, 0].tolist(),
                found.exact.tolist(),
                strict=True,
            ):
                image = folder.name(i)
                rows.append((image, names[label], f"{-nats / math.log(2):.2f}", "yes" if exact else "no"))
                parent = image.partition("/")[0]
                if "/" in image and parent in names:
                    seen[parent] += 1
                    right[parent] += parent == names[label]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image", "class", "bits", "exact"), *rows])
    if options.out is None:
        print(table.getvalue(), end="")
    else:
        with atomic_write(options.out) as temporary:
            temporary.write_bytes(table.getvalue().encode(errors="surrogateescape"))
    log = sys.stderr if options.out is None or is_standard_output(options.out) else sys.stdout
    exact = sum(row[3] == "yes" for row in rows)
    print(f"{len(rows)} images, for {exact} of which the class is the exact arg-max over all scales", file=log)
    if seen:
        accuracy = right.total() / seen.total()
        print(f"accuracy on the {seen.total()} images in folders of {len(seen)} classes: {accuracy:.2%}", file=log)
