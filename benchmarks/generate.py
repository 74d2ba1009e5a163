"""Generation of d16 at 256×256 against the public algorithm: `python -m benchmarks.generate`.

Random weights, seeded; guidance 1.5, top-k 900, top-p 0.96. Both sides in one process, in turns. Before anything is
timed, greedy tokens in float32 must agree.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mvar
from benchmarks import public
from benchmarks.measure import DEVICE, interleaved, require_allocator, write
from benchmarks.parts import breakdown
from mvar.engine import prepared_tokenizer
from mvar.tokenizer import Tokenizer

AGREE = 0.999  # of greedy float32 tokens: ties within a rounding may fall either way


def ours(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype, **options: Any) -> mvar.Generated:
    return mvar.generate(model, tokenizer, labels, dtype=dtype, **options)


def theirs(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return public.generate(model, tokenizer, labels, **options)


def check(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor) -> dict[str, float]:
    """Greedy tokens of both sides in float32, and of ours in bfloat16; pictures of the same tokens by PSNR."""
    exact = ours(model, tokenizer, labels, torch.float32, top_k=1)
    _, public_tokens = theirs(model, tokenizer, labels, torch.float32, top_k=1)
    agreement = float((exact.tokens == public_tokens).float().mean())
    if agreement < AGREE:
        raise SystemExit(f"only {agreement:.2%} of the greedy tokens agree with the public algorithm")
    rough = ours(model, tokenizer, labels, torch.bfloat16, top_k=1)
    features = torch.randn(1, model.config.code_dim, *2 * model.config.patch_nums[-1:])
    pictures = [prepared_tokenizer(tokenizer, d).decode_features(features) for d in (torch.float32, torch.bfloat16)]
    squared_error = float((pictures[0] - pictures[1]).square().mean()) / 4  # pixels span 2
    return {
        "greedy_tokens_equal_to_public": agreement,
        "greedy_tokens_bf16_equal_to_fp32": float((rough.tokens == exact.tokens).float().mean()),
        "decoder_bf16_psnr_db": -10 * torch.tensor(squared_error).log10().item(),
    }


def random_model(depth: int) -> tuple[mvar.Model, Tokenizer]:
    model, tokenizer = mvar.build(depth)
    mvar.initialise(model, alng=1e-2, hd=1.0)  # so that every branch and every logit counts
    return model, tokenizer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if DEVICE.type != "cpu":
        raise SystemExit("this measures the CPU engine; `python -m benchmarks.generation` is for a GPU")
    require_allocator()
    model, tokenizer = random_model(options.depth)
    torch.set_float32_matmul_precision("medium")  # torch's better float32 products on the CPU, for the baseline
    agreement = check(model, tokenizer, torch.tensor([207]))
    print(agreement)
    rows = []
    for batch in options.batches:
        for dtype in (torch.float32, torch.bfloat16):
            rounds = max(options.rounds // batch, 2)
            rows.append(compare(model, tokenizer, torch.arange(batch) * 100 + 7, dtype, rounds))
            print(rows[-1])
    print(write(f"generate_d{options.depth}", {"agreement": agreement, "runs": rows}))


def compare(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time the sides in turns; one image also by part, and with the baseline as torch runs it unless told otherwise."""
    sides = {
        "mvar": lambda: ours(model, tokenizer, labels, dtype),
        "public algorithm": lambda: theirs(model, tokenizer, labels, dtype),
    }
    one = len(labels) == 1  # the first sizes timed: what comes after them is warm
    if one and dtype == torch.float32:
        sides["public algorithm, torch's default products"] = lambda: with_default_products(
            lambda: theirs(model, tokenizer, labels, dtype)
        )
    return {
        "batch": len(labels),
        "dtype": str(dtype)[6:],
        "median_ms": interleaved(sides, rounds=rounds, seconds=0, warm_up=one),
        "breakdown": breakdown(sides["mvar"], tokenizer, len(labels), dtype) if one else None,
    }


def with_default_products(run: Callable[[], Any]) -> Any:
    """Run with the float32 matrix products that torch takes unless told otherwise."""
    torch.set_float32_matmul_precision("highest")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision("medium")


if __name__ == "__main__":
    main()
