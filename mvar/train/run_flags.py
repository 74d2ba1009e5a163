"""Command-line flags that all training commands have, and the parser of a class of flags.

Flags that VAR's trainer (FoundationVision/VAR, utils/arg_util.py) has as well have its names, meaning and defaults.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from mvar.models.config import SCHEDULES
from mvar.utils.files import expanded

SCHE = "learning rate schedule: lin0, lin, lin00, lin0.3 (any fraction), cos, exp"


def boolean(text: str) -> bool:
    """Parse 1 or 0, or a prefix of true or false, as VAR's parser does."""
    for word, value in (("1", True), ("true", True), ("0", False), ("false", False)):
        if text and word.startswith(text.lower()):
            return value
    raise argparse.ArgumentTypeError(f"expected 1 or 0, true or false, got {text!r}")


def integers(text: str) -> tuple[int, ...]:
    """Parse whole numbers such as 1_2_4 or 1-2-4."""
    if not re.fullmatch(r"\d+([_-]\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1_2_4, got {text!r}")
    return tuple(int(number) for number in re.split("[_-]", text))


def token_maps(text: str) -> tuple[int, ...]:
    if text.isdigit() and int(text) in SCHEDULES:
        return SCHEDULES[int(text)]
    try:
        return integers(text)
    except argparse.ArgumentTypeError as error:
        expected = "256, 512, 1024 or side lengths such as 1_2_3_4"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from error


def schedule_name(text: str) -> str:
    number = re.fullmatch(r"lin(0?\.\d+)", text)
    if text not in ("lin0", "lin", "lin00", "cos", "exp") and not (number and 0 < float(number[1]) < 1):
        raise argparse.ArgumentTypeError(f"expected lin0, lin, lin00, lin0.3 (any fraction), cos or exp, got {text!r}")
    return text


def flag(
    default: Any,
    help: str,
    type: Callable[[str], Any] | None = None,
    choices: tuple[Any, ...] | None = None,
    *,
    free: bool = False,
    aliases: tuple[str, ...] = (),
    config: str | None = None,
) -> Any:
    """A field of :class:`RunFlags` or of a class derived from it.

    Args:
        free: the flag may change when a run is resumed, since it does not affect the result.
        aliases: further names, those of other trainers.
        config: the field of the configuration (of the model or tokenizer) that the flag sets. With --init_from the file
            sets it: the flag is None until the file has been read (:func:`with_architecture`), unless it is given.
    """
    metadata = {"help": help, "type": type, "choices": choices, "free": free, "aliases": aliases}
    return field(default=None if config else default, metadata=metadata | {"default": default, "config": config})


