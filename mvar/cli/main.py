"""The `mvar` command: parses the command line, runs one command, prints one line for an error."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from mvar import __version__
from mvar.cli.terminal import non_raising_output
from mvar.utils.errors import message

COMMANDS = (
    "demo",
    "sample",
    "edit",
    "classify",
    "evaluate",
    "train",
    "train-tokenizer",
    "convert",
    "tokenize",
    "check",
    "info",
)
"""Each is a module of this package with HELP, EXAMPLES, add_arguments(parser) and run(options). `run` imports what
needs torch, so that `--help` does not wait for it."""
EXPECTED = (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Reject unknown arguments of a command by the command's own parser, which its parent calls by this method."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Wrong arguments, files and values end with exit code 2 and one line on standard error.

    The same applies, after the command has finished, to a failed write to standard output, except to a closed pipe
    (`| head -1`).
    """
    with non_raising_output() as output:
        try:
            _main(arguments)
        finally:
            output.flush()
            if output.error is not None and not isinstance(output.error, BrokenPipeError):
                print(f"mvar: error: cannot write to standard output: {output.error.strerror}", file=sys.stderr)
                sys.exit(2)


def _main(arguments: Sequence[str] | None) -> None:
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except Exception as error:
        if options.traceback:
            raise
        hint = "" if isinstance(error, EXPECTED) else f" ({type(error).__name__}; --traceback shows where)"
        print(f"mvar {options.command}: error: {message(error)}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mvar", description="M-VAR: scale-wise autoregressive image generation on optimized kernels.")
    parser.add_argument("--version", action="version", version=f"mvar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    for name in COMMANDS:
        command = import_module(f"mvar.cli.{name.replace('-', '_')}")
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            allow_abbrev=False,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.EXAMPLES.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=command.run)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        command.add_arguments(sub)
    return parser
