"""Run test cases of kernels in parallel subprocesses, so that a crash affects only one case."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from mvar_kernels.testing.check import BROKEN, STARTS, Result

# Each subprocess leads a process group, to be killed together with its children. From Python 3.11 on it stays in this
# session, so that the end of the session ends it.
GROUP: Mapping[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
SANITIZER = "========="  # prefix of the output of NVIDIA's compute-sanitizer, if a job's command runs under it
MAX_RESTARTS = 4  # after crashes, per job; then its remaining cases are not run


@dataclass(frozen=True)
class Job:
    """Cases that one subprocess runs sequentially.

    Attributes:
        environment: additional environment variables.
        command: command line, to which the arguments of `mvar_kernels.testing.check` are appended.
    """

    op: str
    backend: str
    dtype: str
    cases: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = (sys.executable, "-m", "mvar_kernels.testing.check")

    def fault(self, case: str, reason: str) -> Result:
        return Result(self.op, self.backend, self.dtype, case, fault=reason)


def run(
    jobs: Sequence[Job], *, processes: int, seconds: float, until: float = math.inf
) -> Iterator[tuple[Job, Result]]:
    """Run jobs in parallel and yield the row of each case when it finishes.

    All subprocesses are killed at `until` and when the generator is closed; their remaining cases have no row.

    Args:
        processes: number of jobs that run at the same time.
        seconds: time limit of a case, in seconds.
        until: deadline, as a value of time.monotonic().
    """
    rows: queue.SimpleQueue[tuple[Job, Result] | BaseException | None] = queue.SimpleQueue()
    running = _ProcessSet()

    def work(job: Job) -> None:
        try:
            for row in _rows(job, seconds, running):
                rows.put((job, row))
        except BaseException as error:
            rows.put(error)
        finally:
            rows.put(None)

    pool = ThreadPoolExecutor(processes)
    try:
        remaining = len([pool.submit(work, job) for job in jobs])
        while remaining:
            try:
                row = rows.get(timeout=None if until == math.inf else max(until - time.monotonic(), 0))
            except queue.Empty:
                return
            if isinstance(row, BaseException):
                raise row
            if row is None:
                remaining -= 1
            else:
                yield row
    finally:
        running.stop()
        pool.shutdown(cancel_futures=True)


class _ProcessSet:
    """The subprocesses of a run. :meth:`stop` kills them and prevents new ones."""

    def __init__(self) -> None:
        self._lock, self._processes, self._stopped = threading.Lock(), set[subprocess.Popen[str]](), False

    def start(self, command: Sequence[str], environment: Mapping[str, str], errors: IO[str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise RuntimeError("stopped")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | environment,
                **GROUP,
            )
            self._processes.add(process)
            return process

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                kill(process)


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill the process group of a process that was started with `GROUP`."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _rows(job: Job, seconds: float, running: _ProcessSet) -> Iterator[Result]:
    """Yield a row per case of the job. After a crash a new subprocess runs the remaining cases."""
    remaining = list(job.cases)
    for _ in range(MAX_RESTARTS + 1):
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            command = [*job.command, job.op, job.backend, job.dtype, *remaining]
            process = running.start(command, job.environment, errors)
            case, timed_out, sanitizer_lines = None, threading.Event(), list[str]()
            assert process.stdout is not None
            for line in _lines(process, process.stdout, seconds, timed_out):
                if line.startswith(STARTS):
                    case = line.removeprefix(STARTS).strip()
                elif line.startswith("{") and case is not None:
                    yield Result(**json.loads(line))
                    remaining.remove(case)
                    case = None
                elif line.startswith(SANITIZER):
                    sanitizer_lines.append(line.removeprefix(SANITIZER).strip())
            code = process.wait()
            if code and (found := [line for line in sanitizer_lines if line]):
                yield job.fault(job.cases[-1], f"compute-sanitizer: {'; '.join(found)[:800]}")
            if not remaining:
                return
            if code != BROKEN:
                errors.seek(0)
                stderr_lines = [line.strip() for line in errors if line.strip()]
                reason = f"process exited with {_status(code)}"
                if timed_out.is_set():
                    reason = f"no output for {seconds:.0f} s"
                last_line = f": {stderr_lines[-1][:500]}" if stderr_lines else ""
                yield job.fault(case or remaining[0], reason + last_line)
                remaining.remove(case or remaining[0])
        if not remaining:
            return
    for name in remaining:
        yield job.fault(name, f"not run: {MAX_RESTARTS + 1} processes of this op, backend and dtype exited before it")


def _lines(
    process: subprocess.Popen[str], output: IO[str], seconds: float, timed_out: threading.Event
) -> Iterator[str]:
    """The output of a process; if it prints no line for `seconds`, set `timed_out` and kill it."""

    def on_timeout() -> None:
        timed_out.set()
        kill(process)

    while True:
        timer = threading.Timer(seconds, on_timeout)
        timer.start()
        try:
            line = output.readline()
        finally:
            timer.cancel()
        if not line:
            return
        yield line


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"
