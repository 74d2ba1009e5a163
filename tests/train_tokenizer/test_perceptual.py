"""Tests of LPIPS. VGG16 has random weights: its real ones are not part of any package."""

import random
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mvar.train_tokenizer.perceptual import LPIPS_FILE, WIDTHS, load_lpips
from tests.models.test_defaults import DEFAULTS, default

CPU = torch.device("cpu")
CONVOLUTIONS = {  # of torchvision's vgg16().features: numbers and widths, and the pooling layers between
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)},
    **{17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)},
}
POOLING = (4, 9, 16, 23)
REAL = find_spec("lpips")


def random_tensor(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    weights = {}
    for i, (inputs, outputs) in CONVOLUTIONS.items():
        weights[f"features.{i}.weight"] = random_tensor(outputs, inputs, 3, 3, seed=i, std=(2 / 9 / inputs) ** 0.5)
        weights[f"features.{i}.bias"] = random_tensor(outputs, seed=i + 1, std=0.1)
    return weights


@pytest.fixture(scope="module")
def linear() -> dict[str, Tensor]:
    """Random weights in the format of lpips's file."""
    return {f"lin{i}.model.1.weight": random_tensor(1, w, 1, 1, seed=50 + i).abs() / w for i, w in enumerate(WIDTHS)}


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    """A file in the old format of torchvision's, with a classifier."""
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linear: dict[str, Tensor]) -> Path:
    """An installed package `lpips` with these weights, whose code must not run."""
    folder = tmp_path / "packages" / "lpips"
    (folder / LPIPS_FILE).parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError")
    torch.save(linear, folder / LPIPS_FILE)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def images(seed: int, side: int = 32, batch: int = 2) -> Tensor:
    return random_tensor(batch, 3, side, side, seed=seed).tanh()


def by_formula(state: dict[str, Tensor], linear: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """LPIPS in float64 by equation 1 of arXiv 1801.03924, written without the module."""

    def features(x: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x, found = ((x.double() + 1) / 2 - mean) / std, []
        for i in range(30):
            if i in CONVOLUTIONS:
                weight, bias = (state[f"features.{i}.{name}"].double() for name in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            elif i in POOLING:
                found.append(x)
                x = F.max_pool2d(x, 2)
        return [*found, x]

    total = torch.zeros(len(a)).double()
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)) ** 2
        total += F.conv2d(difference, linear[f"lin{i}.model.1.weight"].double()).mean(dim=(1, 2, 3))
    return total


@pytest.mark.usefixtures("package")
def test_matches_the_formula(vgg16: Path, state: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
    network = load_lpips(vgg16, CPU)
    a, b = images(1, 24), images(2, 24)
    found = network(a, b)
    assert found.shape == (2,) and found.dtype == torch.float32
    # float32 against float64: each of 13 convolutions rounds sums of up to 4,608 terms, mostly independently
    torch.testing.assert_close(found.double(), by_formula(state, linear, a, b), rtol=1e-5, atol=0)
    assert torch.equal(network(a, a), torch.zeros(2))


@pytest.mark.usefixtures("package")
def test_gradient_reaches_the_reconstruction_only(vgg16: Path) -> None:
    network = load_lpips(vgg16, CPU)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    a, b = images(1, 16), images(2, 16).requires_grad_()
    assert not network(a, b.detach()).requires_grad
    network(a, b).sum().backward()
    assert b.grad is not None and b.grad.isfinite().all()
    direction = b.grad.sign()
    with torch.no_grad():
        step = 1e-3 / b.grad.abs().sum() * network(a, b).sum()
        lower = network(a, b - step * direction).sum() / network(a, b).sum()
    assert float(lower) == pytest.approx(1 - 1e-3, abs=2e-4)  # 1e-3 in the first order


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_autocast(state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype, digits: int) -> None:
    """Also where all features are 0, as in the last stage here: lpips's ε is 0 in float16."""
    torch.save(state | {"features.28.bias": torch.full((512,), -1e3)}, tmp_path / "vgg16.pth")
    network, (a, b) = load_lpips(tmp_path / "vgg16.pth", CPU), (images(1, 16), images(2, 16))
    with torch.autocast("cpu", dtype):
        found = network(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, network(a, b), rtol=13 * 2.0**-digits, atol=0)  # 13 layers of rounded products


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
def test_independent_of_default_dtype_and_device(vgg16: Path, dtype: torch.dtype, device: str) -> None:
    a, b = images(1, 16), images(2, 16)
    right = load_lpips(vgg16, CPU)(a, b)
    with default(dtype, device):
        network = load_lpips(vgg16, CPU)
        found = network(a, b)
    assert found.dtype == torch.float32 and torch.equal(found, right)
    assert all(t.dtype == torch.float32 and t.device == CPU for t in network.state_dict().values())


@pytest.mark.usefixtures("package")
def test_loading_changes_nothing_else(vgg16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state(), random.getstate()
    load_lpips(str(vgg16), CPU)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("package")
def test_safetensors(vgg16: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "vgg16.safetensors")
    a, b = images(1, 16), images(2, 16)
    found, right = (load_lpips(path, CPU)(a, b) for path in (tmp_path / "vgg16.safetensors", vgg16))
    torch.testing.assert_close(found, right, rtol=13 * 2.0**-11, atol=0)  # 13 layers with rounded weights


def _without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without("features.28.bias"), r"VGG16 \(vgg16-397923af.pth\): features.28.bias: .*\(512,\), got None"),
        (lambda state: state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, "features.0.weight: expected shape"),
        (lambda state: state | {"features.30.weight": torch.zeros(512, 512, 3, 3)}, "features.30.weight: expected"),
        (lambda state: {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "features.0.weight: expected shape"),
        (lambda state: nn.Linear(1, 1), "not only weights"),
    ],
    ids=["missing", "shape", "deeper", "ResNet", "module"],
)
def test_other_weights(
    change: Callable[[dict[str, Tensor]], object], reason: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(change(state), path)
    with pytest.raises(ValueError, match=f"other.pth: .*{reason}"):
        load_lpips(path, CPU)


@pytest.mark.usefixtures("package")
def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        load_lpips(tmp_path / "none.pth", CPU)


def test_no_package(vgg16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvar.train_tokenizer.perceptual.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lpips"):
        load_lpips(vgg16, CPU)


def test_another_version_of_the_package(vgg16: Path, package: Path) -> None:
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, package / LPIPS_FILE)
    with pytest.raises(ValueError, match=r"vgg.pth: expected the weights of lpips 0.1 for VGG16, got lin0"):
        load_lpips(vgg16, CPU)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("a", "b", "name"),
    [((2, 3, 15, 16), (2, 3, 15, 16), "images"), ((2, 1, 16, 16), (2, 1, 16, 16), "images"),
     ((2, 3, 16, 16), (2, 3, 32, 32), "reconstructions"), ((2, 3, 16, 16), (3, 16, 16), "reconstructions")],
)  # fmt: skip
def test_other_shapes(vgg16: Path, a: tuple[int, ...], b: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        load_lpips(vgg16, CPU)(torch.zeros(a), torch.zeros(b))


@pytest.mark.skipif(REAL is None, reason="lpips is not installed")
def test_matches_the_package(vgg16: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own module, with a VGG16 in place of torchvision's, which has to be built for this torch."""
    layers: dict[int, nn.Module] = {i: nn.MaxPool2d(2) for i in POOLING}
    layers |= {i: nn.Conv2d(*widths, 3, padding=1) for i, widths in CONVOLUTIONS.items()}
    theirs = types.SimpleNamespace(features=nn.Sequential(*(layers.get(i, nn.ReLU()) for i in range(30))))
    theirs.features.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    models = types.ModuleType("torchvision.models")
    models.vgg16 = lambda **_: theirs  # type: ignore[attr-defined]
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    modules = set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        import lpips

        package = lpips.LPIPS(net="vgg", verbose=False)
    for name in set(sys.modules) - modules:  # it was imported with the stand-in for torchvision
        if name.partition(".")[0] == "lpips":
            del sys.modules[name]
    network, a, b = load_lpips(vgg16, CPU), images(1), images(2).requires_grad_()
    right = package(a, b).flatten()
    found = network(a, b)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value.sum(), b)[0] for value in (found, right)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * float(gradients[1].abs().max()))
