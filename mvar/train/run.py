"""A training run: build data, tokenizer and model, train, save the model, generate a grid of samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvar import digits
from mvar.checkpoint import load_tokenizer, save
from mvar.data import ImageFolder, Source, TokenStore, tensor_source
from mvar.data.source import skipped_summary
from mvar.inference.api import generate
from mvar.models.init_weights import init_weights
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, from_config
from mvar.train.digits_tokenizer import train_digits_tokenizer
from mvar.train.distributed import TrainContext
from mvar.train.flags import Flags
from mvar.train.init_from import Origin, adapt, read_origin
from mvar.train.process import run_seed, running, training_process
from mvar.train.run_flags import with_architecture
from mvar.train.schedule import check_stages
from mvar.train.trainer import Trainer
from mvar.train.validate import check, check_model, model_config
from mvar.utils.files import check_writable
from mvar.utils.images import grid, save_image

ENCODE_BATCH = 256
SAMPLES_PER_CLASS = 8


class Data(NamedTuple):
    tokenizer: Tokenizer
    train: Source
    val: Source | None


def train(flags: Flags, trainer_type: type[Trainer] = Trainer) -> None:
    """Train or resume a run, and write model.safetensors and samples.png to --out."""
    with training_process(flags.device) as context:
        check(flags, context)
        origin = read_origin(flags, context)
        if origin is not None:
            flags = with_architecture(flags, origin.config, origin.path)
        check_model(flags, context, origin.config if origin else None)
        with running(flags, context):
            _run(flags, context, trainer_type, origin)


def _run(flags: Flags, context: TrainContext, trainer_type: type[Trainer], origin: Origin | None) -> None:
    out = Path(flags.out)
    if context.is_main_process:
        for name in ("model.safetensors", "samples.png"):
            check_writable(out / name)
    data = digits_data(flags, context) if flags.preset == "digits" else read_data(flags, context)
    seed = run_seed(flags, context)
    model = new_model(flags, data, seed, origin)
    if origin is not None:
        started = f"{flags.init_from} is not read, as there is a checkpoint in {flags.out}"
        if origin.model is not None:
            started = f"starts from {origin.path}: {adapt(model, origin.model)}"
            origin.model = None  # its memory is not needed any more
        if context.is_main_process:
            print(started, flush=True)
    model = model.to(context.device)
    trainer = trainer_type(flags, model, data.tokenizer, data.train, context, seed=seed, validation=data.val)
    resumed = trainer.resume()
    if context.is_main_process:
        print(_summary(trainer, resumed), flush=True)
    trainer.run()
    weights = trainer.weights()
    if context.is_main_process:
        finished = from_config(model.config)
        finished.load_state_dict(weights)
        finished.class_names = model.class_names
        save(out / "model.safetensors", finished.eval())
        written = [out / "model.safetensors"]
        if flags.samples:
            written.append(out / "samples.png")
            save_samples(finished.to(context.device), data.tokenizer, flags, written[-1])
        print(f"written: {', '.join(map(str, written))}", flush=True)


def read_data(flags: Flags, context: TrainContext) -> Data:
    """Load the tokenizer, and the images of --data_path or the tokens of --tokens."""
    assert flags.tokenizer is not None
    tokenizer = load_tokenizer(flags.tokenizer, patch_nums=flags.pn, device=context.device)
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
    """Raise ValueError if --hflip or --mid_reso differ from those of the `mvar tokenize` run."""
    manifest, side = store.manifest, round(flags.mid_reso * resolution)
    if manifest.flip != flags.hflip:
        raise ValueError(f"--hflip: the tokens in {store.path} were made with {manifest.flip:d}, not {flags.hflip:d}")
    if manifest.mid_side != side:
        raise ValueError(
            f"--mid_reso: the tokens in {store.path} are of images resized to {manifest.mid_side} pixels, not {side}"
        )


def _parts(root: str) -> tuple[Path, Path]:
    return Path(root) / "train", Path(root) / "val"


def digits_data(flags: Flags, context: TrainContext) -> Data:
    """scikit-learn's digits as tokens of --tokenizer, or of a tokenizer that is trained first."""
    file = Path(flags.out) / "tokenizer.safetensors"
    if flags.tokenizer is not None:
        file = Path(flags.tokenizer)
    elif context.is_main_process and not (Path(flags.out) / "checkpoints").is_dir():
        train_digits_tokenizer(file, seed=flags.seed or 0, shorten=flags.shorten)
    context.barrier()
    tokenizer = load_tokenizer(file, device=context.device)
    if flags.pn not in (None, tokenizer.patch_nums):
        raise ValueError(f"--pn: the tokenizer's token maps are {tokenizer.patch_nums}, not {flags.pn}")
    check_stages(flags, len(tokenizer.patch_nums))

    def source(part: digits.Digits) -> Source:
        tokens = [tokenizer.encode(images.to(context.device)).cpu() for images in part.images.split(ENCODE_BATCH)]
        return tensor_source(torch.cat(tokens), part.labels, digits.NUM_CLASSES)

    train, held_out = digits.load()
    return Data(tokenizer, source(train), source(held_out))


def new_model(flags: Flags, data: Data, seed: int, origin: Origin | None = None) -> Model:
    """Create a model for the data and initialize its weights.

    Raises:
        ValueError: the model of --init_from has other codes than the tokenizer.
    """
    tokenizer, base = data.tokenizer, origin.config if origin else None
    codes = {"num_codes": tokenizer.num_codes, "code_dim": tokenizer.code_dim}
    for name, value in codes.items():
        if base is not None and (expected := getattr(base, name)) != value:
            raise ValueError(f"--tokenizer: expected {name} {expected}, as in {flags.init_from}, got {value}")
    config = model_config(flags, base, tokenizer.patch_nums, num_classes=data.train.num_classes, **codes)
    model = init_weights(from_config(config), ini=flags.ini, hd=flags.hd, aln=flags.aln, alng=flags.alng, seed=seed)
    model.class_names = data.train.classes if isinstance(data.train, ImageFolder | TokenStore) else None
    return model


def save_samples(model: Model, tokenizer: Tokenizer, flags: Flags, path: Path) -> None:
    """Generate images of --samples evenly spaced classes and write them as a grid, one row per class."""
    last, count = model.config.num_classes - 1, min(flags.samples, model.config.num_classes)
    classes = torch.linspace(0, last, count, dtype=torch.float32, device="cpu").long()
    sampling: Mapping[str, Any] = digits.SAMPLING if flags.preset == "digits" else {}
    n, rows = SAMPLES_PER_CLASS, []
    for i, label in enumerate(classes):
        out = generate(model, tokenizer, label.repeat(n), first_index=i * n, backend=flags.backend, **sampling)
        rows.append(out.images.cpu())
    save_image(path, grid(torch.cat(rows), n))


def _summary(trainer: Trainer, resumed: bool) -> str:
    schedule, context = trainer.schedule, trainer.context
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    return (
        f"{parameters:.1f}M parameters, {len(trainer.source)} items of {trainer.source.num_classes} classes"
        f"{skipped_summary(trainer.source)}, "
        f"{schedule.epochs} epochs of {schedule.per_epoch} iterations of {schedule.images} images on "
        f"{context.world_size} × {context.device}, peak learning rate {schedule.peak:.3g}, seed {trainer.seed}"
        + (f"; resumed after iteration {trainer.iteration}" if resumed else "")
    )
