"""Tests saving and loading of weight files, and the errors for invalid files."""

import argparse
import gzip
import io
import json
import pickle
import zipfile
from collections import defaultdict, deque
from datetime import datetime, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mvar
from mvar.cli.main import main
from mvar.inference.prepare import custom_layer_of
from mvar.stored import CLASS_NAMES_KEY, CONFIG_KEY
from mvar.utils.files import atomic_write
from tests.helpers import upstream
from tests.helpers.paths import ROOT

RELEASED = json.loads((ROOT / "tests" / "upstream_case" / "released_checkpoints.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("model", "tokenizer"):
        torch.save(upstream.weights(kind), folder / f"{kind}.pth")
    return folder


def test_published_names_shapes_and_dtypes() -> None:
    """Covers all weights of d16.pth, and q/k norm, which published models have from d24 on."""
    published = {}
    for name, (shape, dtype) in RELEASED["mvar_d16"].items():
        names = [name.replace("blocks.0", f"blocks.{i}") for i in range(16)] if ".0." in name else [name]
        published |= {n: (tuple(shape), dtype) for n in names}
    state = {n: torch.empty(s, dtype=getattr(torch, d), device="meta") for n, (s, d) in published.items()}
    squares = torch.tensor([n * n for n in mvar.SCHEDULES[256]], dtype=torch.int32)
    config = mvar.ModelConfig.from_state_dict(state | {"blocks.0.attn.patch_nums": squares})
    assert config == mvar.ModelConfig(depth=16, patch_nums=mvar.SCHEDULES[256])
    assert config.drop_path == pytest.approx(0.1 * 16 / 24)  # VAR's rule by depth
    with torch.device("meta"):
        ours = {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in mvar.MVAR(config).state_dict().items()}
        normed = mvar.MVAR(mvar.ModelConfig(depth=24, patch_nums=mvar.SCHEDULES[256])).state_dict()
    published.pop("attn_bias_for_masking")  # accepted on loading but not stored, as it follows from the schedule
    assert ours == published
    assert normed["blocks.23.attn.scale_mul_1H11"].shape == (1, 24, 1, 1)


@pytest.mark.parametrize(("depth", "million"), [(12, 198), (16, 464), (20, 900), (24, 1500)])
def test_published_parameter_counts(depth: int, million: int) -> None:
    with torch.device("meta"):
        model = mvar.MVAR(mvar.ModelConfig(depth=depth, patch_nums=mvar.SCHEDULES[256]))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count / million - 1) < 0.08


def test_config_from_state_dict() -> None:
    """All sizes differ from the published model's."""
    sizes = {"depth": 1, "patch_nums": (1, 3), "width": 128, "num_classes": 7, "num_codes": 48, "code_dim": 16}
    mixer = {"bidirectional": True, "state_dim": 32, "expand": 1, "conv_width": 3, "mixer_head_dim": 32}
    config = mvar.ModelConfig(**sizes, **mixer, qk_norm=True, mlp_ratio=2.0)
    assert mvar.ModelConfig.from_state_dict(mvar.MVAR(config).state_dict()) == config


def test_published_state_dict_loads_strictly(files: Path) -> None:
    state = torch.load(files / "model.pth", weights_only=True)
    model = mvar.MVAR(mvar.ModelConfig.from_state_dict(state))
    assert model.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(model.blocks[2].mamba.A_log, state["blocks.2.mamba.A_log"])


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer_config = mvar.TokenizerConfig(
        (1, 2, 3), num_codes=32, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False
    )
    model, tokenizer = mvar.build(
        2, num_classes=5, tokenizer=tokenizer_config, bidirectional=True, drop_path=0.25, width=64
    )
    mvar.save(tmp_path / "model.safetensors", model)
    mvar.save(tmp_path / "tokenizer.safetensors", tokenizer)
    again, images = (
        mvar.load_model(tmp_path / "model.safetensors"),
        mvar.load_tokenizer(tmp_path / "tokenizer.safetensors"),
    )
    assert again.config == model.config and images.config == tokenizer.config
    assert not again.training and not images.training
    assert mvar.load_tokenizer(tmp_path / "tokenizer.safetensors", patch_nums=(1, 3)).patch_nums == (1, 3)
    for first, second in ((model, again), (tokenizer, images)):
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value)
    mvar.save(tmp_path / "half.safetensors", model, dtype=torch.float16)
    half = mvar.load_model(tmp_path / "half.safetensors")
    assert half.head.weight.dtype == torch.float32
    assert torch.equal(half.head.weight, model.head.weight.half().float())
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "tokenizer.safetensors", "half.safetensors"}


