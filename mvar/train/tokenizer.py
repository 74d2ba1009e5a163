"""The tokenizer of the digits, the one kind that is trained here: a loop of a hundred lines for a minute's training."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mvar import digits
from mvar.checkpoint import save
from mvar.tokenizer import Tokenizer, TokenizerConfig

CONFIG = TokenizerConfig(
    patch_nums=(1, 2, 3, 4), num_codes=256, ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, attention=False
)
STEPS, BATCH, RATE, WARM_UP, AVERAGE = 700, 64, 6e-3, 50, 0.98
REVIVE_EVERY = 25
# Not shortened with the steps: after a warm-up of 2 the loss jumps from 0.8 to as much as 1.6, and which way a run of 7
# then ends, 0.33 to 0.83 for twelve seeds, is left to roundings. After the same steps of this one it is 0.33 to 0.46.


def train_digits_tokenizer(path: Path, *, seed: int = 0, shorten: float = 1.0) -> None:
    """Train it and write it, in float16, half the size: squared error, commitment and codebook losses.

    What is written are averaged weights. torch's global generator is as it was, afterwards. Raises FloatingPointError
    when the loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reset those of all GPUs
        tokenizer = _trained(seed, shorten)
    save(path, tokenizer.eval(), dtype=torch.float16)


def _trained(seed: int, shorten: float) -> Tokenizer:
    images, steps = digits.load()[0].images, max(round(STEPS * shorten), 1)
    tokenizer = Tokenizer(CONFIG).train()
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
            tokenizer.revive_dead_codes(batch)
        out = tokenizer(batch)
        loss = F.mse_loss(out.images, batch) + out.vq_loss
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"tokenizer: the loss is {value} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        share = 1 - min(AVERAGE, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], share)
        progress.set_postfix(loss=f"{value:.4f}")
        if progress.disable and (step + 1) % max(steps // 10, 1) == 0:
            print(f"tokenizer: step {step + 1} of {steps}, loss {value:.4f}", flush=True)
    for parameter, averaged in zip(parameters, average, strict=True):
        parameter.detach().copy_(averaged)
    return tokenizer


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after another: every epoch in another order, its remainder left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        yield from order[: count - count % size].split(size)
