"""Tests of the training flags: VAR's names and defaults, and one-line errors for invalid use."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mvar.cli.main import main
from mvar.models.config import SCHEDULES
from mvar.train.flags import PRESETS, Flags
from tests.helpers import training

# FoundationVision/VAR, utils/arg_util.py at 78b9539; M-VAR's are the same.
VAR_DEFAULTS = {
    "tfast": 0, "vfast": 0, "depth": 16, "ini": -1, "hd": 0.02, "aln": 0.5, "alng": 1e-5, "fp16": 0, "tblr": 1e-4,
    "twd": 0.05, "twde": 0, "tclip": 2.0, "ls": 0.0, "bs": 768, "ac": 1, "ep": 250, "wp": 0, "wp0": 0.005,
    "wpe": 0.01, "sche": "lin0", "opt": "adamw", "afuse": True, "saln": False, "anorm": True,
    "mid_reso": 1.125, "hflip": False, "workers": 0, "pg": 0.0, "pg0": 4, "pgwp": 0,
    "tf32": True, "seed": None, "exp_name": "text",
}  # fmt: skip


# Other flags of VAR's and M-VAR's parsers, with a value that has no effect here; "" where no such value exists.
OTHER_VAR_FLAGS = {
    "data_path": "x", "pn": "256", "fuse": "1", "patch_size": "16", "same_seed_for_all_ranks": "0",
    "local_debug": "False", "dbg_nan": "False", "local_out_dir_path": "x", "device": "cpu",
    "local-rank": "0", "local_rank": "0",
    "world_size": "1", "dist_url": "env://", "tlr": "", "batch_size": "", "glb_batch_size": "", "patch_nums": "",
    "resos": "", "data_load_reso": "", "tb_log_dir_path": "", "log_txt_path": "", "last_ckpt_path": "", "ngpus": "",
    "nodes": "", "timeout": "", "job_dir": "", "partition": "", "comment": "",
}  # fmt: skip


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Flags:
    """Return the flags that `mvar train` parses from the arguments."""
    parsed: list[Flags] = []
    monkeypatch.setattr("mvar.train.run.train", parsed.append)
    main(["train", *arguments])
    return parsed[0]


def test_defaults_match_var(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = parse(monkeypatch)
    assert {name: getattr(flags, name) for name in VAR_DEFAULTS} == VAR_DEFAULTS


def test_var_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--depth=30 --bs=1024 --ep 350 --tblr=8e-5 --fp16=1 --alng=1e-5 --wpe=0.01 --twde=0.08 --pn=512 --saln=1"
    flags = parse(monkeypatch, *words.split(), "--data_path=/imagenet", "--tf32=false", "--hflip")
    assert (flags.depth, flags.bs, flags.ep, flags.tblr, flags.fp16, flags.twde) == (30, 1024, 350, 8e-5, 1, 0.08)
    assert flags.pn == SCHEDULES[512] and flags.saln and not flags.tf32 and flags.hflip
    assert parse(monkeypatch, "--pn=1_2_4").pn == parse(monkeypatch, "--pn=1-2-4").pn == (1, 2, 4)


@pytest.mark.parametrize("name", OTHER_VAR_FLAGS)
def test_other_var_flags_are_recognized(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if OTHER_VAR_FLAGS[name]:
        parse(monkeypatch, f"--{name}={OTHER_VAR_FLAGS[name]}")
    else:
        with pytest.raises(SystemExit):
            parse(monkeypatch, f"--{name}=7")
        assert f"--{name}=7: not supported: " in capsys.readouterr().err


def test_var_flag_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--opt=AdamW --saln True --anorm=F --tf32=fals --hflip=1 --workers=-1 --ini -1 --tclip=-1 --pn=1_2-3"
    flags = parse(monkeypatch, *words.split(), "--local_out_dir_path=runs", "--local-rank=3", "--pictures=3")
    assert (flags.opt, flags.saln, flags.anorm, flags.tf32, flags.hflip) == ("adamw", True, False, False, True)
    assert (flags.workers, flags.ini, flags.tclip, flags.pn, flags.out) == (0, -1, -1, (1, 2, 3), "runs")
    assert flags.samples == 3
    assert parse(monkeypatch, "--fuse=0").backend == "reference" and parse(monkeypatch, "--fuse=1").backend == "auto"


def test_flags_override_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = parse(monkeypatch, "--preset=d16", "--bs=32")
    assert (flags.depth, flags.ep, flags.fp16, flags.bs, flags.anorm) == (16, 200, 1, 32, False)
    assert PRESETS["d32"]["fsdp"] and parse(monkeypatch, "--preset=d32").recompute
    for preset in PRESETS.values():
        assert preset.keys() <= {item.name for item in fields(Flags)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depht=16"], "unrecognized arguments: --depht=16"),
        (["--dep=16"], "unrecognized arguments: --dep=16"),
        (["--fp16=3"], "--fp16"),
        (["--sche=lin2"], "expected lin0, lin, lin00"),
        (["--pn=1_b"], "expected 256, 512, 1024"),
        (["--tf32=maybe"], "expected 1 or 0"),
        (["--opt=lion"], "invalid choice: 'lion'"),
        (["--same_seed_for_all_ranks=1"], "--same_seed_for_all_ranks=1: not supported: all processes use --seed"),
        (["--local_debug=True"], "--local_debug=True: not supported: --preset=digits"),
        (["--fuse=0", "--backend=cpu"], "--backend: expected reference, with --fuse=0, got cpu"),
        (["--bs=0"], "--bs: expected a whole number of at least 1, got 0"),
        (["--ls=1"], "--ls: expected a number from 0 to below 1"),
        (["--preset=digits", "--tokenizer={tokenizer}", "--pg=0.5", "--pg0=4"], "--pg0: expected a scale from 0 to 3"),
        (["--out=runs"], "give one of --data_path, --tokens and --preset=digits"),
        (["--data_path=x", "--tokenizer=none.pth"], "none.pth: no such file"),
        (["--preset=digits", "--tokenizer={tokenizer}", "--pn=256"], "--pn: the tokenizer's token maps are (1, 2"),
        (["--preset=digits", "--data_path=x"], "--data_path: --preset=digits has its own data"),
        (["--preset=digits", "--tokens=x"], "--tokens: --preset=digits has its own data"),
        (["--device=cuda:77", "--preset=digits"], "--device: 'cuda:77' cannot be used"),
    ],
)  # fmt: skip
def test_bad_use(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("run"))
    with pytest.raises(SystemExit) as exit:
        main(["train", *(text.format(tokenizer=training.TOKENIZER) for text in arguments)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed=9223372036854775808"], "--seed: expected a whole number from 0 to 2⁶³−1, got 9223372036854775808"),
        (["--seed=-1"], "--seed: expected a whole number from 0 to 2⁶³−1, got -1"),
        (["--backend=foo"], "--backend: expected one of auto, reference, cpu, triton, cuda"),
        (["--backend=cuda"], "--backend: "),
        (["--device=mps:9"], "--device: 'mps:9' cannot be used"),
        (["--tokenizer=none.pth"], "--tokenizer: expected the file or folder of a tokenizer, got none.pth: no such"),
        (["--width=100"], "--width: expected a multiple of 64, got 100"),
        (["--state_dim=0"], "--state_dim: expected a positive whole number, got 0"),
        (["--arch=var", "--bidirectional"], "--bidirectional: VAR has no mixer"),
        (["--pn=1_2"], "--pn: expected (1, 2, 3, 4), the token maps of the digits tokenizer, got (1, 2)"),
        (["--pg=0.5", "--pg0=4"], "--pg0: expected a scale from 0 to 3, got 4"),
        (["--fsdp"], "--fsdp: start the run with torchrun"),
        (["--tb"], "--tb=1 requires TensorBoard: pip install 'mvar[train]'"),
        (["--sche=exp", "--wpe=0"], "--wpe: expected a number above 0, with --sche=exp, got 0.0"),
        (["--mid_reso=17"], "--mid_reso: expected a number from 1 to 16, got 17.0"),
        (["--bs=2", "--ac=4"], "--bs: expected at least 4 (--ac times the number of processes), got 2"),
        (["--device=meta"], "--device: 'meta' cannot be used"),
        (["--peak_tflops=0"], "--peak_tflops: expected a number above 0, got 0.0"),
        (["--ini=nan"], "--ini: expected a number, got nan"),
        (["--out=file/run"], "--out: cannot write into file/run: Not a directory"),
        (["--preset=d16"], "give one of --data_path, --tokens and --preset=digits"),
        (["--preset=d16", "--data_path=x", "--tokenizer=file"], "--data_path: expected a folder with train/class/"),
        (["--preset=d16", "--tokens=x", "--tokenizer=file"], "--tokens: expected a folder of `mvar tokenize`, got x/"),
        (["--preset=d16", "--tokens=x", "--tokenizer=file", "--pn=2_1"], "--tokens: "),
    ],
)  # fmt: skip
def test_invalid_flags_create_no_files(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("mvar.train.run._run", lambda *_: pytest.fail("the work has begun"))
    Path("file").touch()
    with pytest.raises(SystemExit) as exit:
        main(["train", "--preset=digits", *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
