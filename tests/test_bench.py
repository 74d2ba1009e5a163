"""`mvar bench` from a checkout and from an installed package, and what the suites compute."""

import base64
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth, page, parity
from mvar import bench, digits
from mvar.cli import SUITES, main
from mvar.evaluate import moments
from tests.test_cli import fails


def test_every_suite_is_there() -> None:
    assert all((bench.ROOT / "benchmarks" / f"{suite}.py").is_file() for suite in SUITES)


def test_a_suite_runs_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str]) -> Any:
        assert cwd == bench.ROOT and env.items() >= bench.ALLOCATOR.items()
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, 3 if command[2] == "benchmarks.ops" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    main(["bench", "--suite", "parity", "--report", "--", "--count", "2"])
    assert ran == [["benchmarks.parity", "--count", "2"], ["benchmarks.report"]]
    assert "suite ops ended with exit code 3" in fails(capsys, "bench", "--suite", "ops", "--report")
    assert ran[2:] == [["benchmarks.ops"]]


def test_without_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert "in mvar's repository, not in the installed package" in fails(capsys, "bench", "--suite", "parity")


def test_parity_tells_a_worse_set_from_an_equal_one() -> None:
    """Real digits in two halves as two sets; then one with noise on it."""
    train, _ = digits.load()
    judge = parity.digit_judge()
    pixels = ((train.images[:600].permute(0, 2, 3, 1) + 1) * 127.5).to(torch.uint8)
    reference = judge.features(pixels)
    same = parity.compare_features(judge, reference, reference)
    assert same["costs"] == 0 and same["costs_interval"] == [0, 0] and same["frechet_to_reference"] < 1e-9
    noisy = (pixels.int() + torch.randint(-90, 90, pixels.shape)).clamp(0, 255).to(torch.uint8)
    worse = parity.compare_features(judge, judge.features(noisy), reference)
    assert worse["costs_interval"][0] > 0 and worse["frechet_to_reference"] > 0.1
    equal = parity.compare_features(judge, judge.features(pixels[:300]), judge.features(pixels[300:]))
    low, high = equal["costs_interval"]
    assert low < 0 < high
    assert moments(reference).mean.dtype == torch.float64


def test_parity_of_a_wrong_backend_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = digits.pretrained()
    labels = torch.arange(20) % 10
    monkeypatch.setattr(parity, "sides", lambda: iter([("reference", torch.float32), ("cpu", torch.bfloat16)]))
    monkeypatch.setattr(parity, "RESAMPLES", 2)
    rows = parity.measure(model, tokenizer, labels, dict(digits.DRAWING), parity.digit_judge(), 0)
    exact, rough, another = rows
    assert exact["equal_tokens"] == 1 and exact["logit_error_rms"] == 0 and exact["psnr_db"] is None
    assert 0.5 < rough["equal_tokens"] < 1 and 1e-3 < rough["logit_error_rms"] < 0.1
    assert len(rough["equal_tokens_by_scale"]) == len(model.config.scales)
    assert rough["psnr_of_same_tokens_db"] > 40 and another["seed"] == 1
    assert parity.psnr_db(torch.zeros(4), torch.full((4,), 0.02), 2) == pytest.approx(40)


def test_growth_counts_what_grows() -> None:
    """d16 at 256 against the README's counts of a generation by part; then how each side grows."""
    rows = {(row["side"], row["resolution"]): row for row in growth.counted()}
    by_part = 834.903932928e9 + 14.479261696e9 + 12.1438208e9  # linear layers, attention, mixer
    assert rows[growth.OURS, 256]["flops"] == pytest.approx(by_part, rel=1e-3)  # its adaLN shares a row
    tokens = rows[growth.OURS, 1024]["tokens"] / rows[growth.OURS, 256]["tokens"]
    remembered = {side: [rows[side, r]["state_bytes"] for r in (256, 1024)] for side in (growth.OURS, growth.VAR)}
    assert remembered[growth.OURS][0] == remembered[growth.OURS][1]
    assert remembered[growth.VAR][1] / remembered[growth.VAR][0] == pytest.approx(tokens, rel=1e-3)
    assert all(rows[growth.PUBLIC, r]["flops"] > 1.3 * rows[growth.OURS, r]["flops"] for r in (256, 512, 1024))


def test_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    text = "A `code` & [link](docs/x.md).\n\n| a | b |\n|---|---|\n| 1 < 2 | – |\n\n![what it shows](a.png)\n"
    made = page.page("Title", {"cpu": text}, tmp_path)
    assert "<code>code</code> &amp; link." in made and "<th>a</th><th>b</th>" in made
    assert "<tr><td>1 &lt; 2</td><td>–</td></tr>" in made
    assert f"data:image/png;base64,{base64.b64encode(b'picture').decode()}" in made and 'alt="what it shows"' in made
    assert "|" not in made and 'src="docs' not in made and "http" not in made
