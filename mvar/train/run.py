"""From flags to a trained model: data, tokenizer and model are put together, trained, written and drawn from."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvar import digits
from mvar.checkpoint import load_tokenizer, save
from mvar.data import ImageFolder, Source, TokenStore, tensor_source
from mvar.data.source import skipped_in_words
from mvar.files import check_writable
from mvar.generate import generate
from mvar.initialise import initialise
from mvar.model import Model, from_config
from mvar.pictures import grid, save_picture
from mvar.tokenizer import Tokenizer
from mvar.train.checks import check, model_config
from mvar.train.distributed import World, joined
from mvar.train.flags import Flags
from mvar.train.lock import locked
from mvar.train.schedule import check_stages
from mvar.train.tokenizer import train_digits_tokenizer
from mvar.train.trainer import Trainer
from mvar_kernels.precision import float32_matmuls

ENCODE_BATCH = 256
ROW = 8  # pictures of a class in the grid at the end


class Data(NamedTuple):
    tokenizer: Tokenizer
    train: Source
    val: Source | None


def run(flags: Flags) -> None:
    """Train, or go on training, what `flags` say; write model.safetensors and pictures.png into --out."""
    with joined(flags.device) as world:
        check(flags, world)
        with (
            locked(Path(flags.out), world),
            float32_matmuls(world.device, fast=flags.tf32),
            _optimizers_device(),
            torch.inference_mode(False),  # with gradients, whatever the caller has switched off
            torch.random.fork_rng(devices=[]),  # weights are made by the global generator before they are initialised
        ):
            _run(flags, world)
            world.meet()


def _optimizers_device() -> AbstractContextManager[object]:
    """In here torch's default device, on which its AdamW counts steps, is the CPU; where it is, no mode costs time."""
    cpu = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == cpu else cpu


def _run(flags: Flags, world: World) -> None:
    out = Path(flags.out)
    if world.leads:
        for name in ("model.safetensors", "pictures.png"):
            check_writable(out / name)
    data = digits_data(flags, world) if flags.preset == "digits" else read_data(flags, world)
    # Everything random follows from one number; a new one is as good as any.
    seed = world.agreed(int.from_bytes(os.urandom(4), "little") if flags.seed is None else flags.seed)
    model = new_model(flags, data, seed).to(world.device)
    trainer = Trainer(flags, model, data.tokenizer, data.train, world, seed=seed, validation=data.val)
    gone_on = trainer.resume()
    if world.leads:
        print(_summary(trainer, gone_on), flush=True)
    trainer.run()
    weights = trainer.weights()
    if world.leads:
        finished = from_config(model.config)
        finished.load_state_dict(weights)
        finished.class_names = model.class_names
        save(out / "model.safetensors", finished.eval())
        written = [out / "model.safetensors"]
        if flags.pictures:
            written.append(out / "pictures.png")
            draw(finished.to(world.device), data.tokenizer, flags, written[-1])
        print(f"written: {', '.join(map(str, written))}", flush=True)


def read_data(flags: Flags, world: World) -> Data:
    """A folder of pictures or tokens, and the tokenizer that belongs to them."""
    assert flags.tokenizer is not None
    tokenizer = load_tokenizer(flags.tokenizer, patch_nums=flags.pn, device=world.device)
    check_stages(flags, len(tokenizer.patch_nums))
    if flags.tokens is not None:
        train_path, val_path = _parts(flags.tokens)
        stores = [TokenStore(train_path), *([TokenStore(val_path)] if val_path.is_dir() else [])]
        for store in stores:
            store.check(tokenizer)
        check_crops(flags, stores[0], tokenizer.resolution)
        return Data(tokenizer, stores[0], stores[1] if len(stores) > 1 else None)
    assert flags.data_path is not None
    train_path, val_path = _parts(flags.data_path)
    side, larger = tokenizer.resolution, flags.mid_reso
    train = ImageFolder(train_path, side, mid_resolution=larger, flip=flags.hflip)
    if not val_path.is_dir():
        return Data(tokenizer, train, None)
    return Data(tokenizer, train, ImageFolder(val_path, side, mid_resolution=larger, classes=train.classes))


