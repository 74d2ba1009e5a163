"""Command-line flags of training: those of VAR's trainer (FoundationVision/VAR, utils/arg_util.py), which are also
M-VAR's, with the same meaning and defaults, and additional ones. Presets are sets of defaults.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mvar.models.config import ARCHITECTURES, SCHEDULES, ModelConfig
from mvar.utils.files import expanded

COMPILE_MODES = {1: "reduce-overhead", 2: "max-autotune", 3: "default"}
SECTIONS = {
    "preset": "preset",
    "data_path": "data",
    "init_from": "model",
    "bs": "optimization",
    "pg": "progressive training",
    "device": "execution",
    "out": "output",
}
"""Headings of `mvar train --help`, by their first flag."""
COMPILED = "torch.compile: 0 off, 1 reduce-overhead, 2 max-autotune, 3 its default mode"


def boolean(text: str) -> bool:
    """Parse 1 or 0, or a prefix of true or false, as VAR's parser does."""
    for word, value in (("1", True), ("true", True), ("0", False), ("false", False)):
        if text and word.startswith(text.lower()):
            return value
    raise argparse.ArgumentTypeError(f"expected 1 or 0, true or false, got {text!r}")


def token_maps(text: str) -> tuple[int, ...]:
    if text.isdigit() and int(text) in SCHEDULES:
        return SCHEDULES[int(text)]
    if not re.fullmatch(r"\d+([_-]\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected 256, 512, 1024 or side lengths such as 1_2_3_4, got {text!r}")
    return tuple(int(side) for side in re.split("[_-]", text))


def schedule_name(text: str) -> str:
    number = re.fullmatch(r"lin(0?\.\d+)", text)
    if text not in ("lin0", "lin", "lin00", "cos", "exp") and not (number and 0 < float(number[1]) < 1):
        raise argparse.ArgumentTypeError(f"expected lin0, lin, lin00, lin0.3 (any fraction), cos or exp, got {text!r}")
    return text


def lowered(text: str) -> str:
    return text.strip().lower()


def _flag(
    default: Any,
    help: str,
    type: Callable[[str], Any] | None = None,
    choices: tuple[Any, ...] | None = None,
    *,
    free: bool = False,
    aliases: tuple[str, ...] = (),
    config: str | None = None,
) -> Any:
    """A field of :class:`Flags`.

    Args:
        free: the flag may change when a run is resumed, since it does not affect the result.
        aliases: further names, those of other trainers.
        config: the field of ModelConfig that the flag sets. With --init_from the file sets it: the flag is None until
            the file has been read (:func:`with_architecture`), unless it is given.
    """
    metadata = {"help": help, "type": type, "choices": choices, "free": free, "aliases": aliases}
    return field(default=None if config else default, metadata=metadata | {"default": default, "config": config})


@dataclass(frozen=True)
class Flags:
    """The flags of a run. Raises ValueError with the name of the flag if a value is out of range."""

    preset: str | None = _flag(
        None,
        "hyperparameters of a published training command, or of the digits model; other flags override them",
        str,
        free=True,
    )
    # Data
    data_path: str | None = _flag(
        None, "folder with train/class/image and, optionally, val/class/image", str, free=True
    )
    tokens: str | None = _flag(None, "folder written by `mvar tokenize`, instead of images", str, free=True)
    tokenizer: str | None = _flag(
        "vae_ch160v4096z32.pth",
        "the tokenizer: a file, a folder of save_pretrained, hf://owner/repository or hf://owner/repository/file",
        str,
        free=True,
    )
    pn: tuple[int, ...] | None = _flag(
        None,
        "token maps: 256, 512, 1024 or side lengths such as 1_2_3 (default: the tokenizer's; 256 if it has none)",
        token_maps,
        free=True,  # the model's token maps are compared instead
    )
    mid_reso: float = _flag(1.125, "size of the shorter side before the crop, relative to the resolution")
    hflip: bool = _flag(False, "flip training images at random")
    workers: int = _flag(0, "processes that read images; 0 or below: the training process reads them", free=True)
    # Model
    init_from: str | None = _flag(
        None,
        "fine-tune: start from the weights of this file, folder of save_pretrained, checkpoint folder, "
        "hf://owner/repository or hf://owner/repository/file, whose architecture the flags from --arch to --anorm then "
        "have",
        str,
        free=True,  # a resumed run does not read it
    )
    arch: str | None = _flag("mvar", "M-VAR or VAR", choices=ARCHITECTURES, config="architecture")
    depth: int | None = _flag(16, "number of blocks; the width is 64·depth", config="depth")
    width: int | None = _flag(None, "number of channels, a multiple of 64 (default: 64·depth)", int, config="width")
    state_dim: int | None = _flag(64, "state size of the Mamba-2 layer", config="state_dim")
    bidirectional: bool | None = _flag(False, "also scan backward within each scale", config="bidirectional")
    saln: bool | None = _flag(False, "one modulation layer for all blocks (VAR's d36-s)", config="shared_adaln")
    anorm: bool | None = _flag(
        True,
        "normalize queries and keys (the published d12, d16 and d20 of M-VAR have --anorm=0)",
        config="qk_norm",
    )
    ini: float = _flag(-1.0, "standard deviation of the initial weights; a negative value selects √(1/(3C)), C: width")
    hd: float = _flag(0.02, "factor on the head's initial weights")
    aln: float = _flag(0.5, "factor on the modulation layers' initial weights")
    alng: float = _flag(1e-5, "factor on the initial weights of the gates in the modulation layers")
    # Optimization
    bs: int = _flag(768, "global batch size, over all processes and accumulated steps")
    ac: int = _flag(1, "gradient accumulation steps")
    ep: int = _flag(250, "epochs")
    opt: str = _flag("adamw", "optimizer; both names select AdamW", lowered, choices=("adam", "adamw"))
    afuse: bool = _flag(True, "fused AdamW", free=True)
    tblr: float = _flag(1e-4, "learning rate for a batch of 256; the peak is this times bs/256")
    twd: float = _flag(0.05, "weight decay at the start")
    twde: float = _flag(0.0, "weight decay at the end, on a cosine schedule; 0: as at the start")
    tclip: float = _flag(2.0, "gradient clipping: largest norm; 0 for none")
    ls: float = _flag(0.0, "label smoothing")
    sche: str = _flag(
        "lin0", "learning rate schedule: lin0, lin, lin00, lin0.3 (any fraction), cos, exp", schedule_name
    )
    wp: float = _flag(0.0, "warm-up epochs; 0 for 1/50 of all epochs")
    wp0: float = _flag(0.005, "learning rate at the start of the warm-up, relative to the peak")
    wpe: float = _flag(0.01, "learning rate at the end, relative to the peak")
    fp16: int = _flag(0, "0: float32, 1: float16 with loss scaling, 2: bfloat16", choices=(0, 1, 2))
    average: float = _flag(0.0, "decay of a moving average of the weights, which is saved as the model; 0 for none")
    # Progressive training
    pg: float = _flag(
        0.0, "fraction of the training in which scales are added one by one; 0: all scales from the start"
    )
    pg0: int = _flag(4, "index (from 0) of the last scale in the first stage")
    pgwp: float = _flag(0.0, "epochs over which the loss of a new scale is ramped up; 0 for 1/300 of all epochs")
    # Execution
    device: str | None = _flag(None, "such as cpu or cuda (default: cuda if available)", str, free=True)
    backend: str = _flag("auto", "backend of every op, see `mvar info`", free=True)
    fuse: bool = _flag(True, "fused kernels; 0 for plain PyTorch, as --backend=reference", free=True)
    tf32: bool = _flag(
        True, "float32 matmuls in TF32 on a GPU; on a CPU by oneDNN if its results are true float32", free=True
    )
    tfast: int = _flag(0, f"compile each block. {COMPILED}", choices=(0, 1, 2, 3), free=True)
    vfast: int = _flag(0, f"compile the encoder of the tokenizer. {COMPILED}", choices=(0, 1, 2, 3), free=True)
    fsdp: bool = _flag(False, "shard weights, gradients and optimizer state (FSDP2) instead of DDP", free=True)
    recompute: bool = _flag(False, "activation checkpointing of the blocks", free=True)
    seed: int | None = _flag(None, "seed of weights, order, crops and dropout (default: a new one)", int)
    # Run
    out: str = _flag(
        "local_output",
        "folder of the run; an interrupted run in it is continued",
        free=True,
        aliases=("local_out_dir_path",),
    )
    exp_name: str = _flag("text", "name of the run in its log", free=True)
    save_every: int = _flag(1000, "iterations between checkpoints", free=True)
    log_every: int = _flag(50, "iterations between log lines", free=True)
    skips: int = _flag(20, "consecutive steps that may be skipped because their gradients are not finite", free=True)
    tb: bool | None = _flag(None, "write TensorBoard logs (default: if it is installed)", boolean, free=True)
    peak_tflops: float | None = _flag(
        None, "peak TFLOP/s of the device, for the model FLOPs utilization", float, free=True
    )
    samples: int = _flag(
        8, "number of classes in the image grid at the end; 0 for no grid", free=True, aliases=("pictures",)
    )
    shorten: float = _flag(1.0, "fraction of the epochs to run, for a quick try")

    def __post_init__(self) -> None:
        if self.init_from is None:
            for name in ARCHITECTURE:
                if getattr(self, name) is None:
                    object.__setattr__(self, name, _FIELDS[name].metadata["default"])
        for name in ("data_path", "tokens", "tokenizer", "init_from", "out"):
            path = getattr(self, name)
            require(path != "", name, "a path", "an empty text")
            if path is not None and "://" not in path:
                object.__setattr__(self, name, str(expanded(path)))
        for name in ("bs", "ac", "ep", "save_every", "log_every", "skips"):
            require(getattr(self, name) >= 1, name, "a whole number of at least 1", getattr(self, name))
        for name in ("twd", "twde", "wp", "wp0", "wpe", "pgwp", "pg0", "samples", "hd", "aln", "alng"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        for name in ("ls", "average"):
            require(0 <= getattr(self, name) < 1, name, "a number from 0 to below 1", getattr(self, name))
        require(math.isfinite(self.ini), "ini", "a number", self.ini)
        require(not math.isnan(self.tclip), "tclip", "a number", self.tclip)
        if self.peak_tflops is not None:
            require(0 < self.peak_tflops < math.inf, "peak_tflops", "a number above 0", self.peak_tflops)
        require(0 < self.tblr < math.inf, "tblr", "a number above 0", self.tblr)
        require(0 <= self.pg < 1, "pg", "a number from 0 to below 1", self.pg)
        require(1 <= self.mid_reso <= 16, "mid_reso", "a number from 1 to 16", self.mid_reso)
        if self.sche == "exp" and not self.pg:
            require(self.wpe > 0, "wpe", "a number above 0, with --sche=exp", self.wpe)
        require(0 < self.shorten <= 1, "shorten", "a number above 0 and up to 1", self.shorten)
        object.__setattr__(self, "workers", max(self.workers, 0))
        if not self.fuse:
            require(self.backend in ("auto", "reference"), "backend", "reference, with --fuse=0", self.backend)
            object.__setattr__(self, "backend", "reference")


_FIELDS = {item.name: item for item in fields(Flags)}
ARCHITECTURE: Mapping[str, str] = {
    name: item.metadata["config"] for name, item in _FIELDS.items() if item.metadata["config"]
}
"""The flags of a model's architecture, and the fields of ModelConfig that they set."""


def require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"--{name}: expected {expected}, got {got}")


_D16 = {"depth": 16, "bs": 768, "ep": 200, "fp16": 1, "alng": 1e-3, "wpe": 0.1, "anorm": False}
_D24 = _D16 | {"depth": 24, "ep": 350, "tblr": 8e-5, "alng": 1e-4, "wpe": 0.01, "anorm": True}
_D30 = _D24 | {"depth": 30, "bs": 1024, "alng": 1e-5, "twde": 0.08, "fsdp": True, "recompute": True}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "exp_name": "model",
        "tokenizer": None,
        "seed": 0,
        "depth": 3,
        "width": 128,
        "state_dim": 32,
        "anorm": False,
        "alng": 1e-2,
        "bs": 64,
        "ep": 67,
        "tblr": 8e-3,
        "sche": "cos",
        "tclip": 1.0,
        "average": 0.99,
        "log_every": 140,
        "save_every": 700,
        "samples": 10,
    },
    "d12": _D16 | {"depth": 12},
    "d16": _D16,
    "d20": _D16 | {"depth": 20, "ep": 250},
    "d24": _D24,
    "d30": _D30,
    "d32": _D30 | {"depth": 32},
}
"""digits: scikit-learn's digits, with a tokenizer trained on them. The others: the commands of the public READMEs for
ImageNet at 256×256 (M-VAR's for d12 to d30; there is none for its d32, which uses d30's)."""


_LAUNCHED = "torchrun starts the processes"
_COMPUTED = "it is computed from other flags, as in VAR's trainer"
UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "patch_size": ("16", "it is determined by the tokenizer"),
    "same_seed_for_all_ranks": ("0", "all processes use --seed"),
    "local_debug": ("0 false", "--preset=digits runs without any files"),
    "dbg_nan": ("0 false", "steps without a finite gradient are skipped and counted, see --skips"),
    **dict.fromkeys(("tlr", "batch_size", "glb_batch_size", "patch_nums", "resos", "data_load_reso"), ("", _COMPUTED)),
    **dict.fromkeys(("tb_log_dir_path", "log_txt_path", "last_ckpt_path"), ("", "all files are in --out")),
    **dict.fromkeys(("ngpus", "nodes", "partition", "comment", "job_dir", "timeout"), ("", _LAUNCHED)),
    "world_size": ("1", _LAUNCHED),
    "dist_url": ("env://", _LAUNCHED),
}
"""Flags of VAR's or M-VAR's parser without an equivalent: accepted values, which have no effect, and the reason."""


class _UnsupportedFlag(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, given: Any, flag: str | None = None) -> None:
        accepted, reason = UNSUPPORTED[self.dest]
        if given.lower() not in accepted.split():
            parser.error(f"{flag}={given}: not supported: {reason}; leave it out")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags to a parser. Flags that are not given are not in its result, see :func:`parse_flags`."""
    for item in _FIELDS.values():
        value = item.metadata["default"]
        kind = item.metadata["type"] or (boolean if isinstance(value, bool) else type(value))
        choices = tuple(PRESETS) if item.name == "preset" else item.metadata["choices"]
        default = "" if value is None else f" (default: {_formatted(value)})"
        details: dict[str, Any] = {"nargs": "?", "const": True} if kind is boolean else {}
        if choices:
            details["choices"] = choices
        else:
            details["metavar"] = item.name.upper()
        names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
        text = item.metadata["help"] + default
        if item.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[item.name])
        group.add_argument(*names, dest=item.name, type=kind, default=argparse.SUPPRESS, help=text, **details)
    suppress = argparse.SUPPRESS
    for name in UNSUPPORTED:
        parser.add_argument(f"--{name}", action=_UnsupportedFlag, default=suppress, help=suppress)
    # Passed by torch.distributed.launch and ignored, since LOCAL_RANK is in the environment as well.
    parser.add_argument("--local-rank", "--local_rank", type=int, default=suppress, help=suppress)


def parse_flags(options: argparse.Namespace) -> Flags:
    """The flags of a parsed command line, which override the defaults of --preset.

    --init_from overrides those of them that describe the model.
    """
    given = {name: value for name, value in vars(options).items() if name in _FIELDS}
    preset = PRESETS.get(given.get("preset", ""), {})
    if "init_from" in given:
        preset = {name: value for name, value in preset.items() if name not in ARCHITECTURE}
    return Flags(**{**preset, **given})


def with_architecture(flags: Flags, config: ModelConfig, path: str) -> Flags:
    """The flags of --init_from with the architecture of its file, or of the run's checkpoint, at `path`.

    Raises:
        ValueError: a flag was given that has another value there.
    """
    found = {name: getattr(config, field) for name, field in ARCHITECTURE.items()}
    for name, value in found.items():
        given = getattr(flags, name)
        if given not in (None, value):
            raise ValueError(f"--{name}: {path} has {_formatted(value)}, not {_formatted(given)}; leave it out")
    return replace(flags, **found)


def _formatted(value: object) -> str:
    return (
        "_".join(map(str, value)) if isinstance(value, tuple) else str(int(value) if isinstance(value, bool) else value)
    )
