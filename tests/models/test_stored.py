"""Tests loading for inference: the same images as after loading in float32, and the memory that it takes."""

import copy
import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mvar
from mvar.models.weights import fingerprint
from mvar.stored import StoredModel, StoredTokenizer
from tests.helpers.generation import small

LABELS = [3, 7, 1]
KINDS: dict[str, dict[str, Any]] = {
    "mvar": {},
    "bidirectional": {"bidirectional": True},
    "var": {"architecture": "var"},
    "shared_adaln": {"architecture": "var", "shared_adaln": True},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved(folder: Path, dtype: torch.dtype | None = None, **sizes: Any) -> tuple[mvar.Model, Any, Path, Path]:
    model, tokenizer = small(**sizes)
    paths = folder / "model.safetensors", folder / "tokenizer.safetensors"
    for path, module in zip(paths, (model, tokenizer), strict=True):
        mvar.save(path, module, dtype=dtype)
    return model, tokenizer, *paths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_equal_those_of_copies(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer, model_file, tokenizer_file = saved(tmp_path, **KINDS[kind])
    torch.save(model.state_dict(), tmp_path / "model.pth")
    want = mvar.generate(model, tokenizer, LABELS, dtype=dtype)
    decoder = mvar.load_tokenizer(tokenizer_file, dtype=dtype, encoder=False)
    assert isinstance(decoder, mvar.InferenceTokenizer)
    files = (model_file, tmp_path / "model.pth") if kind in ("mvar", "var") else (model_file,)
    for file in files:
        loaded = mvar.load_model(file, dtype=dtype)
        assert isinstance(loaded, mvar.InferenceModel) and loaded.dtype == dtype
        got = mvar.generate(loaded, decoder, LABELS)
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.images, want.images)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_stored_dtypes(stored: torch.dtype, tmp_path: Path) -> None:
    """Weights that are stored in another dtype are rounded once, from their stored values."""
    *_, model_file, tokenizer_file = saved(tmp_path, stored)
    pair = mvar.load_model(model_file), mvar.load_tokenizer(tokenizer_file)
    for dtype in (torch.float32, torch.bfloat16):
        want = mvar.generate(*pair, LABELS, dtype=dtype)
        loaded = mvar.load_model(model_file, dtype=dtype), mvar.load_tokenizer(tokenizer_file, dtype=dtype)
        assert torch.equal(mvar.generate(*loaded, LABELS).tokens, want.tokens)


@pytest.mark.parametrize("kind", ["mvar", "var"])
def test_known_labels(kind: str, tmp_path: Path) -> None:
    """A table replaces the modulation layers, and other classes are refused; a table that is larger is not made."""
    *_, model_file, tokenizer_file = saved(tmp_path, **KINDS[kind])
    tokenizer = mvar.load_tokenizer(tokenizer_file, dtype=torch.float32)
    everything = mvar.load_model(model_file, dtype=torch.float32)
    known = mvar.load_model(model_file, dtype=torch.float32, labels=LABELS)
    assert known.modulation_table is not None and len(known.modulation_table) == 4
    assert not any(hasattr(block, "ada_lin") for block in known.blocks) and not hasattr(known, "head_nm")
    for labels in ([3], [1, 7, 7, 3, 1]):
        want = mvar.generate(everything, tokenizer, labels)
        got = mvar.generate(known, tokenizer, labels)
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-5)
    images = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(10, 10, dtype=torch.bool)
    for model in (everything, known):  # the unconditional class is always in the table
        assert mvar.edit(model, tokenizer, images, mask).tokens.shape == (1, 39)
    with pytest.raises(ValueError, match="labels: the model was loaded for the classes 1, 3, 7 only, got 2"):
        mvar.generate(known, tokenizer, [3, 2])
    with pytest.raises(ValueError, match="labels: the refiner was loaded for the classes 1, 3, 7 only, got 2"):
        mvar.generate(everything, tokenizer, [2], refiner=known, refine_from=1)
    with pytest.raises(IndexError):
        known(torch.tensor([2]), torch.zeros(1, 38, 32))
    for function in (mvar.log_likelihood, mvar.classify):
        with pytest.raises(ValueError, match="labels: the model was loaded for the classes 1, 3, 7 only, got 0"):
            function(known, tokenizer, images)  # type: ignore[operator]


