"""bench_generation with a small model on the CPU: every line of it but CUDA's own, because a GPU's time is short."""

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
from benchmarks.analysis.flops import model_flops
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
    """What the suite last wrote; the machine's own rates and other processes are left out."""
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


def test_every_side_has_a_row_with_all_that_its_figures_depend_on(written: dict[str, Any], uncompiled: None) -> None:
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
    assert "times have not been measured yet" in text  # of d16


def test_a_side_that_fails_is_left_out_and_named(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = eager_generation.generate

    def fails(*args: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):  # and not while the engine is checked
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more of that")
        return theirs(*args, **options)

    monkeypatch.setattr(eager_generation, "generate", fails)
    run([Configuration(1, 256, 1, "bfloat16", ALL), Configuration(1, 256, 2, "bfloat16", (OURS,))])
    first, second = written["sizes"]
    assert first["left_out"] == {PUBLIC.name: "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"}
    assert [row["side"] for row in first["rows"]] == ["mvar", "VAR"] and len(second["rows"]) == 1
    (said,) = report.left_out(written["sizes"])
    assert said.endswith("Tried to allocate 20 GiB: public algorithm (d1, 256, batch 1, bfloat16).\n")


def test_a_peak_that_fails_leaves_the_time(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> float:
        raise RuntimeError("exit code -9")

    monkeypatch.setattr(bench_generation, "in_subprocess", killed)
    run([Configuration(1, 256, 1, "float32", (OURS,))])
    ((row,),) = (size["rows"] for size in written["sizes"])
    assert row["peak_gib"] is None and row["p50_ms"] > 0
    assert "| 1.00 | – |" in report.methods(written["sizes"])


def test_what_there_is_no_time_for_is_left_out_and_named(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (limits, bench_generation):
        monkeypatch.setattr(module, "MIN_SECONDS", 0.01)
    run([Configuration(1, 256, 1, "float32", (OURS,))])  # what is slow the first time
    monkeypatch.setattr(bench_generation, "check", lambda *_: {"mvar": {"wrong": None}})
    monkeypatch.setattr(bench_generation, "fastest_chunk", lambda *_: 32)
    monkeypatch.setattr(eager_generation, "generate", lambda *args, **options: time.sleep(60))
    run([Configuration(1, 256, 1, "float32", (OURS, PUBLIC)), Configuration(2, 256, 1, "float32", (OURS,))], seconds=4)
    first, second = written["sizes"]
    assert first["left_out"][PUBLIC.name].startswith("TimeoutError: not done within")
    assert second["left_out"] == {"mvar": "TimeoutError: no time left"} and second["rows"] == []


def test_a_wrong_side_is_not_timed(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine on one backend samples nonsense: its other methods and the public algorithm are timed."""
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


def test_a_compiled_rival_that_is_wrong_is_not_timed(
    written: dict[str, Any], uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, compiled = eager_generation.block, METHODS["public-compiled"]

    def forgets_the_past(
        layers: Any, x: Tensor, cond: Tensor, cache: Tensor, attend: Any, chunk: int
    ) -> tuple[Tensor, Tensor]:
        return true(layers, x, cond, None, attend, chunk)

    for module in (methods, checks):
        monkeypatch.setattr(module, "compiled_block", lambda: forgets_the_past)
    run([Configuration(1, 256, 1, "bfloat16", (PUBLIC, compiled))])
    (size,) = written["sizes"]
    assert [row["side"] for row in size["rows"]] == [PUBLIC.name]
    assert size["left_out"][compiled.name].startswith("wrong: a block is off by")


def test_a_side_without_float32_is_checked_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the reference; "cuda" stands for the CPU's kernels here."""
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


def test_a_share_counts_up_to_the_first_scale_that_differs() -> None:
    tokens, others = torch.zeros(1, 14), torch.zeros(1, 14)
    assert checks.share(tokens, others, (1, 4, 9)) == 1
    others[:, 2], others[:, 5:] = 1, 1
    assert checks.share(tokens, others, (1, 4, 9)) == pytest.approx(0.8)


def test_a_second_run_measures_what_is_missing(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [Configuration(1, 256, batch, "float32", (OURS, PUBLIC)) for batch in (1, 2)]
    run(sizes[:1])
    before = copy.deepcopy(written)
    monkeypatch.setattr(bench_generation, "check", lambda *_: {})  # what was checked is known
    run(sizes, before=copy.deepcopy(before))
    first, second = written["sizes"]
    assert first == before["sizes"][0] and second["batch"] == 2 and len(second["rows"]) == 2
    partly = copy.deepcopy(written)
    partly["sizes"][1] |= {"rows": second["rows"][:1], "left_out": {PUBLIC.name: limits.NO_TIME}}
    partly["sizes"][0]["rows"][0]["peak_gib"] = None
    run(sizes, before=partly)
    assert [size["left_out"] for size in written["sizes"]] == [{}, {}] and len(written["sizes"][1]["rows"]) == 2
    assert written["sizes"][0] == first  # with its peak
    known = copy.deepcopy(written)
    known["sizes"][1] |= {"rows": second["rows"][:1], "left_out": {PUBLIC.name: "OutOfMemoryError: 20 GiB"}}
    written.clear()
    run(sizes, before=known)
    assert not written  # what failed before would fail again


@pytest.mark.parametrize("flag", ["--depths", "--batches", "--rounds"])
def test_sizes_are_positive(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(flag, "0")
    assert f"{flag}: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_on_a_gpu_the_public_scan_multiplies_in_tf32_beside_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_plan_is_the_product_of_what_is_asked_for() -> None:
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


def test_the_plans_have_every_size() -> None:
    """GPU: depth 16, 24 and 30, 256 and 512, batch 1, 8, 25 and 64, by model; CPU: both dtypes; both: one at 1024."""
    on_gpu = {size[:3] for size in PLANS["cuda"] if OURS in size.methods} - {(20, 256, 64)}  # which papers report
    assert on_gpu == {(d, r, b) for d in (16, 24, 30) for r in (256, 512) for b in (1, 8, 25, 64)} | {(16, 1024, 1)}
    on_cpu = {size[:3] for size in PLANS["cpu"]}
    assert on_cpu == {(16, 256, 1), (16, 256, 8), (12, 256, 1), (16, 512, 1), (16, 1024, 1)}
    grown = {size.resolution for size in PLANS["cpu"] if size[:1] + size[2:4] == (16, 1, "float32")}
    assert grown == {256, 512, 1024}


def test_a_process_of_its_own_says_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generation, "random_pair", tiny_pair)
    for method in (OURS, PUBLIC):
        assert 0.1 < bench_generation.peak_of(Configuration(1, 256, 2, "bfloat16", (method,)), method, 32) < 64


def linear_flops(method: Method, pair: Pair) -> tuple[int, int]:
    """Of the linear layers and of batched products in a generation of one image, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        generate(method, pair, torch.tensor([3]), FLOAT32, chunk=CHUNKS[0])
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return found.get("aten.addmm", 0) + found.get("aten.mm", 0), found.get("aten.bmm", 0)


@pytest.mark.parametrize("name", ["mvar", "var", "public"])
def test_flops_of_linear_layers_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of two narrow blocks, whose embeddings and head modulation, not counted, are added by hand."""
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
    # torch makes the engine's word embedding a batched product; its ops, as one operator each, are not counted.
    found = linear_flops(method, pair)[0] if public_side else sum(linear_flops(method, pair))
    assert found == model_flops(method.algorithm, config) - ops + uncounted


def test_flops_of_attention_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(methods, "public_attention", lambda dtype: ("matmul", attend))
    monkeypatch.setattr(eager_generation, "mamba", lambda layer, x, chunk: x)
    pair = tiny_pair(2, 256, "mvar")
    scales = pair[0].config.scales
    case = Case("", {"B": 2, "H": 2, "D": 64}, {"scales": scales, "pattern": "diagonal"})
    assert linear_flops(PUBLIC, pair)[1] == 2 * SPECS["scale_attention"].work(case, 2)[1] > 0


def test_flops_of_a_side_have_its_decoder() -> None:
    """The engine doubles maps by transposed convolutions, with fewer products; the public algorithm does not."""
    deeper = mvar.TokenizerConfig((1, 2, 3), num_codes=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attention=False)
    model, tokenizer = mvar.build(1, tokenizer=deeper)
    with FlopCounterMode(display=False) as counter:
        tokenizer.decode_features(torch.randn(1, 32, 3, 3))
    decoders = {s: flops_per_image(s, (model, tokenizer)) - model_flops(s.algorithm, model.config) for s in ALL}
    assert decoders[PUBLIC] == counter.get_total_flops() > decoders[OURS] > 0
    assert flops_per_image(METHODS["tokens"], (model, tokenizer)) == model_flops(OURS.algorithm, model.config)


def test_a_profile_has_every_part() -> None:
    found = profile.profile_gpu(*tiny_pair(1, 256, "mvar"), torch.arange(1), torch.float32)
    spent = found["parts_ms"]
    assert sum(spent.values()) == pytest.approx(found["total_ms"])
    assert all(spent[name] > 0 for name in ("linear layers", "attention", "mixer", "adaLN", "drawing", "decoder"))
    described = Configuration(1, 256, 2, "bfloat16", ALL).sizes()
    text = report.by_part([described | found])
    assert "| gaps |" in text and "lower bound" not in text and "of 8192×8192 matrices" in text


def test_targets_are_shown_beside_what_was_measured() -> None:
    def row(batch: int, method: Method, ms: float) -> dict[str, Any]:
        size = Configuration(16, 256, batch, "bfloat16", ()).sizes()
        return size | {"side": method.name, "p50_ms": ms, "images_per_second": 1e3 * batch / ms}

    rows = [row(25, OURS, 200.0), row(25, PUBLIC, 1000.0), row(1, OURS, 20.0)]
    timelines = [{"batch": 64, "linear_tflops": 400.0, "product_tflops": 800.0}]
    said, _ = report.targets(rows, timelines, "nvidia_h200")
    assert [line.rsplit(": ")[-1] for line in said.splitlines()[2:]] == ["5.0 times", "20.0 ms", "50%"]
    said, _ = report.targets([], [], "nvidia_h200")
    assert said.count(": not measured") == 3 and report.targets(rows, timelines, "cpu") == []


def test_published_figures_stand_beside_those_of_the_same_size() -> None:
    """Of the paper's batch, or where it names none of the fastest; with the decoder beside with it."""

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


def test_without_its_decoder_a_method_generates_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, labels = tiny_pair(1, 256, "mvar"), torch.tensor([3])
    decoded = generate(METHODS["mvar"], pair, labels, FLOAT32)
    monkeypatch.setattr(Decoder, "forward", lambda self, f: pytest.fail("decoded"))
    assert torch.equal(generate(METHODS["tokens"], pair, labels, FLOAT32), decoded)


def test_scaling_shows_what_was_measured() -> None:
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
