"""Training of the digits tokenizer, which takes about a minute; :mod:`mvar.train_tokenizer` trains any other one."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mvar.checkpoint import save
from mvar.data import digits
from mvar.models.tokenizer import Tokenizer

STEPS, BATCH, RATE, WARM_UP, AVERAGE = 700, 64, 6e-3, 50, 0.98
REVIVE_EVERY = 25
REVIVE_BELOW = 1 / 75  # of an even share, which is 7.5 hits per batch
# WARM_UP is not scaled by `shorten`: with 2 warm-up steps the loss jumps from 0.8 to up to 1.6, and the loss after 7
# steps depends on rounding (0.33 to 0.83 for twelve seeds). With this warm-up it is 0.33 to 0.46 after 7 steps.


def train_digits_tokenizer(path: Path, *, seed: int = 0, shorten: float = 1.0) -> None:
    """Train the tokenizer with squared error, commitment and codebook losses, and write it in float16.

    The weights written are an exponential moving average. torch's global random state is restored.

    Args:
        shorten: factor on the number of steps.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # CPU only: torch.manual_seed would also seed all GPUs
        tokenizer = _train(seed, shorten)
    save(path, tokenizer.eval(), dtype=torch.float16)


def _train(seed: int, shorten: float) -> Tokenizer:
    images, steps = digits.load()[0].images, max(round(STEPS * shorten), 1)
    tokenizer = Tokenizer(digits.TOKENIZER).train()
    tokenizer.quantize.synchronized = False  # under torchrun, one process trains it
    parameters = list(tokenizer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0)
    average = [p.detach().clone() for p in parameters]
    order = batches(len(images), BATCH, seed)
    progress = tqdm(range(steps), desc="tokenizer", file=sys.stdout, disable=None)
    for step in progress:
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * decay
        batch = images[next(order)]
        if step % REVIVE_EVERY == 0 and step < 0.8 * steps:
            tokenizer.revive_dead_codes(batch, REVIVE_BELOW)
        out = tokenizer(batch)
        loss = F.mse_loss(out.images, batch) + out.vq_loss
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"tokenizer: the loss is {value} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        weight = 1 - min(AVERAGE, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], weight)
        progress.set_postfix(loss=f"{value:.4f}")
        if progress.disable and (step + 1) % max(steps // 10, 1) == 0:
            print(f"tokenizer: step {step + 1} of {steps}, loss {value:.4f}", flush=True)
    for parameter, averaged in zip(parameters, average, strict=True):
        parameter.detach().copy_(averaged)
    return tokenizer


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices (size,) int64: each epoch is shuffled, the last incomplete batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        yield from order[: count - count % size].split(size)
