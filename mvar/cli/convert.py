"""`mvar convert`: weights from one file format to another."""

import argparse
from typing import TYPE_CHECKING

from mvar.cli.options import DTYPE_NAMES, path, source
from mvar.train.run_flags import token_maps

if TYPE_CHECKING:
    from mvar.models.tokenizer import Tokenizer
    from mvar.models.transformer import Model

HELP = "read weights or a trainer's checkpoint, and write them in the published format or as safetensors"
EXAMPLES = """\
mvar convert ar-ckpt-last.pth d16.safetensors
mvar convert runs/d16/checkpoints/00333600 d16.pth
mvar convert ar-ckpt-last.pth tokenizer.pth --part tokenizer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=source,
        help="file of weights, checkpoint of VAR's or M-VAR's trainer, checkpoint folder of mvar train, or folder of "
        "save_pretrained",
    )
    parser.add_argument(
        "target", type=path, help=".pth for a state dict as published, .safetensors for the format of mvar.save"
    )
    parser.add_argument(
        "--part",
        choices=("model", "tokenizer"),
        default="model",
        help="part of a trainer's checkpoint to write (default: model)",
    )
    parser.add_argument(
        "--pn", type=token_maps, help="token maps of a tokenizer, not stored in its file: 512, 1_2_3 (default: 256)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES[1:], default="fp32", help="dtype of the weights to write (default: fp32)"
    )


def run(options: argparse.Namespace) -> None:
    from mvar.checkpoint import load_model, load_tokenizer, save, save_published
    from mvar.cli.resolve import DTYPES
    from mvar.stored import WEIGHTS_FILE
    from mvar.train.checkpoint import read_model
    from mvar.utils.files import check_writable, expanded

    if options.target.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{options.target}: expected a name that ends in .pth or .safetensors")
    check_writable(options.target)
    folder = expanded(options.source)
    module: Model | Tokenizer
    if options.part == "tokenizer":
        module = load_tokenizer(options.source, patch_nums=options.pn)
    else:
        is_checkpoint = folder.is_dir() and not (folder / WEIGHTS_FILE).exists()
        module = read_model(folder) if is_checkpoint else load_model(options.source)
    write = save if options.target.suffix == ".safetensors" else save_published
    write(options.target, module, dtype=DTYPES[options.dtype])
    print(f"written: {options.target}")
