"""Tests bench_quality, the scaling with tokens and the report."""

import json
import math
import re
from typing import Any

import pytest
import torch

import mvar
from benchmarks import bench_quality
from benchmarks.analysis import frechet as distances
from benchmarks.analysis import roofline, scaling
from benchmarks.analysis.flops import OURS, PUBLIC, VAR
from benchmarks.common.results import RESULTS, slug
from benchmarks.report import ops, pages
from mvar import digits
from mvar.evaluate import frechet, moments
from mvar.inference.prepare import prepared_model
from mvar.utils.images import to_bytes

pytestmark = pytest.mark.slow


def test_quality_distinguishes_worse_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares a set of real digits with itself, noisy digits with the originals, and two halves of the set."""
    monkeypatch.setattr(distances, "RESAMPLES", 50)
    train, _ = digits.load()
    space, labels = distances.digit_features(), train.labels[:600]
    pixels = ((train.images[:600].permute(0, 2, 3, 1) + 1) * 127.5).to(torch.uint8)
    reference = space.features(pixels)
    same = distances.compare(space, reference, reference, labels)
    assert same["costs"] == 0 and same["costs_interval"] == [0, 0] and same["frechet_to_reference"] < 1e-9
    noisy = (pixels.int() + torch.randint(-90, 90, pixels.shape)).clamp(0, 255).to(torch.uint8)
    worse = distances.compare(space, space.features(noisy), reference, labels)
    assert worse["costs_interval"][0] > 0 and worse["frechet_to_reference"] > 0.1
    real = space.real(None)
    to_real = [frechet(moments(space.features(made)), real) for made in (noisy, pixels)]
    assert worse["frechet_to_real"] == pytest.approx(to_real[0])
    assert worse["costs"] == pytest.approx(to_real[0] - to_real[1]) and worse["costs"] > 0
    equal = distances.compare(space, *map(space.features, pixels.split(300)), labels[:300])
    low, high = equal["costs_interval"]
    assert low < 0 < high
    for found in (same, worse, equal):
        for name in ("frechet_to_reference", "frechet_to_real", "costs"):
            low, high = found[f"{name}_interval"]
            assert low <= found[name] <= high
    assert worse["frechet_to_reference_interval"][0] > same["frechet_to_reference_interval"][1]
    assert moments(reference).mean.dtype == torch.float64


def test_confidence_interval_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 33 of 40 95 % intervals contain the mean; a binomial variable is lower with a probability of 1/1000."""
    monkeypatch.setattr(distances, "RESAMPLES", 50)
    generator = torch.Generator().manual_seed(0)
    width, labels = 8, torch.arange(100) % 2

    def sample() -> torch.Tensor:
        return torch.randn(len(labels), width, generator=generator, dtype=torch.float64)

    centres = 20.0 * labels[:, None]  # well-separated classes, with equal counts in every set
    fixed = moments(sample() + centres)
    space = distances.FeatureSpace("", lambda pixels: pixels, lambda generator: fixed)
    sets = [sample() + centres for _ in range(40)]
    found = [distances.compare(space, made, made + 0.1 * sample(), labels) for made in sets]
    for name in ("frechet_to_real", "costs"):
        figures = torch.tensor([each[name] for each in found])
        low, high = torch.tensor([each[f"{name}_interval"] for each in found]).unbind(1)
        assert int(((low <= figures.mean()) & (figures.mean() <= high)).sum()) >= 33
        # 3.92 σ is the width of the 95 % interval of a normal distribution.
        assert float((high - low).mean()) < 2 * 3.92 * float(figures.std())


def test_quality_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = digits.pretrained()
    labels = torch.arange(20) % 10
    monkeypatch.setattr(
        bench_quality, "backends_and_dtypes", lambda: iter([("reference", torch.float32), ("cpu", torch.bfloat16)])
    )
    monkeypatch.setattr(distances, "RESAMPLES", 2)
    rows = bench_quality.measure(model, tokenizer, labels, dict(digits.SAMPLING), distances.digit_features(), 0)
    exact, rough, another = rows
    assert exact["equal_tokens"] == 1 and exact["logit_error_rms"] == 0 and exact["psnr_db"] is None
    assert 0.5 < rough["equal_tokens"] < 1 and 1e-3 < rough["logit_error_rms"] < 0.1
    assert len(rough["equal_tokens_by_scale"]) == len(model.config.scales)
    assert rough["psnr_of_same_tokens_db"] > 40 and another["seed"] == 1
    assert exact["frechet_to_reference"] < 1e-9 < 0.01 < another["frechet_to_reference"]
    assert (rough["backend"], rough["dtype"], another["dtype"]) == ("cpu", "bfloat16", "float32")

    first, second = (
        mvar.generate(model, tokenizer, labels, **digits.SAMPLING, seed=0, backend=backend, dtype=dtype)
        for backend, dtype in (("reference", torch.float32), ("cpu", torch.bfloat16))
    )
    equal = (first.tokens == second.tokens).double()
    start = 0
    for tokens, share in zip(model.config.scales, rough["equal_tokens_by_scale"], strict=True):
        assert share == pytest.approx(float(equal[:, start : start + tokens].mean()))
        start += tokens
    error = (to_bytes(first.images).double() - to_bytes(second.images)).square().mean()
    assert rough["psnr_db"] == pytest.approx(10 * math.log10(255**2 / float(error)))
    inputs = tokenizer.teacher_forcing_inputs(first.tokens)
    with torch.no_grad():
        logits = model(labels, inputs)
        wrong = prepared_model(model, torch.bfloat16)(labels, inputs) - logits
    spread = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
    assert rough["logit_error_rms"] == pytest.approx(float(wrong.square().mean().sqrt() / spread), rel=0.05)


