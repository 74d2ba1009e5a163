"""`mvar edit`: in-painting, out-painting, class-conditional editing and variations of one image."""

import argparse

from mvar.cli.options import (
    add_compile_decoder,
    add_execution,
    add_sampling,
    add_shortcuts,
    add_weights,
    check_images,
    path,
)

HELP = "generate parts of an image anew: in-painting, out-painting, class-conditional editing, variations"
EXAMPLES = """\
mvar edit --image in.png --box 128,0,256,256 --class 207 --count 4 --out edited \
--weights d16.pth --tokenizer vae_ch160v4096z32.pth
mvar edit --image in.jpg --mask mask.png --out edited --weights d16.pth --tokenizer vae_ch160v4096z32.pth
mvar edit --image in.png --outpaint 64,0,64,0 --out edited --weights d16.pth --tokenizer vae_ch160v4096z32.pth
mvar edit --image digit.png --keep-scales 2 --class 3 --count 8 --out variations"""


def four_numbers(text: str) -> tuple[int, int, int, int]:
    try:
        a, b, c, d = (int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected four whole numbers such as 0,0,64,64, got {text!r}") from error
    return a, b, c, d


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image")
    group.add_argument(
        "--image", type=path, required=True, help="any format; the shorter side is scaled and the center cropped"
    )
    parts = group.add_mutually_exclusive_group()
    parts.add_argument("--mask", type=path, help="image of the same size, white where it is generated anew")
    parts.add_argument("--box", type=four_numbers, metavar="X0,Y0,X1,Y1", help="box to generate anew, in its pixels")
    parts.add_argument(
        "--outpaint",
        type=four_numbers,
        metavar="L,T,R,B",
        help="margins to add on each side, in its pixels; more are added to make it square",
    )
    group.add_argument(
        "--keep-scales",
        type=int,
        default=0,
        metavar="K",
        help="keep the K coarsest scales of the complete image; without a mask, box or margins: variations of it",
    )
    group.add_argument(
        "--fill",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replace masked pixels by their surroundings before the image is encoded, so that they have no influence "
        "(default: without --keep-scales)",
    )
    group.add_argument(
        "--reencode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="correct what was sampled at coarse scales by the image's tokens at finer ones (default: yes)",
    )
    group.add_argument(
        "--blend",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the pixels outside of the mask from the image (default: yes)",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--class", dest="label", help="number or name of a class (default: no class)")
    group.add_argument("--count", type=int, default=1, metavar="N", help="number of results (default: 1)")
    group.add_argument("--batch", type=int, default=16, metavar="N", help="results per batch (default: 16)")
    group.add_argument(
        "--out", type=path, required=True, help="folder for one PNG per result and strip.png: image, mask, results"
    )
    group.add_argument("--overwrite", action="store_true", help="remove the results of an earlier run from --out")
    add_weights(parser)
    group = add_sampling(parser, cfg=1.5, top_k=900, top_p=0.96)
    group.add_argument("--smooth", action="store_true", help="average codes by Gumbel-softmax (more_smooth of VAR)")
    add_shortcuts(group)
    add_compile_decoder(add_execution(parser))


def run(options: argparse.Namespace) -> None:
    """Write --count results; result i has the random numbers of (seed, i)."""
    import torch

    from mvar.cli import class_names, resolve
    from mvar.cli.sample import prepare_folder
    from mvar.inference.edit import edit
    from mvar.utils import canvas
    from mvar.utils.distributed import DistContext, local_device
    from mvar.utils.files import check_writable
    from mvar.utils.images import check_image, grid, grid_size, save_image

    check_images(options, 1)
    requested = None if options.label is None else class_names.parse(options.label, "--class")
    if requested is not None and sum(map(len, requested)) != 1:
        raise ValueError(f"--class: expected one class, got {options.label}")
    image = canvas.read(options.image)
    if options.mask is not None:
        source = canvas.with_mask_file(image, options.mask)
    elif options.box is not None:
        source = canvas.with_box(image, options.box)
    elif options.outpaint is not None:
        source = canvas.with_margins(image, options.outpaint)
    elif options.keep_scales:
        source = canvas.everywhere(image)
    else:
        raise ValueError("nothing of the image would be kept: give --mask, --box, --outpaint or --keep-scales")
    check_writable(options.out / "strip.png")
    files, device = resolve.Files(options), local_device(options.device)
    side = files.tokenizer.resolution
    check_image(options.out / "strip.png", *grid_size(options.count + 2, options.count + 2, side, side))
    label = files.model.config.num_classes
    if requested is not None:
        (label,) = class_names.class_indices(requested, files.model, "--class")
    pixels, mask, steps = source.fitted(side)
    print(f"{options.image}: {steps}")
    if not options.overwrite:
        prepare_folder(options.out, overwrite=False)

    arguments = resolve.generate_arguments(options) | {"dtype": resolve.common_dtype(options, device, DistContext())}
    model, tokenizer, refiner = files.load(device, arguments["dtype"], labels=[label], encoder=True)
    results = []
    for start in range(0, options.count, options.batch):
        count = min(options.batch, options.count - start)
        out = edit(
            model,
            tokenizer,
            pixels.expand(count, -1, -1, -1),
            mask,
            label,
            keep_scales=options.keep_scales,
            more_smooth=options.smooth,
            blend=options.blend,
            fill=options.fill if options.fill is not None else bool(options.outpaint) or not options.keep_scales,
            reencode=options.reencode,
            refiner=refiner,
            refine_from=options.refine_from,
            guidance_until=options.guidance_until,
            first_index=start,
            compile_decoder=options.compile_decoder,
            **arguments,
        )
        results.append(out.images.cpu())
    prepare_folder(options.out, overwrite=options.overwrite)  # earlier results are removed once there are new ones
    for i, result in enumerate(torch.cat(results)):
        save_image(options.out / f"{i:06d}_{label:04d}.png", result)
    strip = torch.cat([pixels[None], mask.float().expand(1, 3, -1, -1), *results])
    save_image(options.out / "strip.png", grid(strip, len(strip)))
    print(f"{options.count} images and strip.png in {options.out}")
