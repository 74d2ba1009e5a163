"""Training: one loop, the losses of the tokenizer and of the model, and the digits preset.

The recipe of the model is VAR's (arXiv 2404.02905): cross entropy over all tokens of all scales at once,
AdamW without decay on vectors, gradient clipping; here with a cosine schedule and an average of the weights.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mvar import digits
from mvar.checkpoint import load_tokenizer, save
from mvar.config import ModelConfig
from mvar.files import check_writable
from mvar.initialise import initialise
from mvar.model import MVAR
from mvar.tokenizer import Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one module is trained."""

    steps: int
    batch: int
    lr: float
    """peak learning rate, reached after `warmup` steps, then a cosine down to a hundredth"""
    weight_decay: float = 0.0
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    average: float = 0.99
    """decay of the exponential average of the weights, which is what training returns"""


def optimise(module: nn.Module, loss_of: Callable[[int], Tensor], recipe: Recipe, name: str) -> None:
    """Minimise `loss_of(step)`; leaves the averaged weights in `module`, in evaluation mode.

    Raises FloatingPointError when the loss is not finite.
    """
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    parameters = list(module.parameters())
    average = [p.detach().clone() for p in parameters]
    module.train()
    progress = tqdm(range(recipe.steps), desc=name, file=sys.stdout, disable=None)
    for step in progress:
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / recipe.warmup) * decay
        loss = loss_of(step)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"{name}: the loss is {value} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        share = 1 - min(recipe.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], share)
        progress.set_postfix(loss=f"{value:.4f}")
        if progress.disable and (step + 1) % max(recipe.steps // 10, 1) == 0:
            print(f"{name}: step {step + 1} of {recipe.steps}, loss {value:.4f}", flush=True)
    for parameter, averaged in zip(parameters, average, strict=True):
        parameter.detach().copy_(averaged)
    module.eval()


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after another: every epoch in another order, its remainder left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def train_tokenizer(config: TokenizerConfig, images: Tensor, recipe: Recipe, seed: int) -> Tokenizer:
    """A tokenizer trained on (n, 3, R, R) images in [−1, 1]: squared error, commitment and codebook losses."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config)
    order = batches(len(images), recipe.batch, seed)

    def loss_of(step: int) -> Tensor:
        batch = images[next(order)]
        if step % REVIVE_EVERY == 0 and step < 0.8 * recipe.steps:
            tokenizer.revive_dead_codes(batch)
        out = tokenizer(batch)
        return F.mse_loss(out.images, batch) + out.vq_loss

    optimise(tokenizer, loss_of, recipe, "tokenizer")
    return tokenizer


def train_model(
    config: ModelConfig, tokenizer: Tokenizer, images: Tensor, labels: Tensor, recipe: Recipe, seed: int
) -> MVAR:
    """A model trained on (n, 3, R, R) images in [−1, 1] and their classes (n,): cross entropy over all tokens."""
    tokens = torch.cat([tokenizer.encode(part) for part in images.split(ENCODE_BATCH)])
    inputs = tokenizer.teacher_forcing_inputs(tokens)
    model = initialise(MVAR(config), alng=1e-2, seed=seed)
    torch.manual_seed(seed)  # dropped labels and branches
    order = batches(len(images), recipe.batch, seed)

    def loss_of(step: int) -> Tensor:
        rows = next(order)
        logits = model(labels[rows], inputs[rows])  # (B, L, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens[rows].flatten())

    optimise(model, loss_of, recipe, "model")
    return model


REVIVE_EVERY = 25
ENCODE_BATCH = 256

DIGITS_TOKENIZER = TokenizerConfig(
    patch_nums=(1, 2, 3, 4), num_codes=256, ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, attention=False
)
DIGITS_TOKENIZER_RECIPE = Recipe(steps=700, batch=64, lr=6e-3, betas=(0.9, 0.99), average=0.98)
DIGITS_MODEL_RECIPE = Recipe(steps=1400, batch=64, lr=2e-3, weight_decay=0.05)


def train_digits(
    out: Path, *, bidirectional: bool = False, tokenizer_file: Path | None = None, seed: int = 0, shorten: float = 1.0
) -> None:
    """Train the demo's tokenizer (unless one is given) and model; write both into the folder `out`.

    Written in float16, half the size; that is also what the checks of the demo see.
    """
    if not 0 < shorten <= 1:
        raise ValueError(f"--shorten: expected a number above 0 and up to 1, got {shorten}")
    if seed < 0:
        raise ValueError(f"--seed: expected a whole number of at least 0, got {seed}")
    for name in ("tokenizer.safetensors", "model.safetensors"):
        check_writable(out / name)
    train, _ = digits.load()
    # oneDNN's float32 products, 2.2 times faster than MKL's on AMD Zen 5, with full float32 accuracy on CPUs.
    torch.set_float32_matmul_precision("medium")

    def shortened(recipe: Recipe) -> Recipe:
        steps = max(round(recipe.steps * shorten), 1)
        return replace(recipe, steps=steps, warmup=min(recipe.warmup, -(-steps // 5)))

    if tokenizer_file is None:
        tokenizer = train_tokenizer(DIGITS_TOKENIZER, train.images, shortened(DIGITS_TOKENIZER_RECIPE), seed)
    else:
        tokenizer = load_tokenizer(tokenizer_file)
    save(out / "tokenizer.safetensors", tokenizer, dtype=torch.float16)
    tokenizer = load_tokenizer(out / "tokenizer.safetensors")
    config = ModelConfig(
        depth=3,
        width=128,
        patch_nums=tokenizer.patch_nums,
        num_classes=digits.NUM_CLASSES,
        num_codes=tokenizer.num_codes,
        code_dim=tokenizer.code_dim,
        state_dim=32,
        bidirectional=bidirectional,
    )
    model = train_model(config, tokenizer, train.images, train.labels, shortened(DIGITS_MODEL_RECIPE), seed)
    save(out / "model.safetensors", model, dtype=torch.float16)
    print(f"written: {out / 'tokenizer.safetensors'}, {out / 'model.safetensors'}")
