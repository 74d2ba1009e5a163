"""Tests of `mvar tokenize` and `TokenStore`: contents, interruption, full disks and damaged files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mvar
from mvar.cli.main import main
from mvar.data import ImageFolder, TokenStore, TokenStoreError
from mvar.data.encode import write_tokens
from mvar.data.tokens import fingerprint
from mvar.models.tokenizer import Tokenizer, TokenizerConfig
from tests.data.test_order_and_folder import assert_same, joined, spoil
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT

SMALL = TokenizerConfig(
    patch_nums=(1, 2, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False
)
SHARD = 4
IMAGES = {"a": 9, "b": 13}  # six files of four images, the last one smaller
CROPS = 3
SEED = 5


def small_tokenizer(seed: int = 0, **changes: Any) -> Tokenizer:
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig(**(vars(SMALL) | changes))).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer


def write(folder: ImageFolder, out: Path, tokenizer: Tokenizer | None = None, **options: Any) -> int:
    given = {"crops": CROPS, "seed": SEED, "batch": 7, "shard": SHARD} | options
    return write_tokens(folder, tokenizer or small_tokenizer(), out, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    path = write_images(tmp_path_factory.mktemp("images") / "train", IMAGES)
    return ImageFolder(path, SMALL.patch_nums[-1] * 2, flip=True)


@pytest.fixture(scope="module")
def reference(folder: ImageFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token store that an uninterrupted run of one process writes."""
    out = tmp_path_factory.mktemp("tokens") / "train"
    assert write(folder, out) == 6
    return out


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    for name, content in contents(reference).items():
        (tmp_path / "train" / name).write_bytes(content)
    return tmp_path / "train"


def shard(folder: Path, number: int) -> Path:
    return next(folder.glob(f"{number:05d}-*.npy"))


# Contents


def test_crops_match_epochs_of_image_folder(folder: ImageFolder, reference: Path) -> None:
    """Over `CROPS` epochs, the store yields every crop of every item once, as the encoder's tokens."""
    tokenizer, store = small_tokenizer(), TokenStore(reference)
    expected: dict[bytes, set[bytes]] = {}
    for epoch in range(CROPS):
        for batch in folder.batches(batch=22, seed=SEED, epoch=epoch):
            assert batch.images is not None
            tokens = tokenizer.encode(batch.images)
            for row, label in zip(tokens, batch.labels, strict=True):
                expected.setdefault(label.numpy().tobytes(), set()).add(row.numpy().tobytes())
    actual_tokens: dict[bytes, set[bytes]] = {}
    first = []
    for epoch in range(7, 7 + CROPS):
        (batch,) = store.batches(batch=22, seed=1, epoch=epoch)
        assert batch.images is None and batch.tokens is not None and batch.tokens.dtype == torch.int64
        for row, label in zip(batch.tokens, batch.labels, strict=True):
            actual_tokens.setdefault(label.numpy().tobytes(), set()).add(row.numpy().tobytes())
        first.append(batch.tokens)
    assert actual_tokens == expected
    assert store.classes == folder.classes and store.num_classes == 2 and len(store) == 22
    assert store.digest() == folder.digest()
    assert sum(len(rows) for rows in actual_tokens.values()) > 60  # of 66: few crops of noise have the same tokens


def test_validation_uses_center_crop(folder: ImageFolder, tmp_path: Path) -> None:
    write(folder, tmp_path, crops=None)
    stored, images = next(TokenStore(tmp_path).once(batch=22)), next(folder.once(batch=22))
    assert stored.tokens is not None and images.images is not None
    assert torch.equal(stored.tokens, small_tokenizer().encode(images.images))
    assert torch.equal(stored.labels, images.labels)


def test_batches_do_not_depend_on_ranks_workers_and_start(reference: Path) -> None:
    store, run = TokenStore(reference), {"seed": 2, "epoch": 1}
    batches = list(store.batches(batch=6, **run))
    assert_same(batches, joined([store.batches(batch=3, rank=r, world_size=2, workers=r, **run) for r in range(2)]))
    assert_same(batches[2:], list(store.batches(batch=6, start=2, workers=1, **run)))
    assert_same(list(store.once(batch=6)), joined([store.once(batch=3, rank=r, world_size=2) for r in range(2)]))


def test_two_processes_match_single_process(folder: ImageFolder, reference: Path, tmp_path: Path) -> None:
    assert write(folder, tmp_path, rank=1, world_size=2, workers=1) == 3
    assert len(contents(tmp_path)) == 3  # the manifest is written by rank 0
    assert write(folder, tmp_path, rank=0, world_size=2) == 3
    assert contents(tmp_path) == contents(reference)
    assert write(folder, tmp_path) == 0


