"""Classes as a command line gives them: by number, by range, by name."""

import csv
import os
import re
from collections.abc import Sequence

from mvar.model import Model

Name = tuple[str]
"""A class by name; of length 1, as many as it stands for."""


def parsed(text: str) -> list[range | Name]:
    """ "1,7-9,cat" → [range(1, 2), range(7, 10), ("cat",)]; a name with commas stands in double quotes.

    Raises ValueError where there is no class in `text`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # a locale without these characters (LC_ALL=C), where Python keeps the bytes
        text = os.fsencode(text).decode(errors="replace")
    try:
        found = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        found = []
    parts: list[range | Name] = []
    for part in found or [""]:
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        parts.append(range(int(match[1]), int(match[2] or match[1]) + 1) if match else (part.strip(),))
        if not parts[-1] or parts[-1] == ("",):
            raise ValueError(f"--classes: expected such as 3, 1,5,7-9 or cat,dog, got {text!r}")
    return parts


def numbers(parts: Sequence[range | Name], model: Model) -> list[int]:
    """The classes' numbers, in this order. Raises ValueError for one that the model does not have, or has twice."""
    names, classes = model.class_names or (), list[int]()
    for part in parts:
        if not isinstance(part, range):
            (name,) = part
            if names.count(name) != 1:
                has = f"names {', '.join(names[:5])}{', …' * (len(names) > 5)}" if names else "has numbers alone"
                found = "two classes" if name in names else "no class"
                raise ValueError(f"--classes: {found} {name!r}; the model's file {has}")
            part = range(names.index(name), names.index(name) + 1)
        if part.stop > model.config.num_classes:
            expected = f"numbers from 0 to {model.config.num_classes - 1}"
            raise ValueError(f"--classes: expected {expected}, got {part.stop - 1}")
        classes += part
    return classes
