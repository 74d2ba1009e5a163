"""Whether a side computes what it should, before it is timed: greedy tokens; of the compiled rival, a block."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import public
from benchmarks.growth import OURS, PUBLIC, ROWS, VAR
from benchmarks.measure import DEVICE
from benchmarks.sides import SIDES, Pair, Side, compiled_block, generate, public_arithmetic, public_attention
from mvar.blocks import MVARBlock
from mvar.engine import release
from mvar_kernels.dispatch import BackendError

# Of the tokens up to the first scale that differs, as all that comes after one that fell the other way by rounding is
# another picture. On a GPU products are summed in other orders, and one token of a coarse scale is a tenth of them.
AGREE = {"cpu": 0.999, "cuda": 0.9}
AGREE_IN_16_BITS = 0.5  # a wrong kernel agrees on next to none
Found = dict[str, Any]


def check(sides: Sequence[Side], known: Mapping[str, Found], pair_of: Callable[[str], Pair]) -> dict[str, Found]:
    """By the names of those not known yet: what was found, and in "wrong" why they are not to be timed, or None.

    pair_of: architecture → model and tokenizer.
    """
    found: dict[str, Found] = {}
    judges = dict.fromkeys(judge for side in sides for judge in _judged_by(side))
    for side in (judge for judge in judges if judge.name not in known):
        pair = pair_of(side.architecture)
        try:
            found[side.name] = _same_draws(side, pair) if side.graph is False else _greedy(side, pair)
        except Exception as error:
            found[side.name] = {"wrong": f"not checked: {type(error).__name__}: {error}".splitlines()[0][:200]}
        for module in pair:
            release(module)
        print(f"{side.name}: {found[side.name]}", flush=True)
    return found


def reason_against(side: Side, found: Mapping[str, Found]) -> str | None:
    """Why a side is not to be timed, or None."""
    reasons = (found[judge.name]["wrong"] for judge in _judged_by(side))
    return next((reason for reason in reasons if reason), None)


def _judged_by(side: Side) -> list[Side]:
    """The sides to check for this one: none for the public algorithm, which the others are held against."""
    if side.algorithm == PUBLIC:
        return []
    if side.compiled or not side.decoded:  # the engine's own model, with another decoder or none
        return [SIDES["var" if side.algorithm == VAR else "mvar"]]
    return [SIDES["mvar"], side] if side.graph is False else [side]


def _greedy(side: Side, pair: Pair) -> Found:
    """Held against the public algorithm, in float32; VAR, and kernels without float32, against the reference."""
    labels = torch.tensor([7], device=DEVICE)
    dtype, other = torch.float32, SIDES["public"] if side.algorithm == OURS else SIDES["var"].on("reference")
    try:
        tokens = generate(side, pair, labels, dtype, top_k=1)
    except BackendError:
        dtype, other = torch.bfloat16, SIDES["mvar"].on("reference")
        tokens = generate(side, pair, labels, dtype, top_k=1)
    equal = share(tokens, generate(other, pair, labels, dtype, top_k=1), pair[0].config.scales)
    enough = AGREE[DEVICE.type] if dtype == torch.float32 else AGREE_IN_16_BITS
    wrong = None if equal >= enough else f"wrong: {equal:.1%} of its greedy tokens are those of: {other.name}"
    return {"dtype": str(dtype)[6:], "as": other.name, "equal_greedy_tokens": equal, "wrong": wrong}


def _same_draws(side: Side, pair: Pair) -> Found:
    """Held against the engine with a graph: the same tokens, in a batch that is padded."""
    labels = torch.tensor([1, 2, 3], device=DEVICE)
    draws = [generate(each, pair, labels, torch.bfloat16) for each in (side, SIDES["mvar"])]
    same = torch.equal(*draws)
    return {"dtype": "bfloat16", "as": OURS, "same_tokens": same, "wrong": None if same else "wrong: other tokens"}


@torch.no_grad()
def fault_of_compiled(pair: Pair, batch: int, dtype: torch.dtype, chunk: int) -> str | None:
    """What is wrong with the public algorithm's compiled block, held against the same one run eagerly, or None.

    At the last scale of such a batch, for which a generation has compiled it.
    """
    model, _ = pair
    layers, (*coarser, length) = model.typed_blocks()[0], model.config.scales
    assert isinstance(layers, MVARBlock)
    lengths, (_, attend) = (length, sum(coarser)), public_attention(dtype)
    x, cache = (torch.randn(ROWS * batch, n, model.config.channels, device=DEVICE) for n in lengths)
    cond = model.class_emb.weight[: ROWS * batch]
    with public_arithmetic(dtype, chunk):
        got, expected = (run(layers, x, cond, cache, attend) for run in (compiled_block(), public.block))
    error = float((got[0] - expected[0]).norm() / expected[0].norm())
    # float32: sums of up to 4,096 products in another order. In 16 bits what a factor's rounding adds is more.
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
