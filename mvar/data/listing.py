"""Find the images of a folder by class."""

import os
from pathlib import Path

from mvar.utils.files import is_environmental

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The extensions of torchvision's ImageFolder, so that both find the same images in the same order."""

SYSTEM_NAMES = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "__pycache__"}
SYSTEM_NAMES |= {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""Names in lower case of system files and folders, which are skipped like hidden folders and macOS's `._*` files."""


def images_by_class(path: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Find the images of each class, in the order of torchvision's ImageFolder.

    Symbolic links are followed, except links to a parent folder and, inside a class, links to a folder of that class
    and further links to a folder that has been visited. Pipes and devices are skipped.

    Returns:
        The images by class name, and the skipped entries: cyclic links, special, system and hidden files (a skipped
        folder is one entry). All paths are relative to `path`.

    Raises:
        OSError: a folder is missing or cannot be read.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected one with a subfolder for each class")
    real = os.path.realpath(path)
    classes, skipped = {}, []
    for entry in _entries(path):
        if _is_ignored(entry) or (_is_linked_folder(entry) and _is_inside(real, os.path.realpath(entry.path))):
            skipped.append(entry.name)
        elif _is_folder(entry):
            classes[entry.name], skipped_in_class = _walk(path, entry.name)
            skipped += skipped_in_class
    return classes, tuple(skipped)


def images_below(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Find all images of a folder and its subfolders, sorted by folder and name.

    Links, and the returned skipped entries and errors, as in :func:`images_by_class`.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    images, skipped = _walk(path, "")
    return images, tuple(skipped)


def _walk(path: Path, name: str) -> tuple[list[str], list[str]]:
    """The images of a class, or of all of `path` for "", sorted by folder and name, and the skipped entries."""
    top = os.path.realpath(path / name)
    images: dict[str, list[str]] = {}
    skipped: list[str] = []
    pending, seen = [name], {top}
    while pending:
        folder = pending.pop()
        images[folder] = []
        folder_path = path / folder
        for entry in _entries(folder_path):
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if _is_ignored(entry):
                skipped.append(relative)
            elif _is_folder(entry):
                real = os.path.realpath(entry.path)
                is_parent = any(_is_inside(child, real) for child in (top, os.path.realpath(folder_path)))
                if _is_linked_folder(entry) and (real in seen or is_parent or _is_inside(real, top)):
                    skipped.append(relative)
                else:
                    seen.add(real)
                    pending.append(relative)
            elif entry.name.lower().endswith(EXTENSIONS):
                (skipped if _is_special(entry) else images[folder]).append(relative)
    return [image for folder in sorted(images) for image in images[folder]], skipped


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_ignored(entry: "os.DirEntry[str]") -> bool:
    name = entry.name.lower()
    return name in SYSTEM_NAMES or name.startswith("._") or (name.startswith(".") and _is_folder(entry))


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
    """Whether the entry is a pipe or a device, which may block forever. A dangling link is an unreadable image."""
    if not entry.is_symlink():
        return not entry.is_file()
    return os.path.exists(entry.path) and not os.path.isfile(entry.path)


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder
