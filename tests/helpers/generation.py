"""Small models, and a plain implementation of generation to compare with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mvar
from mvar.inference.prepare import prepared_model
from mvar.models.tokenizer import Tokenizer


def small(depth: int = 2, seed: int = 4, **sizes: Any) -> tuple[Any, Tokenizer]:
    """A small random model and tokenizer, with gates large enough that every branch contributes."""
    tokenizer = mvar.TokenizerConfig(
        (1, 2, 3, 5), num_codes=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False
    )
    model, images = mvar.build(depth, tokenizer=tokenizer, **{"num_classes": 10} | sizes)
    return mvar.init_weights(model, alng=1.0, hd=1.0, seed=seed), images


@torch.no_grad()
def generate_from_prefix(
    model: mvar.Model,
    tokenizer: Tokenizer,
    labels: Tensor,
    cfg: float,
    *,
    refiner: mvar.Model | None = None,
    refine_from: int | None = None,
    guidance_until: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy generation with the public algorithm, which runs all layers over the full prefix at every scale.

    Guidance is applied after the head, with a factor of 0 from `guidance_until` on. Returns tokens (B, L) and guided
    logits (B, L, V).
    """
    B, scales = len(labels), model.config.scales
    both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    f_hat = torch.zeros(B, model.config.code_dim, *2 * model.config.patch_nums[-1:])
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    inputs: list[Tensor] = []
    for k, length in enumerate(scales):
        one = refiner if refiner is not None and refine_from is not None and k >= refine_from else model
        cond = one.class_emb(both)
        rows = torch.cat([one.start(cond), *(one.word_embed(step).repeat(2, 1, 1) for step in inputs)], 1)
        x = rows + one.positions()[:, : rows.shape[1]]
        hidden, _ = one.hidden(x, one.modulation(both, cond), scales[: k + 1])
        out = one.head(hidden[:, -length:])
        c = 0.0 if guidance_until is not None and k >= guidance_until else cfg * k / (len(scales) - 1)
        logits.append((1 + c) * out[:B] - c * out[B:])
        tokens.append(logits[-1].argmax(-1))
        f_hat = f_hat + tokenizer.scale_features(k, tokenizer.embed(tokens[-1]))
        if k + 1 < len(scales):
            inputs.append(tokenizer.next_input(k + 1, f_hat))
    return torch.cat(tokens, 1), torch.cat(logits, 1)


def with_guided_logits(run: Callable[[], mvar.Generated], *models: mvar.Model) -> tuple[mvar.Generated, Tensor]:
    """The generated images and the outputs of the models' heads, concatenated over the scales."""
    seen: list[Tensor] = []
    heads = [prepared_model(model, torch.float32).head for model in models]
    handles = [head.register_forward_hook(lambda module, args, output: seen.append(output)) for head in heads]
    try:
        out = run()
    finally:
        for handle in handles:
            handle.remove()
    return out, torch.cat(seen, 1)
