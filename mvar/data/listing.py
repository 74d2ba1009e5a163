"""Which files of a folder are pictures, and of which class."""

import os
from pathlib import Path

from mvar.files import is_environmental

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision's ImageFolder, so that both see the same pictures in the same order."""

LEFT_BY_SYSTEMS = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "__pycache__"}
LEFT_BY_SYSTEMS |= {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""In lower case. None is a class or a picture, nor is a hidden folder, or a file `._*` of macOS's other attributes."""


def pictures_by_class(path: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Classes by name, and the pictures of each, relative to `path`: the order of torchvision's ImageFolder.

    Links to files and folders are followed, but for those that lead back: to a folder above, and, inside a class, to a
    folder of that class, or a second time to the same folder elsewhere. Pipes and devices are left.

    Returns:
        the pictures, and what is skipped, relative to `path`: links back, and what systems and tools leave (a folder is
        one entry, whatever it holds).

    Raises OSError where a folder is missing or cannot be read.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected one with a subfolder for each class")
    real = os.path.realpath(path)
    classes, skipped = {}, []
    for entry in _entries(path):
        if _is_left(entry) or (_is_linked_folder(entry) and _is_inside(real, os.path.realpath(entry.path))):
            skipped.append(entry.name)
        elif _is_folder(entry):
            classes[entry.name], left = _walked(path, entry.name)
            skipped += left
    return classes, tuple(skipped)


def _walked(path: Path, name: str) -> tuple[list[str], list[str]]:
    """The pictures of a class by folder and name, and what is skipped."""
    top = os.path.realpath(path / name)
    pictures: dict[str, list[str]] = {}
    skipped: list[str] = []
    waiting, seen = [name], {top}
    while waiting:
        folder = waiting.pop()
        pictures[folder] = []
        folder_path = path / folder
        for entry in _entries(folder_path):
            relative = f"{folder}/{entry.name}"
            if _is_left(entry):
                skipped.append(relative)
            elif _is_folder(entry):
                real = os.path.realpath(entry.path)
                above = any(_is_inside(below, real) for below in (top, os.path.realpath(folder_path)))
                if _is_linked_folder(entry) and (real in seen or above or _is_inside(real, top)):
                    skipped.append(relative)
                else:
                    seen.add(real)
                    waiting.append(relative)
            elif entry.name.lower().endswith(EXTENSIONS):
                (skipped if _is_special(entry) else pictures[folder]).append(relative)
    return [picture for folder in sorted(pictures) for picture in pictures[folder]], skipped


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_left(entry: "os.DirEntry[str]") -> bool:
    name = entry.name.lower()
    return name in LEFT_BY_SYSTEMS or name.startswith("._") or (name.startswith(".") and _is_folder(entry))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if is_environmental(error):
            raise
        return False  # a link to itself


def _is_linked_folder(entry: "os.DirEntry[str]") -> bool:
    return entry.is_symlink() and _is_folder(entry)


def _is_special(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a pipe or a device, whose reading may never end. A link that leads nowhere is a lost picture."""
    if not entry.is_symlink():
        return not entry.is_file()
    return os.path.exists(entry.path) and not os.path.isfile(entry.path)


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder
