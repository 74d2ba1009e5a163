"""The model card of a model or tokenizer: facts that follow from its configuration, and an example.

Figures of quality are not in it, as they do not follow from the weights.
"""

import torch
from huggingface_hub import ModelCard, ModelCardData

from mvar.models.config import SCHEDULES
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar.models.weights import plain_module

SHOWN_NAMES = 10
ARCHITECTURES = {
    "mvar": ("M-VAR", "2411.10433", "attention within each scale and a Mamba-2 mixer over all scales"),
    "var": ("VAR", "2404.02905", "attention over the same scale and all coarser ones"),
}


def model_card(
    module: Model | Tokenizer, dtype: torch.dtype | None, license: str | None, repo_id: str | None
) -> ModelCard:
    """The card of a module whose weights are saved in `dtype`; None for their own."""
    parameters = sum(p.numel() for p in plain_module(module).parameters())
    saved_in = dtype or next(module.parameters()).dtype
    stated = license or "not stated; to be added by the owner of the weights"
    name = repo_id or "path/to/this/folder"
    task: str | None
    if isinstance(module, Model):
        title, facts, example, tags, task = _of_model(module, name)
    else:
        title, facts, example, tags, task = _of_tokenizer(module, name)
    facts += [
        f"Token maps: {', '.join(f'{p}×{p}' for p in module.config.patch_nums)}, coarse to fine; "
        f"{sum(p * p for p in module.config.patch_nums):,} tokens",
        f"Codes: {module.config.num_codes:,} of width {module.config.code_dim}",
        f"Parameters: {parameters:,}, saved in {str(saved_in).removeprefix('torch.')}",
        f"License: {stated}",
    ]
    data = ModelCardData(license=license, library_name="mvar", pipeline_tag=task, tags=["mvar", *tags])
    listed = "\n".join(f"- {fact}" for fact in facts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{listed}\n\n## Use\n\n```python\n{example}\n```\n")


def _of_model(model: Model, name: str) -> tuple[str, list[str], str, list[str], str]:
    config = model.config
    label, paper, attention = ARCHITECTURES[config.architecture]
    classes = f"{config.num_classes:,}"
    if model.class_names is not None:
        names = ", ".join(" ".join(text.split()) for text in model.class_names[:SHOWN_NAMES])
        classes += f": {names}{', …' if config.num_classes > SHOWN_NAMES else ''}"
    facts = [
        f"Architecture: [{label}](https://arxiv.org/abs/{paper}), {attention}; {config.depth} blocks of width "
        f"{config.channels}{', bidirectional mixer' if config.bidirectional else ''}",
        f"Classes: {classes}",
        f"Training settings in the configuration: label dropout {config.label_drop:g}, stochastic depth "
        f"{config.drop_path:g}. Data, steps and results are not in the files; to be added by the author",
    ]
    if config.patch_nums in SCHEDULES.values():
        resolution = next(side for side, patch_nums in SCHEDULES.items() if patch_nums == config.patch_nums)
        facts.insert(1, f"Resolution: {resolution}×{resolution} with the published tokenizer, 16×16 pixels per token")
    example = (
        f'import mvar\n\nmodel = mvar.Model.from_pretrained("{name}")\n'
        'tokenizer = mvar.Tokenizer.from_pretrained("…")  # the one that the model was trained with\n'
        "# The sampling settings that were published for ImageNet at 256×256, not tuned for these weights\n"
        "images = mvar.generate(model, tokenizer, [0], cfg=1.5, top_k=900, top_p=0.96, seed=0).images  # in [0, 1]"
    )
    return f"{label} model of images", facts, example, [config.architecture], "unconditional-image-generation"


def _of_tokenizer(tokenizer: Tokenizer, name: str) -> tuple[str, list[str], str, list[str], None]:
    side = tokenizer.resolution
    facts = [
        "Architecture: [VAR](https://arxiv.org/abs/2404.02905)'s multi-scale residual VQ-VAE",
        f"Resolution: {side}×{side}, {tokenizer.downsampling}×{tokenizer.downsampling} pixels per token",
    ]
    example = (
        f'import mvar\n\ntokenizer = mvar.Tokenizer.from_pretrained("{name}")\n'
        f"tokens = tokenizer.encode(images)  # images: (B, 3, {side}, {side}) in [−1, 1]\n"
        "reconstructed = tokenizer.decode(tokens)"
    )
    return "Tokenizer of images", facts, example, ["tokenizer"], None
