"""A VAR model before and after `mvar_kernels.accelerate`, and under torch.compile: `python -m benchmarks.plug_in`.

A training step (forward and backward of the cross entropy, without the optimiser) and a generation with guidance, whose
decoder is a small one for all sides: it is no part of this. The model is that of tests/plain_var.py, with random
weights; or, with `--sources`, the one that a checkout of FoundationVision/VAR builds. Outputs, gradients and greedy
tokens are compared before anything is timed.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar
import mvar_kernels as mk
from benchmarks.measure import DEVICE, interleaved, require_allocator, write
from mvar.tokenizer import Tokenizer
from mvar_kernels.precision import float32_matmuls
from tests.plain_var import PlainVAR, randomised

PATCH_NUMS = mvar.SCHEDULES[256]
SMALL_DECODER = 32  # channels, for the published 160
OTHER_ORDER = 1e-3  # of the largest value: float32 sums in another order, under softmax temperatures up to 100


@dataclass
class Subject:
    """A model and how it draws: greedy (top_k 1) or with its usual filters, into tokens (B, L) and images."""

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    draw: Callable[[nn.Module, Tensor, int, float], tuple[Tensor, Tensor]]


def small_tokenizer() -> Tokenizer:
    return mvar.build(1, tokenizer=mvar.TokenizerConfig(PATCH_NUMS, ch=SMALL_DECODER))[1].to(DEVICE)


def plain(depth: int) -> Subject:
    torch.manual_seed(0)
    model = randomised(PlainVAR(depth, PATCH_NUMS, num_classes=1000, num_codes=4096)).to(DEVICE)
    tokenizer = small_tokenizer()

    def draw(model: Any, labels: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        tokens, _ = model.generate(tokenizer, labels, top_k=top_k, top_p=top_p)
        return tokens, tokenizer.decode(tokens)

    return Subject("a model of VAR's shape", model, tokenizer, draw)


def published(depth: int, sources: Path) -> Subject:
    """FoundationVision/VAR's own model, random weights, gates wide enough that every branch counts."""
    sys.path.insert(0, str(sources))
    from models import build_vae_var  # type: ignore[import-not-found, unused-ignore]

    tokenizer = small_tokenizer()  # before build_vae_var, which takes torch's layers their initialisation away
    torch.manual_seed(0)
    vae, model = build_vae_var(DEVICE, ch=SMALL_DECODER, depth=depth, init_adaln_gamma=0.3, init_head=1.0)
    model.cond_drop_rate = 0.0  # its forward drops labels in evaluation, too
    for block in model.blocks:
        block.drop_path = nn.Identity()  # not at work here, and a reason for torch.compile to compile every block anew
    vae.load_state_dict(tokenizer.state_dict(), strict=False)
    commit = subprocess.run(["git", "-C", sources, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)

    def draw(model: Any, labels: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = model.vae_quant_proxy[0].embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        images = model.autoregressive_infer_cfg(len(labels), labels, g_seed=0, cfg=1.5, top_k=top_k, top_p=top_p)
        hook.remove()
        return torch.cat(seen, 1), images

    return Subject(f"FoundationVision/VAR at {commit.stdout[:12]}", model.eval(), tokenizer, draw)


def engine(subject: Subject) -> mvar.Model:
    """The same weights in mvar."""
    state = subject.model.state_dict()
    with torch.device("meta"):
        model = mvar.from_config(mvar.ModelConfig.from_state_dict(state))
    model.load_state_dict(state, assign=True)
    return model.eval()


def step(model: nn.Module, labels: Tensor, inputs: Tensor, tokens: Tensor) -> list[Tensor]:
    """Loss, logits and gradients of a training step without dropped labels or branches."""
    model.zero_grad()
    logits = model(labels, inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return [loss.detach(), logits.detach()]


def check(sides: dict[str, nn.Module], subject: Subject, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """The largest error of logits and gradients relative to the largest value; SystemExit where it is too large."""
    found = {}
    for name, model in sides.items():
        outputs = step(model, *batch)
        found[name] = outputs + [p.grad.clone() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    reference = found["before"]
    worst = 0.0
    for name, values in found.items():
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, reference, strict=True)]
        worst = max(worst, *errors)
        if max(errors) > OTHER_ORDER:
            raise SystemExit(f"{name}: logits or gradients differ by {max(errors):.1e} of the largest value")
    return worst


def training(subject: Subject, batch: int, rounds: int) -> dict[str, Any]:
    sides: dict[str, nn.Module] = {"before": subject.model}
    sides["accelerated"] = copy.deepcopy(subject.model)
    report = mk.accelerate(sides["accelerated"])
    compiled = copy.deepcopy(subject.model)
    compiled.compile()
    sides["torch.compile"] = compiled
    sides["mvar"] = engine(subject)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (batch, sum(n * n for n in PATCH_NUMS)), generator=generator).to(DEVICE)
    inputs = subject.tokenizer.teacher_forcing_inputs(tokens).detach()
    data = torch.arange(batch, device=DEVICE), inputs, tokens
    error = check(sides, subject, data)
    runs = {name: lambda model=model: step(model, *data) for name, model in sides.items()}
    times = interleaved(runs, rounds=rounds, seconds=0.0)
    return {"batch": batch, "dtype": "float32", "error": error, "report": str(report), "median_ms": times}


def generation(subject: Subject, batch: int, rounds: int) -> dict[str, Any]:
    labels = torch.arange(batch, device=DEVICE)
    accelerated = copy.deepcopy(subject.model)
    mk.accelerate(accelerated)
    compiled = copy.deepcopy(subject.model)
    for block in cast(nn.ModuleList, compiled.blocks):
        block.compile(dynamic=True)  # one graph for the lengths of all scales
    model = engine(subject)

    def ours(top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        out = mvar.generate(model, subject.tokenizer, labels, top_k=top_k, top_p=top_p or 1.0, dtype=torch.float32)
        return out.tokens, out.images

    sides: dict[str, Callable[[int, float], tuple[Tensor, Tensor]]] = {
        "before": lambda top_k, top_p: subject.draw(subject.model, labels, top_k, top_p),
        "accelerated": lambda top_k, top_p: subject.draw(accelerated, labels, top_k, top_p),
        "torch.compile": lambda top_k, top_p: subject.draw(compiled, labels, top_k, top_p),
        "mvar": ours,
    }
    greedy = {name: side(1, 0.0)[0] for name, side in sides.items()}
    agree = {name: float((tokens == greedy["before"]).float().mean()) for name, tokens in greedy.items()}
    if min(agree.values()) < 0.999:  # ties within a rounding may fall either way
        raise SystemExit(f"greedy tokens agree in {agree}")
    runs = {name: lambda side=side: side(900, 0.96) for name, side in sides.items()}
    times = interleaved(runs, rounds=rounds, seconds=0.0, warm_up=False)  # the greedy images were that
    return {"batch": batch, "dtype": "float32", "greedy_tokens_equal": agree, "median_ms": times}


@float32_matmuls(DEVICE, fast=DEVICE.type == "cpu")  # true float32, for all sides
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", type=Path, help="a checkout of FoundationVision/VAR")
    options = parser.parse_args()
    require_allocator()
    torch._dynamo.config.recompile_limit = 64  # the lengths of scales, with and without a cache
    subject = published(options.depth, options.sources) if options.sources else plain(options.depth)
    rows = {"model": subject.name, "depth": options.depth}
    rows["training"] = training(subject, options.batch, options.rounds)
    with torch.no_grad():
        rows["generation"] = generation(subject, options.batch, options.rounds)
    print(rows)
    name = f"plug_in_{'published' if options.sources else 'plain'}_d{options.depth}"
    print(write(name, rows))


if __name__ == "__main__":
    main()
