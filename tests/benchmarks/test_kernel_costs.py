"""Tests what kernels cost: reading machine code and Triton's IR, the result file, the page."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.analysis import kernel_times, machine_code, trip_counts
from benchmarks.report import kernel_costs as report
from tests.helpers.paths import ROOT

pytest.importorskip("triton")
from benchmarks import count_instructions  # noqa: E402
from benchmarks.analysis import kernel_costs  # noqa: E402

# A loop with two inner ones, of which the first is left by a second predicate; the last lines are the slow path of a
# division, which only the CALL reaches, and padding.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000e620000000800 */
        /*0010*/              @!P0 LDG.E.U16 R2, desc[UR4][R2.64] ;          /* 0x0000000602027981 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R6.64], P1 ;
        /*0030*/               @P1 BRA 0x60 ;
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/               @P2 BRA P3, 0x40 ;
        /*0060*/                   HMMA.1688.F32.TF32 R4, R4, R6, R8 ;
        /*0070*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0080*/              @!P4 CALL.REL.NOINC 0xe0 ;
        /*0090*/               @P5 BRA 0x60 ;
        /*00a0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00b0*/               @P6 BRA 0x20 ;
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   MUFU.RCP R3, R3 ;
        /*00f0*/                   RET.REL.NODEC R2 0x0 ;
        /*0100*/                   BRA 0x100;
        /*0110*/                   NOP;
"""


def test_loops_in_machine_code() -> None:
    listing = machine_code.parse(SASS)
    assert [(loop.first, loop.last, loop.depth, loop.own) for loop in listing.loops] == [
        (2, 11, 1, (2, 3, 10, 11)),
        (4, 5, 2, (4, 5)),
        (6, 9, 2, (6, 7, 8, 9)),
    ]
    assert listing.outside == (0, 1, 12, 13)
    assert listing.accesses(listing.outside) == {"LDG 2 B": 1, "STG 16 B": 1}
    assert listing.accesses(listing.loops[0].own) == {"LDGSTS 16 B": 1}
    assert listing.accesses(listing.loops[2].own) == {"LDG 4 B": 1}
    assert listing.flops(range(14)) == {("HGMMA", "BF16"): 2 * 64 * 32 * 16 // 4, ("HMMA", "TF32"): 2 * 16 * 8 * 8}


def test_overlapping_loops() -> None:
    with pytest.raises(ValueError, match="loops overlap"):
        machine_code.parse(SASS.replace("BRA 0x20", "BRA 0x50"))


# for i in range(lo, hi, 2), of a plan by program: one loop in all iterations, one in the rows below 2, two at a time.
TTIR = """
#loc = loc("kernel.py":1:0)
module {
  tt.func public @_a_kernel(%plan_ptr: !tt.ptr<i32> loc("plan_ptr"(#loc)), %x_ptr: !tt.ptr<f32> loc("x_ptr"(#loc)), \
%y_ptr: !tt.ptr<f32> loc("y_ptr"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %c1_i32 = arith.constant 1 : i32 loc(#loc)
    %c2_i32 = arith.constant 2 : i32 loc(#loc)
    %cst = arith.constant dense<0.000000e+00> : tensor<16xf32> loc(#loc)
    %p = tt.get_program_id x : i32 loc(callsite(#loc at #loc))
    %at = tt.addptr %plan_ptr, %p : !tt.ptr<i32>, i32 loc(#loc)
    %hi = tt.load %at : !tt.ptr<i32> loc(#loc)
    %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>> loc(#loc)
    %r = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32> loc(#loc)
    %rows = tt.splat %p : i32 -> tensor<16xi32> loc(#loc)
    %all = arith.addi %rows, %r : tensor<16xi32> loc(#loc)
    %last = "tt.reduce"(%all) <{axis = 0 : i32}> ({
    ^bb0(%a: i32 loc(#loc), %b: i32 loc(#loc)):
      %most = arith.maxsi %a, %b : i32 loc(#loc)
      tt.reduce.return %most : i32 loc(#loc)
    }) : (tensor<16xi32>) -> i32 loc(#loc)
    %few = arith.cmpi slt, %last, %n : i32 loc(#loc)
    %sum:2 = scf.for %i = %c1_i32 to %hi step %c2_i32 iter_args(%acc = %cst, %ptr = %x) \
-> (tensor<16xf32>, tensor<16x!tt.ptr<f32>>)  : i32 {
      %v = tt.load %ptr : tensor<16x!tt.ptr<f32>> loc(#loc)
      %w = scf.if %few -> (tensor<16xf32>) {
        %deep = scf.for %j = %c1_i32 to %n step %c1_i32 iter_args(%inner = %acc) -> (tensor<16xf32>)  : i32 {
          scf.yield %inner : tensor<16xf32> loc(#loc)
        } loc(#loc)
        scf.yield %deep : tensor<16xf32> loc(#loc)
      } else {
        scf.yield %v : tensor<16xf32> loc(#loc)
      } loc(#loc)
      scf.yield %w, %ptr : tensor<16xf32>, tensor<16x!tt.ptr<f32>> loc(#loc)
    } loc(#loc)
    %y = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>> loc(#loc)
    tt.store %y, %sum#0 : tensor<16x!tt.ptr<f32>> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_trip_counts() -> None:
    """Programs 0 to 3 make 2, 0, 5 and 1 iterations. Only 0 and 1, whose last row is below 17, go deeper."""
    function = trip_counts.parse(TTIR)
    plan = torch.tensor([5, 1, 10, 3], dtype=torch.int32)
    programs = trip_counts.Programs(function, (4,), {"plan_ptr": plan, "n": 17})
    (outer, first), (inner, second) = trip_counts.loops(function)
    assert (first, second) == (1, 2)
    assert programs.iterations(outer) == [np.mean([2, 0, 5, 1])]
    assert programs.iterations(outer, unrolled=2) == [np.mean([1, 0, 2, 0]), np.mean([0, 0, 1, 1])]
    assert programs.iterations(inner) == [np.mean([2 * 16, 0, 0, 0])]
    rising = trip_counts.parse(TTIR.replace("%j = %c1_i32 to %n", "%j = %i to %n"))
    programs = trip_counts.Programs(rising, (4,), {"plan_ptr": plan, "n": 17})
    assert programs.iterations(trip_counts.loops(rising)[1][0]) == [np.mean([(17 - 1) + (17 - 3), 0, 0, 0])]
    assert trip_counts.accesses(function) == ({"plan_ptr", "x_ptr"}, {"y_ptr"})
    with pytest.raises(trip_counts.UnknownError, match="n is float"):
        trip_counts.Programs(function, (4,), {"plan_ptr": plan, "n": 17.0}).iterations(inner)


def test_every_kernel_is_declared() -> None:
    sources = (ROOT / "mvar_kernels" / "ops").glob("*/triton/*.py")
    found = {name for path in sources for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert found == kernel_costs.KERNELS.keys()


def row(**changes: Any) -> dict[str, Any]:
    return {
        **{"arch": "sm_90", "op": "adaln", "case": "d16 training", "pass": "forward", "token_heads": 1000},
        **{"op_bytes": 3_000_000, "op_flops": 0, "kernel": "_adaln_fwd_kernel", "tile": "C=1024", "programs": 1320},
        **{"warps": 4, "stages": 1, "registers": 64, "stack_bytes": 0, "shared_bytes": 1024, "resident_warps": 20},
        **{"outside": 50, "loops": [[25, 2.0]], "warp_instructions": 528_000, "accesses": {"LDG 16 B": 4}},
        **{"tensor_core_flops": {}, "read_bytes": 6_000_000, "written_bytes": 3_000_000},
        **changes,
    }


def test_estimates() -> None:
    given = row(tensor_core_flops={"HGMMA BF16": 8e8, "HMMA TF32": 8e8}, warp_instructions=924_000)
    limits = kernel_times.limits_us(given)
    assert limits["memory"] == pytest.approx(3) and limits["instructions"] == pytest.approx(2)
    assert limits["tensor cores"] == pytest.approx(1 + 2 / 0.62)
    assert kernel_times.estimate_us(given) == pytest.approx(1 + 1 + 2 / 0.62)
    assert kernel_times.bound_us(3_000_000, 1_600_000_000) == pytest.approx(2)


def test_page_compares_labels(tmp_path: Path) -> None:
    """A file keeps its first label and the last that was written."""
    path = tmp_path / "instructions.json"
    count_instructions.write(path, "before", [row(), row(kernel="_gated_adaln_fwd_kernel")])
    count_instructions.write(path, "second", [row()])
    count_instructions.write(path, "after", [row(warp_instructions=64_000)])
    content = json.loads(path.read_text())
    assert list(content["labels"]) == ["before", "after"]
    page = report.page(content)
    summary = next(line for line in page.splitlines() if line.startswith("| adaln |"))
    assert [cell.strip() for cell in summary.split("|")[4:-1]] == [
        *("2 → 1", "1056 → 64.0", "18.0 → 9.00", "3.00", "8.00 → 4.00", "1.00", "12% → 25%")
    ]
    assert "## adaln, `before`" in page and "## adaln, `after`" in page and "second" not in page
    count_instructions.write(path, "before", [row()])
    assert list(json.loads(path.read_text())["labels"]) == ["before", "after"]
