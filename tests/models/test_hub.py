"""Tests of from_pretrained, save_pretrained and push_to_hub, offline."""

import copy
import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hub_mixin
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import mvar
from mvar.cli.main import main
from mvar.inference.prepare import custom_layer_of
from mvar.models.weights import fingerprint, without_storage

SIZES = mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False, beta=0.5)
FILES = {"model.safetensors", "config.json", "README.md"}


def built(architecture: str = "mvar", **sizes: Any) -> tuple[mvar.Model, mvar.Tokenizer]:
    return mvar.build(2, num_classes=2, tokenizer=SIZES, architecture=architecture, width=64, **sizes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders mvar, var and tokenizer of `save_pretrained`. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("mvar", "var"):
        model, tokenizer = built(name, drop_path=0.25)
        model.class_names = ("cat", "Käfer | \n beetle")
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer", license="mit")
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


def same(module: nn.Module, other: nn.Module) -> bool:
    pairs = zip(module.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(t, u) for (name, t), (other_name, u) in pairs)


@pytest.mark.parametrize("name", ["mvar", "var", "tokenizer"])
def test_folder_round_trip(name: str, saved: Path) -> None:
    model, tokenizer = built(name if name != "tokenizer" else "mvar", drop_path=0.25)
    module = tokenizer if name == "tokenizer" else model
    kinds: dict[str, Any] = {"mvar": mvar.MVAR, "var": mvar.VAR, "tokenizer": mvar.Tokenizer}
    load: Any = mvar.load_tokenizer if name == "tokenizer" else mvar.load_model
    assert {path.name for path in (saved / name).iterdir()} == FILES
    loads = [
        kinds[name].from_pretrained,
        load,
        lambda path: load(str(path)),
        lambda path: load(path / "model.safetensors"),
    ]
    if name != "tokenizer":
        loads.append(mvar.Model.from_pretrained)
    for read in loads:
        again = read(saved / name)
        assert type(again) is kinds[name] and not again.training and isinstance(again, PyTorchModelHubMixin)
        assert again.config == module.config and same(again, module)
        assert getattr(again, "class_names", None) == (None if name == "tokenizer" else ("cat", "Käfer | \n beetle"))


@pytest.mark.parametrize("without", ["config.json", "metadata"])
def test_either_configuration_is_enough(without: str, copied: Path) -> None:
    for name, kind in (("var", mvar.VAR), ("tokenizer", mvar.Tokenizer)):
        expected: Any = kind.from_pretrained(copied / name)
        if without == "config.json":
            (copied / name / without).unlink()
        else:
            weights = copied / name / "model.safetensors"
            save_file(load_file(weights), weights)
            with safe_open(weights, "pt") as content:
                assert not content.metadata()
        again: Any = kind.from_pretrained(copied / name)
        assert again.config == expected.config and same(again, expected)
        assert getattr(again, "class_names", None) == getattr(expected, "class_names", None)


def test_edited_config_takes_precedence(copied: Path) -> None:
    path = copied / "mvar/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_drop": 0.5, "class_names": ["a", "b"]}))
    model = mvar.load_model(copied / "mvar")
    assert (model.config.label_drop, model.class_names) == (0.5, ("a", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "invalid JSON"),
        ("[1]", r"expected a dict, got \[1\]"),
        (b"\xff", "expected JSON in UTF-8"),
        ({"torch_dtype": "float32"}, "unknown key 'torch_dtype'"),
        ({"depth": 0}, "depth: expected a positive whole number, got 0"),
        ({"architecture": "dit"}, "architecture: expected one of mvar, var; got 'dit'"),
        ({"class_names": ["cat"]}, "class names: expected a list of 2 names"),
    ],
)
def test_invalid_config(content: Any, message: str, copied: Path) -> None:
    path = copied / "mvar/config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(mvar.CheckpointError, match=message) as raised:
        mvar.MVAR.from_pretrained(copied / "mvar")
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_wrong_class_or_no_folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name, message in (
        (mvar.MVAR, "var", "config.architecture: expected 'mvar', got 'var'"),
        (mvar.VAR, "mvar", "config.architecture: expected 'var', got 'mvar'"),
        (mvar.Model, "tokenizer", "no valid configuration of a model: it is the file of a tokenizer"),
        (mvar.Tokenizer, "var", "no valid configuration of a tokenizer: it is the file of a model"),
    ):
        with pytest.raises(mvar.CheckpointError, match=message):
            kind.from_pretrained(saved / name)
    for path in (tmp_path / "none", "./none/none", "none"):
        with pytest.raises(FileNotFoundError, match="none: no such folder; expected a folder of save_pretrained, or"):
            mvar.Model.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="a folder without model.safetensors"):
        mvar.load_model(tmp_path)
    with pytest.raises(TypeError, match="strict"):
        mvar.Model.from_pretrained(saved / "mvar", strict=False)

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match="^owner/none: no such folder; hf://owner/none: could not be downloaded: .*"
    ) as raised:
        mvar.Model.from_pretrained("owner/none", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_subclasses_and_options(saved: Path) -> None:
    class Own(mvar.MVAR):
        pass

    assert type(Own.from_pretrained(saved / "mvar")) is Own
    assert mvar.Tokenizer.from_pretrained(saved / "tokenizer", patch_nums=(2,)).patch_nums == (2,)
    assert isinstance(mvar.Model.from_pretrained(saved / "var", map_location=torch.device("cpu")), mvar.VAR)


def test_from_hub(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, Any]] = []

    def fetched(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options.get("revision")))
        path = copied / repository.partition("/")[2] / name
        if not path.exists():
            raise EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    (copied / "var/config.json").unlink()
    assert isinstance(mvar.Model.from_pretrained("owner/var", revision="v1"), mvar.VAR)
    assert asked == [("owner/var", "model.safetensors", "v1"), ("owner/var", "config.json", "v1")]
    assert mvar.load_tokenizer("hf://owner/tokenizer").config == SIZES
    assert mvar.load_model("hf://owner/mvar/model.safetensors").config.architecture == "mvar"
    (copied / "var/model.safetensors").unlink()
    with pytest.raises(OSError, match="hf://owner/var: could not be downloaded: model.safetensors"):
        mvar.load_model("hf://owner/var")


