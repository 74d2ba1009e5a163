"""Tests of writing output files over links, pipes, devices and existing files."""

import errno
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import mvar
from mvar.utils.files import atomic_write, check_writable, expanded, is_environmental, make_folder
from mvar.utils.images import check_image, save_image


def write(path: str | Path, text: str = "new") -> None:
    check_writable(path)
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def test_link_is_kept_and_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "target").write_text("old")
    for name, target in (("link", "disk/target"), ("second", "link"), ("dangling", "disk/more/new")):
        (tmp_path / name).symlink_to(target)
        write(tmp_path / name, name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == name
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()) == [
        "new",
        "target",
    ]


def test_linked_folders(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to("there")  # the target does not exist yet
    write(tmp_path / "here" / "file")
    assert (tmp_path / "here").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    (tmp_path / "run").symlink_to("disk/run")
    make_folder(tmp_path / "run")
    assert (tmp_path / "disk" / "run").is_dir()


def test_link_cycle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="cannot write .*/a: Too many levels of symbolic links"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_mode_is_kept_or_set_by_umask(tmp_path: Path) -> None:
    for mode in (0o600, 0o664, 0o755):
        (tmp_path / "file").write_text("old")
        (tmp_path / "file").chmod(mode)
        write(tmp_path / "file")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    before = os.umask(0o027)
    try:
        write(tmp_path / "fresh")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    if os.geteuid() == 0:
        os.chown(tmp_path / "file", 1234, 2345)
        write(tmp_path / "file")
        assert ((tmp_path / "file").stat().st_uid, (tmp_path / "file").stat().st_gid) == (1234, 2345)


def test_weights_follow_umask_and_links(tmp_path: Path) -> None:
    # safetensors renames its own temporary file over the given path, which would also replace a link.
    model, _ = mvar.build(1, num_classes=2, tokenizer=mvar.TokenizerConfig((1, 2), 16, ch=32, ch_mult=(1,)))
    (tmp_path / "plain").touch()
    (tmp_path / "link.safetensors").symlink_to("target")
    mvar.save(tmp_path / "link.safetensors", model)
    assert (tmp_path / "link.safetensors").is_symlink() and len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write regardless of the mode
    for name in ("file", "link"):
        with pytest.raises(OSError, match=f"cannot write .*{name}: Permission denied"):
            write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_pipe_is_written_after_completion(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_descriptor_is_written_at_its_position(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as stream:
        stream.write("before ")
        stream.flush()
        (tmp_path / "link").symlink_to(f"/dev/fd/{stream.fileno()}")
        write(tmp_path / "link", "then ")
        write(f"/proc/self/fd/{stream.fileno()}", "now")
        stream.seek(0)
        assert stream.read() == "before then now"
    with (tmp_path / "log").open() as stream, pytest.raises(OSError, match="not open for writing"):
        check_writable(f"/dev/fd/{stream.fileno()}")


def test_devices(tmp_path: Path) -> None:
    write("/dev/null")
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"):
        write("/dev/full")
    for name in ("null", "full"):
        assert stat.S_ISCHR(os.stat(f"/dev/{name}").st_mode)
    with pytest.raises(OSError, match="/dev/null is not a folder|Not a directory"):
        write("/dev/null/file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/socket")
        with pytest.raises(OSError, match="a socket is in its place"):
            write(tmp_path / "socket")


def test_mounted_file_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_busy(temporary: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(temporary))

    (tmp_path / "file").write_text("a longer old text")
    monkeypatch.setattr(Path, "replace", raise_busy)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, OSError(errno.ENOSPC, "full")])
def test_failed_write_leaves_no_files(tmp_path: Path, error: type[BaseException] | BaseException) -> None:
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error) if isinstance(error, BaseException) else error), atomic_write(tmp_path / "link"):
        raise error
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_maximum_length_names(tmp_path: Path) -> None:
    for name in ("a" * 255, "ä" * 125 + ".png", "." + "b" * 254):
        write(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write("~/deep/file")
    assert (tmp_path / "home" / "deep" / "file").exists() and not (tmp_path / "~").exists()
    assert expanded("~") == tmp_path / "home" and expanded("a/~/b") == Path("a/~/b")
    assert expanded(f"~{Path('~root').expanduser().owner()}/x") == Path("~root/x").expanduser()
    write(expanded("./~/file"))  # expanded twice
    assert (tmp_path / "~" / "file").exists()
    assert expanded("~nobody-of-that-name.png") == tmp_path / "~nobody-of-that-name.png"


def test_is_environmental() -> None:
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.ESTALE):
        assert is_environmental(OSError(number, os.strerror(number)))
    assert is_environmental(MemoryError())
    for error in (OSError("truncated"), FileNotFoundError(errno.ENOENT, ""), OSError(errno.ELOOP, ""), ValueError()):
        assert not is_environmental(error)


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.png", "PNG"), ("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG")],
)
def test_image_format_follows_file_extension(tmp_path: Path, name: str, format: str) -> None:
    image = torch.linspace(0, 1, 3 * 16 * 16).view(3, 16, 16)
    save_image(tmp_path / name, image)
    with Image.open(tmp_path / name) as written:
        assert written.format == format and written.size == (16, 16)


def test_unsupported_image_formats_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.gif: expected a name that ends in one of .png, .jpg"):
        save_image(tmp_path / "a.gif", torch.zeros(3, 4, 4))
    check_image("a.png", 70000, 10)
    with pytest.raises(
        ValueError, match="a.jpg: expected at most 65500 pixels per side for JPEG, got 70000 × 10: give a .png"
    ):
        check_image("a.jpg", 70000, 10)
    assert list(tmp_path.iterdir()) == []
