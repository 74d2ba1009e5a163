"""Tests bench_generation with a small model on the CPU: all code except the CUDA-only lines, as GPU time is scarce."""

import argparse
import copy
import itertools
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mvar
import mvar.inference.model
from benchmarks import bench_generation
from benchmarks.analysis import profile, roofline
from benchmarks.analysis.flops import decoder_norm_bytes, model_flops
from benchmarks.baselines import eager_generation
from benchmarks.common import limits
from benchmarks.generation import checks, methods, plan
from benchmarks.generation.methods import CHUNKS, METHODS, Method, Pair, flops_per_image, generate
from benchmarks.generation.plan import ALL, PLANS, Configuration
from benchmarks.report import generation as report
from benchmarks.report import published
from mvar.inference.api import PendingResult
from mvar.inference.sampling import SamplingParams
from mvar.models.autoencoder import Decoder
from mvar_kernels.dispatch import BackendError
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case

pytestmark = pytest.mark.slow

TINY = mvar.TokenizerConfig((1, 2, 3), num_codes=1024, ch=32, ch_mult=(1,), num_res_blocks=1, attention=False)
OURS, PUBLIC = METHODS["mvar"], METHODS["public"]
FLOAT32 = torch.float32


def tiny_pair(depth: int, resolution: int, architecture: str) -> Pair:
    return methods.random_pair(depth, resolution, architecture, TINY)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results last written by the suite, with the machine's peak rates and subprocesses replaced by constants."""
    files: dict[str, Any] = {}
    monkeypatch.setattr(bench_generation, "save", lambda name, rows: files.update(copy.deepcopy(rows)))
    monkeypatch.setattr(bench_generation, "TIMING_SECONDS", {"cpu": 0.0})
    monkeypatch.setattr(bench_generation, "in_subprocess", lambda *arguments: 1.5)
    for module in (profile, roofline):
        monkeypatch.setattr(module, "matmul_tflops", lambda dtype: 0.1)
    monkeypatch.setattr(profile, "copy_gbps", lambda: 10.0)
    roofline.peak_tflops.cache_clear()
    return files


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.compile(eager_generation.block, backend="eager")
    for module in (methods, checks):
        monkeypatch.setattr(module, "compiled_block", lambda: block)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)


def run(sizes: list[Configuration], seconds: float = 1000, before: dict[str, Any] | None = None) -> None:
    bench_generation.Suite(tiny_pair, seconds, before).run(sizes)


def test_all_methods_have_complete_rows(written: dict[str, Any], uncompiled: None) -> None:
    every = (*METHODS.values(), OURS.on("reference"))
    run(
        [Configuration(2, 256, 2, "bfloat16", every, profile=True), Configuration(2, 256, 1, "bfloat16", ALL, rounds=3)]
    )
    first, second = written["sizes"]
    assert first["left_out"] == {} and [row["side"] for row in first["rows"]] == [method.name for method in every]
    assert [row["rounds"] for row in second["rows"]] == [3, 3, 3]
    pairs = {name: tiny_pair(2, 256, name) for name in ("mvar", "var")}
    for method, row in zip(every, first["rows"], strict=True):
        pair = pairs[method.architecture]
        assert row["tokens"] == 14 and row["parameters"] == sum(p.numel() for p in pair[0].parameters())
        assert row["flops"] == flops_per_image(method, pair) and row["peak_gib"] == 1.5
        assert (row["depth"], row["resolution"], row["batch"], row["dtype"]) == (2, 256, 2, "bfloat16")
        assert row["images_per_second"] == pytest.approx(2e3 / row["p50_ms"]) and row["p90_ms"] >= row["p50_ms"] > 0
        assert row["share_of_peak"] == pytest.approx(2 * row["flops"] / (row["p50_ms"] / 1e3) / 1e11)
        assert row["backend"] == {True: None, False: method.backend}[method.algorithm == "public algorithm"]
        assert (row["scan_chunk"] in CHUNKS) == (method.algorithm == "public algorithm")
    (spent,) = written["by_part"]
    assert sum(spent["parts_ms"].values()) == pytest.approx(spent["total_ms"]) and spent["batch"] == 2
    text = "\n".join(report.sections(json.loads(json.dumps(written)), "cpu").values())
    assert text.count("| d2 at 256×256 | 2 | bfloat16 |") == len(every) and "| linear layers |" in text
    assert "times have not been measured yet" in text  # d16 was not run


