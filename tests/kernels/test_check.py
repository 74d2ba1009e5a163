"""Tests of `mvar check`."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mvar.check import jobs as check_jobs
from mvar.check import plan
from mvar.check.jobs import MAX_RESTARTS, Job, run
from mvar.check.plan import key, plan_jobs, read, record_rows, table, verdict
from mvar.cli.main import main
from mvar_kernels.dispatch import OPS
from mvar_kernels.testing import check as worker
from mvar_kernels.testing.check import Result, check_case
from mvar_kernels.testing.contract import LAYOUTS
from mvar_kernels.testing.registry import SPECS
from tests.cli.test_cli import fails

ODD = next(case for case in SPECS["adaln"].cases if case.name == "odd")
STAND_IN = """
import json, os, signal, sys, time

op, backend, dtype, *cases = (a for a in sys.argv[1:] if not a.startswith("--") and not a.isdecimal())
for case in cases:
    print(f"starts: {case}", flush=True)
    print("a library's own words", flush=True)
    if case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "hang":
        time.sleep(600)
    if case == "exit":
        sys.exit("no such thing")
    print(json.dumps({"op": op, "backend": backend, "dtype": dtype, "case": case, "shares": {"y": 0.5}}), flush=True)
    if case == "broken":
        sys.exit(99)
