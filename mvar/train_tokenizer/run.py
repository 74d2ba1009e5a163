"""A tokenizer's training run: build data and tokenizer, train, save the tokenizer and images of reconstructions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvar.checkpoint import load_tokenizer, save
from mvar.data import ImageFolder
from mvar.data.source import skipped_summary
from mvar.models.tokenizer import Tokenizer, TokenizerConfig
from mvar.train.checkpoint import Checkpoints
from mvar.train.distributed import TrainContext
from mvar.train.process import check_run, run_seed, running, training_process
from mvar.train.run_flags import architecture, flag_error, require, with_architecture
from mvar.train_tokenizer.discriminator import Discriminator
from mvar.train_tokenizer.flags import TokenizerFlags
from mvar.train_tokenizer.perceptual import MIN_RESOLUTION, load_lpips
from mvar.train_tokenizer.trainer import RECONSTRUCTIONS, TokenizerTrainer
from mvar.utils.errors import message
from mvar.utils.files import check_writable

FILE = "tokenizer.safetensors"
PARTS = {"train", "val", "test"}
FLAG_OF = {field: name for name, field in architecture(TokenizerFlags).items()} | {"patch_nums": "pn"}


def train(flags: TokenizerFlags) -> None:
    """Train or resume a run, and write tokenizer.safetensors and reconstructions.png to --out."""
    with training_process(flags.device) as context:
        check_run(flags, context)
        folders = image_folders(flags)
        flags, origin = _with_origin(flags, context)
        config = tokenizer_config(flags)
        lpips = _loss_networks(flags, context, config)
        train_folder, val_folder = read_data(flags, config, folders)
        with running(flags, context):
            if context.is_main_process:
                for name in (FILE, RECONSTRUCTIONS):
                    check_writable(Path(flags.out) / name)
            seed = run_seed(flags, context)
            tokenizer = new_tokenizer(config, seed) if origin is None else origin
            trainer = TokenizerTrainer(
                flags,
                tokenizer.to(context.device),
                train_folder,
                context,
                seed=seed,
                validation=val_folder,
                lpips=lpips,
            )
            resumed = trainer.resume()
            if context.is_main_process:
                if flags.init_from is not None:
                    not_read = f"is not read, as there is a checkpoint in {flags.out}"
                    print(f"{flags.init_from} {not_read}" if resumed else f"starts from {flags.init_from}", flush=True)
                print(_summary(trainer, train_folder, resumed), flush=True)
            trainer.run()
            if context.is_main_process:
                trained = Tokenizer(config)
                trained.load_state_dict(trainer.weights())
                save(Path(flags.out) / FILE, trained.eval())
                print(f"written: {Path(flags.out) / FILE}", flush=True)


def _with_origin(flags: TokenizerFlags, context: TrainContext) -> tuple[TokenizerFlags, Tokenizer | None]:
    """The flags with the architecture of --init_from, and its tokenizer, None without it or if the run is resumed."""
    if flags.init_from is None:
        return flags, None
    config = Checkpoints(Path(flags.out), context, "tokenizer").config()
    if config is not None:
        return _like(flags, config, f"the run in {flags.out}"), None
    try:
        tokenizer = load_tokenizer(flags.init_from, patch_nums=flags.pn)
    except (OSError, ValueError) as error:
        raise ValueError(f"--init_from: {message(error)}") from error
    tokenizer.config = replace(tokenizer.config, beta=flags.beta)
    tokenizer.quantize.beta = flags.beta
    return _like(flags, tokenizer.config, flags.init_from), tokenizer


def _like(flags: TokenizerFlags, config: TokenizerConfig, path: str) -> TokenizerFlags:
    flags = with_architecture(flags, config, path)
    if flags.pn is None:
        object.__setattr__(flags, "pn", config.patch_nums)
    return flags


def tokenizer_config(flags: TokenizerFlags) -> TokenizerConfig:
    """The configuration that the flags give. Raises ValueError with the name of the flag."""
    assert flags.pn is not None
    given = {field: getattr(flags, name) for name, field in architecture(TokenizerFlags).items()}
    try:
        config = TokenizerConfig(patch_nums=flags.pn, beta=flags.beta, **given)
    except ValueError as error:
        raise flag_error(error, FLAG_OF) from error
    side, resolution = config.patch_nums[-1], _resolution(config)
    expected = f"{resolution}, the last of --pn ({side}) times 2^(levels of --ch_mult − 1) ({resolution // side})"
    require(flags.resolution in (None, resolution), "resolution", expected, flags.resolution)
    return config


def _loss_networks(flags: TokenizerFlags, context: TrainContext, config: TokenizerConfig) -> nn.Module | None:
    """LPIPS, or None without --lpips. Raises ValueError for its flag, or those of the discriminator."""
    if flags.disc:
        try:
            Discriminator(flags.disc_channels, flags.disc_layers, resolution=_resolution(config))
        except ValueError as error:
            if not str(error).startswith("resolution"):
                raise flag_error(error, {"channels": "disc_channels", "num_layers": "disc_layers"}) from error
            side = _resolution(config)
            raise ValueError(
                f"--disc_layers: {flags.disc_layers} layers need at least {3 << flags.disc_layers}×"
                f"{3 << flags.disc_layers} pixels, the images have {side}×{side}; give fewer, or --disc=0"
            ) from error
    if flags.lpips is None or not flags.perceptual:
        return None
    side = _resolution(config)
    require(side >= MIN_RESOLUTION, "lpips", f"images of at least {MIN_RESOLUTION} pixels", side)
    try:
        return load_lpips(flags.lpips, context.device)
    except (OSError, ValueError) as error:
        raise ValueError(f"--lpips: {message(error)}") from error


def _resolution(config: TokenizerConfig) -> int:
    return config.patch_nums[-1] * 2 ** (len(config.ch_mult) - 1)


def read_data(
    flags: TokenizerFlags, config: TokenizerConfig, folders: tuple[Path, Path | None]
) -> tuple[ImageFolder, ImageFolder | None]:
    """The images for training and validation."""
    train_path, val_path = folders
    resolution = _resolution(config)
    options: dict[str, Any] = {"mid_resolution": flags.mid_reso, "labeled": False}
    try:
        train = ImageFolder(train_path, resolution, flip=flags.hflip, **options)
        return train, None if val_path is None else ImageFolder(val_path, resolution, **options)
    except ValueError as error:
        raise ValueError(f"--data_path: {error}") from error


def _parts(root: Path) -> tuple[Path, Path | None]:
    """The folders train and val of `root`; or `root` alone, in which train, next to others, is a class of trains."""
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if {"train", "val"} <= folders:
        return root / "train", root / "val"
    return root / "train" if "train" in folders and folders <= PARTS else root, None


def image_folders(flags: TokenizerFlags) -> tuple[Path, Path | None]:
    """The folders of --data_path for training and validation. Raises ValueError with the name of the flag."""
    if flags.data_path is None:
        raise ValueError("--data_path: expected a folder of images")
    root = Path(flags.data_path)
    got = f"{root}: {'not a folder' if root.exists() else 'no such folder'}"
    require(root.is_dir(), "data_path", "a folder of images", got)
    out = Path(flags.out).resolve()
    parts = _parts(root)
    for part in filter(None, parts):
        inside = part.resolve() in (out, *out.parents)
        require(not inside, "out", f"a folder outside of the images in {part}", flags.out)
    return parts


def new_tokenizer(config: TokenizerConfig, seed: int) -> Tokenizer:
    """A tokenizer with random weights, which depend on the seed alone; torch's global random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # CPU only: torch.manual_seed would also seed all GPUs
        return Tokenizer(config)


def _summary(trainer: TokenizerTrainer, folder: ImageFolder, resumed: bool) -> str:
    schedule, context, tokenizer = trainer.schedule, trainer.context, trainer.tokenizer
    parameters = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    perceptual = "; without LPIPS, which needs --lpips" if trainer.flags.lpips is None else ""
    return (
        f"{parameters:.1f}M parameters, {tokenizer.resolution}×{tokenizer.resolution} pixels → {tokenizer.num_tokens} "
        f"tokens of {tokenizer.num_codes} codes, {len(folder)} images in {folder.path}{skipped_summary(folder)}, "
        f"{schedule.epochs} epochs of {schedule.per_epoch} iterations of {schedule.images} images on "
        f"{context.world_size} × {context.device}, peak learning rate {schedule.peak:.3g}, seed {trainer.seed}"
        + perceptual
        + (f"; resumed after iteration {trainer.iteration}" if resumed else "")
    )
