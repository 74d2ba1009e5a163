"""Tests of the schedules against values computed with VAR's utils/lr_control.py (commit 78b9539)."""

import pytest

from mvar.train.flags import Flags
from mvar.train.schedule import Schedule, Stage

PER_EPOCH, IMAGES = 13, 96

LONGER = {"sche": "exp", "ep": 20, "wp": 1.5, "wpe": 0.1, "twde": 0.08, "ac": 2}


@pytest.mark.parametrize(
    ("flags", "iteration", "rate", "decay"),
    [
        ({}, 0, 1.8750000000000003e-07, 0.05),
        ({}, 64, 3.692596153846154e-05, 0.05),
        ({}, 65, 3.7500000000000003e-05, 0.05),
        ({}, 1000, 2.7978188640571282e-05, 0.05),
        ({}, 3249, 3.7500000000000006e-07, 0.05),
        (LONGER, 10, 3.76875e-05, 0.0501102120131458),
        (LONGER, 100, 4.547096438676816e-05, 0.059746415886009374),
        (LONGER, 259, 7.500000000000002e-06, 0.08),
        ({"sche": "lin0.3", "ep": 20}, 50, 3.4211368110236224e-05, 0.05),
        ({"sche": "lin0.3", "ep": 20}, 200, 1.0846421541057371e-05, 0.05),
        ({"sche": "cos", "ep": 20}, 3, 2.2575e-05, 0.05),
        ({"sche": "cos", "ep": 20}, 200, 5.1019824641637115e-06, 0.05),
        ({"sche": "lin", "ep": 20}, 200, 1.0520321908290877e-05, 0.05),
        # Progressive training uses lin0.3, regardless of --sche.
        ({"pg": 0.3, "ep": 20}, 200, 1.0846421541057371e-05, 0.05),
    ],
)
def test_learning_rate_and_weight_decay_match_var(flags: dict, iteration: int, rate: float, decay: float) -> None:
    schedule = Schedule(Flags(**flags), PER_EPOCH, IMAGES, 10)
    assert schedule.learning_rate(iteration) == pytest.approx(rate, rel=1e-12)
    assert schedule.weight_decay(iteration) == pytest.approx(decay, rel=1e-12)


def test_peak_learning_rate_scales_with_batch_size() -> None:
    assert Schedule(Flags(bs=768), 100, 768, 10).peak == pytest.approx(3e-4)
    assert Schedule(Flags(bs=768, ac=4), 400, 192, 10).peak == pytest.approx(3e-4)


def test_progressive_training_stages() -> None:
    """10 scales, 100 iterations per epoch: the first 5 until the warm-up ends at 20, then linearly to all at 500."""
    schedule = Schedule(Flags(ep=10, pg=0.5, pg0=4, pgwp=0.1), 100, IMAGES, 10)
    stages = [schedule.stage(i) for i in range(1000)]
    assert stages[0] == stages[20] == Stage(5, 1.0)  # the loss of the first stage has full weight from the start
    counts = [stage.scales for stage in stages]
    assert counts == sorted(counts) and set(counts) == {5, 6, 7, 8, 9, 10}
    assert counts.index(10) == 20 + 432 + 1  # round(5·(i−20)/480) becomes 5 above 4.5, that is after i−20 = 432
    first = counts.index(7)
    assert [stages[first + k].newest_weight for k in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert all(stage.newest_weight == 1 for stage in stages if stage.scales == 10)
    assert Schedule(Flags(), 100, IMAGES, 10).stage(0) == Stage(10, 1.0)


def test_shorten_matches_fewer_epochs() -> None:
    """Explicit and default warm-ups are shortened too; the default `pgwp` is a 300th of the epochs, as in VAR."""
    for changed, fewer in (({"wp": 6.0, "pgwp": 0.4}, {"wp": 3.0, "pgwp": 0.2}), ({}, {"pgwp": 0.1})):
        shortened = Schedule(Flags(ep=60, shorten=0.5, pg=0.5, **changed), 100, IMAGES, 10)
        short = Schedule(Flags(ep=30, pg=0.5, **fewer), 100, IMAGES, 10)
        assert shortened.iterations == short.iterations == 3000
        for i in range(0, 3000, 3):
            assert shortened.stage(i) == short.stage(i) and shortened.learning_rate(i) == short.learning_rate(i)


def test_gradient_accumulation_steps() -> None:
    schedule = Schedule(Flags(ac=3, ep=1), 8, IMAGES, 10)
    assert [i for i in range(8) if schedule.steps(i)] == [2, 5, 7]
