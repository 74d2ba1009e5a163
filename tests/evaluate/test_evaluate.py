"""Tests of `mvar evaluate`: reproducible images with any number of interruptions and processes, and the metrics."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar import digits
from mvar.cli import resolve
from mvar.cli.main import main
from mvar.evaluate import frechet_distance, images, precision_recall
from mvar.evaluate.images import Recipe
from mvar.evaluate.inception import FEATURES, LOGITS, WEIGHTS
from mvar.models.weights import fingerprint
from mvar.utils import distributed, files, machine
from mvar.utils.distributed import DistContext
from mvar.utils.images import read_npz, save_npz, to_bytes
from tests.cli.test_cli import fails
from tests.data.test_tokens import small_tokenizer
from tests.helpers.threads import threads

pytestmark = pytest.mark.slow

# 40 images in 14 batches, the last one smaller. In float32, images do not depend on the batch size.
ARGUMENTS = ["evaluate", "--count", "4", "--batch", "3", "--dtype", "fp32", "--device", "cpu", "--seed", "2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(mvar.__file__).parent.parent)}
BATCHES = set(range(0, 40, 3))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    result = subprocess.run([sys.executable, "-m", "mvar", *ARGUMENTS, "--out", folder], env=ENVIRONMENT)
    assert result.returncode == 0
    return folder


def pixels(folder: Path) -> np.ndarray[Any, Any]:
    with np.load(folder / "images.npz") as content:
        assert content["labels"].tolist() == [i % 10 for i in range(40)]
        images: np.ndarray[Any, Any] = content["arr_0"]
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
    return images


def test_images_match_generate(uninterrupted: Path) -> None:
    """The images match `mvar.generate` with the published recipe, and evaluation.json records the recipe."""
    model, tokenizer = digits.pretrained()
    drawn = []
    for start in sorted(BATCHES):
        labels = [i % 10 for i in range(start, min(start + 3, 40))]
        recipe: dict[str, Any] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seed": 2, "dtype": torch.float32}
        out = mvar.generate(model, tokenizer, labels, first_index=start, **recipe)
        drawn.append(to_bytes(out.images).numpy())
    assert np.array_equal(pixels(uninterrupted), np.concatenate(drawn))
    recorded = json.loads((uninterrupted / "evaluation.json").read_text())["recipe"]
    stated = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seed": 2, "dtype": "float32", "batch": 3, "per_class": 4}
    assert recorded.items() >= (stated | {"classes": 10, "backend": "auto", "device": "cpu", "threads": 1}).items()
    assert json.loads((uninterrupted / "recipe.json").read_text()).items() <= recorded.items()


def test_batches_are_split_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes draws every other missing batch and does not write images.npz."""
    recipe = Recipe("", "", 10, 4, 32, 1.5, 900, 0.96, 2, 3, "float32", "auto", None, False, "cpu", 1)
    monkeypatch.setattr(DistContext, "barrier", lambda self: None)
    monkeypatch.setattr(DistContext, "broadcast", lambda self, value: value)
    drawn: list[int] = []

    def batches(begin: Any, starts: Any) -> Iterator[tuple[int, torch.Tensor]]:
        for start in starts:
            drawn.append(start)
            yield start, torch.zeros(min(3, 40 - start), 32, 32, 3, dtype=torch.uint8)

    monkeypatch.setattr(images, "prefetched", batches)
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "000003.npy", np.zeros(0))
    images.generate_images(tmp_path, recipe, lambda start: pytest.fail("begun"), DistContext(1, 2), {})
    assert drawn == sorted(BATCHES - {3})[1::2] and not (tmp_path / "images.npz").exists()


def test_resume_after_sigkill(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.Popen([sys.executable, "-m", "mvar", *ARGUMENTS, "--out", tmp_path], env=ENVIRONMENT)
    while len(list(tmp_path.glob("parts/[0-9]*.npy"))) < 3:
        assert run.poll() is None, "ended before it was killed"
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    finished = {int(path.stem) for path in tmp_path.glob("parts/[0-9]*.npy")}
    assert 3 <= len(finished) < len(BATCHES) and not (tmp_path / "images.npz").exists()

    drawn = []

    def launch(*arguments: Any, first_index: int, **options: Any) -> Any:
        drawn.append(first_index)
        return mvar.generate.__globals__["launch"](*arguments, first_index=first_index, **options)

    monkeypatch.setattr(resolve, "launch", launch)
    main([*ARGUMENTS, "--out", str(tmp_path), "--png"])
    assert sorted(drawn) == sorted(BATCHES - finished)
    assert np.array_equal(pixels(tmp_path), pixels(uninterrupted))
    assert not (tmp_path / "parts").exists()
    files = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in files] == [f"{i:06d}_{i % 10:04d}.png" for i in range(40)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), pixels(uninterrupted))

    main([*ARGUMENTS, "--out", str(tmp_path)])
    assert len(drawn) == len(BATCHES - finished)  # all images exist: nothing is drawn


def test_shortcuts_are_part_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--count", "1", "--dtype", "fp32", "--device", "cpu", "--out", str(tmp_path)]
    shortcuts = ["--refiner", "digits_refiner", "--refine-from", "2", "--guidance-until", "3"]
    main([*arguments, *shortcuts])
    refiner = mvar.load_model(Path(mvar.__file__).parent / "assets" / "digits_refiner.safetensors")
    options: dict[str, Any] = {"refiner": refiner, "refine_from": 2, "guidance_until": 3, "dtype": torch.float32}
    want = to_bytes(mvar.generate(*digits.pretrained(), range(10), **options).images).numpy()
    with np.load(tmp_path / "images.npz") as content:
        assert np.abs(content["arr_0"].astype(int) - want).max() <= 1
    recipe = json.loads((tmp_path / "evaluation.json").read_text())["recipe"]
    assert recipe["refiner"] == fingerprint(refiner)
    assert (recipe["refine_from"], recipe["guidance_until"]) == (2, 3)
    assert "refine_from 2 in the folder, None requested" in fails(capsys, *arguments)


def test_resumed_run_keeps_its_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under --dtype auto, although another dtype is the fastest by then; not without images, or in another dtype."""
    launch, used = resolve.launch, []

    def launched(*arguments: Any, dtype: torch.dtype, **options: Any) -> Any:
        used.append(dtype)
        if len(used) == 3:
            raise ValueError("interrupted")
        return launch(*arguments, dtype=dtype, **options)

    monkeypatch.setattr(resolve, "launch", launched)
    arguments = [*ARGUMENTS, "--out", str(tmp_path), "--dtype"]
    assert images.stored_dtype(tmp_path) is None
    monkeypatch.setattr(resolve, "fastest_dtype", lambda device: torch.float32)
    assert "interrupted" in fails(capsys, *arguments, "auto")
    assert images.stored_dtype(tmp_path) == "float32" and set(used) == {torch.float32}
    monkeypatch.setattr(resolve, "fastest_dtype", lambda device: torch.bfloat16)
    error = fails(capsys, *arguments, "bf16")
    assert "dtype float32 in the folder, bfloat16 requested" in error
    main([*arguments, "auto"])
    assert set(used) == {torch.float32} and len(used) > len(BATCHES)
    assert json.loads((tmp_path / "evaluation.json").read_text())["recipe"]["dtype"] == "float32"
    (tmp_path / "images.npz").unlink()
    assert images.stored_dtype(tmp_path) is None


def test_processes_use_the_dtype_of_the_main_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes, which does not decide: the main process sends it bfloat16 and no missing batches."""
    monkeypatch.setattr(distributed, "init_distributed", lambda: nullcontext(DistContext(1, 2)))
    monkeypatch.setattr(DistContext, "barrier", lambda self: None)
    sent: list[Any] = [torch.bfloat16, []]
    monkeypatch.setattr(DistContext, "broadcast", lambda self, value: sent.pop(0))
    monkeypatch.setattr(resolve, "fastest_dtype", lambda device: pytest.fail("the main process decides"))
    recipes: list[Recipe] = []
    generate = images.generate_images

    def generated(folder: Path, recipe: Recipe, *arguments: Any) -> Path:
        recipes.append(recipe)
        return generate(folder, recipe, *arguments)

    monkeypatch.setattr(images, "generate_images", generated)
    main([*ARGUMENTS, "--out", str(tmp_path), "--dtype", "auto"])
    assert [recipe.dtype for recipe in recipes] == ["bfloat16"] and sent == []