"""


def fake_job(*cases: str) -> Job:
    return Job("op", "backend", "dtype", cases, command=(sys.executable, "-c", STAND_IN))


def test_run_continues_after_worker_failure() -> None:
    jobs = [fake_job("first", "crash", "broken", "hang", "exit", "last"), fake_job("alone")]
    rows = {row.case: row for _, row in run(jobs, processes=2, seconds=2)}
    assert list(rows) != [] and set(rows) == {"first", "crash", "broken", "hang", "exit", "last", "alone"}
    faults = {case: row.fault for case, row in rows.items() if row.fault is not None}
    assert faults == {
        "crash": "process exited with SIGSEGV",
        "hang": "no output for 2 s",
        "exit": "process exited with status 1: no such thing",
    }
    assert all(row.right == (case not in faults) for case, row in rows.items())


def test_max_restarts() -> None:
    rows = [row for _, row in run([fake_job(*["crash"] * (MAX_RESTARTS + 3))], processes=1, seconds=20)]
    assert [row.fault for row in rows[MAX_RESTARTS:]] == [
        "process exited with SIGSEGV",
        *["not run: 5 processes of this op, backend and dtype exited before it"] * 2,
    ]


def test_sanitizer_error(tmp_path: Path) -> None:
    """The error is a row of its own: an out-of-bounds read need not make the result of the case wrong."""
    found = ("COMPUTE-SANITIZER", "Invalid __global__ read of size 4")
    said = "".join(f"print('========= {line}')\n" for line in found)
    job = replace(fake_job("first"), command=(sys.executable, "-c", f"{STAND_IN}\n{said}raise SystemExit(7)"))
    (_, row), (_, fault) = run([job], processes=1, seconds=20)
    assert row.right and row.case == fault.case == "first"
    assert fault.fault == "compute-sanitizer: COMPUTE-SANITIZER; Invalid __global__ read of size 4"


def test_record_rows(tmp_path: Path) -> None:
    path, jobs = tmp_path / "check.jsonl", [fake_job("first", "second"), fake_job("third")]
    other, old = Result("adaln", "triton", "float32", "odd"), jobs[0].fault("first", "old")
    path.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in (other, old)))
    row = replace(old, fault=None, shares={"out": 0.5})
    assert list(record_rows(jobs, iter([(jobs[0], row)]), path)) == [(jobs[0], row)]
    rows = {key(found): found for found in read(path)}
    assert len(rows) == 4 and rows[key(other)] == other and rows[key(row)] == row
    assert {found.case: found.fault for found in rows.values() if not found.right} == dict.fromkeys(
        ("second", "third"), "not run"
    )


def test_worker_exits_with_parent(tmp_path: Path) -> None:
    """The parent is killed with SIGKILL, which it cannot handle; otherwise the worker would sleep for ten minutes."""
    program = (
        "import subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'from mvar_kernels.testing.check import end_with_parent; "
        "end_with_parent(); print(1, flush=True); import time; time.sleep(600)'], stdout=subprocess.PIPE)\n"
        "worker.stdout.readline(); print(worker.pid, flush=True); import time; time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    begin = time.monotonic()
    while Path(f"/proc/{pid}").exists() and time.monotonic() - begin < 20:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_run_terminates_workers() -> None:
    """Closing the generator, or reaching `until`, ends a worker that would otherwise hang for ten minutes."""
    rows = run([fake_job("first", "hang")], processes=1, seconds=600)
    assert next(rows)[1].case == "first"
    rows.close()  # type: ignore[attr-defined]
    begin = time.monotonic()
    assert [row.case for _, row in run([fake_job("first", "hang")], processes=1, seconds=600, until=begin + 2)] == [
        "first"
    ]


def test_check_case() -> None:
    row, answers = check_case(SPECS["adaln"], ODD, "cpu", torch.float32)
    assert answers and row.right and row.fault is row.refused is None
    kinds = ["", *(f", {layout.__name__}" for layout in LAYOUTS)]
    names = ("out", "grad of x", "grad of scale", "grad of shift")
    assert row.shares.keys() == {name + kind for name in names for kind in kinds}
    assert 0 < row.worst <= 1
    row, _ = check_case(SPECS["adaln"], ODD, "cpu", torch.float16)
    assert row.right and row.refused is not None and "dtype float16" in row.refused


@pytest.mark.parametrize(
    ("plant", "fault", "share"),
    [
        (lambda x, calls: x.add_(1).clone(), "another answer in run 2: out; inputs written to: x", 0),
        (lambda x, calls: x.add(calls * 1e-7), "another answer in run 2: out", 0),
        (lambda x, calls: x + torch.nan, "another answer in run 2: out", math.inf),
        (lambda x, calls: x.new_empty(x.shape), "another answer", math.inf),
        (lambda x, calls: 1 / 0, "ZeroDivisionError: division by zero", 0),
        (lambda x, calls: x * 1.001, None, 100),
        (lambda x, calls: x.double(), None, math.inf),
    ],
    ids=["writes", "moves", "nan", "unwritten", "raises", "wrong", "dtype"],
)
def test_check_case_detects_faults(
    plant: object, fault: str | None, share: float, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    spec, calls = SPECS["adaln"], iter(range(100))

    def evaluated(
        spec: object, case: object, inputs: Mapping[str, torch.Tensor], backend: str | None, given: object = None
    ) -> object:
        x = inputs["x"]
        if backend is None:
            return {"out": x.clone()}
        return {"out": plant(x, next(calls))}  # type: ignore[operator]

    monkeypatch.setattr(worker, "evaluate", evaluated)
    row, _ = check_case(spec, ODD, "cpu", torch.float32)
    assert not row.right and (row.fault or "").startswith(fault or "") and (fault is None) == (row.fault is None)
    assert share == 0 or max(row.shares.values()) >= share


def test_table() -> None:
    rows = [
        Result("adaln", "cpu", "float32", "odd", {"out": 0.25, "grad of x": 0.5}),
        Result("adaln", "cpu", "float32", "even", {"out": 3.0, "grad of x": math.inf}, "inputs written to: x"),
        Result(
            "adaln", "cpu", "float16", "odd", refused="adaln: backend 'cpu' requested, but: dtype float16 is not here"
        ),
        Result("ssd_scan", "triton", "bfloat16", "odd", {"y": 4.0}),
    ]
    lines = table(rows)
    assert any(
        line.split()[:4] == ["adaln", "cpu", "float16", "–"] and "dtype float16 is not here" in line for line in lines
    )
    assert any(line.split() == ["adaln", "cpu", "float32", "1/2", "inf", "fault:", "even"] for line in lines)
    assert any(line.split()[-2:] == ["arithmetic:", "odd"] for line in lines)
    assert "WRONG adaln cpu float32 even: inputs written to: x; out 3; grad of x inf" in lines
    assert [verdict(x) for x in (0, 1, 1.5, 12, 30, math.inf)] == [
        "right",
        "right",
        "arithmetic",
        "unclear",
        "fault",
        "fault",
    ]


def test_interrupted_check_and_only_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    wrong = Result("adaln", "cpu", "float32", "odd", {"out": 7.0})
    right = Result("adaln", "cpu", "float32", "one_token", {"out": 0.5})

    def stopped(jobs: object, **_: object) -> object:
        yield jobs, right
        yield jobs, wrong
        raise KeyboardInterrupt

    monkeypatch.setattr(check_jobs, "run", stopped)
    with pytest.raises(SystemExit) as exit:
        main(["check", "adaln", "--out", str(file)])
    assert exit.value.code == 130 and [row for row in read(file) if row.fault is None] == [right, wrong]
    (again,) = (job.cases for job in plan_jobs(["adaln"], "cpu", file) if job.dtype == "float32")
    assert "odd" in again and "one_token" not in again and len(again) == len(SPECS["adaln"].cases) - 1
    file.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in (wrong, right)))
    monkeypatch.setattr(check_jobs, "run", lambda jobs, **_: iter([(jobs, wrong)]))
    with pytest.raises(SystemExit) as exit:
        main(["check", "--only-failed", str(file)])
    assert exit.value.code == 1 and "1 of 1 cases failed" in capsys.readouterr().out
    file.write_text(json.dumps(asdict(right)) + "\n")
    main(["check", "--only-failed", str(file)])
    assert f"no failed cases in {file}" in capsys.readouterr().out
    file.write_text("no rows")
    assert f"{file}: expected a file of `mvar check --out`" in fails(capsys, "check", "--only-failed", str(file))
    assert "op: expected any of adaln, " in fails(capsys, "check", "layer_norm")
    assert "--backend: expected one of cpu" in fails(capsys, "check", "--backend", "cuda")


@pytest.mark.parametrize(("free_gib", "expected"), [(78, 16), (7, 3), (1, 1)])
def test_processes_limited_by_gpu_memory(free_gib: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_gib * 2**30, 80 * 2**30))
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 16)
    assert plan.processes() == expected


@pytest.mark.slow
def test_check_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "adaln", "--backend", "cpu"])
    out = capsys.readouterr().out
    assert (
        f"{len(plan.DTYPES) * len(SPECS['adaln'].cases)} cases of 1 ops" in out
        and out.rstrip().endswith("all cases passed")
        and "torch 2" in out
    )


def test_every_op_has_a_spec() -> None:
    assert OPS.keys() == SPECS.keys()
