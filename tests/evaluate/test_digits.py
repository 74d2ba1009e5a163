"""Tests of the data and the quality checks of the demo."""

import torch

from mvar import digits


def test_split_is_fixed_disjoint_and_stratified() -> None:
    train, held_out = digits.load()
    assert train.images.shape == (1347, 3, 32, 32) and held_out.images.shape == (450, 3, 32, 32)
    assert train.images.min() == -1 and train.images.max() <= 1
    assert held_out.labels.bincount().min() >= 43
    distance = torch.cdist(train.images.flatten(1), held_out.images.flatten(1))
    assert distance.min() > 0


def test_checks_pass_for_real_digits_and_fail_for_corrupted_digits() -> None:
    train, held_out = digits.load()
    good = digits.quality(train.images[:1000], train.labels[:1000])
    assert all(holds for _, holds in good.checks()) and good.nearest == 0  # these are the training digits themselves

    wrong_class = digits.quality(held_out.images, (held_out.labels + 1) % 10)
    collapsed_images = torch.stack([train.images[train.labels == c].mean(0) for c in held_out.labels])
    collapsed = digits.quality(collapsed_images, held_out.labels)
    noisy = digits.quality((held_out.images + 0.6 * torch.randn(450, 3, 32, 32)).clamp(-1, 1), held_out.labels)
    failed = [
        [text.split(" ", 2)[0] for text, holds in q.checks() if not holds] for q in (wrong_class, collapsed, noisy)
    ]
    assert wrong_class.agreement < 0.05
    assert {"Fréchet", "smallest"} <= set(failed[1])
    assert "Fréchet" in failed[2]