def test_quality_backends_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cpu": None, "triton": "no GPU", "reference": None}
    monkeypatch.setattr(bench_quality, "backends", lambda: there)
    monkeypatch.setattr(bench_quality, "DEVICE", torch.device("cuda"))
    wanted = [
        (name, dtype) for name in ("reference", "cpu") for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert list(bench_quality.backends_and_dtypes()) == wanted
    assert bench_quality.psnr_db(torch.zeros(4), torch.full((4,), 0.02), 2) == pytest.approx(40)


def test_scaling_counts() -> None:
    """Compares d16 at 256 with FLOP counts by part, then checks how each algorithm scales."""
    rows = {(row["side"], row["resolution"]): row for row in scaling.counted()}
    by_part = 834.903932928e9 + 14.479261696e9 + 12.1438208e9  # linear layers, attention, mixer
    assert rows[OURS, 256]["flops"] == pytest.approx(by_part, rel=1e-3)  # adaLN rows are shared
    tokens = rows[OURS, 1024]["tokens"] / rows[OURS, 256]["tokens"]
    carried = {name: [rows[name, r]["state_bytes"] for r in (256, 1024)] for name in (OURS, VAR)}
    assert carried[OURS][0] == carried[OURS][1]
    assert carried[VAR][1] / carried[VAR][0] == pytest.approx(tokens, rel=1e-3)
    assert all(rows[PUBLIC, r]["flops"] > 1.3 * rows[OURS, r]["flops"] for r in (256, 512, 1024))


# 1 GFLOP on 0.1 GB: 10 FLOP per byte.
ROW = {"case": "c", "dtype": "float32", "pass": "forward", "flops": 1e9, "moved_bytes": 1e8}


def test_roofline_point() -> None:
    """An op takes 2 ms and a copy 1 ms: 500 of 1,000 GFLOP/s, or of 800 if matmuls reach no more."""
    row = ROW | {"median_ms": {"mvar cpu": 2.0, "mvar other": 3.0, "eager": 1.5, "copy": 1.0}}
    free = roofline.point("op", row, {"bfloat16": 100.0})
    assert free and (free.intensity, free.gflops, free.limit_gflops) == pytest.approx((10, 500, 1000))
    bound = roofline.point("op", row, {"float32": 800.0})
    assert bound and (bound.gflops, bound.limit_gflops) == pytest.approx((500, 800))
    assert roofline.fastest_copy_gbps({"op": [row]}) == pytest.approx(100)
    wrong = ROW | {"median_ms": {"eager": 1.5, "copy": 1.0}}
    assert roofline.points({"op": [wrong, row]}, {}) == [free]
    table = ops.comparison({"op": [row, wrong]}, {"float32": 800.0})
    assert "| `op` c | float32 forward | 2, 3 | 62 % | 1 | eager 1.5 (0.8×) |" in table
    assert "| wrong, not timed | – | 1 | eager 1.5 |" in table


def test_generated_plots_are_shown() -> None:
    """The plot files are exactly those that the results page shows."""
    shown = re.findall(r"!\[.*\]\((.+)\)", pages.BENCHMARKS.read_text())
    assert "roofline_amd_epyc_family_26_avx512.png" in shown
    assert {path.name for path in pages.GENERATED.glob("*.png")} == set(shown)


def test_results_of_two_cpus_in_one_folder() -> None:
    """Each CPU model has a separate folder and heading, and a folder with results of two models raises an error."""

    def results(*models: str) -> dict[str, Any]:
        machine = {"device": "cpu", "processor": "AMD EPYC", "threads": 2, "torch": "2.13.0"}
        return {f"op{i}": {"machine": machine | {"cpu_model": model}} for i, model in enumerate(models)}

    one, two = "AMD EPYC, family 25, avx2", "AMD EPYC, family 26, avx512"
    assert pages.machine("a", results(one, one)) == f"{one}, 2 threads, torch 2.13.0"
    with pytest.raises(ValueError, match=f"a: has figures of {one} and of {two}; give each a folder"):
        pages.machine("a", results(one, two))


def test_result_folders_match_cpus() -> None:
    for path in RESULTS.glob("*/*.json"):
        machine = json.loads(path.read_text())["machine"]
        assert machine["device"] != "cpu" or path.parent.name == slug(machine["cpu_model"])
