"""Parse classes of the command line: numbers, ranges and names."""

import csv
import os
import re
from collections.abc import Sequence
from typing import Any

from mvar.stored import StoredModel

Name = tuple[str]
"""A class name, in a tuple so that its length is the number of classes, as for a range."""


def parse(text: str, flag: str = "--classes") -> list[range | Name]:
    """Parse "1,7-9,cat" to [range(1, 2), range(7, 10), ("cat",)]. Names with commas are in double quotes.

    Raises:
        ValueError: `text` is empty, has an empty part or unbalanced quotes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogate escapes of an ASCII locale (LC_ALL=C)
        text = os.fsencode(text).decode(errors="replace")
    try:
        fields = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        fields = []
    parts: list[range | Name] = []
    for part in fields or [""]:
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        parts.append(range(int(match[1]), int(match[2] or match[1]) + 1) if match else (part.strip(),))
        if not parts[-1] or parts[-1] == ("",):
            raise ValueError(f"{flag}: expected classes such as 3, 1,5,7-9 or cat,dog, got {text!r}")
    return parts


def class_indices(parts: Sequence[range | Name], model: StoredModel[Any], flag: str = "--classes") -> list[int]:
    """Class indices in the given order. Raises ValueError for unknown or ambiguous names and indices out of range."""
    names, classes = model.class_names or (), list[int]()
    for part in parts:
        if not isinstance(part, range):
            (name,) = part
            if names.count(name) != 1:
                known = f"has {', '.join(names[:5])}{', …' * (len(names) > 5)}" if names else "has no class names"
                problem = "ambiguous class" if name in names else "unknown class"
                raise ValueError(f"{flag}: {problem} {name!r}; the model {known}")
            part = range(names.index(name), names.index(name) + 1)
        if part.stop > model.config.num_classes:
            expected = f"numbers from 0 to {model.config.num_classes - 1}"
            raise ValueError(f"{flag}: expected {expected}, got {part.stop - 1}")
        classes += part
    return classes