@dataclass(frozen=True)
class RunFlags:
    """Flags of data, optimization, execution and output. Raises ValueError with the name of a flag that is invalid.

    SECTIONS: all flags of a class by the headings of its --help.
    """

    SECTIONS: ClassVar[Mapping[str, str]] = {}

    # Data
    data_path: str | None = flag(None, "folder with train/class/image and, optionally, val/class/image", str, free=True)
    mid_reso: float = flag(1.125, "size of the shorter side before the crop, relative to the resolution")
    hflip: bool = flag(False, "flip training images at random")
    workers: int = flag(0, "processes that read images; 0 or below: the training process reads them", free=True)
    # Start
    init_from: str | None = flag(None, "weights to start from", str, free=True)  # a resumed run does not read it
    # Optimization
    bs: int = flag(768, "global batch size, over all processes and accumulated steps")
    ac: int = flag(1, "gradient accumulation steps")
    ep: int = flag(250, "epochs")
    tblr: float = flag(1e-4, "learning rate for a batch of 256; the peak is this times bs/256")
    twd: float = flag(0.05, "weight decay at the start")
    twde: float = flag(0.0, "weight decay at the end, on a cosine schedule; 0: as at the start")
    tclip: float = flag(2.0, "gradient clipping: largest norm; 0 for none")
    sche: str = flag("lin0", SCHE, schedule_name)
    wp: float = flag(0.0, "warm-up epochs; 0 for 1/50 of all epochs")
    wp0: float = flag(0.005, "learning rate at the start of the warm-up, relative to the peak")
    wpe: float = flag(0.01, "learning rate at the end, relative to the peak")
    fp16: int = flag(0, "0: float32, 1: float16 with loss scaling, 2: bfloat16", choices=(0, 1, 2))
    average: float = flag(0.0, "decay of a moving average of the weights, which is saved as the model; 0 for none")
    # Execution
    device: str | None = flag(None, "such as cpu or cuda (default: cuda if available)", str, free=True)
    tf32: bool = flag(
        True, "float32 matmuls in TF32 on a GPU; on a CPU by oneDNN if its results are true float32", free=True
    )
    seed: int | None = flag(None, "seed of weights, order, crops and dropout (default: a new one)", int)
    # Output
    out: str = flag(
        "local_output",
        "folder of the run; an interrupted run in it is continued",
        free=True,
        aliases=("local_out_dir_path",),
    )
    exp_name: str = flag("text", "name of the run in its log", free=True)
    save_every: int = flag(1000, "iterations between checkpoints", free=True)
    log_every: int = flag(50, "iterations between log lines", free=True)
    skips: int = flag(20, "consecutive steps that may be skipped because their gradients are not finite", free=True)
    tb: bool | None = flag(None, "write TensorBoard logs (default: if it is installed)", boolean, free=True)
    samples: int = flag(
        8, "number of classes in the image grid at the end; 0 for no grid", free=True, aliases=("pictures",)
    )
    shorten: float = flag(1.0, "fraction of the epochs to run, for a quick try")

    def __post_init__(self) -> None:
        if self.init_from is None:
            for name in architecture(type(self)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, _fields(type(self))[name].metadata["default"])
        self._expand("data_path", "init_from", "out")
        for name in ("bs", "ac", "ep", "save_every", "log_every", "skips"):
            require(getattr(self, name) >= 1, name, "a whole number of at least 1", getattr(self, name))
        for name in ("twd", "twde", "wp", "wp0", "wpe", "samples"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        require(0 <= self.average < 1, "average", "a number from 0 to below 1", self.average)
        require(not math.isnan(self.tclip), "tclip", "a number", self.tclip)
        require(0 < self.tblr < math.inf, "tblr", "a number above 0", self.tblr)
        require(1 <= self.mid_reso <= 16, "mid_reso", "a number from 1 to 16", self.mid_reso)
        require(0 < self.shorten <= 1, "shorten", "a number above 0 and up to 1", self.shorten)
        object.__setattr__(self, "workers", max(self.workers, 0))

    def _expand(self, *names: str) -> None:
        """Expand ~ and check the paths of these flags."""
        for name in names:
            path = getattr(self, name)
            require(path != "", name, "a path", "an empty text")
            if path is not None and "://" not in path:
                object.__setattr__(self, name, str(expanded(path)))


AnyFlags = TypeVar("AnyFlags", bound=RunFlags)


def _fields(kind: type[RunFlags]) -> dict[str, Any]:
    return {item.name: item for item in fields(kind)}


def architecture(kind: type[RunFlags]) -> Mapping[str, str]:
    """The flags that set a field of the configuration, and this field."""
    return {item.name: item.metadata["config"] for item in fields(kind) if item.metadata["config"]}


def require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"--{name}: expected {expected}, got {got}")


def flag_error(error: ValueError, flag_of: Mapping[str, str]) -> ValueError:
    """An error "field: expected …" with the name of the flag that sets the field."""
    field, _, expected = str(error).partition(": ")
    return ValueError(f"--{flag_of.get(field, field)}: {expected}")


def add_flags(parser: argparse.ArgumentParser, kind: type[RunFlags]) -> None:
    """Add all flags to a parser. Flags that are not given are not in its result, see :func:`given_flags`."""
    found = _fields(kind)
    for heading, names in kind.SECTIONS.items():
        group = parser.add_argument_group(heading)
        for name in names.split():
            item = found.pop(name)
            value = item.metadata["default"]
            parse = item.metadata["type"] or (boolean if isinstance(value, bool) else type(value))
            default = "" if value is None else f" (default: {formatted(value)})"
            details: dict[str, Any] = {"nargs": "?", "const": True} if parse is boolean else {}
            if item.metadata["choices"]:
                details["choices"] = item.metadata["choices"]
            else:
                details["metavar"] = name.upper()
            group.add_argument(
                *(f"--{n}" for n in (name, *item.metadata["aliases"])),
                dest=name,
                type=parse,
                default=argparse.SUPPRESS,
                help=item.metadata["help"] + default,
                **details,
            )
    assert not found, f"flags without a section: {sorted(found)}"
    # Passed by torch.distributed.launch and ignored, since LOCAL_RANK is in the environment as well.
    parser.add_argument("--local-rank", "--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def given_flags(options: argparse.Namespace, kind: type[RunFlags]) -> dict[str, Any]:
    """The flags that were given on the command line."""
    known = _fields(kind)
    return {name: value for name, value in vars(options).items() if name in known}


def with_architecture(flags: AnyFlags, config: object, path: str) -> AnyFlags:
    """The flags of --init_from with the architecture of its file, or of the run's checkpoint, at `path`.

    Raises:
        ValueError: a flag was given that has another value there.
    """
    found = {name: getattr(config, field) for name, field in architecture(type(flags)).items()}
    for name, value in found.items():
        given = getattr(flags, name)
        if given not in (None, value):
            raise ValueError(f"--{name}: {path} has {formatted(value)}, not {formatted(given)}; leave it out")
    return replace(flags, **found)


def formatted(value: object) -> str:
    """A flag's value as on the command line."""
    if isinstance(value, tuple):
        return "_".join(map(str, value))
    return str(int(value) if isinstance(value, bool) else value)
