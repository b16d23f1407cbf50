"""What people call a class: the words of a WordNet id (``n03000684``: chain saw), or those of a file.

Only what is shown has words; labels and records keep the name of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, brief

WORDNET = re.compile(r"n\d{8}")


def read_class_names(path: Path) -> dict[str, str]:
    """The words of each class folder: a line is the folder's name, a tab or blanks, and the words.

    That is the form of ImageNet's ``synset_words.txt``. A name with blanks needs the tab.

    Raises ConfigError for a file that cannot be read, a line without words, or a name that comes twice.
    """
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"class names {path}: cannot be read ({brief(error)})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = line.strip().split("\t", 1) if "\t" in line.strip() else line.split(maxsplit=1)
        words = " ".join(rest).strip()
        if not words or name.strip() in found:
            raise ConfigError(
                f"class names {path}, line {number}: expected a class folder, a tab and its words, found "
                f"{brief(repr(line), 60)}"
            )
        found[name.strip()] = words
    return found


def in_words(classes: Iterable[str], given: Mapping[str, str] | None = None) -> list[str]:
    """Each class as it is shown: ``chain saw (n03000684)``, or the folder's name where no words are known.

    Args:
        given: words by the folder's name, as :func:`read_class_names` finds them; they come before WordNet's.
    """
    return [_shown(name, (given or {}).get(name) or _of_wordnet(name)) for name in classes]


def _shown(name: str, words: str | None) -> str:
    return f"{words} ({name})" if words and words != name else name


def _of_wordnet(name: str) -> str | None:
    """The first of the words that WordNet has for an id, as timm tells them."""
    if not WORDNET.fullmatch(name):
        return None
    known = _imagenet()
    try:
        return str(known.label_name_to_description(name, detailed=False)).split(",")[0] if known else None
    except (KeyError, ValueError):
        return None


@cache
def _imagenet() -> Any:
    try:
        from timm.data import ImageNetInfo
    except ModuleNotFoundError:  # records are also read without torch
        return None
    return ImageNetInfo("imagenet-22k")  # which has all ids of the smaller sets
