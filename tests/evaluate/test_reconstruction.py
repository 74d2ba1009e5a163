"""Tests of `mvar evaluate --reconstruct`: its metrics against independent ones, its record, and unreadable images."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from mvar import digits
from mvar.cli.main import main
from mvar.data.folder import ImageFolder, UnreadableImages
from mvar.evaluate import frechet_distance, moments, psnr, ssim
from mvar.evaluate.features import MomentAccumulator
from mvar.evaluate.inception import WEIGHTS
from mvar.evaluate.reconstruction import reconstruct
from mvar.models.tokenizer import Tokenizer
from mvar.models.weights import fingerprint
from mvar.utils.images import save_image, to_bytes
from tests.cli.test_cli import fails
from tests.evaluate.test_evaluate import features, mock_torch_fidelity  # noqa: F401  (a fixture)
from tests.helpers.images import write_images


def noisy_pairs(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, shape, np.uint8)
    b = np.clip(a + rng.normal(0, 30, shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(a), torch.from_numpy(b)


@pytest.mark.parametrize("shape", [(2, 11, 11, 3), (2, 20, 33, 3)])
def test_ssim_against_its_definition(shape: tuple[int, ...]) -> None:
    """With SciPy's Gaussian filter of a radius of 3.5·1.5 → 5 pixels, whose borders are cut off, as in scikit-image."""

    def filtered(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return gaussian_filter(image, sigma=1.5, truncate=3.5)[5:-5, 5:-5]

    a, b = noisy_pairs(*shape)
    expected = []
    for x_image, y_image in zip(a.double().numpy(), b.double().numpy(), strict=True):
        of_channels = []
        for c in range(3):
            x, y = x_image[..., c], y_image[..., c]
            mx, my = filtered(x), filtered(y)
            vx, vy, cov = filtered(x * x) - mx**2, filtered(y * y) - my**2, filtered(x * y) - mx * my
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            of_channels.append(s.mean())
        expected.append(np.mean(of_channels))
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(a, a).tolist() == [1.0, 1.0] and ssim(a[:0], b[:0]).shape == (0,)


def test_psnr() -> None:
    a, b = noisy_pairs(2, 4, 5, 3)
    b[1] = a[1]
    found = psnr(a, b)
    assert found[0].item() == pytest.approx(
        10 * np.log10(255**2 / np.mean((a[0].double() - b[0].double()).numpy() ** 2))
    )
    assert found[1] == torch.inf
    for metric, images in ((psnr, b[:, :3]), (psnr, b.float()), (ssim, b)):
        with pytest.raises(ValueError, match=r"expected \(B, H, W, C\) uint8, both of the same shape"):
            metric(a, images)


def test_moments_of_batches() -> None:
    """A large mean: sums of squares would have lost the covariance (1e7² · 2⁻⁵³ is about 0.01)."""
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e7
    accumulator = MomentAccumulator()
    for part in rows.split([1, 20, 29]):
        accumulator.update(part)
    expected, found = moments(rows), accumulator.result()
    assert torch.allclose(found.mean, expected.mean, rtol=1e-15)
    assert torch.allclose(found.covariance, expected.covariance, rtol=1e-7, atol=1e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 digits, some in subfolders, and files that are no images of it."""
    path = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(digits.load()[1].images[:12]):
        save_image(path / ("a/b" if i % 3 == 1 else ".") / f"{i:02d}.png", (image + 1) / 2)
    for other in ("._00.png", "a/notes.txt", ".cache/13.png"):
        (path / other).parent.mkdir(exist_ok=True)
        (path / other).write_bytes(b"none")
    return path


def run(folder: Path, out: Path, *options: str) -> dict[str, Any]:
    main(["evaluate", "--reconstruct", str(folder), "--out", str(out), "--device", "cpu", "--workers", "0", *options])
    record: dict[str, Any] = json.loads((out / "reconstruction.json").read_text())
    return record


def test_record(
    folder: Path,
    tmp_path: Path,
    mock_torch_fidelity: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    weight = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": weight}, tmp_path / WEIGHTS)
    record = run(folder, tmp_path, "--batch", "5", "--inception", str(tmp_path / WEIGHTS))
    out = capsys.readouterr().out

    tokenizer = digits.pretrained()[1]
    files = sorted(folder.glob("*.png")) + sorted(folder.glob("a/b/*.png"))  # by folder, then by name
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in files if not p.name.startswith(".")])
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = tokenizer.encode(images)
    again = to_bytes((tokenizer.decode(tokens) + 1) / 2)
    assert record["images"] == 12 == len(pixels) and record["unreadable"] == {} and record["skipped"] == 2
    metrics = record["metrics"]
    # The batch size may change the last bit of a float32 convolution, hence the rounding of a few of the 36,864 values.
    assert metrics["psnr"] == pytest.approx(float(psnr(pixels, again).mean()), abs=1e-3)
    assert metrics["ssim"] == pytest.approx(float(ssim(pixels, again).mean()), abs=1e-4)
    assert metrics["psnr_of_mean_mse"] < metrics["psnr"]  # Jensen's inequality
    rows = [features(p.permute(0, 3, 1, 2), weight) for p in (pixels, again)]
    assert metrics["rfid"] == pytest.approx(frechet_distance(*rows), rel=1e-2) and metrics["rfid"] > 0
    assert record["preprocessing"]["sha256 of the pixels"] == hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    assert record["tokenizer"]["sha256 of the weights"] == fingerprint(tokenizer)

    scales = tokens.split(tokenizer.scales, 1)
    for usage, codes, side in zip(record["usage"]["scales"], scales, tokenizer.patch_nums, strict=True):
        counts = codes.unique(return_counts=True)[1].double()
        entropy = -(counts / counts.sum() * (counts / counts.sum()).log()).sum()
        expected = {"side": side, "tokens": 12 * side**2, "used": len(counts) / 256, "perplexity": float(entropy.exp())}
        assert usage == pytest.approx(expected)
    assert record["usage"]["total"]["used"] == len(tokens.unique()) / 256
    assert Image.open(tmp_path / "reconstruction.png").size == (8 * 34 + 2, 2 * 34 + 2)
    assert f"psnr: {metrics['psnr']:.4g} dB" in out and f"rfid: {metrics['rfid']:.4g}" in out


def test_preprocessing_of_other_sizes(tmp_path: Path) -> None:
    """The shorter side is resized to round(1.25·32) = 40, and the center of 32×32 is taken."""
    write_images(tmp_path / "images", {"a": 2}, size=(90, 60))
    record = run(tmp_path / "images", tmp_path, "--mid_reso", "1.25")
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "images/a").iterdir()):
        image = Image.open(path).convert("RGB").resize((60, 40), Image.Resampling.LANCZOS)
        digest.update(np.asarray(image.crop((14, 4, 46, 36))).tobytes())
    assert record["preprocessing"]["sha256 of the pixels"] == digest.hexdigest()
    assert record["preprocessing"]["shorter_side"] == 40 and "rfid" not in record["metrics"] and record["missing"]


def test_unreadable_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 % may be unreadable: they are left out, not replaced; with more, the error names them."""
    tokenizer = digits.pretrained()[1]
    given: list[torch.Tensor] = []
    monkeypatch.setattr(tokenizer, "encode", lambda images: given.append(images) or torch.zeros(len(images), 30).long())
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: given[-1])
    write_images(tmp_path, {"a": 100}, size=(32, 32))
    (tmp_path / "a/007.png").write_bytes(b"not an image")
    images = ImageFolder(tmp_path, 32, mid_resolution=1, labeled=False)
    found = reconstruct(images, tokenizer, batch=1)
    assert found.images == 99 == len(given) and list(images.unreadable) == ["a/007.png"]
    assert len(torch.cat(given).flatten(1).unique(dim=0)) == 99
    assert found.metrics == {"psnr": None, "psnr_of_mean_mse": None, "exact_images": 99, "ssim": 1.0}
    (tmp_path / "a/008.png").write_bytes(b"not an image")
    with pytest.raises(UnreadableImages, match="2 of the first 50 images cannot be read.*a/007.png"):
        reconstruct(images, tokenizer)


def test_psnr_leaves_out_exact_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = digits.pretrained()[1]
    given: list[torch.Tensor] = []
    monkeypatch.setattr(tokenizer, "encode", lambda images: given.append(images) or torch.zeros(len(images), 30).long())
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: given[-1] + torch.tensor([0, 2 / 255])[:, None, None, None])
    (tmp_path / "a").mkdir()
    for name in ("exact.png", "off.png"):
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "a" / name)
    metrics = reconstruct(ImageFolder(tmp_path, 32, mid_resolution=1, labeled=False), tokenizer).metrics
    # An error of 1 in all pixels of one image: 20·log₁₀ 255 dB, and 10·log₁₀ 2 more for the mean of both.
    assert metrics["exact_images"] == 1 and metrics["psnr"] == pytest.approx(48.1308, abs=1e-4)
    assert metrics["psnr_of_mean_mse"] == pytest.approx(48.1308 + 3.0103, abs=1e-4)
    (tmp_path / "a" / "off.png").unlink()
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: given[-1])
    assert reconstruct(ImageFolder(tmp_path, 32, mid_resolution=1, labeled=False), tokenizer).images == 1


def test_errors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    base = ["evaluate", "--out", str(tmp_path / "out")]
    here = [*base, "--reconstruct", str(folder)]
    assert "--weights: not with --reconstruct" in fails(capsys, *here, "--weights", "d16.pth")
    assert "--png: not with --reconstruct" in fails(capsys, *here, "--png")
    assert "--mid_reso: applies to --reconstruct only" in fails(capsys, *base, "--mid_reso", "1")
    assert "give --tokenizer" in fails(capsys, *here, "--resolution", "256")
    assert "batch: expected at least 1" in fails(capsys, *here, "--batch", "0")
    assert "no-such: no such folder" in fails(capsys, *base, "--reconstruct", "no-such")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no images\n" in fails(capsys, *base, "--reconstruct", str(tmp_path / "empty"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--reconstruct: expected one process, got 2" in fails(capsys, *here)
    other = ImageFolder(folder, 16, mid_resolution=1, labeled=False)
    tokenizer: Tokenizer = digits.pretrained()[1]
    with pytest.raises(ValueError, match="folder: expected a resolution of 32 pixels, the tokenizer's"):
        reconstruct(other, tokenizer)
