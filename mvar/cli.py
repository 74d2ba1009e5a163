"""The command line: `mvar demo | sample | evaluate | train | convert | tokenize | bench | check | info`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mvar import __version__
from mvar.errors import message
from mvar.files import expanded
from mvar.terminal import tolerant_output
from mvar.train.flags import add_flags, parsed, token_maps

# `mvar --help` imports no torch: the module of a command is imported when the command runs.

DTYPE_NAMES = ("auto", "fp32", "bf16", "fp16")
SUITES = ("parity", "throughput", "ops", "data", "train", "digits", "plug_in")
EXPECTED = (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)
Group = argparse._ArgumentGroup


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Nothing is left over: a subcommand's parser is asked by its parent in this way, and would not object."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand. Bad use, bad files and bad values end with exit code 2 and one plain line.

    So does output that cannot be printed, once the work is done, unless its reader has gone (`| head -1`).
    """
    with tolerant_output() as output:
        try:
            _main(arguments)
        finally:
            output.flush()
            if output.lost is not None and not isinstance(output.lost, BrokenPipeError):
                print(f"mvar: error: cannot write to standard output: {output.lost.strerror}", file=sys.stderr)
                sys.exit(2)


def _main(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except Exception as error:
        if options.traceback:
            raise
        hint = "" if isinstance(error, EXPECTED) else f" ({type(error).__name__}; --traceback shows where)"
        print(f"mvar {options.command}: error: {message(error)}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mvar", description="M-VAR: scale-wise autoregressive image generation on optimized kernels.")
    parser.add_argument("--version", action="version", version=f"mvar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, examples: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            allow_abbrev=False,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        return sub

    demo = command(
        "demo",
        _demo,
        "generate handwritten digits with the model in the package, and check them",
        "mvar demo\nmvar demo --bidirectional --out digits",
    )
    group = demo.add_argument_group("output and checks")
    group.add_argument(
        "--out", type=_path, default=Path("demo"), help="folder for samples.png and scales.png (default: demo)"
    )
    group.add_argument("--bidirectional", action="store_true", help="use the model with the bidirectional mixer")
    group.add_argument(
        "--checked", type=int, default=1000, metavar="N", help="digits to generate for the checks (default: 1000)"
    )
    _sampling(demo, cfg=None, top_k=None, top_p=None)
    _execution(demo)

    sample = command(
        "sample",
        _sample,
        "generate images from any weights",
        "mvar sample --classes 0-9 --count 8 --grid digits.png\n"
        "mvar sample --weights d16.pth --tokenizer vae_ch160v4096z32.pth --classes 207,980 --out images\n"
        "mvar sample --weights d16.pth --tokenizer vae_ch160v4096z32.pth --classes 0-999 --count 50 --npz fid.npz\n"
        "torchrun --nproc_per_node=8 -m mvar sample --weights d16.pth --tokenizer vae_ch160v4096z32.pth "
        "--classes 0-999 --count 50 --npz fid.npz",
    )
    group = sample.add_argument_group("images")
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
    group = sample.add_argument_group("output", "at least one of --out, --grid and --npz")
    group.add_argument("--out", type=_path, help="folder for one PNG per image; refused if it has some already")
    group.add_argument("--overwrite", action="store_true", help="remove the images of an earlier run from --out")
    group.add_argument(
        "--grid",
        type=_path,
        help="file for a grid of all images, one row per class: .png, .jpg, .webp or .bmp; PNG without a suffix",
    )
    group.add_argument("--npz", type=_path, help="npz with all images, as ADM's evaluator reads it")
    _weights(sample)
    group = _sampling(sample, cfg=1.5, top_k=900, top_p=0.96)
    group.add_argument(
        "--smooth", action="store_true", help="average codes by Gumbel-softmax (more_smooth of VAR); not for FID"
    )
    _compile_decoder(_execution(sample))

    evaluate = command(
        "evaluate",
        _evaluate,
        "generate 50 images per class with the published settings, and compute FID, Inception score, precision and "
        "recall",
        "mvar evaluate --weights d16.pth --tokenizer vae_ch160v4096z32.pth --out d16 "
        "--reference VIRTUAL_imagenet256_labeled.npz --inception weights-inception-2015-12-05-6726825d.pth\n"
        "torchrun --nproc_per_node=8 -m mvar evaluate --weights d16.pth --tokenizer vae_ch160v4096z32.pth "
        "--out d16",
    )
    group = evaluate.add_argument_group("images")
    group.add_argument("--count", type=int, default=50, metavar="N", help="images per class (default: 50)")
    group.add_argument("--batch", type=int, default=50, metavar="N", help="images per batch (default: 50)")
    group = evaluate.add_argument_group("output")
    group.add_argument(
        "--out",
        type=_path,
        required=True,
        help="folder for images.npz and evaluation.json; an interrupted run in it is continued",
    )
    group.add_argument("--png", action="store_true", help="also write one PNG per image")
    group = evaluate.add_argument_group("metrics")
    group.add_argument("--reference", type=_path, help="ADM's reference npz, or any npz with images or moments")
    group.add_argument(
        "--inception",
        type=_path,
        help="Inception weights of torch-fidelity (default: those in torch.hub's folder; never downloaded)",
    )
    _weights(evaluate)
    _sampling(evaluate, cfg=1.5, top_k=900, top_p=0.96)
    _compile_decoder(_execution(evaluate))

    train = command(
        "train",
        _train,
        "train a model, with the flags of VAR's and M-VAR's trainers; in one process or under torchrun",
        "mvar train --preset digits --out runs/digits\n"
        "mvar train --preset digits --bidirectional --tokenizer runs/digits/tokenizer.safetensors --out runs/both\n"
        "torchrun --nproc_per_node=8 -m mvar train --depth=16 --bs=768 --ep=200 --fp16=1 --alng=1e-3 --wpe=0.1 "
        "--data_path=imagenet",
    )
    add_flags(train)

    convert = command(
        "convert",
        _convert,
        "read weights or a trainer's checkpoint, and write them in the published format or as safetensors",
        "mvar convert ar-ckpt-last.pth d16.safetensors\n"
        "mvar convert runs/d16/checkpoints/00333600 d16.pth\n"
        "mvar convert ar-ckpt-last.pth tokenizer.pth --part tokenizer",
    )
    convert.add_argument(
        "source",
        type=_source,
        help="file of weights, checkpoint of VAR's or M-VAR's trainer, or checkpoint folder of mvar train",
    )
    convert.add_argument(
        "target", type=_path, help=".pth for a state dict as published, .safetensors for the format of mvar.save"
    )
    convert.add_argument("--part", choices=("model", "tokenizer"), default="model", help="(default: model)")
    convert.add_argument(
        "--pn", type=token_maps, help="token maps of a tokenizer, not stored in its file: 512, 1_2_3 (default: 256)"
    )
    convert.add_argument(
        "--dtype", choices=DTYPE_NAMES[1:], default="fp32", help="dtype of the weights to write (default: fp32)"
    )

    tokenize = command(
        "tokenize",
        _tokenize,
        "write the tokens of a data set once, for training without an encoder",
        "mvar tokenize --data_path imagenet --tokenizer vae_ch160v4096z32.pth --out tokens --crops 4\n"
        "torchrun --nproc_per_node=8 -m mvar tokenize --data_path imagenet --tokenizer vae_ch160v4096z32.pth "
        "--out tokens",
    )
    group = tokenize.add_argument_group("input and output")
    group.add_argument(
        "--data_path",
        type=_path,
        required=True,
        help="folder with train/class/image and, optionally, val/class/image",
    )
    group.add_argument(
        "--tokenizer", type=_source, required=True, help="file of the tokenizer, or hf://owner/repository/file"
    )
    group.add_argument(
        "--out",
        type=_path,
        required=True,
        help="folder for train/ and val/; an interrupted run in it is continued",
    )
    group = tokenize.add_argument_group("crops")
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
    maps = group.add_mutually_exclusive_group()
    maps.add_argument("--resolution", type=int, help="256, 512 or 1024 (default: as the tokenizer's file says)")
    maps.add_argument("--patch_nums", type=int, nargs="+", metavar="N", help="side lengths of other token maps")
    group = tokenize.add_argument_group("execution")
    group.add_argument("--batch", type=int, default=64, metavar="N", help="crops per batch (default: 64)")
    workers = min(8, os.cpu_count() or 1)
    group.add_argument(
        "--workers", type=int, default=workers, metavar="N", help=f"processes that read images (default: {workers})"
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the encoder (default: fp32)")
    _device(group)

    bench = command(
        "bench",
        _bench,
        "measure speed and quality on this machine, from a checkout of the repository",
        "mvar bench --suite parity --report\nmvar bench --suite throughput\nmvar bench --suite parity -- --count 20",
    )
    bench.add_argument("--suite", nargs="+", choices=SUITES, metavar="NAME", help=f"any of {', '.join(SUITES)}")
    bench.add_argument("--report", action="store_true", help="then write docs/generated from the result files")
    bench.add_argument("arguments", nargs="*", help="after --: of the suite, see python -m benchmarks.NAME --help")

    check = command(
        "check",
        _check,
        "compare every kernel that runs on this machine with a float64 reference, forward and backward",
        "mvar check\nmvar check scale_attention --backend triton --out check.jsonl\n"
        "mvar check --only-failed check.jsonl",
    )
    check.add_argument("ops", nargs="*", metavar="op", help="such as scale_attention (default: all)")
    check.add_argument("--backend", default=None, help="check only this backend (default: all but the reference)")
    check.add_argument("--out", type=_path, help="file for one line of JSON per case, written as the cases finish")
    check.add_argument(
        "--only-failed", type=_path, metavar="FILE", help="check only the cases that failed in such a file"
    )

    command("info", _info, "print versions, devices and backends, and why a backend is not available", "mvar info")
    return parser


def _weights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights", "both or neither; without them the digits model in the package")
    group.add_argument("--weights", type=_source, help="file of the model, or hf://owner/repository/file")
    group.add_argument("--tokenizer", type=_source, help="file of its tokenizer, likewise")


def _sampling(parser: argparse.ArgumentParser, cfg: float | None, top_k: int | None, top_p: float | None) -> Group:
    def default(value: float | None) -> str:
        return f"(default: {'depends on the model' if value is None else value})"

    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg", type=float, default=cfg, help=f"classifier-free guidance; 0 for none {default(cfg)}")
    group.add_argument(
        "--top-k", type=int, default=top_k, help=f"keep the k most likely codes; 0 for all {default(top_k)}"
    )
    group.add_argument(
        "--top-p", type=float, default=top_p, help=f"keep the most likely codes up to this probability {default(top_p)}"
    )
    group.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone (default: 0)")
    return group


def _execution(parser: argparse.ArgumentParser) -> Group:
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="auto", help="dtype of the model (default: the fastest on the device)"
    )
    group.add_argument("--backend", default="auto", help="backend of every op, see `mvar info` (default: auto)")
    group.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run each batch as one CUDA graph (default: on a GPU)",
    )
    _device(group)
    return group


def _device(group: Group) -> None:
    group.add_argument("--device", default=None, help="such as cpu or cuda:1 (default: cuda if available)")


def _compile_decoder(group: Group) -> None:
    group.add_argument(
        "--compile-decoder",
        action="store_true",
        help="run the decoder with torch.compile: pays off for thousands of images",
    )


def _source(text: str) -> str:
    """A path, or an hf:// address, which is none."""
    if not text:  # an unset variable of a shell; to Path it is the current folder
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return text


def _path(text: str) -> Path:
    return expanded(_source(text))


def _demo(options: argparse.Namespace) -> None:
    from mvar.demo import demo

    demo(options)


def _sample(options: argparse.Namespace) -> None:
    from mvar.sample import sample

    sample(options)


def _evaluate(options: argparse.Namespace) -> None:
    from mvar.evaluate.command import evaluate

    evaluate(options)


def _train(options: argparse.Namespace) -> None:
    from mvar.train.run import run
    from mvar.train.trainer import Interrupted

    try:
        run(parsed(options))
    except Interrupted as error:
        print(error, flush=True)
        sys.exit(128 + error.signal)


def _convert(options: argparse.Namespace) -> None:
    from mvar.convert import convert

    convert(options)


def _tokenize(options: argparse.Namespace) -> None:
    from mvar.data.encode import tokenize

    tokenize(options)


def _bench(options: argparse.Namespace) -> None:
    from mvar.bench import bench

    bench(options)


def _check(options: argparse.Namespace) -> None:
    from mvar.check.command import check

    check(options)


def _info(options: argparse.Namespace) -> None:
    from mvar import machine

    print(*machine.lines(), sep="\n")