def test_tokenizer_at_several_resolutions(files: Path) -> None:
    tokenizer = mvar.load_tokenizer(files / "tokenizer.pth", patch_nums=(1, 2, 4))
    assert tokenizer.patch_nums == (1, 2, 4)
    for resolution, maps in mvar.SCHEDULES.items():
        assert mvar.load_tokenizer(files / "tokenizer.pth", resolution=resolution).patch_nums == maps
    with pytest.raises(mvar.CheckpointError, match="patch_nums: no published schedule has 6 scales"):
        mvar.load_tokenizer(files / "tokenizer.pth")
    with pytest.raises(ValueError, match="resolution: expected one of 256, 512, 1024, got 300"):
        mvar.load_tokenizer(files / "tokenizer.pth", resolution=300)


def test_load_from_hub(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:// paths download the right file and load it; download failures raise an OSError."""
    import huggingface_hub

    asked = []

    def fetched(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(files / "tokenizer.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    mvar.load_tokenizer("hf://owner/repo/folder/vae.pth", patch_nums=upstream.PATCH_NUMS)
    assert asked == [("owner/repo", "folder/vae.pth")]
    with pytest.raises(ValueError, match="expected hf://owner/repository or hf://owner/repository/file"):
        mvar.load_model("hf://owner")

    def offline(repository: str, name: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="hf://owner/repo/model.pth: could not be downloaded: no network"):
        mvar.load_model("hf://owner/repo/model.pth")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('/tmp/mvar_test_pickle_ran', 'w')",)


def test_malicious_pickle_is_rejected(tmp_path: Path) -> None:
    trace = Path("/tmp/mvar_test_pickle_ran")
    trace.unlink(missing_ok=True)
    torch.save({"head.weight": Malicious()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"head.weight": Malicious()}))
    for name in ("zip.pth", "plain.pth"):
        for load in (mvar.load_model, mvar.load_tokenizer):
            with pytest.raises(mvar.CheckpointError, match=f"{name}: not loaded, because it is not only weights"):
                load(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("size", [0, 5, 100, -1000])
def test_truncated_files(files: Path, tmp_path: Path, size: int) -> None:
    mvar.save(tmp_path / "own.safetensors", mvar.load_model(files / "model.pth"))
    for file in (files / "model.pth", tmp_path / "own.safetensors"):
        cut = tmp_path / f"cut{file.suffix}"
        cut.write_bytes(file.read_bytes()[:size])
        with pytest.raises(mvar.CheckpointError, match=f"cut{file.suffix}: .*"):
            mvar.load_model(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.fc1.bias"), "1 weights are missing, the first is 'blocks.1.ffn.fc1.bias'"),
        (
            lambda s: s.pop("word_embed.weight"),
            "not the weights of an M-VAR or VAR model: 'word_embed.weight' is missing",
        ),
        (lambda s: s.update({"extra": torch.zeros(1)}), "1 unknown weights, the first is 'extra'"),
        (lambda s: s.update({"head.bias": torch.zeros(7)}), r"head.bias: expected shape \(512,\), got \(7,\)"),
        (lambda s: s["head.weight"].fill_(torch.nan), "head.weight: not all values are finite"),
        (lambda s: s["blocks.0.attn.patch_nums"].add_(1), "patch_nums: expected squares"),
        (lambda s: s.update({"word_embed.weight": torch.zeros(3)}), "word_embed.weight: expected 2 dimensions"),
        (lambda s: s.update({"head.bias": [1, 2]}), "state dict of names and tensors"),
        (lambda s: s.update({7: torch.zeros(1)}), "state dict of names and tensors"),
        (lambda s: s.update({"head.bias": torch.zeros(512).long()}), "head.bias: expected dense floating-point values"),
        (lambda s: s.update({"head.bias": torch.zeros(512) + 1j}), "head.bias: expected dense floating-point values"),
        (lambda s: s.update({"head.bias": torch.zeros(512).to_sparse()}), "head.bias: expected dense"),
        (lambda s: s.update({"word_embed.weight": torch.zeros(0, 8)}), "no valid configuration of a model"),
        (lambda s: s["lvl_1L"].fill_(99), "lvl_1L: does not follow from the patch numbers"),
        (lambda s: s["blocks.1.attn.patch_nums"].zero_(), "blocks.1.attn.patch_nums: does not follow"),
    ],
)
def test_invalid_weights(files: Path, tmp_path: Path, change: object, message: str) -> None:
    state = torch.load(files / "model.pth", weights_only=True)
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(mvar.CheckpointError, match=message) as raised:
        mvar.load_model(tmp_path / "changed.pth")
    assert str(raised.value).startswith(str(tmp_path / "changed.pth")) and "\n" not in str(raised.value)


def wrapped(kind: str, state: dict[str, torch.Tensor]) -> dict[str, object]:
    """A state dict inside a checkpoint as other programs save it."""
    in_front = {
        "ddp": "module.",
        "compiled": "_orig_mod.",
        "ddp compiled": "module._orig_mod.",
        "compiled ddp": "_orig_mod.module.",
        "lightning": "model.",
    }
    named = {in_front.get(kind, "module._orig_mod.") + name: t for name, t in state.items()}
    blocks = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in state.items()}
    other = {name: torch.zeros_like(t) for name, t in state.items()}
    kinds: dict[str, dict[str, object]] = {
        "lightning": {"epoch": 1, "state_dict": {**named, "loss.weight": torch.zeros(1)}, "callbacks": {"best": 0.5}},
        "model": {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "step": 7},
        "state_dict": {"state_dict": named},
        "ema": {"ema": state, "model": other},
        "model and ema": {"model": other, "model_ema": {"decay": 0.99, "module": named}},
        "names of ema": {**{f"model.{n}": t for n, t in other.items()}, **{f"ema.{n}": t for n, t in state.items()}},
        "trainer": {"trainer": {"var_wo_ddp": named, "config": {"lr": 0.1}}},
        "params": {"params": {"model": named}},
        "namespace": {"args": argparse.Namespace(depth=1, data=Path("images")), "model": state},
        "values": {"best": np.float64(1.5), "step": np.int64(3), "rng": np.random.get_state(), "model": state},
        "records": {"at": datetime(2026, 1, 2), "log": defaultdict(list, a=[1]), "seen": slice(3), "model": state},
        "empty": {"a": np.empty(0), "b": b"", "c": frozenset(), "d": deque([1]), "e": range(3), "model": state},
        "library": {"at": time(1), "id": UUID(int=1), "of": Decimal(1), "on": torch.__version__, "model": state},
        "moments": {"optimizer": {"exp_avg": other, "ema": other}, "exp_avg_sq": other, "model": state},
        "averaged": {"n_averaged": torch.tensor(3), **{f"module.{name}": t for name, t in state.items()}},
        "a block alone": blocks,  # type: ignore[dict-item]
    }
    return kinds.get(kind, dict(named))


KINDS = (
    "ddp, compiled, ddp compiled, compiled ddp, lightning, model, state_dict, ema, model and ema, names of ema, "
    "trainer, params, namespace, values, records, empty, library, moments, averaged, a block alone"
)


@pytest.fixture(scope="module")
def tiny() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of a small model and tokenizer."""
    sizes = mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)
    model, tokenizer = mvar.build(1, num_classes=2, tokenizer=sizes)
    return {"model": dict(model.state_dict()), "tokenizer": dict(tokenizer.state_dict())}


@pytest.mark.parametrize("kind", KINDS.split(", "))
def test_nested_state_dict(kind: str, tiny: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    loaders = {"model": mvar.load_model, "tokenizer": partial(mvar.load_tokenizer, patch_nums=(1, 2))}
    for name, load in loaders.items():
        torch.save(wrapped(kind, tiny[name]), tmp_path / "wrapped.pth")
        values = load(tmp_path / "wrapped.pth").state_dict()  # type: ignore[operator]
        assert all(torch.equal(values[n], t) for n, t in tiny[name].items())


def test_prefixes_in_safetensors(tiny: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    state = tiny["model"]
    save_file({f"module.{name}": t for name, t in state.items()}, tmp_path / "m.safetensors")
    assert torch.equal(mvar.load_model(tmp_path / "m.safetensors").head.weight, state["head.weight"])
    torch.save({"module.head.bias": state["head.bias"], **state}, tmp_path / "twice.pth")
    with pytest.raises(mvar.CheckpointError, match="twice.pth: two weights are named 'head.bias'"):
        mvar.load_model(tmp_path / "twice.pth")


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
            "a Git LFS pointer, not the weights",
        ),
        (b"\n <!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page, not the weights"),
        (b"\xef\xbb\xbf<!-- saved --><html></html>", "an HTML page, not the weights"),
        (b"\xef\xbb\xbf[]", "JSON, not weights"),
        (b"w.pth".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 2000, "a tar archive: unpack it first"),
        (b"\0" * 5000, "truncated, corrupted or not weights: (a format that cannot|.*header)"),
        (gzip.compress(b"x" * 100), "compressed by gzip: unpack it first"),
        (b'{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "an index of 2 files"),
        (b'{"x":  [{"depth": 16}]}', "JSON, not weights"),
        (zipped(b"hello"), "a zip archive of readme.txt without weights"),
        (b"Entry not found", "truncated, corrupted or not weights|not only weights, or corrupted"),
    ],
    ids=[
        "empty",
        "lfs",
        "html",
        "html comment",
        "json with bom",
        "tar",
        "zeros",
        "gzip",
        "index",
        "json",
        "zip",
        "text",
    ],  # explicit, as gzip and zip contents contain a timestamp
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_file_without_weights(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for load in (mvar.load_model, mvar.load_tokenizer):
        with pytest.raises(mvar.CheckpointError, match=f"{name}: (not loaded, because it is )?({message})") as raised:
            load(tmp_path / name)
        assert "\n" not in str(raised.value)
    for path, said in ((tmp_path, "a folder without model.safetensors"), ("/dev/null", "not a regular file")):
        with pytest.raises(FileNotFoundError, match=said):
            mvar.load_model(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_weights_in_other_dtypes(dtype: torch.dtype, tiny: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tiny["model"].items()}
    torch.save(stored, tmp_path / "m.pth")
    save_file(stored, tmp_path / "m.safetensors")
    for name in ("m.pth", "m.safetensors"):
        model = mvar.load_model(tmp_path / name)
        assert model.head.weight.dtype == torch.float32
        assert torch.equal(model.head.weight, stored["head.weight"].float())
    stored["head.bias"][:1] = torch.nan
    torch.save(stored, tmp_path / "nan.pth")
    with pytest.raises(mvar.CheckpointError, match="head.bias: not all values are finite"):
        mvar.load_model(tmp_path / "nan.pth")


def test_class_names_are_saved(tmp_path: Path) -> None:
    sizes = mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,))
    model, tokenizer = mvar.build(1, num_classes=2, tokenizer=sizes)
    assert model.class_names is None
    mvar.save(tmp_path / "without.safetensors", model)
    assert mvar.load_model(tmp_path / "without.safetensors").class_names is None
    model.class_names = ("cat", "Käfer")
    mvar.save(tmp_path / "m.safetensors", model)
    main(["convert", f"{tmp_path}/m.safetensors", f"{tmp_path}/again.safetensors"])
    assert mvar.load_model(tmp_path / "again.safetensors").class_names == ("cat", "Käfer")
    mvar.generate(model, tokenizer, [1], dtype=torch.float32)
    assert custom_layer_of(model) is None
    for unusable in (("cat",), "ab", (1, 2), {0: "cat", 1: "dog"}):
        model.class_names = unusable  # type: ignore[assignment]
        with pytest.raises(ValueError, match="class_names: expected a list or tuple of 2 names"):
            mvar.save(tmp_path / "m.safetensors", model)
    assert mvar.load_model(tmp_path / "m.safetensors").class_names == ("cat", "Käfer")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={CLASS_NAMES_KEY: "["})
    with pytest.raises(mvar.CheckpointError):
        mvar.load_model(tmp_path / "odd.safetensors")


def test_wrong_kind_of_file(files: Path, tmp_path: Path) -> None:
    sizes = mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,))
    for name, module in zip(("m", "t"), mvar.build(1, num_classes=2, tokenizer=sizes), strict=True):
        mvar.save(tmp_path / f"{name}.safetensors", module)
    with pytest.raises(mvar.CheckpointError, match="no valid configuration of a model: it is the file of a tokenizer"):
        mvar.load_model(tmp_path / "t.safetensors")
    with pytest.raises(mvar.CheckpointError, match="no valid configuration of a tokenizer: it is the file of a model"):
        mvar.load_tokenizer(tmp_path / "m.safetensors")
    with pytest.raises(mvar.CheckpointError, match="not the weights of an M-VAR or VAR model"):
        mvar.load_model(files / "tokenizer.pth")
    with pytest.raises(mvar.CheckpointError, match="not the weights of a tokenizer"):
        mvar.load_tokenizer(files / "model.pth", patch_nums=(1, 2))
    with pytest.raises(FileNotFoundError, match="absent.pth: no such file"):
        mvar.load_model("absent.pth")


def test_random_corruption(files: Path, tmp_path: Path) -> None:
    content, generator = (files / "tokenizer.pth").read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(20):
        spoilt = bytearray(content)
        for place in torch.randint(0, 4000, (8,), generator=generator).tolist():
            spoilt[place] ^= 0xFF
        (tmp_path / "spoilt.pth").write_bytes(spoilt)
        with pytest.raises(mvar.CheckpointError, match="spoilt.pth: "):
            mvar.load_tokenizer(tmp_path / "spoilt.pth", patch_nums=upstream.PATCH_NUMS)


def test_invalid_stored_config(tmp_path: Path) -> None:
    for stored, message in (
        ("{", "invalid JSON"),
        ("[1]", "expected a dict"),
        ('{"depth": 1, "patch_nums": [1], "num_codes": 1e30}', "num"),
        ('{"depth": 0, "patch_nums": [1]}', "depth"),
        ('{"deep": 1}', "deep"),
    ):
        save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={CONFIG_KEY: stored})
        with pytest.raises(mvar.CheckpointError, match=message):
            mvar.load_model(tmp_path / "odd.safetensors")


def test_atomic_write(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    target.unlink()
    target.touch()
    before = target.stat()  # default mode of a new file
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode == before.st_mode
    assert target.stat().st_ino != before.st_ino  # renamed, not copied
    with pytest.raises(OSError, match="cannot write /proc/"):
        with atomic_write("/proc/mvar/file.txt"):
            pass


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"width": 100}, "width: expected a multiple of 64"),
        ({"patch_nums": (1, 3, 2)}, "patch_nums: expected increasing"),
        ({"patch_nums": ()}, "patch_nums"),
        ({"label_drop": 1.0}, "label_drop"),
        ({"mixer_head_dim": 48}, "mixer_head_dim: expected a divisor"),
    ],
)
def test_invalid_sizes(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mvar.ModelConfig(**({"depth": 2, "patch_nums": (1, 2)} | sizes))  # type: ignore[arg-type]
