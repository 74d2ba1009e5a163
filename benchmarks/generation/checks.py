"""Whether a method computes what it should, before it is timed: by greedy tokens, a compiled baseline by one block."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.analysis.flops import OURS, PUBLIC, ROWS, VAR
from benchmarks.baselines import eager_generation
from benchmarks.common.environment import DEVICE
from benchmarks.common.limits import first_line
from benchmarks.generation.methods import (
    METHODS,
    Method,
    Pair,
    compiled_block,
    generate,
    public_attention,
    public_precision,
)
from mvar.inference.prepare import release
from mvar.models.blocks import MVARBlock
from mvar_kernels.dispatch import BackendError

# Least share of equal tokens up to the first scale that differs: a token that rounding decides changes all later ones.
# On a GPU sums are in other orders, and one token of a coarse scale is a tenth of them.
MIN_EQUAL = {"cpu": 0.999, "cuda": 0.9}
MIN_EQUAL_IN_16_BITS = 0.5  # with a wrong kernel next to none are equal
Found = dict[str, Any]


def check(methods: Sequence[Method], known: Mapping[str, Found], pair_of: Callable[[str], Pair]) -> dict[str, Found]:
    """Findings by the names of those not known yet, with "wrong": why the method is not to be timed, or None.

    pair_of: architecture → model and tokenizer.
    """
    found: dict[str, Found] = {}
    to_check = dict.fromkeys(each for method in methods for each in _checked_for(method))
    for method in (each for each in to_check if each.name not in known):
        pair = pair_of(method.architecture)
        try:
            found[method.name] = _equal_samples(method, pair) if method.graph is False else _greedy(method, pair)
        except Exception as error:
            found[method.name] = {"wrong": f"not checked: {first_line(error)}"}
        for module in pair:
            release(module)
        print(f"{method.name}: {found[method.name]}", flush=True)
    return found


def reason_against(method: Method, found: Mapping[str, Found]) -> str | None:
    """Why a method is not to be timed, or None."""
    reasons = (found[each.name]["wrong"] for each in _checked_for(method))
    return next((reason for reason in reasons if reason), None)


def _checked_for(method: Method) -> list[Method]:
    """The methods whose check decides on this one: none for the public algorithm, which is the reference."""
    if method.algorithm == PUBLIC:
        return []
    if method.compiled or not method.decoded:  # the engine's own model, with another decoder or none
        return [METHODS["var" if method.algorithm == VAR else "mvar"]]
    return [METHODS["mvar"], method] if method.graph is False else [method]


def _greedy(method: Method, pair: Pair) -> Found:
    """Compared with the public algorithm in float32; VAR, and kernels without float32, with the reference backend."""
    labels = torch.tensor([7], device=DEVICE)
    dtype, other = torch.float32, METHODS["public"] if method.algorithm == OURS else METHODS["var"].on("reference")
    try:
        tokens = generate(method, pair, labels, dtype, top_k=1)
    except BackendError:
        dtype, other = torch.bfloat16, METHODS["mvar"].on("reference")
        tokens = generate(method, pair, labels, dtype, top_k=1)
    equal = share(tokens, generate(other, pair, labels, dtype, top_k=1), pair[0].config.scales)
    enough = MIN_EQUAL[DEVICE.type] if dtype == torch.float32 else MIN_EQUAL_IN_16_BITS
    wrong = None if equal >= enough else f"wrong: {equal:.1%} of its greedy tokens are those of: {other.name}"
    return {"dtype": str(dtype)[6:], "as": other.name, "equal_greedy_tokens": equal, "wrong": wrong}


def _equal_samples(method: Method, pair: Pair) -> Found:
    """Compared with the engine under a CUDA graph, in a batch that is padded."""
    labels = torch.tensor([1, 2, 3], device=DEVICE)
    same = torch.equal(*(generate(each, pair, labels, torch.bfloat16) for each in (method, METHODS["mvar"])))
    return {"dtype": "bfloat16", "as": OURS, "same_tokens": same, "wrong": None if same else "wrong: other tokens"}


@torch.no_grad()
def compiled_fault(pair: Pair, batch: int, dtype: torch.dtype, chunk: int) -> str | None:
    """What is wrong with the public algorithm's compiled block, compared with the eager one, or None.

    At the last scale of such a batch, for which a generation has compiled it.
    """
    model, _ = pair
    layers, (*coarser, length) = model.typed_blocks()[0], model.config.scales
    assert isinstance(layers, MVARBlock)
    lengths, (_, attend) = (length, sum(coarser)), public_attention(dtype)
    x, cache = (torch.randn(ROWS * batch, n, model.config.channels, device=DEVICE) for n in lengths)
    cond = model.class_emb.weight[: ROWS * batch]
    with public_precision(dtype):
        blocks = (compiled_block(), eager_generation.block)
        got, expected = (block(layers, x, cond, cache, attend, chunk)[0] for block in blocks)
    error = float((got - expected).norm() / expected.norm())
    # float32: sums of up to 4,096 terms in another order. In 16 bits a rounding of the factors adds more.
    allowed = torch.finfo(dtype).eps * (32 if dtype == torch.float32 else 2)
    return None if error <= allowed else f"wrong: a block is off by {error:.1e} of its norm"


def share(tokens: Tensor, others: Tensor, scales: Sequence[int]) -> float:
    """Of equal tokens, up to the end of the first scale that differs anywhere. tokens: (B, L)."""
    end = 0
    for length in scales:
        end += length
        if not torch.equal(tokens[:, :end], others[:, :end]):
            break
    return float((tokens[:, :end] == others[:, :end]).float().mean())