def test_large_tables_are_not_made(tmp_path: Path) -> None:
    """A table has at most three quarters of the layers' 65·11·64 elements, with a row of 11·64 for each class."""
    wide, _ = mvar.build(1, num_classes=100, patch_nums=(1, 2), width=64)
    mvar.save(tmp_path / "wide.safetensors", wide)
    for count, smaller in ((47, True), (48, False)):
        loaded = mvar.load_model(tmp_path / "wide.safetensors", dtype=torch.float32, labels=range(count))
        assert (loaded.modulation_table is not None) == smaller


def test_other_functions(tmp_path: Path) -> None:
    model, tokenizer, model_file, tokenizer_file = saved(tmp_path)
    loaded = mvar.load_model(model_file, dtype=torch.float32)
    encodes = mvar.load_tokenizer(tokenizer_file, dtype=torch.float32)
    images = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encodes.encode(images * 2 - 1), tokenizer.encode(images * 2 - 1))
    for function in (mvar.log_likelihood, mvar.classify):
        want, got = function(model, tokenizer, images), function(loaded, encodes, images)
        field = "by_scale" if function is mvar.log_likelihood else "log_likelihood"
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=1e-6, atol=1e-4)
    mask = torch.arange(10).expand(10, 10) > 4
    pairs = (model, tokenizer), (loaded, encodes)
    edited = [mvar.edit(*pair, images, mask, 1, dtype=torch.float32) for pair in pairs]
    assert torch.equal(edited[0].tokens, edited[1].tokens)
    refined = mvar.generate(loaded, encodes, LABELS, refiner=loaded, refine_from=2)
    assert torch.equal(refined.tokens, mvar.generate(model, tokenizer, LABELS, dtype=torch.float32).tokens)
    with pytest.raises(ValueError, match=r"dtype: the model was loaded in torch.float32 for inference, got torch.bfl"):
        mvar.generate(loaded, encodes, [1], dtype=torch.bfloat16)


def test_only_for_inference(tmp_path: Path) -> None:
    *_, model_file, tokenizer_file = saved(tmp_path)
    model = mvar.load_model(model_file, dtype=torch.bfloat16)
    assert model.to("cpu") is model and model.eval() is model
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    with pytest.raises(RuntimeError, match="InferenceModel is for inference: to train it, load it without dtype"):
        model.train()
    with pytest.raises(RuntimeError, match="cannot be moved or converted"):
        model.float()
    with pytest.raises(TypeError, match="got a InferenceModel, which is for inference alone: load it without dtype"):
        mvar.save(tmp_path / "again.safetensors", model)  # type: ignore[arg-type]
    for use in (model.state_dict, lambda: model.load_state_dict({})):
        with pytest.raises(RuntimeError, match="state dict: load the model without dtype"):
            use()
    for use in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(TypeError, match="load it again"):
            use()
    decoder = mvar.load_tokenizer(tokenizer_file, dtype=torch.bfloat16, encoder=False)
    with pytest.raises(RuntimeError, match="the tokenizer was loaded without its encoder"):
        decoder.encode(torch.zeros(1, 3, 10, 10))
    assert decoder.to("cpu") is decoder and copy.deepcopy(decoder).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="InferenceTokenizer cannot be moved or converted"):
        decoder.float()
    with pytest.raises(RuntimeError, match="InferenceTokenizer is for inference"):
        decoder.train()
    with pytest.raises(TypeError, match="InferenceTokenizer, which is for inference alone: load it without dtype"):
        mvar.save(tmp_path / "again.safetensors", decoder)
    with pytest.raises(ValueError, match="encoder: expected False with dtype only"):
        mvar.load_tokenizer(tokenizer_file, encoder=False)  # type: ignore[call-overload]


