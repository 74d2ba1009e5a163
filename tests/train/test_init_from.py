"""Tests of fine-tuning (--init_from): classes by name, interpolated positions, flags, resumption."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import mvar
from mvar.checkpoint import save_published
from mvar.cli.main import main
from mvar.train.distributed import TrainContext
from mvar.train.flags import Flags, add_arguments, parse_flags
from mvar.train.init_from import adapt, read_origin
from mvar.train.run_flags import with_architecture
from tests.helpers import training
from tests.helpers.images import write_images

MAPS = (1, 2, 3, 4)
CONTEXT = TrainContext(0, 1, torch.device("cpu"))
KINDS: dict[str, dict[str, Any]] = {
    "mvar": {},
    "bidirectional": {"bidirectional": True},
    "var": {"architecture": "var"},
    "shared": {"architecture": "var", "shared_adaln": True},
}


def small(seed: int = 0, names: str | None = None, **sizes: Any) -> mvar.Model:
    """A model with random weights; a name is one letter."""
    count = 3 if names is None else len(names)
    config = mvar.ModelConfig(
        **{"depth": 1, "patch_nums": MAPS, "num_classes": count, "num_codes": 16, "code_dim": 8, "state_dim": 16}
        | sizes
    )
    model = mvar.init_weights(mvar.from_config(config), hd=1.0, alng=1.0, seed=seed)
    model.class_names = None if names is None else tuple(names)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_same_classes_and_maps_copy_all_weights(kind: str) -> None:
    source, target = small(0, **KINDS[kind]), small(1, **KINDS[kind])
    line = adapt(target, source)
    assert line == (
        "3 of 3 classes kept (by number, as there are no names to compare); "
        "positions of 4 scales kept, of 0 interpolated"
    )
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("names", "wanted", "sizes", "rows", "said"),
    [
        ("abc", "abc", {}, [0, 1, 2], "3 of 3 classes kept (by name);"),
        ("abc", "cxa", {}, [2, 3, 0], "2 of 3 classes kept (by name), 1 begun from the unconditional class;"),
        ("abc", "dbefg", {}, [3, 1, 3, 3, 3], "1 of 5 classes kept (by name), 4 begun from the unconditional class;"),
        ("aba", "ab", {}, [3, 1], "1 of 2 classes kept (by name), 1 begun"),
        (None, "xyz", {}, [0, 1, 2], "3 of 3 classes kept (by number, as there are no names to compare);"),
        ("abc", None, {}, [0, 1, 2], "3 of 3 classes kept (by number"),
        (None, "xy", {}, [3, 3], "0 of 2 classes kept (as there are no names to compare and the file has 3), 2 begun"),
        ("abc", None, {"num_classes": 4}, [3] * 4, "0 of 4 classes kept (as there are no names"),
    ],
)
def test_class_embeddings(
    names: str | None, wanted: str | None, sizes: dict[str, int], rows: list[int], said: str
) -> None:
    source, target = small(0, names), small(1, wanted, **sizes)
    assert adapt(target, source).startswith(said)
    assert torch.equal(target.class_emb.weight, source.class_emb.weight[[*rows, 3]])
    assert target.class_names == (None if wanted is None else tuple(wanted))
    for name, value in target.state_dict().items():
        assert name == "class_emb.weight" or torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["mvar", "var"])
def test_other_token_maps(kind: str) -> None:
    """Positions that are quadratic in row and column stay so away from the border, where no tap is missing.

    Cubic convolution reproduces polynomials of degree 2 (Keys, 1981), linear interpolation only of degree 1.
    """
    source, target = small(patch_nums=(2, 3, 8), **KINDS[kind]), small(1, patch_nums=(2, 4, 16), **KINDS[kind])
    channel = torch.arange(64.0)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    with torch.no_grad():
        grid = row[..., None] * channel + column[..., None] ** 2 * (3 - channel) + 1
        source.pos_1LC[0, -64:] = grid.flatten(0, 1)
    assert adapt(target, source).endswith("; positions of 1 scales kept, of 2 interpolated")
    assert torch.equal(target.pos_1LC[:, :4], source.pos_1LC[:, :4])
    assert torch.equal(target.pos_start, source.pos_start)
    assert torch.equal(target.lvl_embed.weight, source.lvl_embed.weight)
    assert target.lvl_1L.flatten().unique_consecutive(return_counts=True)[1].tolist() == [4, 16, 256]

    inner = target.pos_1LC[0, -256:].view(16, 16, 64)[4:-4, 4:-4]
    at = (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5
    row, column = torch.meshgrid(at, at, indexing="ij")
    expected = row[..., None] * channel + column[..., None] ** 2 * (3 - channel) + 1
    # Two sums of four products, of numbers up to 7 · 63 + 49 · 60: 8 · 2⁻²⁴ · 3400 = 1.6·10⁻³.
    torch.testing.assert_close(inner, expected, rtol=0, atol=1.6e-3)
    logits = target.eval()(torch.tensor([0]), torch.randn(1, 272, 8))
    assert bool(logits.isfinite().all())


def test_other_number_of_scales() -> None:
    source, target = small(patch_nums=(1, 2, 4)), small(1, patch_nums=(2, 3, 4, 5, 6))
    assert adapt(target, source).endswith("; positions of 0 scales kept, of 5 interpolated")
    assert torch.equal(target.lvl_embed.weight, source.lvl_embed.weight[[0, 0, 1, 2, 2]])
    assert torch.equal(target.pos_start, source.pos_start.expand(1, 4, 64))  # of the 1×1 map
    assert torch.equal(target.pos_1LC[:, :13], source.pos_1LC[:, :1].expand(1, 13, 64))
    assert adapt(small(patch_nums=(1,)), source).endswith("; positions of 1 scales kept, of 0 interpolated")


def parsed(*arguments: str) -> Flags:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parse_flags(parser.parse_args(arguments))


def test_architecture_is_that_of_the_file(tmp_path: Path) -> None:
    """Also over a preset; what the flags cannot say, as the width of the feed-forward network, is kept."""
    source = small(depth=2, width=64, state_dim=64, architecture="var", mlp_ratio=2.0)
    save_published(tmp_path / "var.pth", source)
    flags = parsed("--preset=d24", f"--init_from={tmp_path}/var.pth", f"--out={tmp_path}", "--depth=2")
    assert (flags.depth, flags.arch, flags.anorm, flags.ep) == (2, None, None, 350)
    origin = read_origin(flags, CONTEXT)
    assert origin is not None and origin.config == source.config and origin.model is not None
    found = with_architecture(flags, origin.config, origin.path)
    assert (found.depth, found.width, found.arch, found.anorm, found.saln) == (2, 64, "var", True, False)
    source.save_pretrained(tmp_path / "folder")
    of_folder = read_origin(parsed(f"--init_from={tmp_path}/folder", f"--out={tmp_path}"), CONTEXT)
    assert of_folder is not None and of_folder.config == source.config
    assert parsed("--preset=d24").arch == "mvar" and read_origin(parsed(), CONTEXT) is None
    for given, said in (
        ("--depth=3", "--depth: W has 2, not 3; leave it out"),
        ("--arch=mvar", "--arch: W has var, not mvar"),
        ("--anorm=0", "--anorm: W has 1, not 0"),
        ("--width=128", "--width: W has 64, not 128"),
    ):
        with pytest.raises(ValueError, match=said):
            with_architecture(parsed("--init_from=W", given), source.config, "W")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of almost 0, the result has the weights from which the run starts, and so the averages."""
    monkeypatch.chdir(tmp_path)
    tokenizer = mvar.load_tokenizer(training.TOKENIZER)
    codes = {"num_codes": tokenizer.num_codes, "code_dim": tokenizer.code_dim}
    source = small(names="cat", **codes)
    mvar.save("source.safetensors", source)
    write_images(Path("data/train"), {"a": 2, "b": 2, "t": 2}, size=(32, 32))
    run = ["train", "--data_path=data", f"--tokenizer={training.TOKENIZER}", "--bs=3", "--ep=1", "--samples=0"]
    run += ["--tblr=1e-30", "--average=0.5", "--device=cpu", "--tb=0"]
    tune = [*run, "--init_from=source.safetensors", "--out=tuned"]
    main(tune)
    assert (
        "starts from source.safetensors: 2 of 3 classes kept (by name), 1 begun from the unconditional class; positions"
        in capsys.readouterr().out
    )
    expected = small(1, names="abt", **codes)
    adapt(expected, source)
    tuned = mvar.load_model("tuned/model.safetensors")
    assert tuned.config == source.config and tuned.class_names == ("a", "b", "t")
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-29)  # what was 0 is not quite

    Path("source.safetensors").unlink()
    main(tune)  # resumes without the file
    out = capsys.readouterr().out
    assert "resumed after iteration 2" in out and "starts from" not in out
    assert "source.safetensors is not read, as there is a checkpoint in tuned\n" in out
    main([*run, "--init_from=tuned/checkpoints/00000002", "--out=again"])
    assert "starts from tuned/checkpoints/00000002: 3 of 3 classes kept (by name);" in capsys.readouterr().out

    mvar.save("other.safetensors", small())
    for changed, said in (
        ([*tune, "--depth=2"], "--depth: the run in tuned has 1, not 2; leave it out"),
        (
            [*run, "--depth=1", "--out=tuned"],
            "--init_from: the run in tuned started from source.safetensors; give it again",
        ),
        ([*run, "--init_from=none.pth", "--out=new"], "--init_from: none.pth: no such file"),
        ([*run, "--init_from=other.safetensors", "--out=new"], "--tokenizer: expected num_codes 16, as in other.saf"),
        (["train", "--preset=digits", "--init_from=other.safetensors", "--out=new"], "--tokenizer: expected the"),
    ):
        with pytest.raises(SystemExit):
            main(changed)
        assert said in capsys.readouterr().err
