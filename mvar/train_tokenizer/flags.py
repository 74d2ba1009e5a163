"""Flags of `mvar train-tokenizer`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from mvar.models.config import SCHEDULES
from mvar.train.run_flags import SCHE, RunFlags, flag, given_flags, integers, require, schedule_name, token_maps

FREEZE = ("nothing", "encoder", "tokens")


@dataclass(frozen=True)
class TokenizerFlags(RunFlags):
    """The flags of a run of `mvar train-tokenizer`; the defaults of the architecture are those of VAR's tokenizer."""

    SECTIONS: ClassVar[Mapping[str, str]] = {
        "data": "data_path mid_reso hflip workers",
        "tokenizer": "init_from freeze resolution pn ch_mult ch blocks attention codes code_dim phi beta",
        "loss": "l1 l2 lpips perceptual disc disc_start disc_channels disc_layers",
        "codebook": "revive revive_below revive_until",
        "optimization": "bs ac ep tblr twd twde tclip sche wp wp0 wpe fp16 average",
        "execution": "device tf32 seed",
        "output": "out exp_name save_every log_every skips tb samples shorten",
    }

    # Data
    data_path: str | None = flag(
        None,
        "folder of images, in subfolders or not; if it has train/ and val/, or train/ alone, these are used",
        str,
        free=True,
    )
    # Tokenizer
    init_from: str | None = flag(
        None,
        "start from the weights of this file (such as vae_ch160v4096z32.pth), folder of save_pretrained, "
        "hf://owner/repository or hf://owner/repository/file, whose architecture the flags from --ch_mult to --phi "
        "then have",
        str,
        free=True,
    )
    freeze: str = flag(
        "nothing",
        "with --init_from: encoder to train only codebook and decoder; tokens to train only the decoder, so that "
        "images keep their tokens and trained models remain valid",
        choices=FREEZE,
    )
    resolution: int | None = flag(
        None,
        "of the images; must be the last of --pn times 2^(number of --ch_mult − 1), which it is without it",
        int,
        free=True,
    )
    pn: tuple[int, ...] | None = flag(
        None,
        "token maps: 256, 512, 1024 or side lengths such as 1_2_3 (default: those of --init_from, or 256)",
        token_maps,
    )
    ch_mult: tuple[int, ...] | None = flag(
        (1, 1, 2, 2, 4),
        "width of each level, relative to --ch; each level but the last halves the resolution",
        integers,
        config="ch_mult",
    )
    ch: int | None = flag(160, "width of the first level, a multiple of 32", config="ch")
    blocks: int | None = flag(
        2, "residual blocks per level of the encoder; the decoder has one more", config="num_res_blocks"
    )
    attention: bool | None = flag(True, "self-attention at the lowest level", config="attention")
    codes: int | None = flag(4096, "number of codes", config="num_codes")
    code_dim: int | None = flag(32, "width of the codes", config="code_dim")
    phi: int | None = flag(4, "number of convolutions after the upsampling, which scales share", config="num_phi")
    beta: float = flag(0.25, "weight of the commitment loss, relative to the codebook loss")
    # Loss
    l1: float = flag(1.0, "weight of the absolute error")
    l2: float = flag(1.0, "weight of the squared error")
    lpips: str | None = flag(
        None,
        "VGG-16 weights of torchvision (vgg16-397923af.pth) for LPIPS; without them the loss is left out",
        str,
        free=True,
    )
    perceptual: float = flag(1.0, "weight of LPIPS")
    disc: float = flag(0.5, "weight of the adversarial loss, times VQGAN's adaptive weight; 0 for no discriminator")
    disc_start: float = flag(0.5, "fraction of the training after which the discriminator begins")
    disc_channels: int = flag(64, "width of the discriminator's first layer, a multiple of 16")
    disc_layers: int = flag(3, "convolutions of stride 2 in the discriminator")
    # Codebook
    revive: int = flag(100, "optimizer steps between replacements of unused codes; 0 for none")
    revive_below: float = flag(0.05, "a code is unused if it has at most this fraction of an even share of the tokens")
    revive_until: float = flag(0.8, "fraction of the training after which no code is replaced")
    # Optimization
    bs: int = flag(128, "global batch size, over all processes and accumulated steps")
    ep: int = flag(50, "epochs")
    tblr: float = flag(2e-4, "learning rate for a batch of 256; the peak is this times bs/256")
    twd: float = flag(0.0, "weight decay at the start")
    tclip: float = flag(1.0, "gradient clipping: largest norm; 0 for none")
    sche: str = flag("cos", SCHE, schedule_name)
    average: float = flag(0.999, "decay of a moving average of the weights, which is saved; 0 for none")
    # Output
    exp_name: str = flag("tokenizer", "name of the run in its log", free=True)
    samples: int = flag(8, "images in reconstructions.png; 0 for no file", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expand("lpips")
        for name in ("l1", "l2", "perceptual", "disc", "revive", "revive_below", "beta"):
            require(0 <= getattr(self, name) < inf, name, "a number of at least 0", getattr(self, name))
        for name in ("disc_start", "revive_until"):
            require(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1", getattr(self, name))
        require(self.l1 + self.l2 > 0, "l1", "a number above 0, as --l2 is 0", self.l1)
        if self.sche == "exp":
            require(self.wpe > 0, "wpe", "a number above 0, with --sche=exp", self.wpe)
        if self.init_from is None:
            require(self.freeze == "nothing", "freeze", "nothing, without --init_from", self.freeze)
            if self.pn is None:
                object.__setattr__(self, "pn", SCHEDULES[256])


def parse_flags(options: argparse.Namespace) -> TokenizerFlags:
    """The flags of a parsed command line."""
    given: dict[str, Any] = given_flags(options, TokenizerFlags)
    return TokenizerFlags(**given)