def test_nothing_stays_mapped(tmp_path: Path) -> None:
    """Also without a run of the garbage collector, and for files with characters that end a line."""
    *_, model_file, tokenizer_file = saved(tmp_path)
    files = [file.rename(tmp_path / f"{file.stem}\n\x85 1.safetensors") for file in (model_file, tokenizer_file)]
    stored = StoredModel(files[0], mvar.from_config)
    assert stored._pages._ranges
    del stored
    gc.disable()
    try:
        loaded = [mvar.load_model(files[0]), mvar.load_model(files[0], dtype=torch.float32)]
        decoders = [mvar.load_tokenizer(files[1]), mvar.load_tokenizer(files[1], dtype=torch.float32)]
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    assert loaded and decoders


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": torch.float64}, "dtype: expected one of"),
        ({"labels": [1]}, "labels: expected with dtype only"),
        ({"dtype": torch.float32, "labels": []}, "labels: expected a non-empty"),
        ({"dtype": torch.float32, "labels": [11]}, "labels: expected classes from 0 to 10, got 11 to 11"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    *_, model_file, tokenizer_file = saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        mvar.load_model(model_file, **wrong)
    if "labels" not in wrong:
        with pytest.raises(ValueError, match=message):
            mvar.load_tokenizer(tokenizer_file, **wrong)


def test_damaged_block_is_named(tmp_path: Path) -> None:
    model, _, model_file, _ = saved(tmp_path)
    with torch.no_grad():
        model.blocks[1].ffn.fc2.weight[0, 0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(mvar.CheckpointError, match=r"model.pth: blocks.1.ffn.fc2.weight: not all values are finite"):
        mvar.load_model(tmp_path / "model.pth", dtype=torch.float32)
    state = mvar.load_model(model_file).state_dict()
    state["blocks.1.attn.patch_nums"][0] = 9
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(mvar.CheckpointError, match=r"model.pth: blocks.1.attn.patch_nums: does not follow"):
        mvar.load_model(tmp_path / "model.pth", dtype=torch.float32)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_weights_do_not_depend_on_the_file(suffix: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """The file is memory-mapped while it is read; a later change of it, in place, must not reach the model."""
    model, tokenizer, _, _ = saved(tmp_path)
    file = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save(model.state_dict(), file)
    loaded = mvar.load_model(file, **({} if dtype is None else {"dtype": dtype}))
    file.write_bytes(bytes(file.stat().st_size))
    want = mvar.generate(model, tokenizer, LABELS, dtype=torch.float32)
    assert torch.equal(mvar.generate(loaded, tokenizer, LABELS, dtype=torch.float32).tokens, want.tokens)


def test_fingerprints_of_files(tmp_path: Path) -> None:
    *_, model_file, tokenizer_file = saved(tmp_path, torch.float16)
    assert StoredModel(model_file, mvar.from_config).fingerprint() == fingerprint(mvar.load_model(model_file))
    for maps in (None, (1, 2, 5)):  # with other token maps the statistics in the file are not used
        stored = StoredTokenizer(tokenizer_file, mvar.Tokenizer, patch_nums=maps)
        assert stored.fingerprint() == fingerprint(mvar.load_tokenizer(tokenizer_file, patch_nums=maps))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory(suffix: str, dtype: str, tmp_path: Path) -> None:
    """Loading takes at most 1.25 times the weights in their dtype, with the pages of the float32 file."""
    model, _ = mvar.build(32, num_classes=10, patch_nums=(1, 2, 3), width=192)
    if suffix == "pth":
        torch.save(model.state_dict(), tmp_path / "model.pth")
    else:
        mvar.save(tmp_path / "model.safetensors", model)
    code = f"""
import re, sys, torch, mvar
from pathlib import Path

def held(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

mvar.load_model({str(tmp_path / f"model.{suffix}")!r}, dtype=torch.{dtype})  # for what the first use loads
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
model = mvar.load_model({str(tmp_path / f"model.{suffix}")!r}, dtype=torch.{dtype})
print(held("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    assert int(done.stdout) < 1.25 * weights