def test_dtype_and_errors_of_save(tmp_path: Path) -> None:
    model = built()[0]
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as content:
        assert content.get_tensor("head.weight").dtype == torch.bfloat16
    assert "saved in bfloat16" in (tmp_path / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="head.weight: not all values are finite"):
        model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="config: expected None"):
        model.save_pretrained(tmp_path, config={})  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_model_card(saved: Path, tmp_path: Path) -> None:
    card = ModelCard.load(saved / "mvar/README.md")
    assert card.data.to_dict() == {
        "library_name": "mvar",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["mvar"],
    }
    model = mvar.Model.from_pretrained(saved / "mvar")
    for fact in (
        "Classes: 2: cat, Käfer | beetle\n",
        "Token maps: 1×1, 2×2, coarse to fine; 5 tokens",
        f"Parameters: {sum(p.numel() for p in model.parameters()):,}, saved in float32",
        "label dropout 0.1, stochastic depth 0.25.",
        "License: not stated",
        "cfg=1.5, top_k=900, top_p=0.96",
    ):
        assert fact in card.text, fact
    card = ModelCard.load(saved / "tokenizer/README.md")
    assert card.data.license == "mit" and "License: mit" in card.text and "Resolution: 2×2" in card.text

    for resolution, maps in mvar.SCHEDULES.items():
        with without_storage():
            text = mvar.VAR(mvar.ModelConfig(1, maps, architecture="var")).generate_model_card().text
        assert (
            f"Resolution: {resolution}×{resolution} with the published tokenizer" in text and "Classes: 1,000\n" in text
        )
    (tmp_path / "README.md").write_text("edited")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "edited"


