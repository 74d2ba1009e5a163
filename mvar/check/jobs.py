"""Cases of the contract in processes of their own, several at a time: one that dies takes no other case with it."""

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

# A process is killed with all that it started. In this session where Python can, so that what ends that ends it, too.
GROUP: Mapping[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
SANITIZER = "========="  # begins the lines of NVIDIA's compute-sanitizer, when a job's command is one under it
MAX_DEATHS = 4  # of one job's processes, after which the rest of its cases is given up


@dataclass(frozen=True)
class Job:
    """Cases that one process checks, one after the other.

    environment: added to the process's. command: starts it, before the arguments of `mvar_kernels.testing.check`.
    """

    op: str
    backend: str
    dtype: str
    cases: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = (sys.executable, "-m", "mvar_kernels.testing.check")

    def fault(self, case: str, what: str) -> Result:
        return Result(self.op, self.backend, self.dtype, case, fault=what)


def run(
    jobs: Sequence[Job], *, processes: int, seconds: float, until: float = math.inf
) -> Iterator[tuple[Job, Result]]:
    """The row of every case as it comes, `processes` jobs at a time; a case that takes longer than `seconds` is ended.

    When the caller stops, or time.monotonic() comes to `until`, all processes end, and what they had not done has no
    row.
    """
    rows: queue.SimpleQueue[tuple[Job, Result] | BaseException | None] = queue.SimpleQueue()
    running = _Running()

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
        left = len([pool.submit(work, job) for job in jobs])
        while left:
            try:
                row = rows.get(timeout=None if until == math.inf else max(until - time.monotonic(), 0))
            except queue.Empty:
                return
            if isinstance(row, BaseException):
                raise row
            if row is None:
                left -= 1
            else:
                yield row
    finally:
        running.stop()
        pool.shutdown(cancel_futures=True)


class _Running:
    """The processes that run, which end with the run."""

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
    """End a process that was started with `GROUP`, and all that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _rows(job: Job, seconds: float, running: _Running) -> Iterator[Result]:
    """A row for each of the job's cases; after one that ended its process another process goes on."""
    left = list(job.cases)
    for _ in range(MAX_DEATHS + 1):
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            command = [*job.command, job.op, job.backend, job.dtype, *left]
            process = running.start(command, job.environment, errors)
            case, hung, notes = None, threading.Event(), list[str]()
            assert process.stdout is not None
            for line in _lines(process, process.stdout, seconds, hung):
                if line.startswith(STARTS):
                    case = line.removeprefix(STARTS).strip()
                elif line.startswith("{") and case is not None:
                    yield Result(**json.loads(line))
                    left.remove(case)
                    case = None
                elif line.startswith(SANITIZER):
                    notes.append(line.removeprefix(SANITIZER).strip())
            code = process.wait()
            if code and (found := [note for note in notes if note]):
                yield job.fault(job.cases[-1], f"compute-sanitizer: {'; '.join(found)[:800]}")
            if not left:
                return
            if code != BROKEN:
                errors.seek(0)
                said = [line.strip() for line in errors if line.strip()]
                how = f"no answer for {seconds:.0f} s" if hung.is_set() else f"the process ended with {_status(code)}"
                yield job.fault(case or left[0], how + (f": {said[-1][:500]}" if said else ""))
                left.remove(case or left[0])
        if not left:
            return
    for name in left:
        yield job.fault(name, f"not tried: {MAX_DEATHS + 1} processes of this op, backend and dtype ended before it")


def _lines(process: subprocess.Popen[str], output: IO[str], seconds: float, hung: threading.Event) -> Iterator[str]:
    """What the process prints; it is ended, and `hung` set, when no line comes for so long."""

    def end() -> None:
        hung.set()
        kill(process)

    while True:
        timer = threading.Timer(seconds, end)
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