def check_crops(flags: Flags, store: TokenStore, resolution: int) -> None:
    """Raise ValueError where flags ask for other crops than the tokens are of: those were chosen by `mvar tokenize`."""
    made, side = store.manifest, round(flags.mid_reso * resolution)
    if made.flip != flags.hflip:
        raise ValueError(f"--hflip: the tokens in {store.path} were made with {made.flip:d}, not {flags.hflip:d}")
    if made.mid_side != side:
        raise ValueError(
            f"--mid_reso: the tokens in {store.path} are of pictures resized to {made.mid_side} pixels, not {side}"
        )


def _parts(root: str) -> tuple[Path, Path]:
    return Path(root) / "train", Path(root) / "val"


def digits_data(flags: Flags, world: World) -> Data:
    """scikit-learn's digits as tokens, of the tokenizer given or of one trained for them."""
    file = Path(flags.out) / "tokenizer.safetensors"
    if flags.tokenizer is not None:
        file = Path(flags.tokenizer)
    elif world.leads and not (Path(flags.out) / "checkpoints").is_dir():
        train_digits_tokenizer(file, seed=flags.seed or 0, shorten=flags.shorten)
    world.meet()
    tokenizer = load_tokenizer(file, device=world.device)
    if flags.pn not in (None, tokenizer.patch_nums):
        raise ValueError(f"--pn: the tokenizer's token maps are {tokenizer.patch_nums}, not {flags.pn}")
    check_stages(flags, len(tokenizer.patch_nums))

    def source(part: digits.Digits) -> Source:
        tokens = [tokenizer.encode(images.to(world.device)).cpu() for images in part.images.split(ENCODE_BATCH)]
        return tensor_source(torch.cat(tokens), part.labels, digits.NUM_CLASSES)

    train, held_out = digits.load()
    return Data(tokenizer, source(train), source(held_out))


def new_model(flags: Flags, data: Data, seed: int) -> Model:
    """A model for these data, initialised."""
    config = model_config(
        flags,
        data.tokenizer.patch_nums,
        num_classes=data.train.num_classes,
        num_codes=data.tokenizer.num_codes,
        code_dim=data.tokenizer.code_dim,
    )
    model = initialise(from_config(config), ini=flags.ini, hd=flags.hd, aln=flags.aln, alng=flags.alng, seed=seed)
    model.class_names = data.train.classes if isinstance(data.train, ImageFolder | TokenStore) else None
    return model


def draw(model: Model, tokenizer: Tokenizer, flags: Flags, path: Path) -> None:
    """A grid of pictures, one row a class, classes evenly apart."""
    last, count = model.config.num_classes - 1, min(flags.pictures, model.config.num_classes)
    classes = torch.linspace(0, last, count, dtype=torch.float32, device="cpu").long()
    drawing: Mapping[str, Any] = digits.SAMPLING if flags.preset == "digits" else {}
    rows = []
    for i, label in enumerate(classes):
        out = generate(model, tokenizer, label.repeat(ROW), first_index=i * ROW, backend=flags.backend, **drawing)
        rows.append(out.images.cpu())
    save_picture(path, grid(torch.cat(rows), ROW))


def _summary(trainer: Trainer, gone_on: bool) -> str:
    schedule, world = trainer.schedule, trainer.world
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    return (
        f"{parameters:.1f}M parameters, {len(trainer.source)} items of {trainer.source.num_classes} classes"
        f"{skipped_in_words(trainer.source)}, "
        f"{schedule.epochs} epochs of {schedule.per_epoch} iterations of {schedule.images} images on {world.size} × "
        f"{world.device}, peak learning rate {schedule.peak:.3g}, seed {trainer.seed}"
        + (f"; goes on after iteration {trainer.done}" if gone_on else "")
    )
