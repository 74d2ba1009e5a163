"""Tests of `mvar evaluate` with torch-fidelity, if installed. The network has random weights: no published FID."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvar import digits
from mvar.cli.main import main
from mvar.evaluate import frechet_distance, precision_recall
from mvar.evaluate.inception import FEATURES, LOGITS, Inception
from mvar.utils.images import to_bytes

try:
    import torch_fidelity.metric_prc  # noqa: F401
    from torch_fidelity import FeatureExtractorInceptionV3
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch version
    pytest.skip(f"torch-fidelity: {error}", allow_module_level=True)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random state dict of the network, scaled so that features and logits differ between images."""
    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *arguments: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", [FEATURES], str(path))
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        network.fc.weight *= 50
    torch.save(network.state_dict(), path)
    return path


def test_metrics_match_torch_fidelity(weights: Path, tmp_path: Path) -> None:
    """FID, precision and recall match `mvar.evaluate` on the same features; the Inception score its definition."""
    digit_images = to_bytes((digits.load()[1].images[:9] + 1) / 2).numpy()
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    real = np.concatenate([digit_images, noise])
    np.savez(tmp_path / "real.npz", arr_0=real)
    options = ["--count", "2", "--seed", "2", "--dtype", "fp32", "--device", "cpu", "--out", str(tmp_path)]
    main(["evaluate", *options, "--inception", str(weights), "--reference", str(tmp_path / "real.npz")])
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["missing"] == [] and record["measured by"]["versions"]["torch-fidelity"]

    network = Inception(weights, torch.device("cpu"))
    made, others = (network.features(tmp_path / name, batch=20) for name in ("images.npz", "real.npz"))
    found = record["metrics"]
    # torch-fidelity takes square roots of eigenvalues of a rank-deficient product: half of the float64 digits are left.
    scale = made[FEATURES].double().var(0).sum() + others[FEATURES].double().var(0).sum()
    assert found["fid"] == pytest.approx(frechet_distance(made[FEATURES], others[FEATURES]), abs=1e-5 * float(scale))
    shares = precision_recall(made[FEATURES], others[FEATURES])
    assert (found["precision"], found["recall"]) == pytest.approx(shares)
    assert shares.precision != shares.recall and 0 < shares.recall < 1
    p = made[LOGITS].double().softmax(1)
    scores = []
    for part in np.array_split(np.random.RandomState(2020).permutation(20), 10):
        rows = p[torch.from_numpy(part)]
        scores.append(float((rows * (rows / rows.mean(0)).log()).nansum(1).mean().exp()))
    assert found["inception_score_mean"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert found["inception_score_mean"] > 1.005