def test_card_example_runs(saved: Path) -> None:
    card = ModelCard.load(saved / "mvar/README.md").text
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/this/folder", str(saved / "mvar")).replace("…", str(saved / "tokenizer"))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (1, 3, 2, 2)


class MockApi:
    """Records the upload of huggingface_hub's HfApi."""

    uploads: list[dict[str, Any]] = []

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        return type("Url", (), {"repo_id": repo_id, "private": private})

    def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.uploads.append(options | {"files": files, "token": self.token})
        return "https://commit"


def test_push_to_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_mixin, "HfApi", MockApi)
    monkeypatch.setattr(MockApi, "uploads", [])
    model = mvar.Model.from_pretrained(saved / "mvar")
    options = {"dtype": torch.float16, "license": "apache-2.0"}
    assert model.push_to_hub("owner/digits", token="secret", branch="v1", **options) == "https://commit"  # type: ignore[arg-type]
    url = model.save_pretrained(tmp_path / "digits", repo_id="owner/digits", push_to_hub=True, **options)  # type: ignore[arg-type]
    assert url == "https://commit"
    first, second = MockApi.uploads
    for name in ("README.md", "config.json"):  # safetensors does not keep the order of its metadata
        assert first["files"][name] == second["files"][name] == (tmp_path / "digits" / name).read_bytes()
    assert (first["repo_id"], first["revision"], first["token"]) == ("owner/digits", "v1", "secret")
    assert set(first["files"]) == set(second["files"]) == FILES
    card = ModelCard(first["files"]["README.md"].decode())
    assert card.data.license == "apache-2.0" and 'from_pretrained("owner/digits")' in card.text
    assert "saved in float16" in card.text
    for name, content in first["files"].items():
        (tmp_path / name).write_bytes(content)
    assert same(mvar.Model.from_pretrained(tmp_path), model.half().float())

    (tmp_path / "digits" / "README.md").write_text("with results")
    model.save_pretrained(tmp_path / "digits", repo_id="owner/digits", push_to_hub=True)
    assert MockApi.uploads[-1]["files"]["README.md"] == b"with results"


def test_folder_of_the_other_kind_is_kept(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = built()
    for module, other, kind in ((model, tokenizer, "model"), (tokenizer, model, "tokenizer")):
        folder = tmp_path / kind
        module.save_pretrained(folder)
        module.save_pretrained(folder)
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match=f"{kind}: has a {kind}, which would be overwritten"):
            other.save_pretrained(folder)
        assert (folder / "model.safetensors").read_bytes() == before


def test_mixin_adds_no_state(saved: Path, tmp_path: Path) -> None:
    """Copies, pickles, dynamic subclasses and inference copies are those of an ordinary module."""
    model, tokenizer = built()
    for module in (model, tokenizer):
        assert not {name for name in vars(module) if "hub" in name}
        assert module._hub_mixin_config is None
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert fingerprint(again) == fingerprint(module) and again.config == module.config
    assert custom_layer_of(model) is None
    parametrize.register_parametrization(model, "pos_start", nn.Identity())
    assert type(model) is not mvar.MVAR and isinstance(model, mvar.MVAR)
    model.save_pretrained(tmp_path)
    assert fingerprint(mvar.MVAR.from_pretrained(tmp_path)) == fingerprint(mvar.MVAR.from_pretrained(saved / "mvar"))


def test_command_line_reads_folders(saved: Path, tmp_path: Path) -> None:
    weights = ["--weights", str(saved / "mvar"), "--tokenizer", str(saved / "tokenizer")]
    main(["sample", *weights, "--classes", "cat", "--grid", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").exists()
    main(["convert", str(saved / "var"), str(tmp_path / "var.pth")])
    load: Any = partial(torch.load, weights_only=True)
    assert torch.equal(load(tmp_path / "var.pth")["head.weight"], mvar.load_model(saved / "var").head.weight)
