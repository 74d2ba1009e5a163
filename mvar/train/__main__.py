"""`torchrun … -m mvar.train`: the same program as `mvar train`."""

import sys

from mvar.cli import main

main(["train", *sys.argv[1:]])
