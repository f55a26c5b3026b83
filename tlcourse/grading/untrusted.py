"""Is it safe for the parent to keep what a sandbox says? Asked before anything else is done."""

from __future__ import annotations

from typing import Any

_DEEPEST = 50  # levels of JSON for those of plain data
_MOST_PARTS = 100_000  # lists and dicts in a value
_MOST_AXES = 32
_MOST_ENTRIES = 20_000_000  # of an array, or characters of one of text


def one_line(value: Any, most: int) -> str:
    """One line that can be shown: no control characters, no half ones."""
    if type(value) is not str:
        return ""
    return "".join(c if c.isprintable() else " " for c in value[:most])


def within_bounds(value: Any) -> bool:
    """Whether a value costs the parent about as much as its length suggests.

    It is no deeper than plain data can be, is not made of brackets, and its arrays do not ask for
    more than they bring: few words of which one is long fill much memory as an array.
    """
    waiting, found = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        if type(item) not in (dict, list):
            continue
        if type(item) is dict and type(item.get("array")) is dict and not _modest(item["array"]):
            return False
        for part in item.values() if type(item) is dict else item:
            if type(part) in (dict, list):
                found += 1
                waiting.append((part, depth + 1))
                if depth == _DEEPEST or found > _MOST_PARTS:
                    return False
    return True


def _modest(array: dict[str, Any]) -> bool:
    """Whether what an array in JSON says of its own size can be believed."""
    shape, words = array.get("shape"), array.get("text")
    if type(shape) is list:
        sizes = [n for n in shape if type(n) is int]
        if len(shape) > _MOST_AXES or max(sizes, default=0) > _MOST_ENTRIES:
            return False
    if type(words) is list:
        longest = max((len(word) for word in words if type(word) is str), default=0)
        return len(words) * longest <= _MOST_ENTRIES
    return True
