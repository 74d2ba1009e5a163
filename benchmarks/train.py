"""A training step, ours beside eager PyTorch and torch.compile: `python -m benchmarks.train`.

Forward, loss, backward, clipping and fused AdamW of M-VAR at 256×256, on random tokens, without drops; the sides share
weights, optimizer and autocast. Before anything is timed gradients must agree in float32. What the encoder adds to
a step that starts from pictures is timed by itself.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mvar
from benchmarks.measure import DEVICE, interleaved, require_allocator, write
from benchmarks.memory import in_a_process_of_its_own, peak_gib
from benchmarks.parts import peak_gflops
from benchmarks.public import mamba, norm
from mvar.blocks import MVARBlock
from mvar.layers import Attention
from mvar.train.metrics import flops_per_image, peak_flops
from mvar.train.objective import Objective
from mvar.train.optimizer import Stepper, adamw
from mvar.train.run import set_products

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(labels, inputs, tokens) → the mean loss"""

AGREE = 1e-3  # of a gradient's norm, float32: sums in other orders over some ten thousand terms


def sides(model: mvar.MVAR) -> dict[str, Loss]:
    objective = Objective(model)

    def ours(labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
        return objective(labels, inputs, tokens).loss

    # One graph for all blocks and one for head and loss, as large trainers compile: minutes less than one for all.
    compiled = partial(plain_loss, model, block=torch.compile(plain_block), head=torch.compile(plain_head))
    return {"mvar": ours, "eager PyTorch": partial(plain_loss, model), "torch.compile": compiled}


def plain_loss(
    model: mvar.MVAR,
    labels: Tensor,
    inputs: Tensor,
    tokens: Tensor,
    block: Callable[..., Tensor] | None = None,
    head: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The model as people write it in PyTorch, in its best form: no kernel of ours."""
    cond = model.class_emb(labels)
    x = torch.cat([model.start(cond), model.word_embed(inputs)], 1) + model.positions()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for each in model.typed_blocks():
        assert isinstance(each, MVARBlock)
        x = (block or plain_block)(each, x, cond, model.config.scales)
    return (head or plain_head)(model, x, cond, tokens)


def plain_block(block: MVARBlock, x: Tensor, cond: Tensor, scales: tuple[int, ...]) -> Tensor:
    g1, g2, g3, s1, s2, s3, t1, t2, t3 = (v[:, None].to(x.dtype) for v in block.modulation(cond))
    x = x + g1 * attention_by_scale(block.attn, norm(x) * (1 + s1) + t1, scales)
    x = x + g2 * mamba(block.mamba, norm(x) * (1 + s2) + t2)
    return x + g3 * block.ffn(norm(x) * (1 + s3) + t3)


def plain_head(model: mvar.MVAR, x: Tensor, cond: Tensor, tokens: Tensor) -> Tensor:
    scale, shift = model.head_nm.ada_lin(cond)[:, None].chunk(2, -1)
    logits = model.head(norm(x) * (1 + scale) + shift).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def attention_by_scale(attn: Attention, x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Of the forms in rivals.py the fastest on each device: products by scale on a CPU, SDPA by scale on a GPU."""
    q, k, v = attn.qkv(x).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
    scale = 0.25 * q.shape[-1] ** -0.5

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if x.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return ((q * scale) @ k.mT).softmax(-1).to(v.dtype) @ v

    outs = [one(*parts) for parts in zip(*(t.split(scales, 2) for t in (q, k, v)), strict=True)]
    return attn.proj(torch.cat(outs, 2).transpose(1, 2).flatten(2))


class Steps:
    """A model, a batch, an optimizer, and a step of each side."""

    def __init__(self, depth: int, batch: int) -> None:
        set_products(DEVICE, tf32=True)
        model, self.tokenizer = mvar.build(depth, label_drop=0.0, drop_path=0.0, qk_norm=False)
        mvar.initialise(model, alng=1e-2, hd=1.0)  # so that every branch and every logit counts
        assert isinstance(model, mvar.MVAR)
        self.model, self.batch = model.to(DEVICE).train(), batch
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.num_codes, (batch, model.config.num_tokens), generator=generator)
        labels = torch.randint(model.config.num_classes, (batch,), generator=generator)
        inputs = self.tokenizer.teacher_forcing_inputs(tokens)
        self.data = [value.to(DEVICE) for value in (labels, inputs, tokens)]
        self.stepper = Stepper(adamw(self.model), DEVICE, clip=2.0, float16=False, average=0.0)
        self.sides = sides(self.model)

    def step(self, side: str, dtype: torch.dtype) -> None:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = self.sides[side](*self.data)
        self.stepper.backward(loss)
        self.stepper.step(learning_rate=1e-6, weight_decay=0.05)

    def gradient_differences(self) -> dict[str, float]:
        """The largest, over the weights, of the difference to the eager side's gradient, relative to its norm."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        found = {name: torch.autograd.grad(loss(*self.data), parameters) for name, loss in self.sides.items()}
        right = found.pop("eager PyTorch")
        worst = {
            side: max((float((a - b).norm() / b.norm()), name) for a, b, name in zip(grads, right, names, strict=True))
            for side, grads in found.items()
        }
        if wrong := {side: at for side, at in worst.items() if at[0] > AGREE}:
            raise SystemExit(f"gradients differ from eager PyTorch's by more than {AGREE}: {wrong}")
        return {side: difference for side, (difference, _) in worst.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = DEVICE.type == "cpu"
    parser.add_argument("--depth", type=int, default=4 if on_cpu else 16)
    parser.add_argument("--batch", type=int, default=2 if on_cpu else 48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        steps, dtype = Steps(options.depth, options.batch), getattr(torch, options.dtype)
        steps.step(options.memory_of, dtype)  # compiles, and makes the optimizer's state
        print(peak_gib(lambda: steps.step(options.memory_of, dtype)))
        return
    require_allocator()
    steps = Steps(options.depth, options.batch)
    differences = steps.gradient_differences()
    print(f"gradients agree: {differences}")
    found: dict[str, Any] = {"gradient_differences": differences, "encode": encode(steps), "runs": []}
    for dtype in (torch.float32, torch.bfloat16):
        found["runs"].append(measure(steps, dtype, options))
        print(json.dumps(found["runs"][-1]), write(f"train_d{options.depth}", found))


def measure(steps: Steps, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every side; beside them the least time of the matrix products alone."""
    timed = interleaved({s: partial(steps.step, s, dtype) for s in steps.sides}, rounds=options.rounds, seconds=0)
    sizes = ("--depth", str(options.depth), "--batch", str(options.batch), "--dtype", str(dtype)[6:])
    gflop = steps.batch * flops_per_image(steps.model) / 1e9
    rate = peak_gflops(dtype) if DEVICE.type == "cpu" else (peak_flops(DEVICE) or float("nan")) / 1e9
    return {
        "batch": steps.batch,
        "dtype": str(dtype)[6:],
        "median_ms": timed,
        "peak_gib": {s: in_a_process_of_its_own("benchmarks.train", "--memory-of", s, *sizes) for s in steps.sides},
        "gflop": gflop,
        "peak_gflops": rate,
        "floor_ms": 1e3 * gflop / rate,
    }


def encode(steps: Steps) -> dict[str, float]:
    """Milliseconds for the batch's pictures to become tokens, with the published tokenizer's sizes, float32."""
    tokenizer, side = steps.tokenizer.to(DEVICE), steps.tokenizer.resolution
    images = torch.rand(steps.batch, 3, side, side, device=DEVICE) * 2 - 1
    return interleaved({"encoder": lambda: tokenizer.encode(images)}, rounds=2, seconds=0)


if __name__ == "__main__":
    main()
