"""Numbers, lists and near misses in words, for messages and tables. No tensor library is imported here."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any


def count(number: int, what: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def numbered(name: str) -> Iterator[str]:
    """name, name-2, name-3 …, for a first one that is free."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def in_words(value: Any) -> str:
    """A plain value for people: sizes as 3 × 4, large numbers with commas."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inside}" for name, inside in value.items())
    if isinstance(value, list):
        return (" × " if all(isinstance(v, int) for v in value) else ", ").join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def did_you_mean(name: str, known: Iterable[str], otherwise: str, *, most: int = 1) -> str:
    """The end of a message about an unknown name: the nearest known ones, at most so many, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(near)}?" if near else otherwise
