"""Tests of `mvar convert` from VAR's, M-VAR's and our checkpoints into the published format and ours."""

import math
import resource
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

import mvar
from mvar.checkpoint import published_state_dict
from mvar.cli.main import main
from mvar.models.transformer import from_config
from tests.cli.test_cli import fails
from tests.helpers import training, upstream


@pytest.mark.parametrize("name", ["mvar_wo_ddp", "var_wo_ddp"])
def test_convert_public_checkpoint(name: str, tmp_path: Path) -> None:
    """Convert a checkpoint with the layout of trainer.py and train.py of FoundationVision/VAR."""
    weights, codes = upstream.weights("model"), upstream.weights("tokenizer")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    state = {"config": {"patch_nums": (1, 2)}, name: OrderedDict(weights), "vae_local": OrderedDict(codes)}
    arguments = OrderedDict(depth=16, pn="256", tlr=None, cmd="--depth=16")
    content = {"epoch": 3, "iter": 0, "trainer": {**state, name[:-7] + "_opt": {"optimizer": optimizer}}}
    torch.save({**content, "args": arguments}, tmp_path / "ar-ckpt-last.pth")

    main(["convert", f"{tmp_path}/ar-ckpt-last.pth", f"{tmp_path}/model.pth"])
    written = torch.load(tmp_path / "model.pth", weights_only=True)
    assert written.keys() == weights.keys()  # including the derived attention mask
    for key, value in weights.items():
        assert torch.equal(written[key], value) and written[key].dtype == value.dtype, key
    maps = "_".join(str(math.isqrt(n)) for n in weights["blocks.0.attn.patch_nums"].tolist())
    main(
        [
            "convert",
            f"{tmp_path}/ar-ckpt-last.pth",
            f"{tmp_path}/tokenizer.safetensors",
            "--part",
            "tokenizer",
            "--pn",
            maps,
        ]
    )
    tokenizer = mvar.load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert torch.equal(tokenizer.quantize.embedding.weight, codes["quantize.embedding.weight"])


@pytest.mark.slow
def test_convert_own_checkpoint(tmp_path: Path) -> None:
    run = training.trainer(training.flags(tmp_path), items=128)
    run.run()
    newest = run.checkpoints.paths()[0]
    main(["convert", str(newest), f"{tmp_path}/model.pth"])
    main(["convert", str(newest), f"{tmp_path}/model.safetensors", "--dtype", "fp16"])
    weights = run.weights()
    model = mvar.load_model(tmp_path / "model.pth")
    half = mvar.load_model(tmp_path / "model.safetensors")
    assert model.config.depth == 1 and model.config.patch_nums == (1, 2, 3, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
        assert torch.equal(half.state_dict()[name], value.half().float() if value.is_floating_point() else value)


def test_conversion_is_deterministic(tmp_path: Path) -> None:
    model, _ = mvar.build(1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,)))
    mvar.save(tmp_path / "source.safetensors", model)
    for name in ("a.pth", "b.pth"):
        main(["convert", f"{tmp_path}/source.safetensors", f"{tmp_path}/{name}", "--dtype", "fp16"])
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_float16_overflow_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = mvar.build(1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,)))
    with torch.no_grad():
        model.head.bias[1] = 1e5
    mvar.save(tmp_path / "source.safetensors", model)
    for name in ("m.pth", "m.safetensors"):
        error = fails(capsys, "convert", f"{tmp_path}/source.safetensors", f"{tmp_path}/{name}", "--dtype", "fp16")
        assert "head.bias: not all values are finite in float16" in error and not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_full_disk_keeps_existing_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_no_space(state: object, path: Path | BinaryIO, **_: object) -> None:
        with path.open("wb") if isinstance(path, Path) else nullcontext(path) as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    model, _ = mvar.build(1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,)))
    mvar.save(tmp_path / "source.safetensors", model)
    (tmp_path / name).write_text("old")
    monkeypatch.setattr(torch, "save", raise_no_space)
    monkeypatch.setattr("mvar.checkpoint.save_file", raise_no_space)
    with pytest.raises(SystemExit):
        main(["convert", f"{tmp_path}/source.safetensors", f"{tmp_path}/{name}"])
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_file_size_limit_error_names_the_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = mvar.build(1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,)))
    mvar.save(tmp_path / "source.safetensors", model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        error = fails(capsys, "convert", f"{tmp_path}/source.safetensors", f"{tmp_path}/{name}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {tmp_path}/{name}: " in error and "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_published_attention_masks() -> None:
    for architecture in ("mvar", "var"):
        model = mvar.init_weights(from_config(mvar.ModelConfig(depth=1, patch_nums=(1, 2), architecture=architecture)))
        mask = published_state_dict(model)["attn_bias_for_masking"]
        assert torch.equal(published_state_dict(torch.nn.DataParallel(model))["attn_bias_for_masking"], mask)
        assert mask.shape == (1, 1, 5, 5) and mask[0, 0, 0, :2].tolist() == [0.0, -torch.inf]
        assert mask[0, 0, 1, 0] == (0.0 if architecture == "var" else -torch.inf)
        assert not mask[0, 0, 1:, 1:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{out}/x.pt"], "expected a name that ends in .pth or .safetensors"),
        (["{out}", "{out}/x.pth"], "no state.json there; expected a folder in a run's checkpoints/"),
        (["{out}/none.pth", "{out}/x.pth"], "no such file"),
        (["{out}/both.safetensors", "{out}/x.pth"], "no published format"),
        (["{out}/strange.pth", "{out}/x.pth"], "expected a model's state dict"),
    ],
)
def test_bad_use(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bidirectional_model, _ = mvar.build(
        1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,)), bidirectional=True
    )
    mvar.save(tmp_path / "both.safetensors", bidirectional_model)
    torch.save({"trainer": {"config": {}}}, tmp_path / "strange.pth")
    with pytest.raises(SystemExit) as exit:
        main(["convert", *(text.format(run=tmp_path / "both.safetensors", out=tmp_path) for text in arguments)])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