def test_failed_method_is_reported(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = eager_generation.generate

    def fails(*args: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):  # not while the engine's tokens are checked
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more of that")
        return theirs(*args, **options)

    monkeypatch.setattr(eager_generation, "generate", fails)
    run([Configuration(1, 256, 1, "bfloat16", ALL), Configuration(1, 256, 2, "bfloat16", (OURS,))])
    first, second = written["sizes"]
    assert first["left_out"] == {PUBLIC.name: "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"}
    assert [row["side"] for row in first["rows"]] == ["mvar", "VAR"] and len(second["rows"]) == 1
    (said,) = report.left_out(written["sizes"])
    assert said.endswith("Tried to allocate 20 GiB: public algorithm (d1, 256, batch 1, bfloat16).\n")


def test_failed_peak_memory_keeps_time(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> float:
        raise RuntimeError("exit code -9")

    monkeypatch.setattr(bench_generation, "in_subprocess", killed)
    run([Configuration(1, 256, 1, "float32", (OURS,))])
    ((row,),) = (size["rows"] for size in written["sizes"])
    assert row["peak_gib"] is None and row["p50_ms"] > 0
    assert "| 1.00 | – |" in report.methods(written["sizes"])


def test_timeout_is_reported(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (limits, bench_generation):
        monkeypatch.setattr(module, "MIN_SECONDS", 0.01)
    run([Configuration(1, 256, 1, "float32", (OURS,))])  # warm up, as the first run is slow
    monkeypatch.setattr(bench_generation, "check", lambda *_: {"mvar": {"wrong": None}})
    monkeypatch.setattr(bench_generation, "fastest_chunk", lambda *_: 32)
    monkeypatch.setattr(eager_generation, "generate", lambda *args, **options: time.sleep(60))
    run([Configuration(1, 256, 1, "float32", (OURS, PUBLIC)), Configuration(2, 256, 1, "float32", (OURS,))], seconds=4)
    first, second = written["sizes"]
    assert first["left_out"][PUBLIC.name].startswith("TimeoutError: not done within")
    assert second["left_out"] == {"mvar": "TimeoutError: no time left"} and second["rows"] == []


def test_wrong_method_is_not_timed(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the engine returns wrong tokens on one backend, only its other methods and the public algorithm are timed."""
    true = methods.launch

    def nonsense(model: Any, tokenizer: Any, labels: Any, how: SamplingParams, **options: Any) -> PendingResult:
        pending = true(model, tokenizer, labels, how, **options)
        tokens = pending.generated.tokens + (how.backend == "reference")
        return replace(pending, generated=replace(pending.generated, tokens=tokens))

    monkeypatch.setattr(methods, "launch", nonsense)
    run([Configuration(1, 256, 1, "float32", (OURS, OURS.on("reference"), PUBLIC))])
    (size,) = written["sizes"]
    assert [row["side"] for row in size["rows"]] == ["mvar", PUBLIC.name]
    assert size["left_out"] == {"mvar, reference": "wrong: 0.0% of its greedy tokens are those of: public algorithm"}
    numbers = itertools.count()
    monkeypatch.setattr(checks, "generate", lambda *_, **options: torch.full((1, 14), next(numbers)))
    run(
        [
            Configuration(
                1, 256, 1, "float32", (OURS, METHODS["compiled-decoder"], METHODS["no-graph"], PUBLIC), profile=True
            )
        ]
    )
    (size,) = written["sizes"]
    assert [row["side"] for row in size["rows"]] == [PUBLIC.name] and written["by_part"] == []


def test_wrong_compiled_baseline_is_not_timed(
    written: dict[str, Any], uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, compiled = eager_generation.block, METHODS["public-compiled"]

    def block_without_cache(
        layers: Any, x: Tensor, cond: Tensor, cache: Tensor, attend: Any, chunk: int
    ) -> tuple[Tensor, Tensor]:
        return true(layers, x, cond, None, attend, chunk)

    for module in (methods, checks):
        monkeypatch.setattr(module, "compiled_block", lambda: block_without_cache)
    run([Configuration(1, 256, 1, "bfloat16", (PUBLIC, compiled))])
    (size,) = written["sizes"]
    assert [row["side"] for row in size["rows"]] == [PUBLIC.name]
    assert size["left_out"][compiled.name].startswith("wrong: a block is off by")


def test_check_without_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method without float32 is compared with the reference in 16 bits; "cuda" runs the CPU kernels here."""
    true = methods.launch

    def without_float32(*args: Any, dtype: torch.dtype, **options: Any) -> PendingResult:
        model, tokenizer, labels, how = args
        if (how.backend, dtype) == ("cuda", FLOAT32):
            raise BackendError("dtype float32 is not bfloat16 or float16")
        backend = "cpu" if how.backend == "cuda" else how.backend
        return true(model, tokenizer, labels, replace(how, backend=backend), dtype=dtype, **options)

    monkeypatch.setattr(methods, "launch", without_float32)
    (found,) = checks.check([OURS.on("cuda")], {}, lambda name: tiny_pair(1, 256, name)).values()
    assert (found["dtype"], found["as"], found["wrong"]) == ("bfloat16", "mvar, reference", None)


def test_share_stops_after_first_different_scale() -> None:
    tokens, others = torch.zeros(1, 14), torch.zeros(1, 14)
    assert checks.share(tokens, others, (1, 4, 9)) == 1
    others[:, 2], others[:, 5:] = 1, 1
    assert checks.share(tokens, others, (1, 4, 9)) == pytest.approx(0.8)


def test_second_run_measures_missing_rows(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [Configuration(1, 256, batch, "float32", (OURS, PUBLIC)) for batch in (1, 2)]
    run(sizes[:1])
    before = copy.deepcopy(written)
    monkeypatch.setattr(bench_generation, "check", lambda *_: {})  # results of the check are kept
    run(sizes, before=copy.deepcopy(before))
    first, second = written["sizes"]
    assert first == before["sizes"][0] and second["batch"] == 2 and len(second["rows"]) == 2
    partly = copy.deepcopy(written)
    partly["sizes"][1] |= {"rows": second["rows"][:1], "left_out": {PUBLIC.name: limits.NO_TIME}}
    partly["sizes"][0]["rows"][0]["peak_gib"] = None
    run(sizes, before=partly)
    assert [size["left_out"] for size in written["sizes"]] == [{}, {}] and len(written["sizes"][1]["rows"]) == 2
    assert written["sizes"][0] == first  # including its peak memory
    known = copy.deepcopy(written)
    known["sizes"][1] |= {"rows": second["rows"][:1], "left_out": {PUBLIC.name: "OutOfMemoryError: 20 GiB"}}
    written.clear()
    run(sizes, before=known)
    assert not written  # previous failures are not retried


@pytest.mark.parametrize("flag", ["--depths", "--batches", "--rounds"])
def test_sizes_must_be_positive(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(flag, "0")
    assert f"{flag}: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_public_precision_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "DEVICE", torch.device("cuda"))
    before, found = torch.get_float32_matmul_precision(), []
    for dtype in (torch.bfloat16, FLOAT32):
        with methods.public_precision(dtype):
            found.append(torch.get_float32_matmul_precision())
    assert found == ["high", before] and torch.get_float32_matmul_precision() == before


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_flags(parser)
    return parser.parse_args(flags)


def test_plan_is_product_of_flags() -> None:
    assert plan.configurations(parsed(), "cpu") == list(PLANS["cpu"])
    assert {size.rounds for size in plan.configurations(parsed("--rounds", "9"), "cuda")} == {9}
    flags = ("--depths", "2", "4", "--batches", "1", "3", "--dtypes", "fp32", "bf16", "--backends", "auto", "reference")
    sizes = plan.configurations(parsed(*flags, "--methods", "var", "mvar", "--rounds", "2"), "cpu")
    expected = [(d, 256, b, t) for d in (2, 4) for b in (1, 3) for t in ("float32", "bfloat16")]
    assert [size[:4] for size in sizes] == expected
    assert {size.methods for size in sizes} == {(METHODS["var"], OURS, OURS.on("reference"))}
    assert all(size.rounds == 2 for size in sizes)
    assert plan.configurations(parsed("--resolutions", "512"), "cpu") == [
        Configuration(16, 512, 1, "bfloat16", plan.ALL[:3])
    ]


def test_default_plans() -> None:
    """GPU: depths 16, 24, 30 at 256 and 512, batches 1, 8, 25, 64; CPU: both dtypes; both devices: one size at 1024."""
    on_gpu = {size[:3] for size in PLANS["cuda"] if OURS in size.methods} - {(20, 256, 64)}  # a size reported by papers
    assert on_gpu == {(d, r, b) for d in (16, 24, 30) for r in (256, 512) for b in (1, 8, 25, 64)} | {(16, 1024, 1)}
    on_cpu = {size[:3] for size in PLANS["cpu"]}
    assert on_cpu == {(16, 256, 1), (16, 256, 8), (12, 256, 1), (16, 512, 1), (16, 1024, 1)}
    grown = {size.resolution for size in PLANS["cpu"] if size[:1] + size[2:4] == (16, 1, "float32")}
    assert grown == {256, 512, 1024}


def test_peak_memory_in_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generation, "random_pair", tiny_pair)
    for method in (OURS, PUBLIC):
        assert 0.1 < bench_generation.peak_of(Configuration(1, 256, 2, "bfloat16", (method,)), method, 32) < 64


def linear_flops(method: Method, pair: Pair) -> tuple[int, int]:
    """FLOPs of linear layers and of batched matrix products in the generation of one image, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        generate(method, pair, torch.tensor([3]), FLOAT32, chunk=CHUNKS[0])
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return found.get("aten.addmm", 0) + found.get("aten.mm", 0), found.get("aten.bmm", 0)


@pytest.mark.parametrize("name", ["mvar", "var", "public"])
def test_linear_flops_match_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a model of two narrow blocks; its uncounted embeddings and head modulation are added by hand."""
    monkeypatch.setattr(
        mvar.inference.model, "can_prepack", lambda device, dtype: False
    )  # torch does not count packed layers
    method = METHODS[name]
    pair = tiny_pair(2, 256, method.architecture)
    config = pair[0].config
    C, H, scales = config.channels, config.heads, config.scales
    ours, public_side = method.algorithm == "mvar", method.algorithm == "public algorithm"
    ops = 0
    for k, new in enumerate(scales, 1):
        seen = sum(scales[:k])
        pattern = {"scales": scales[:k], "pattern": "causal", "query_scales": 1}
        if method.algorithm != "VAR":
            pattern = {"scales": (new,), "pattern": "diagonal"}
            sizes = {"B": 2, "L": new if ours else seen, "C": C, "H": 2 * H, "P": 64, "N": 64}
            ops += config.depth * SPECS["mamba2_mixer"].work(Case("", sizes, {"scales": None}), 2)[1]
        ops += config.depth * SPECS["scale_attention"].work(Case("", {"B": 2, "H": H, "D": 64}, pattern), 2)[1]
    uncounted = 2 * (sum(scales) - scales[0]) * config.code_dim * C
    uncounted += (len(scales) if public_side else 1) * 2 * 2 * C * 2 * C
    # torch computes the engine's word embedding as a batched product, and does not count the engine's custom operators.
    found = linear_flops(method, pair)[0] if public_side else sum(linear_flops(method, pair))
    assert found == model_flops(method.algorithm, config) - ops + uncounted


def test_attention_flops_match_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(methods, "public_attention", lambda dtype: ("matmul", attend))
    monkeypatch.setattr(eager_generation, "mamba", lambda layer, x, chunk: x)
    pair = tiny_pair(2, 256, "mvar")
    scales = pair[0].config.scales
    case = Case("", {"B": 2, "H": 2, "D": 64}, {"scales": scales, "pattern": "diagonal"})
    assert linear_flops(PUBLIC, pair)[1] == 2 * SPECS["scale_attention"].work(case, 2)[1] > 0


def test_flops_include_decoder() -> None:
    """The engine upsamples by transposed convolutions, which need fewer FLOPs than the public algorithm's decoder."""
    deeper = mvar.TokenizerConfig((1, 2, 3), num_codes=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    model, tokenizer = mvar.build(1, tokenizer=deeper)
    with FlopCounterMode(display=False) as counter:
        tokenizer.decode_features(torch.randn(1, 32, 3, 3))
    decoders = {s: flops_per_image(s, (model, tokenizer)) - model_flops(s.algorithm, model.config) for s in ALL}
    assert decoders[PUBLIC] == counter.get_total_flops() > decoders[OURS] > 0
    assert flops_per_image(METHODS["tokens"], (model, tokenizer)) == model_flops(OURS.algorithm, model.config)


def test_decoder_norm_bytes() -> None:
    """8 GroupNorms at 3×3 and 5 at 6×6, 32 channels each."""
    deeper = mvar.TokenizerConfig((1, 2, 3), num_codes=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    assert decoder_norm_bytes(deeper, batch=3, itemsize=2) == 3 * 2 * 2 * 32 * (8 * 3**2 + 5 * 6**2)


def test_profile_has_all_parts() -> None:
    found = profile.profile_gpu(*tiny_pair(1, 256, "mvar"), torch.arange(1), torch.float32)
    spent = found["parts_ms"]
    assert sum(spent.values()) == pytest.approx(found["total_ms"])
    parts = "linear layers", "convolutions", "attention", "mixer", "adaLN", "drawing", "quantizer", "decoder"
    assert all(spent[name] > 0 for name in parts)
    described = Configuration(1, 256, 2, "bfloat16", ALL).sizes()
    text = report.by_part([described | found])
    outside = sum(ms for name, ms in spent.items() if name not in ("linear layers", "convolutions"))
    assert f"| all but linear layers and convolutions | {outside / found['total_ms']:.1%} |" in text
    assert "| gaps |" in text and "lower bound" not in text and "of 8192×8192 matrices" in text


def test_report_targets() -> None:
    def row(batch: int, method: Method, ms: float) -> dict[str, Any]:
        size = Configuration(16, 256, batch, "bfloat16", ()).sizes()
        return size | {"side": method.name, "p50_ms": ms, "images_per_second": 1e3 * batch / ms}

    rows = [row(25, OURS, 200.0), row(25, PUBLIC, 1000.0), row(1, OURS, 20.0)]
    timelines = [{"batch": 64, "linear_tflops": 400.0, "product_tflops": 800.0}]
    said, _ = report.targets(rows, timelines, "nvidia_h200")
    assert [line.rsplit(": ")[-1] for line in said.splitlines()[2:]] == ["5.0 times", "20.0 ms", "50%"]
    said, _ = report.targets([], [], "nvidia_h200")
    assert said.count(": not measured") == 3 and report.targets(rows, timelines, "cpu") == []


def test_published_comparison() -> None:
    """Uses the batch size of the paper, or the fastest one if the paper states none."""

    def row(batch: int, method: Method, rate: float) -> dict[str, Any]:
        return Configuration(16, 256, batch, "bfloat16", ()).sizes() | {"side": method.name, "images_per_second": rate}

    rows = [
        row(25, OURS, 200.0),
        row(64, OURS, 300.0),
        row(25, METHODS["tokens"], 900.0),
        row(64, METHODS["var"], 250.0),
    ]
    lines = published.comparison(rows).splitlines()
    arpg, markov = (next(line for line in lines if name in line) for name in ("d16, ARPG", "d16, Markov-VAR"))
    assert arpg.endswith("| with | 114.0 | 300.0 (batch 64) | 250.0 (batch 64) |")
    assert markov.endswith("| with | 82.5 | 200.0 (batch 25) | not measured |")  # 25 images in 0.303 s
    assert sum("| without |" in line for line in lines) == 3
    for named in (name for names in published.METHODS.values() for name in names):
        assert named in {method.name for method in METHODS.values()}


def test_tokens_only_method_generates_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, labels = tiny_pair(1, 256, "mvar"), torch.tensor([3])
    decoded = generate(METHODS["mvar"], pair, labels, FLOAT32)
    monkeypatch.setattr(Decoder, "forward", lambda self, f: pytest.fail("decoded"))
    assert torch.equal(generate(METHODS["tokens"], pair, labels, FLOAT32), decoded)


def test_report_scaling() -> None:
    def row(resolution: int, dtype: str, method: str, ms: float) -> dict[str, Any]:
        size = Configuration(16, resolution, 1, dtype, ()).sizes()
        tokens = {256: 680, 512: 2240}[resolution]
        return size | {"side": method, "p50_ms": ms, "peak_gib": None, "tokens": tokens}

    rows = [row(256, "bfloat16", "mvar", 1e3), row(256, "float32", "mvar", 2e3), row(512, "float32", "VAR", 4e3)]
    measured = report.one_image([*rows, rows[0] | {"batch": 8}, rows[0] | {"depth": 12}])
    assert measured == rows[1:]
    text = report.scaling(measured)
    assert "| 680 | mvar | 0.86 | 17 | 2 | not measured |" in text
    assert "| 2240 | VAR | 2.25 | 294 | 4 | not measured |" in text
    assert text.count("| not measured | not measured |") == 7
    found = list(report.sections(None, "cpu").values())
    assert found[0] == report.NOT_MEASURED and "not been measured yet" in found[1] and len(found) == 2
