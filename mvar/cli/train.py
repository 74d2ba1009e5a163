"""`mvar train`: the flags are those of :mod:`mvar.train.flags`."""

import argparse

from mvar.train.flags import add_arguments, parse_flags

HELP = "train a model, with the flags of VAR's and M-VAR's trainers; in one process or under torchrun"
EXAMPLES = """\
mvar train --preset digits --out runs/digits
mvar train --preset digits --bidirectional --tokenizer runs/digits/tokenizer.safetensors --out runs/both
torchrun --nproc_per_node=8 -m mvar train --depth=16 --bs=768 --ep=200 --fp16=1 --alng=1e-3 --wpe=0.1 \
--data_path=imagenet"""

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    from mvar.train.loop import exit_when_interrupted
    from mvar.train.run import train

    with exit_when_interrupted():
        train(parse_flags(options))
