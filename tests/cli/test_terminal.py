"""Tests of terminal output and error messages for any kind of standard output."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mvar
from mvar.cli import info
from mvar.cli.main import main
from mvar.cli.terminal import NonRaisingStream, non_raising_output
from mvar.utils.errors import message


def text_stream(encoding: str, errors: str = "strict") -> tuple[io.BytesIO, io.TextIOWrapper]:
    content = io.BytesIO()
    return content, io.TextIOWrapper(content, encoding=encoding, errors=errors)


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("ascii", "strict", rb"2 \xd7 cpu \u2212 \udcff"),
        ("latin-1", "strict", b"2 \xd7 cpu \\u2212 \\udcff"),
        ("cp1252", "strict", b"2 \xd7 cpu \\u2212 \\udcff"),
        ("utf-8", "strict", b"2 \xc3\x97 cpu \xe2\x88\x92 \\udcff"),
        ("ascii", "replace", b"2 ? cpu ? ?"),
        ("utf-8", "surrogateescape", b"2 \xc3\x97 cpu \xe2\x88\x92 \xff"),
    ],
)
def test_unencodable_characters_are_escaped(encoding: str, errors: str, expected: bytes) -> None:
    content, text = text_stream(encoding, errors)
    # \udcff is an undecodable byte of a file name.
    print("2 × cpu − \udcff", end="", file=NonRaisingStream(text), flush=True)
    assert content.getvalue() == expected


class FailingRawIO(io.RawIOBase):
    def __init__(self, error: OSError) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        raise self.error


def test_write_errors_are_suppressed() -> None:
    out = NonRaisingStream(
        io.TextIOWrapper(io.BufferedWriter(FailingRawIO(OSError(28, "full")), 16), "utf-8", write_through=True)
    )
    for _ in range(3):
        print("more than sixteen characters", file=out, flush=True)
    assert isinstance(out.error, OSError) and not out.isatty()
    for out_stream in (NonRaisingStream(None), NonRaisingStream(closed := io.StringIO())):
        closed.close()
        print("text", file=out_stream, flush=True)
        assert out_stream.error is None and not out_stream.isatty()


def test_non_raising_output_restores_streams() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(ValueError), non_raising_output():
        assert sys.stdout is not before[0] and sys.stdout.encoding == before[0].encoding
        raise ValueError
    assert (sys.stdout, sys.stderr) == before


CODE = "import sys; from mvar.cli.main import main; main(sys.argv[1:])"


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", ">&- 2>&-"])
def test_help_with_closed_output(redirection: str) -> None:
    """`--help` succeeds with a pipe closed by its reader and with closed streams, both in ASCII."""
    environment = {"PYTHONPATH": str(Path(mvar.__file__).parent.parent), "PYTHONIOENCODING": "ascii"}
    command = ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-c", CODE, "train", "--help"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as exit:
            main(["train", "--help"])
        assert exit.value.code == 2
    assert capsys.readouterr().err == "mvar: error: cannot write to standard output: No space left on device\n"


def test_image_on_stdout_is_not_mixed_with_text(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    # Not through /dev/stdout itself: a bug that replaced the link would replace the link of the machine.
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    main(["sample", "--classes", "3", f"--grid={tmp_path}/stdout", "--device=cpu", "--dtype=fp32"])
    out, err = capfdbinary.readouterr()
    assert out.startswith(b"\x89PNG") and out.endswith(b"IEND\xaeB`\x82")
    assert b"1 images in" in err and (tmp_path / "stdout").is_symlink()


class Odd(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("\n            Some tensors share memory,\n  mismatching"),
            "Some tensors share memory, mismatching",
        ),
        (RuntimeError("Error(s) in loading:\n\tMissing key(s): 'a'.\n"), "Error(s) in loading: Missing key(s): 'a'."),
        (ValueError(), "ValueError"),
        (ValueError("\n \n"), "ValueError"),
        (KeyError("a"), "KeyError('a') (KeyError; --traceback shows where)"),
        (Odd("why"), "why (Odd; --traceback shows where)"),
        (MemoryError(), "MemoryError"),
        (OSError(2, "No such file", "a\udcff"), r"[Errno 2] No such file: 'a\udcff'"),
        (
            RuntimeError(
                "[enforce fail at x.cpp:1] no memory\nException raised from f (most recent call first):\nframe #0"
            ),
            "[enforce fail at x.cpp:1] no memory",
        ),
        (
            RuntimeError(
                "Caught in worker 0.\nOriginal Traceback (most recent call last):\n  File 1\nEOFError: short\n"
            ),
            "EOFError: short",
        ),
    ],
)
def test_error_message_is_complete_and_on_one_line(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: object) -> None:
        raise error

    monkeypatch.setattr(info, "run", fails)
    with pytest.raises(SystemExit) as exit:
        main(["info"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"mvar info: error: {expected}\n"
    with pytest.raises(type(error)):
        main(["info", "--traceback"])
    assert "\n" not in message(error)
