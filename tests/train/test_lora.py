"""Tests of LoRA adapters by peft on mvar's models: training, saving, loading, merging and generation."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed"),
]
CONFIG = mvar.TokenizerConfig((1, 2, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 2), num_res_blocks=1)
LAYERS = {"mat_qkv", "proj", "in_proj", "out_proj", "fc1", "fc2"}
OF_VAR = LAYERS - {"in_proj", "out_proj"}
LABELS = torch.tensor([1, 7, 3, 3])


def pair(architecture: str) -> tuple[mvar.Model, mvar.Tokenizer]:
    model, tokenizer = mvar.build(num_classes=10, tokenizer=CONFIG, depth=2, architecture=architecture)
    return mvar.init_weights(model, alng=1.0, hd=1.0, seed=4), tokenizer


def tokens_of(model: Any, tokenizer: mvar.Tokenizer) -> Tensor:
    return mvar.generate(model, tokenizer, LABELS, top_k=0, top_p=1.0, dtype=torch.float32).tokens


@pytest.mark.parametrize("architecture", ["mvar", "var"])
def test_adapters_train_save_load_and_merge(architecture: str, tmp_path: Path) -> None:
    import peft  # takes seconds, which collecting the tests should not

    model, tokenizer = pair(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of_base = tokens_of(model, tokenizer)
    torch.manual_seed(0)  # for the adapters
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(LAYERS)))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == (
        LAYERS if architecture == "mvar" else OF_VAR
    )

    tokens = torch.randint(64, (4, tokenizer.num_tokens), generator=torch.Generator().manual_seed(0))
    inputs = tokenizer.teacher_forcing_inputs(tokens)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(adapted(LABELS, inputs).flatten(0, 1), tokens.flatten())
        loss.backward()
        assert {name for name, p in adapted.named_parameters() if p.grad is not None} == trained.keys()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(bool(p.any()) for p in trained.values())
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())

    of_adapted = tokens_of(adapted, tokenizer)
    assert not torch.equal(of_adapted, of_base)
    assert torch.equal(tokens_of(adapted.base_model.model, tokenizer), of_adapted)
    with adapted.disable_adapter():
        assert torch.equal(tokens_of(adapted, tokenizer), of_base)
    with pytest.raises(ValueError, match=r"mat_qkv is a Linear of peft.*merge_and_unload"):
        mvar.save(tmp_path / "model.safetensors", adapted)
    assert not list(tmp_path.iterdir())

    adapted.save_pretrained(tmp_path / "adapters")
    loaded: Any = peft.PeftModel.from_pretrained(pair(architecture)[0], str(tmp_path / "adapters"))
    assert torch.equal(tokens_of(loaded, tokenizer), of_adapted)
    merged = loaded.merge_and_unload()
    assert torch.equal(tokens_of(merged, tokenizer), of_adapted)
    mvar.save(tmp_path / "model.safetensors", merged)
    assert torch.equal(tokens_of(mvar.load_model(tmp_path / "model.safetensors"), tokenizer), of_adapted)
