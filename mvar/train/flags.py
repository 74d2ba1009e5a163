"""Flags of `mvar train`: those of VAR's trainer (FoundationVision/VAR, utils/arg_util.py), which are also M-VAR's, with
the same meaning and defaults, and additional ones. Presets are sets of defaults.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mvar.models.config import ARCHITECTURES
from mvar.train.run_flags import RunFlags, add_flags, architecture, flag, given_flags, require, token_maps

COMPILE_MODES = {1: "reduce-overhead", 2: "max-autotune", 3: "default"}
COMPILED = "torch.compile: 0 off, 1 reduce-overhead, 2 max-autotune, 3 its default mode"


def lowered(text: str) -> str:
    return text.strip().lower()


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


@dataclass(frozen=True)
class Flags(RunFlags):
    """The flags of a run of `mvar train`."""

    SECTIONS: ClassVar[Mapping[str, str]] = {
        "preset": "preset",
        "data": "data_path tokens tokenizer pn mid_reso hflip workers",
        "model": "init_from arch depth width state_dim bidirectional saln anorm ini hd aln alng",
        "optimization": "bs ac ep opt afuse tblr twd twde tclip ls sche wp wp0 wpe fp16 average",
        "progressive training": "pg pg0 pgwp",
        "execution": "device backend fuse tf32 tfast vfast fsdp recompute seed",
        "output": "out exp_name save_every log_every skips tb peak_tflops samples shorten",
    }

    preset: str | None = flag(
        None,
        "hyperparameters of a published training command, or of the digits model; other flags override them",
        str,
        choices=tuple(PRESETS),
        free=True,
    )
    # Data
    tokens: str | None = flag(None, "folder written by `mvar tokenize`, instead of images", str, free=True)
    tokenizer: str | None = flag(
        "vae_ch160v4096z32.pth",
        "the tokenizer: a file, a folder of save_pretrained, hf://owner/repository or hf://owner/repository/file",
        str,
        free=True,
    )
    pn: tuple[int, ...] | None = flag(
        None,
        "token maps: 256, 512, 1024 or side lengths such as 1_2_3 (default: the tokenizer's; 256 if it has none)",
        token_maps,
        free=True,  # the model's token maps are compared instead
    )
    # Model
    init_from: str | None = flag(
        None,
        "fine-tune: start from the weights of this file, folder of save_pretrained, checkpoint folder, "
        "hf://owner/repository or hf://owner/repository/file, whose architecture the flags from --arch to --anorm then "
        "have",
        str,
        free=True,  # a resumed run does not read it
    )
    arch: str | None = flag("mvar", "M-VAR or VAR", choices=ARCHITECTURES, config="architecture")
    depth: int | None = flag(16, "number of blocks; the width is 64·depth", config="depth")
    width: int | None = flag(None, "number of channels, a multiple of 64 (default: 64·depth)", int, config="width")
    state_dim: int | None = flag(64, "state size of the Mamba-2 layer", config="state_dim")
    bidirectional: bool | None = flag(False, "also scan backward within each scale", config="bidirectional")
    saln: bool | None = flag(False, "one modulation layer for all blocks (VAR's d36-s)", config="shared_adaln")
    anorm: bool | None = flag(
        True,
        "normalize queries and keys (the published d12, d16 and d20 of M-VAR have --anorm=0)",
        config="qk_norm",
    )
    ini: float = flag(-1.0, "standard deviation of the initial weights; a negative value selects √(1/(3C)), C: width")
    hd: float = flag(0.02, "factor on the head's initial weights")
    aln: float = flag(0.5, "factor on the modulation layers' initial weights")
    alng: float = flag(1e-5, "factor on the initial weights of the gates in the modulation layers")
    # Optimization
    opt: str = flag(
        "adamw",
        "optimizer: adam and adamw select AdamW; adamw8bit AdamW with moments in 8 bits, by bitsandbytes",
        lowered,
        choices=("adam", "adamw", "adamw8bit"),
    )
    afuse: bool = flag(True, "fused AdamW, without effect on adamw8bit", free=True)
    ls: float = flag(0.0, "label smoothing")
    # Progressive training
    pg: float = flag(0.0, "fraction of the training in which scales are added one by one; 0: all scales from the start")
    pg0: int = flag(4, "index (from 0) of the last scale in the first stage")
    pgwp: float = flag(0.0, "epochs over which the loss of a new scale is ramped up; 0 for 1/300 of all epochs")
    # Execution
    backend: str = flag("auto", "backend of every op, see `mvar info`", free=True)
    fuse: bool = flag(True, "fused kernels; 0 for plain PyTorch, as --backend=reference", free=True)
    tfast: int = flag(0, f"compile each block. {COMPILED}", choices=(0, 1, 2, 3), free=True)
    vfast: int = flag(0, f"compile the encoder of the tokenizer. {COMPILED}", choices=(0, 1, 2, 3), free=True)
    fsdp: bool = flag(False, "shard weights, gradients and optimizer state (FSDP2) instead of DDP", free=True)
    recompute: bool = flag(False, "activation checkpointing of the blocks", free=True)
    # Run
    peak_tflops: float | None = flag(
        None, "peak TFLOP/s of the device, for the model FLOPs utilization", float, free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expand("tokens", "tokenizer")
        for name in ("pgwp", "pg0", "hd", "aln", "alng"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        require(0 <= self.ls < 1, "ls", "a number from 0 to below 1", self.ls)
        require(math.isfinite(self.ini), "ini", "a number", self.ini)
        if self.peak_tflops is not None:
            require(0 < self.peak_tflops < math.inf, "peak_tflops", "a number above 0", self.peak_tflops)
        require(0 <= self.pg < 1, "pg", "a number from 0 to below 1", self.pg)
        if self.sche == "exp" and not self.pg:
            require(self.wpe > 0, "wpe", "a number above 0, with --sche=exp", self.wpe)
        if not self.fuse:
            require(self.backend in ("auto", "reference"), "backend", "reference, with --fuse=0", self.backend)
            object.__setattr__(self, "backend", "reference")


ARCHITECTURE = architecture(Flags)
"""The flags of a model's architecture, and the fields of ModelConfig that they set."""


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags to a parser, also the unsupported ones of VAR's parser."""
    add_flags(parser, Flags)
    suppress = argparse.SUPPRESS
    for name in UNSUPPORTED:
        parser.add_argument(f"--{name}", action=_UnsupportedFlag, default=suppress, help=suppress)


def parse_flags(options: argparse.Namespace) -> Flags:
    """The flags of a parsed command line, which override the defaults of --preset.

    --init_from overrides those of them that describe the model.
    """
    given = given_flags(options, Flags)
    preset = PRESETS.get(given.get("preset", ""), {})
    if "init_from" in given:
        preset = {name: value for name, value in preset.items() if name not in ARCHITECTURE}
    return Flags(**{**preset, **given})