def test_images_do_not_depend_on_the_number_of_processes(uninterrupted: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mvar"]
    result = subprocess.run(
        [*torchrun, *ARGUMENTS, "--out", tmp_path, "--png"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("40 images in") == 1
    assert np.array_equal(pixels(tmp_path), pixels(uninterrupted))
    assert len(list((tmp_path / "png").glob("*.png"))) == 40
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [by["machine"]["processes"] for by in record["generated by"]] == [2] and record["recipe"]["images"] == 40


def test_images_of_another_recipe_are_not_overwritten(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "images.npz").read_bytes()
    error = fails(capsys, *ARGUMENTS, "--out", str(uninterrupted), "--cfg", "2")
    assert "images of another recipe: cfg 1.5 in the folder, 2.0 requested" in error
    with threads(2):  # the last bit of a float32 pixel depends on the number of threads
        assert "threads 1 in the folder, 2 requested" in fails(capsys, *ARGUMENTS, "--out", str(uninterrupted))
    assert (uninterrupted / "images.npz").read_bytes() == before

    (tmp_path / "parts").mkdir()
    (tmp_path / "recipe.json").write_text((uninterrupted / "recipe.json").read_text())
    for start in BATCHES:
        np.save(tmp_path / "parts" / f"{start:06d}.npy", np.zeros((min(3, 40 - start), 32, 32, 3), np.uint8))
    spoilt = tmp_path / "parts" / "000006.npy"
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    error = fails(capsys, *ARGUMENTS, "--out", str(tmp_path))
    assert f"{spoilt}: damaged" in error and "delete it" in error
    np.save(spoilt, np.zeros((2, 32, 32, 3), np.uint8))
    error = fails(capsys, *ARGUMENTS, "--out", str(tmp_path))
    assert f"{spoilt}: damaged: (2, 32, 32, 3) uint8 instead of (3, 32, 32, 3)" in error
    assert not list(tmp_path.glob("*images.npz*"))


def test_invalid_recipe_is_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "seed: expected" in fails(capsys, *ARGUMENTS, "--out", str(tmp_path), "--seed", "-1")
    main([*ARGUMENTS, "--out", str(tmp_path)])


def test_images_without_recipe_are_rejected(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images.npz").write_bytes((uninterrupted / "images.npz").read_bytes())
    assert "has images, but no recipe.json" in fails(capsys, *ARGUMENTS, "--out", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz"]


@pytest.mark.parametrize("full", ["000006.npy", "images.npz"])
def test_full_disk_error_names_the_file(
    full: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes fail with ENOSPC through /dev/full, and the same command resumes once there is space."""
    create = files._create_temporary

    def created(target: Path) -> Path:
        path = create(target)
        if target.name == full:
            path.unlink()
            path.symlink_to("/dev/full")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(files, "_create_temporary", created)
        error = fails(capsys, *ARGUMENTS, "--out", str(tmp_path))
    assert "cannot write" in error and f"{full}: No space left on device" in error
    assert not list(tmp_path.rglob(full))
    main([*ARGUMENTS, "--out", str(tmp_path)])


def test_record_separates_generation_and_measurement_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is interrupted, resumed with a second torch version and measured with a third."""
    for torch_version, batches in (("1", 3), ("2", None), ("3", None)):
        with monkeypatch.context() as patch:
            patch.setattr(machine, "versions", lambda torch_version=torch_version: {"torch": torch_version})
            if batches:
                drawn = images.prefetched
                patch.setattr(images, "prefetched", lambda begin, starts: drawn(begin, list(starts)[:batches]))  # noqa: B023
                with pytest.raises(SystemExit):
                    main([*ARGUMENTS, "--out", str(tmp_path)])
            else:
                main([*ARGUMENTS, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [by["versions"]["torch"] for by in record["generated by"]] == ["1", "2"]
    assert record["measured by"]["versions"]["torch"] == "3"


def test_npz_is_read_in_batches(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
    save_npz(tmp_path / "ours.npz", images.shape, [images[:5], images[5:]], torch.arange(7))
    np.savez_compressed(tmp_path / "theirs.npz", arr_0=images)
    for name in ("ours", "theirs"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npz")["arr_0"], images)
        batches = list(read_npz(tmp_path / f"{name}.npz", 3))
        assert [len(batch) for batch in batches] == [3, 3, 1] and np.array_equal(np.concatenate(batches), images)
    with pytest.raises(ValueError, match="expected 8 images in total"):
        save_npz(tmp_path / "few.npz", (8, 4, 4, 3), [images], torch.arange(8))
    assert not (tmp_path / "few.npz").exists()
    np.savez(tmp_path / "grey.npz", arr_0=images[..., 0])
    with pytest.raises(ValueError, match="arr_0: expected"):
        next(read_npz(tmp_path / "grey.npz", 3))


def test_fingerprint_detects_single_bit_changes() -> None:
    tokenizer = small_tokenizer().requires_grad_(False)
    bias = tokenizer.decoder.conv_out.bias
    assert bias is not None
    before = fingerprint(tokenizer)
    bias[1] = torch.nextafter(bias[1], torch.tensor(9.0))
    assert fingerprint(tokenizer) != before
    bias[1] = torch.nextafter(bias[1], torch.tensor(-9.0))
    assert fingerprint(tokenizer) == before


# Metrics


def test_missing_dependencies_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # importing it raises ImportError
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    main([*ARGUMENTS, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "pip install 'torch-fidelity>=0.4'" in out and "fetch https://github.com/toshas/torch-fidelity/" in out
    assert "VIRTUAL_imagenet256_labeled.npz" in out
    assert out.index("pip install") < out.index("40 images in")  # reported before sampling, which can take hours
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["metrics"] == {} and len(record["missing"]) == 3
    assert (tmp_path / "images.npz").exists()


class MockInception(torch.nn.Module):
    """Minimal replacement for torch-fidelity's Inception: uint8 (B, 3, H, W) → features and logits."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == [FEATURES, LOGITS]
        self.weight = torch.load(feature_extractor_weights_path)["weight"]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        found = features(images, self.weight)
        return found, found[:, :5]


def features(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ weight


@pytest.fixture
def mock_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock torch-fidelity modules with the functions, arguments and keys of version 0.4."""

    def statistics(rows: torch.Tensor) -> dict[str, Any]:
        return {"mu": rows.numpy().mean(0), "sigma": np.cov(rows.numpy(), rowvar=False)}

    def distance(a: dict[str, Any], b: dict[str, Any], verbose: bool) -> dict[str, float]:
        assert a["mu"].dtype == b["mu"].dtype and a["sigma"].dtype == b["sigma"].dtype  # required by torch-fidelity
        moments = [mvar.evaluate.Moments(torch.from_numpy(s["mu"]), torch.from_numpy(s["sigma"])) for s in (a, b)]
        return {"frechet_inception_distance": mvar.evaluate.frechet(*moments)}

    def shares(made: torch.Tensor, real: torch.Tensor, **options: Any) -> dict[str, float]:
        assert options == {"save_cpu_ram": True, "verbose": False}
        found = precision_recall(made, real)
        return {"precision": found.precision, "recall": found.recall, "f_score": 0.0}

    contents: dict[str, dict[str, Any]] = {
        "torch_fidelity": {"FeatureExtractorInceptionV3": MockInception},
        "torch_fidelity.metric_prc": {"prc_features_to_metric": shares},
        "torch_fidelity.metric_isc": {
            "isc_features_to_metric": lambda rows: {
                "inception_score_mean": float(rows.shape[1]),
                "inception_score_std": 0.0,
            }
        },
        "torch_fidelity.metric_fid": {
            "KEY_METRIC_FID": "frechet_inception_distance",
            "fid_features_to_statistics": statistics,
            "fid_statistics_to_metric": distance,
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_metrics_against_reference(
    uninterrupted: Path, tmp_path: Path, mock_torch_fidelity: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(48, 8))).float()
    torch.save({"weight": weight}, tmp_path / WEIGHTS)
    real = np.concatenate([pixels(uninterrupted)[::2], rng.integers(0, 256, (10, 32, 32, 3), np.uint8)])
    mu, sigma = rng.normal(size=8), np.diag(rng.uniform(1, 2, 8))
    np.savez(tmp_path / "images.npz", arr_0=real)
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "both.npz", arr_0=real, mu=mu.astype(np.float32), sigma=sigma)

    made_rows, real_rows = (
        features(torch.from_numpy(p).permute(0, 3, 1, 2), weight) for p in (pixels(uninterrupted), real)
    )
    shares = precision_recall(made_rows, real_rows)
    assert shares.precision != shares.recall and min(shares) > 0
    of_moments = mvar.evaluate.frechet(
        mvar.evaluate.moments(made_rows), mvar.evaluate.Moments(torch.from_numpy(mu), torch.from_numpy(sigma))
    )
    of_images = frechet_distance(made_rows, real_rows)
    assert abs(of_images - of_moments) > 1
    for name, fid, has_images in (
        ("images", of_images, True),
        ("moments", of_moments, False),
        ("both", of_moments, True),
    ):
        given = ["--inception", str(tmp_path / WEIGHTS), "--reference", str(tmp_path / f"{name}.npz")]
        main([*ARGUMENTS, "--out", str(uninterrupted), *given])
        record = json.loads((uninterrupted / "evaluation.json").read_text())
        metrics = record["metrics"]
        assert record["missing"] == []
        assert metrics["fid"] == pytest.approx(fid, rel=1e-5)  # float32 features
        assert metrics["inception_score_mean"] == 5
        assert ("precision" in metrics) == has_images
        if has_images:
            assert (metrics["precision"], metrics["recall"]) == pytest.approx(shares)
        assert f"fid: {metrics['fid']:.4g}\n" in capsys.readouterr().out
        assert len(metrics["inception_sha256"]) == len(metrics["reference_sha256"]) == 64

    main([*ARGUMENTS, "--out", str(uninterrupted), "--inception", str(tmp_path / WEIGHTS)])
    record = json.loads((uninterrupted / "evaluation.json").read_text())
    assert set(record["metrics"]) == {"inception_score_mean", "inception_score_std", "inception_sha256"}
    assert "reference" in record["missing"][0]


def test_invalid_files_are_rejected(
    uninterrupted: Path, tmp_path: Path, mock_torch_fidelity: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "odd.npz", odd=np.zeros(2))
    out = [*ARGUMENTS, "--out", str(uninterrupted)]
    assert "--inception: no.pth: no such file" in fails(capsys, *out, "--inception", "no.pth")
    assert "not a file of weights" in fails(capsys, *out, "--inception", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
    assert "not an npz" in fails(capsys, *out, "--reference", str(tmp_path / "text.npz"))
    assert "expected mu and sigma" in fails(capsys, *out, "--reference", str(tmp_path / "odd.npz"))
    assert "--batch: expected at least 1" in fails(capsys, *out, "--batch", "0")


def test_reference_and_network_are_validated_before_sampling(
    tmp_path: Path, mock_torch_fidelity: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mu, sigma, real = np.zeros(8), np.eye(8), np.zeros((5, 32, 32, 3), np.uint8)
    references: dict[str, tuple[dict[str, Any], str]] = {
        "half": ({"mu": mu}, "expected mu and sigma"),
        "narrow": ({"mu": mu[:7], "sigma": sigma[:7, :7]}, "mu: expected real numbers (8,), got float64 (7,)"),
        "flat": ({"mu": mu, "sigma": mu}, "sigma: expected real numbers (8, 8), got float64 (8,)"),
        "lost": ({"mu": mu, "sigma": sigma * np.nan}, "sigma: not all values are finite"),
        "words": ({"mu": mu.astype(str), "sigma": sigma}, "mu: expected real numbers (8,), got <U32 (8,)"),
        "objects": ({"mu": np.array([None]), "sigma": sigma}, "damaged: Object arrays cannot be loaded"),
        "grey": ({"mu": mu, "sigma": sigma, "arr_0": real[..., 0]}, "arr_0: expected (n, H, W, 3) uint8"),
        "few": ({"arr_0": real[:3]}, "arr_0: expected more than 3 images, got 3"),
        "cut": ({"arr_0": real}, "not an npz, or truncated"),
        "spoilt": ({"arr_0": real}, "damaged: Bad CRC-32"),
    }
    torch.save({"weight": torch.randn(48, 8)}, tmp_path / "inception.pth")
    given = [*ARGUMENTS, "--out", str(tmp_path / "out"), "--inception", str(tmp_path / "inception.pth")]
    for name, (content, message) in references.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **content)
        written = bytearray(path.read_bytes())
        if name == "spoilt":
            written[len(written) // 2] ^= 1
        path.write_bytes(written[:-100] if name == "cut" else written)
        error = fails(capsys, *given, "--reference", str(path))
        assert f"--reference: {path}: " in error and message in error, name
    torch.save({"other": torch.zeros(2)}, tmp_path / "inception.pth")
    assert "inception.pth: expected the weights of the network, " in fails(capsys, *given)
    assert not (tmp_path / "out").exists()


def test_png_images_without_npz_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "000000_0000.png").write_bytes(b"another's")
    assert "png/ has images of an earlier run, but no images.npz" in fails(capsys, *ARGUMENTS, "--out", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["png"]
