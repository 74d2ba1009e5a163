"""Tests what Triton kernels compiled for H100 cost: narrow loads, tensor-core instructions, instructions in all.

One process compiles the ops of d16 and of the decoder in bfloat16, or takes from Triton's cache what
test_compile_ahead.py compiled.
"""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest

from tests.helpers.compiler import compiler_environment
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
OPS = ("mamba2_mixer", "ssd_scan", "scale_attention", "adaln", "gated_adaln", "group_norm_silu")

# At most so many instructions that load one number of 16 bits from global memory; of other kernels none.
NARROW_LOADS = {
    # conv_weight, of which a thread takes a tap of a channel at a time, before the loop.
    "_mamba2_mixer_prepare_kernel": 64,
    "_mamba2_mixer_fwd_kernel": 32,
    "_ssd_scan_bwd_prepare_kernel": 8,  # dt, once for a chunk of all heads
    # The parameters and the first number of each group, before the loops.
    "_group_norm_silu_stats_kernel": 2,
    "_group_norm_silu_fwd_kernel": 9,
}
# Kernels whose matmuls are all wgmma.
WGMMA = {
    "_scale_attention_fwd_kernel",
    "_scale_attention_bwd_kernel",
    "_mamba2_mixer_fwd_kernel",
    "_ssd_scan_fwd_kernel",
    "_ssd_scan_bwd_sweep_kernel",
    "_ssd_scan_bwd_grads_kernel",
    "_mamba2_mixer_bwd_outputs_kernel",
}
# Warp instructions of all launches per token and head (of adaLN per token), at most: d16, training with batch 32.
INSTRUCTIONS = {
    ("mamba2_mixer", "forward"): 165,
    ("mamba2_mixer", "backward"): 485,
    ("ssd_scan", "forward"): 62,
    ("ssd_scan", "backward"): 238,
    ("scale_attention", "forward"): 140,
    ("scale_attention", "backward"): 340,
    ("adaln", "forward"): 760,
    ("adaln", "backward"): 1320,
    ("gated_adaln", "forward"): 1000,
    ("gated_adaln", "backward"): 1830,
}


# The same of group_norm_silu per 1,000 numbers, of its sites in the decoder that have most of them.
DECODER = {"decoder_256": 820, "decoder_128": 840}


# Of the loop over chunks alone, which is what a longer sequence costs.
MIXER_LOOP = 100


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("counted") / "instructions.json"
    command = [sys.executable, "-m", "benchmarks.count_instructions", *OPS, "--depths", "16"]
    command += ["--label", "here", "--write", str(path)]
    subprocess.run(command, env=compiler_environment(), cwd=ROOT, check=True)
    found: list[dict[str, Any]] = json.loads(path.read_text())["labels"]["here"]["rows"]
    return found


def test_narrow_loads(rows: list[dict[str, Any]]) -> None:
    narrow = [f"{load} {width} B" for load in ("LDG", "LDGSTS") for width in (1, 2)]
    found = {row["kernel"]: sum(row["accesses"].get(access, 0) for access in narrow) for row in rows}
    assert NARROW_LOADS.keys() <= found.keys()
    assert not {name: count for name, count in found.items() if count > NARROW_LOADS.get(name, 0)}


def test_tensor_cores(rows: list[dict[str, Any]]) -> None:
    used = defaultdict(set)
    for row in rows:
        used[row["kernel"]] |= {kind.split()[0] for kind in row["tensor_core_flops"]}
    assert {name: used[name] for name in WGMMA} == {name: {"HGMMA"} for name in WGMMA}


def test_number_of_instructions(rows: list[dict[str, Any]]) -> None:
    found: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row["case"] == "d16 training":
            found[row["op"], row["pass"]] += row["warp_instructions"] / row["token_heads"]
    assert found.keys() == INSTRUCTIONS.keys()
    assert not {key: round(count, 1) for key, count in found.items() if count > INSTRUCTIONS[key]}


def test_number_of_instructions_of_the_decoder(rows: list[dict[str, Any]]) -> None:
    found: Counter[str] = Counter()
    for row in rows:
        if row["op"] == "group_norm_silu":
            assert not row["stack_bytes"] and row["accesses"]["LDG 16 B"] >= 2
            found[row["case"]] += 1000 * row["warp_instructions"] / (row["op_bytes"] / 4)  # read and written, 2 bytes
    assert not {case: round(found[case]) for case, most in DECODER.items() if not 0 < found[case] <= most}


def test_instructions_of_the_mixers_loop(rows: list[dict[str, Any]]) -> None:
    (row,) = (r for r in rows if r["case"] == "d16 training" and r["kernel"] == "_mamba2_mixer_fwd_kernel")
    instructions, iterations = row["loops"][0]
    assert instructions * iterations * row["warps"] * row["programs"] / row["token_heads"] <= MIXER_LOOP
