"""Tests of the PatchGAN discriminator, the hinge losses and the adaptive weight."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.train_tokenizer.discriminator import (
    DELTA,
    MAX_ADAPTIVE_WEIGHT,
    Discriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from tests.models.test_defaults import DEFAULTS, default


def images(batch: int, resolution: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, resolution, resolution, generator=generator) * 2 - 1


def alone(values: Tensor) -> Tensor:
    """all_reduce of a single process."""
    return values


@pytest.mark.parametrize(("resolution", "num_layers"), [(256, 3), (64, 3), (32, 2), (24, 3), (20, 2), (16, 1), (6, 1)])
def test_shapes(resolution: int, num_layers: int) -> None:
    discriminator = Discriminator(16, num_layers, resolution=resolution)
    side = resolution // 2**num_layers - 2
    assert discriminator(images(2, resolution)).shape == (2, 1, side, side)


def test_widths() -> None:
    """The published PatchGAN: widths up to 8 times the first, the last two convolutions of stride 1."""
    convolutions = [layer for layer in Discriminator(resolution=256).layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    deeper = [layer for layer in Discriminator(16, 5, resolution=96).layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in deeper] == [16, 32, 64, 128, 128, 128, 1]


def test_each_logit_depends_on_a_patch() -> None:
    """Of 70×70 pixels with three layers, except through GroupNorm's statistics."""
    discriminator = Discriminator(16, 3, resolution=256)
    for i, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):
            discriminator.layers[i] = nn.Identity()
    pixels = images(1, 256).requires_grad_()
    discriminator(pixels)[0, 0, 15, 15].backward()
    assert pixels.grad is not None
    touched = pixels.grad[0].abs().sum(0).nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [70, 70]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"resolution": 23}, "resolution: expected at least 24 for 3"),
        ({"resolution": 5, "num_layers": 1}, "resolution: expected at least 6"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": 64, "num_layers": 0}, "num_layers"),
        ({"resolution": 64, "channels": 24}, "channels"),
        ({"resolution": 64, "channels": 0}, "channels"),
    ],
)
def test_invalid_arguments(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        Discriminator(**arguments)  # type: ignore[arg-type]


def test_weights_are_a_function_of_the_seed() -> None:
    before = torch.get_rng_state()
    first, same, other = (Discriminator(32, resolution=64, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])
    widest = first["layers.8.weight"]  # 256 × 128 × 4 × 4
    assert widest.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * widest.numel()))
    assert first["layers.0.bias"].count_nonzero() == 0
    assert torch.equal(first["layers.3.weight"], torch.ones(64)) and first["layers.3.bias"].count_nonzero() == 0


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
def test_independent_of_default_dtype_and_device(dtype: torch.dtype, device: str) -> None:
    def run() -> list[Tensor]:
        discriminator = Discriminator(16, 1, resolution=16)
        pixels, layer = images_on_cpu, weight.clone().requires_grad_()
        fake = F.conv2d(pixels, layer, padding=1)
        rec, gan = (fake - pixels).abs().mean(), generator_loss(discriminator.frozen(fake))
        loss = discriminator_loss(discriminator(pixels), discriminator(fake.detach()))
        factor = adaptive_weight(rec, gan, layer, alone)
        return [*discriminator.state_dict().values(), loss.detach(), gan.detach(), factor]

    images_on_cpu, weight = images(2, 16), torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    right = run()
    assert all(t.dtype == torch.float32 for t in right)
    with default(dtype, device):
        got = run()
    assert all(
        g.dtype == r.dtype and g.device == r.device and torch.equal(g, r) for g, r in zip(got, right, strict=True)
    )


def test_every_image_by_itself() -> None:
    """No statistics of the batch: a batch's logits are those of its images."""
    discriminator, batch = Discriminator(16, 1, resolution=16), images(4, 16)
    together, apart = discriminator(batch), torch.cat([discriminator(image[None]) for image in batch])
    torch.testing.assert_close(together, apart)


def test_frozen() -> None:
    discriminator, fake = Discriminator(16, 1, resolution=16), images(2, 16).requires_grad_()
    expected = discriminator(fake)
    (right,) = torch.autograd.grad(expected.sum(), fake)
    logits = discriminator.frozen(fake)
    logits.sum().backward()
    assert torch.equal(logits, expected) and fake.grad is not None and torch.equal(fake.grad, right)
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_hinge_losses() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [1.0, -1.0]]), torch.tensor([-2.0, 0.5, -1.0, 0.0])
    # real: max(0, 1 − x) = 0, 0.5, 0, 2; fake: max(0, 1 + x) = 0, 1.5, 0, 1
    assert discriminator_loss(real, fake).item() == (2.5 / 4 + 2.5 / 4) / 2
    assert generator_loss(fake).item() == 2.5 / 4


def test_adaptive_weight_by_hand() -> None:
    """Losses a·w and b·w have the gradients a and b."""
    w, a, b = (torch.tensor(v) for v in ([1.0, -2.0], [3.0, 4.0], [0.0, 0.5]))
    w.requires_grad_()
    found = adaptive_weight(a @ w, b @ w, w, alone)
    assert found.item() == pytest.approx(5 / (0.5 + DELTA)) and not found.requires_grad and found.shape == ()
    assert w.grad is None
    assert adaptive_weight(0 * (a @ w), b @ w, w, alone).item() == 0
    assert adaptive_weight(a @ w, 0 * (b @ w), w, alone).item() == MAX_ADAPTIVE_WEIGHT
    scaled = adaptive_weight(a @ w, b @ w, w, alone, loss_scale=2.0**11)
    assert scaled.item() == pytest.approx(5 / (0.5 + DELTA))
    for pair in ((a * math.inf, b), (a, b * math.inf), (a, b * math.nan)):
        assert math.isnan(adaptive_weight(*(v @ w for v in pair), w, alone).item())


class _Generator(nn.Module):
    """Two layers; the last one stands for the decoder's last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.first(x)))


def _losses(generator: _Generator, discriminator: Discriminator, batch: Tensor) -> tuple[Tensor, Tensor]:
    fake = generator(batch).float()
    return (fake - batch).abs().mean(), generator_loss(discriminator.frozen(fake))


@pytest.fixture
def generator() -> _Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Generator()


def test_two_processes_match_one(generator: _Generator) -> None:
    """λ and all gradients; the two processes' halves of the batch differ much."""
    discriminator = Discriminator(16, 1, resolution=16)
    halves = images(2, 16, seed=1), images(2, 16, seed=2) * 0.1 + 0.5
    whole = torch.cat(halves)
    rec, gan = _losses(generator, discriminator, whole)
    expected = adaptive_weight(rec, gan, generator.last.weight, alone)
    ((rec + expected * gan) + discriminator_loss(discriminator(whole), discriminator(-whole))).backward()
    parameters = [*generator.parameters(), *discriminator.parameters()]
    right = [p.grad for p in parameters]

    sent: list[Tensor] = []

    def send(values: Tensor) -> Tensor:
        sent.append(values.clone())
        return values

    graphs = [_losses(generator, discriminator, half) for half in halves]
    local = [adaptive_weight(*graph, generator.last.weight, send) for graph in graphs]
    total = torch.stack(sent).sum(0)
    found = [adaptive_weight(*graph, generator.last.weight, lambda _: total.clone()) for graph in graphs]
    assert torch.equal(found[0], found[1])
    # float32 sums in another order
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=0)
    assert abs(local[0] / local[1] - 1) > 0.01 and abs(sum(local) / 2 / expected - 1) > 0.001
    for p in parameters:
        p.grad = None
    for (rec, gan), factor, half in zip(graphs, found, halves, strict=True):
        own = discriminator_loss(discriminator(half), discriminator(-half))
        ((rec + factor * gan + own) / 2).backward()
    for p, gradient in zip(parameters, right, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_autocast(dtype: torch.dtype, digits: int, generator: _Generator) -> None:
    discriminator, batch = Discriminator(16, 1, resolution=16), images(2, 16)
    right = adaptive_weight(*_losses(generator, discriminator, batch), generator.last.weight, alone)
    with torch.autocast("cpu", dtype):
        rec, gan = _losses(generator, discriminator, batch)
        assert rec.dtype == gan.dtype == discriminator(batch).dtype == torch.float32
    found = adaptive_weight(rec, gan, generator.last.weight, alone, loss_scale=2.0**11)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(right.item(), rel=8 * 2.0**-digits)  # a few roundings in a row


def test_float16_needs_the_loss_scale(generator: _Generator) -> None:
    """Gradients of a mean over many pixels are below float16's range."""
    discriminator, batch = Discriminator(16, 1, resolution=16), images(2, 16)
    with torch.autocast("cpu", torch.float16):
        rec, gan = (loss * 1e-5 for loss in _losses(generator, discriminator, batch))
    weight = generator.last.weight
    assert adaptive_weight(rec, gan, weight, alone).item() == 0
    assert adaptive_weight(rec, gan, weight, alone, loss_scale=2.0**11).item() > 0
