"""Tests of the code in docs/accelerate.md: each replacement matches the code that it replaces."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvar
from mvar_kernels.dispatch import native
from mvar_kernels.patching.patches.base import Patch
from tests.helpers.paths import ROOT
from tests.helpers.plain_mamba2 import PlainMamba2
from tests.helpers.plain_var import PlainVAR, randomised

DOCUMENT = (ROOT / "docs" / "accelerate.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
PATCH_NUMS = mvar.SCHEDULES[256]
SCALES = tuple(n * n for n in PATCH_NUMS)
# Float32 sums of 680 terms in a different order, and softmax temperatures up to 100: √680 · 100 · 2⁻²⁴ = 1.6·10⁻⁴.
TOLERANCE = 2e-4


def function(name: str, when: str) -> Callable[..., Any]:
    (setup,) = (block for block in BLOCKS if block.startswith("import math"))
    (source,) = (block for block in BLOCKS if block.startswith(f"# {when}\n") and f"def {name}(" in block)
    assert when == "before" or len(source.splitlines()) - 1 <= 10
    names: dict[str, Any] = {}
    exec(setup + source, names)
    found: Callable[..., Any] = names[name]
    return found


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def assert_same(runs: list[Callable[[], Tensor]], leaves: list[Tensor]) -> None:
    """Compare outputs and the gradients of all leaves."""
    results = []
    for run in runs:
        out = run()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for before, after in zip(*results, strict=True):
        assert (after - before).abs().max() <= TOLERANCE * before.abs().max()


def test_attention() -> None:
    model = PlainVAR(1, PATCH_NUMS)
    qkv, scale_mul = random(2, 680, 3, 2, 16), torch.tensor([1.5, 5.0]).view(1, 2, 1, 1).requires_grad_()
    before, after = function("attend", "before"), function("attend", "after")
    assert_same(
        [
            lambda: before(qkv, scale_mul, model.attn_bias_for_masking),
            lambda: after(qkv, scale_mul, PATCH_NUMS),
        ],
        [qkv, scale_mul],
    )


def test_block() -> None:
    model = randomised(PlainVAR(1, PATCH_NUMS))
    block, x, cond = model.blocks[0], random(2, 680, 64), random(2, 64)
    runs = [function("block", "before"), function("block", "after")]
    mask = model.attn_bias_for_masking
    assert_same(
        [lambda run=run: run(block, x, cond, mask) for run in runs],  # type: ignore[misc]
        [x, cond, *block.parameters()],
    )


def test_draw() -> None:
    """Compares the greedy token and the frequencies of 20,000 draws from one row of logits."""
    before, after = function("draw", "before"), function("draw", "after")
    cond, uncond = (t.detach() for t in (random(2, 256, 512), random(256, 2, 512).transpose(0, 1)))
    assert torch.equal(after(cond, uncond, 1.5, 1, 1.0), before(cond, uncond, 1.5, 1, 1.0))

    n, row, other = 20_000, 2 * random(1, 1, 32).detach(), random(1, 32, 1).mT.detach()
    torch.manual_seed(0)
    counts = [
        draw(row.expand(1, n, -1), other.expand(1, n, -1), 0.5, 12, 0.9).flatten().bincount(minlength=32).double() / n
        for draw in (before, after)
    ]
    assert torch.equal(counts[0] > 0, counts[1] > 0) and 2 < int((counts[0] > 0).sum()) < 12
    deviation = (2 * counts[0] * (1 - counts[0]) / n).sqrt()  # of the difference of the two frequencies
    assert ((counts[0] - counts[1]).abs() <= 5 * deviation).all()


def test_mamba2() -> None:
    torch.manual_seed(0)
    layer, u = PlainMamba2(32, headdim=16, d_state=16), random(2, 91, 32)
    before, after = function("mix", "before"), function("mix", "after")
    scales = SCALES[:6]

    def over_prefixes() -> Tensor:
        ends = [sum(scales[:k]) for k in range(len(scales) + 1)]
        return torch.cat([before(layer, u[:, :a], u[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)], 1)

    def carried() -> Tensor:
        outs, state = [], None
        for new in u.split(scales, 1):
            out, state = after(layer, state, new)
            outs.append(out)
        return torch.cat(outs, 1)

    assert_same([over_prefixes, carried], [u, *layer.parameters()])


@pytest.mark.skipif(native() is None, reason="the C++ extension was not built, so that nothing is patched")
def test_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in BLOCKS if "mk.accelerate" in block)
    model: nn.Module = PlainVAR(1, (1, 2))
    exec(code, {"model": model})
    assert "replaced blocks.0.attn" in capsys.readouterr().out
    assert not any(isinstance(module, Patch) for module in model.modules())


def test_all_code_blocks_are_tested() -> None:
    assert len(BLOCKS) == 2 + 2 * 4