def test_replacement_image_keeps_its_class(tmp_path: Path) -> None:
    folder = ImageFolder(write_images(tmp_path / "train", {"a": 60, "b": 60}), 8)
    name = spoil(folder, 20)
    write(folder, tmp_path / "tokens", crops=None, shard=50)
    stored, read = next(TokenStore(tmp_path / "tokens").once(batch=120)), next(folder.once(batch=120))
    assert torch.equal(stored.labels, read.labels) and list(folder.unreadable) == [name]


def test_manifest_records_bfloat16(folder: ImageFolder, reference: Path, tmp_path: Path) -> None:
    write(folder, tmp_path, dtype=torch.bfloat16)
    actual, exact = (next(TokenStore(path).once(batch=22)).tokens for path in (tmp_path, reference))
    assert actual is not None and exact is not None and 0.5 < (actual == exact).float().mean() < 1
    assert json.loads((tmp_path / "manifest.json").read_text())["dtype"] == "bfloat16"


# Interruption

STOP_IN_ENCODE = """
import sys, time
from pathlib import Path
from tests.data.test_tokens import ImageFolder, small_tokenizer, write

out, files, workers = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tokenizer = small_tokenizer()
encode = tokenizer.encode
calls = 0
def stopping(images):
    global calls
    calls += 1
    if calls > 2 * files + 1:  # two batches a file: in the middle of the next one
        time.sleep(600)
    return encode(images)
tokenizer.encode = stopping
write(ImageFolder(sys.argv[1], 8, flip=True), out, tokenizer, workers=workers)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("files", "workers"), [(1, 0), (3, 1)])
def test_resume_after_sigkill(folder: ImageFolder, reference: Path, tmp_path: Path, files: int, workers: int) -> None:
    arguments = [sys.executable, "-c", STOP_IN_ENCODE, str(folder.path), str(tmp_path), str(files), str(workers)]
    process = subprocess.Popen(arguments, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("0*.npy"))) < files:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_ino for path in tmp_path.glob("0*.npy")}
    with pytest.raises(TokenStoreError, match=f"incomplete: {6 - files} of 6 files are missing"):
        TokenStore(tmp_path)
    (tmp_path / f".{5:05d}-0123.npy.tmp.npy").write_bytes(b"half")  # as left by SIGKILL during a write
    assert write(folder, tmp_path) == 6 - files
    assert contents(tmp_path) == contents(reference)
    assert all(path.stat().st_ino == inode for path, inode in finished.items())


def test_resume_after_full_disk(
    folder: ImageFolder, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def on_a_small_disk(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        with path.open("wb") as stream:
            return stream.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", on_a_small_disk)
        with pytest.raises(
            OSError, match=r"cannot write .*00002-.*: No space left on device; the same command resumes"
        ):
            write(folder, tmp_path)
    remaining = contents(tmp_path)
    assert len(remaining) == 3 and remaining.items() < contents(reference).items()
    assert write(folder, tmp_path) == 4
    assert contents(tmp_path) == contents(reference)


# Damage


def test_flipped_bit_is_detected_and_repaired(
    folder: ImageFolder, reference: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TokenStore(copy).verify()
    path = shard(copy, 3)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokenStoreError, match=f"1 files are damaged; .*{path.name}: damaged"):
        TokenStore(copy).verify()
    assert write(folder, copy) == 1 and path.name in caplog.text
    assert contents(copy) == contents(reference)


@pytest.mark.parametrize("kept", [0, 50, 300])
def test_truncated_file_raises_when_opened(copy: Path, kept: int) -> None:
    path = shard(copy, 2)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TokenStoreError, match=f"{path.name}: truncated or damaged"):
        TokenStore(copy)


def test_swapped_files_are_rejected(copy: Path, folder: ImageFolder, reference: Path) -> None:
    path = shard(copy, 5)
    path.write_bytes(shard(copy, 0).read_bytes())
    with pytest.raises(TokenStoreError, match=f"{path.name}: expected 2 records"):
        TokenStore(copy)
    shard(copy, 0).rename(copy / f"00005-{'0' * 16}.npy")
    with pytest.raises(TokenStoreError, match=f"incomplete|{path.name} .*differ"):
        TokenStore(copy)
    assert write(folder, copy) == 2 and contents(copy) == contents(reference)


def test_missing_or_invalid_manifest(copy: Path) -> None:
    with pytest.raises(TokenStoreError, match="no manifest.json there; give one of its parts: train"):
        TokenStore(copy.parent)
    manifest = copy / "manifest.json"
    stored = json.loads(manifest.read_text())
    for content, message in [
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        (json.dumps(stored | {"format": 1}), "expected format 2, got 1"),
        (json.dumps(stored | {"extra": 2}), "missing or unknown: extra"),
    ]:
        manifest.write_text(content)
        with pytest.raises(TokenStoreError, match=message):
            TokenStore(copy)
    manifest.unlink()
    with pytest.raises(TokenStoreError, match="no manifest.json there; `mvar tokenize` writes one"):
        TokenStore(copy)


# Mismatched tokenizers and settings


def test_tokens_of_another_tokenizer_are_rejected(reference: Path) -> None:
    store = TokenStore(reference)
    store.check(small_tokenizer())
    for other, message in [
        (small_tokenizer(patch_nums=(1, 3, 4)), r"expected patch_nums \(1, 3, 4\), got \(1, 2, 4\)"),
        (small_tokenizer(num_codes=32), "expected num_codes 32, got 64"),
        (small_tokenizer(ch_mult=(1, 1, 1)), "expected resolution 16, got 8"),
        (small_tokenizer(seed=1), "expected weights"),
    ]:
        with pytest.raises(TokenStoreError, match=f"tokens of another tokenizer: {message}"):
            store.check(other)


def test_fingerprint_covers_encoder_weights_only() -> None:
    tokenizer = small_tokenizer()
    before = fingerprint(tokenizer)
    with torch.no_grad():
        tokenizer.quantize.ema_vocab_hit_SV.add_(1)
        for decoding in (tokenizer.decoder, tokenizer.post_quant_conv):
            for p in decoding.parameters():
                p.add_(1)
        assert fingerprint(tokenizer) == before
        deciding = (tokenizer.encoder.conv_in, tokenizer.quant_conv, tokenizer.quantize.quant_resi.qresi_ls[0])
        for weight in (*(module.weight for module in deciding), tokenizer.quantize.embedding.weight):
            weight.view(-1)[0].add_(1e-3)
            assert fingerprint(tokenizer) != before
            before = fingerprint(tokenizer)


def test_different_settings_in_the_same_folder_are_rejected(folder: ImageFolder, copy: Path) -> None:
    before = contents(copy)
    for options, message in [
        ({"seed": 6}, "seed 5, not 6"),
        ({"crops": 2}, "crops 3, not 2"),
        ({"crops": None}, "crops 3, not 1; augmented True, not False"),
        ({"tokenizer": small_tokenizer(seed=1)}, "tokenizer .*, not"),
    ]:
        with pytest.raises(TokenStoreError, match=f"has tokens with other settings: {message}"):
            write(folder, copy, **options)
    assert contents(copy) == before


def test_maximum_number_of_codes(folder: ImageFolder, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(num_codes=65536)
    write(folder, tmp_path, tokenizer, crops=None)
    stored, images = next(TokenStore(tmp_path).once(batch=22)), next(folder.once(batch=22))
    assert stored.tokens is not None and images.images is not None and stored.tokens.max() > 2**15
    assert torch.equal(stored.tokens, tokenizer.encode(images.images))
    with pytest.raises(ValueError, match="expected at most 65536 codes"):
        write(folder, tmp_path, small_tokenizer(num_codes=65537))


# The command


def test_tokenize_writes_train_and_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, counts in (("train", {"a": 5, "b": 4}), ("val", {"b": 3})):
        write_images(tmp_path / "data" / part, counts)
    (tmp_path / "data" / "train" / ".ipynb_checkpoints").mkdir()  # ignored, not a class
    mvar.save(tmp_path / "tokenizer.safetensors", small_tokenizer())
    arguments = ["tokenize", "--data_path", f"{tmp_path}/data", "--tokenizer", f"{tmp_path}/tokenizer.safetensors"]
    arguments += ["--out", f"{tmp_path}/tokens", "--hflip", "--workers", "0", "--device", "cpu"]
    arguments += ["--mid_reso", "1.5", "--dtype", "bf16", "--seed", "3"]
    for rank in (1, 0):  # as set by torchrun
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        main([*arguments, "--crops", "2"])
    out = capsys.readouterr().out
    assert "train (process 1 of 2): 9 images of 2 classes, 0 files written" in out
    assert (
        "train (process 0 of 2): 9 images of 2 classes, 1 files written, 0 unreadable images, 1 skipped such as .ip"
        in out
    )
    train, val = (TokenStore(tmp_path / "tokens" / part) for part in ("train", "val"))
    assert (len(train), train.manifest.crops, train.manifest.flip, train.manifest.augmented) == (9, 2, True, True)
    assert (len(val), val.manifest.crops, val.manifest.flip, val.manifest.augmented) == (3, 1, False, False)
    for manifest in (train.manifest, val.manifest):
        assert (manifest.mid_side, manifest.dtype, manifest.seed) == (12, "bfloat16", 3)
    assert val.classes == train.classes and next(val.once(batch=3)).labels.tolist() == [1, 1, 1]

    for extra, message in [
        (["--crops", "0"], "crops: expected at least 1"),
        (["--crops", "3"], "crops 2, not 3"),
        (["--patch_nums", "1", "3", "4"], "patch_nums (1, 2, 4), not (1, 3, 4)"),
        (["--resolution", "128"], "resolution: expected one of"),
        (["--seed", "-1"], "seed: expected a whole number from 0"),
        (["--mid_reso", "0.5"], "mid_resolution: expected"),
    ]:
        with pytest.raises(SystemExit) as exit:
            main([*arguments, *extra])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error and error.count("\n") == 1
