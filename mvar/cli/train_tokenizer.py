"""`mvar train-tokenizer`: the flags are those of :mod:`mvar.train_tokenizer.flags`."""

import argparse

from mvar.train.run_flags import add_flags
from mvar.train_tokenizer.flags import TokenizerFlags, parse_flags

HELP = "train a tokenizer on a folder of images, in one process or under torchrun"
EXAMPLES = """\
mvar train-tokenizer --data_path photos --pn 1_2_3_4_6_8 --ch_mult 1_2_2_4 --ch 32 --blocks 1 --codes 1024 --disc 0
torchrun --nproc_per_node=8 -m mvar train-tokenizer --data_path imagenet --fp16=2 --lpips vgg16-397923af.pth
mvar train-tokenizer --init_from vae_ch160v4096z32.pth --freeze tokens --data_path photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, TokenizerFlags)


def run(options: argparse.Namespace) -> None:
    from mvar.train.loop import exit_when_interrupted
    from mvar.train_tokenizer.run import train

    with exit_when_interrupted():
        train(parse_flags(options))
