"""A VAR model before and after `mvar_kernels.accelerate`, and under torch.compile.

`python -m benchmarks.bench_accelerate` measures a training step (forward and backward of the cross entropy, without the
optimizer) and a generation with guidance and a small decoder, which is the same for all. The model is that of
tests/helpers/plain_var.py, with random weights; or, with `--sources`, that of a checkout of FoundationVision/VAR.
Outputs, gradients and greedy tokens are compared before anything is timed.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar
import mvar_kernels as mk
from benchmarks.common.environment import DEVICE, argument_parser, set_allocator
from benchmarks.common.results import save
from benchmarks.common.timing import interleaved
from mvar.models.tokenizer import Tokenizer
from mvar_kernels.precision import float32_matmuls
from tests.helpers.plain_var import PlainVAR, randomised

PATCH_NUMS = mvar.SCHEDULES[256]
SMALL_DECODER = 32  # channels, instead of the published 160
MAX_ERROR = 1e-3  # of the largest value: float32 sums in another order, under softmax temperatures up to 100


@dataclass
class Subject:
    """A model and how it generates tokens (B, L) and images: greedily (top_k 1) or with top-k and top-p."""

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    generate: Callable[[nn.Module, Tensor, int, float], tuple[Tensor, Tensor]]


def small_tokenizer() -> Tokenizer:
    return mvar.build(1, tokenizer=mvar.TokenizerConfig(PATCH_NUMS, ch=SMALL_DECODER))[1].to(DEVICE)


def plain_var(depth: int) -> Subject:
    torch.manual_seed(0)
    model = randomised(PlainVAR(depth, PATCH_NUMS, num_classes=1000, num_codes=4096)).to(DEVICE)
    tokenizer = small_tokenizer()

    def generate(model: Any, labels: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        tokens, _ = model.generate(tokenizer, labels, top_k=top_k, top_p=top_p)
        return tokens, tokenizer.decode(tokens)

    return Subject("a model of VAR's shape", model, tokenizer, generate)


def published(depth: int, sources: Path) -> Subject:
    """FoundationVision/VAR's own model, random weights, gates large enough that every branch counts."""
    sys.path.insert(0, str(sources))
    from models import build_vae_var  # type: ignore[import-not-found, unused-ignore]

    tokenizer = small_tokenizer()  # before build_vae_var, which disables the initialisation of torch's layers
    torch.manual_seed(0)
    vae, model = build_vae_var(DEVICE, ch=SMALL_DECODER, depth=depth, init_adaln_gamma=0.3, init_head=1.0)
    model.cond_drop_rate = 0.0  # its forward drops labels in evaluation as well
    for block in model.blocks:
        block.drop_path = nn.Identity()  # unused here, and torch.compile would recompile for every block
    vae.load_state_dict(tokenizer.state_dict(), strict=False)
    commit = subprocess.run(["git", "-C", sources, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)

    def generate(model: Any, labels: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        tokens: list[Tensor] = []
        hook = model.vae_quant_proxy[0].embedding.register_forward_hook(
            lambda module, args, out: tokens.append(args[0])
        )
        images = model.autoregressive_infer_cfg(len(labels), labels, g_seed=0, cfg=1.5, top_k=top_k, top_p=top_p)
        hook.remove()
        return torch.cat(tokens, 1), images

    return Subject(f"FoundationVision/VAR at {commit.stdout[:12]}", model.eval(), tokenizer, generate)


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


def check(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """The largest error of logits and gradients relative to the largest value; SystemExit where it is too large."""
    found = {}
    for name, model in models.items():
        outputs = step(model, *batch)
        found[name] = outputs + [p.grad.clone() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    reference = found["before"]
    worst = 0.0
    for name, values in found.items():
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, reference, strict=True)]
        worst = max(worst, *errors)
        if max(errors) > MAX_ERROR:
            raise SystemExit(f"{name}: logits or gradients differ by {max(errors):.1e} of the largest value")
    return worst


def training(subject: Subject, batch: int, rounds: int) -> dict[str, Any]:
    accelerated, compiled = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    report = mk.accelerate(accelerated)
    compiled.compile()
    models = {"before": subject.model, "accelerated": accelerated, "torch.compile": compiled, "mvar": engine(subject)}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (batch, sum(n * n for n in PATCH_NUMS)), generator=generator).to(DEVICE)
    inputs = subject.tokenizer.teacher_forcing_inputs(tokens).detach()
    data = torch.arange(batch, device=DEVICE), inputs, tokens
    error = check(models, data)
    runs = {name: lambda model=model: step(model, *data) for name, model in models.items()}
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

    methods: dict[str, Callable[[int, float], tuple[Tensor, Tensor]]] = {
        "before": lambda top_k, top_p: subject.generate(subject.model, labels, top_k, top_p),
        "accelerated": lambda top_k, top_p: subject.generate(accelerated, labels, top_k, top_p),
        "torch.compile": lambda top_k, top_p: subject.generate(compiled, labels, top_k, top_p),
        "mvar": ours,
    }
    greedy = {name: method(1, 0.0)[0] for name, method in methods.items()}
    equal = {name: float((tokens == greedy["before"]).float().mean()) for name, tokens in greedy.items()}
    if min(equal.values()) < 0.999:  # a rounding may decide ties
        raise SystemExit(f"wrong: shares of equal greedy tokens {equal}")
    runs = {name: partial(method, 900, 0.96) for name, method in methods.items()}
    times = interleaved(runs, rounds=rounds, seconds=0.0, warm_up=False)  # done by the greedy images
    return {"batch": batch, "dtype": "float32", "greedy_tokens_equal": equal, "median_ms": times}


@float32_matmuls(DEVICE, fast=DEVICE.type == "cpu")  # true float32, for all
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", type=Path, help="a checkout of FoundationVision/VAR")
    options = parser.parse_args()
    set_allocator()
    torch._dynamo.config.recompile_limit = 64  # a shape per scale, with and without a cache
    subject = published(options.depth, options.sources) if options.sources else plain_var(options.depth)
    rows = {"model": subject.name, "depth": options.depth}
    rows["training"] = training(subject, options.batch, options.rounds)
    with torch.no_grad():
        rows["generation"] = generation(subject, options.batch, options.rounds)
    print(rows)
    name = f"plug_in_{'published' if options.sources else 'plain'}_d{options.depth}"
    print(save(name, rows))


if __name__ == "__main__":
    main()
