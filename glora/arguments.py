"""Checks of arguments' types, and their messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

PATH = (str, os.PathLike)
FILE = (*PATH, type(None))


def require_type(argument: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError, naming the argument, unless ``value`` is of ``kind``; ``expected`` says it in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: expected {expected}, got {type_of(value)}")


def require_function(argument: str, value: object, expected: str) -> None:
    """Raise TypeError unless ``value`` can be called with values; a class is refused: a call only makes an instance."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{argument}: expected {expected}, got {type_of(value)}")


def require_integer(argument: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{argument}: expected an integer from {least}, got {value!r}")


def type_of(value: object) -> str:
    """The type of ``value``, in words for a message."""
    return f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__


MOST = 8  # entries that a message lists


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], form: str = " {}, expected {}") -> str:
    """The innermost entries that differ, such as ``"limit 9000, expected 3; settings seed 0, expected 1"``.

    Args:
        form: the text after a name, with places for the two values.
    """
    entries = list(_differing(found, expected, form))
    return "; ".join(entries[:MOST]) + _rest(entries, MOST)


def listed(names: Iterable[str], most: int = MOST) -> str:
    """``names`` for a message: the first ones, and how many more there are."""
    names = list(names)
    return ", ".join(map(repr, names[:most])) + _rest(names, most)


def _differing(found: Any, expected: Any, form: str, name: str = "") -> Iterator[str]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in {**found, **expected}:
            yield from _differing(found.get(key), expected.get(key), form, f"{name} {key}".lstrip())
    elif found != expected:
        yield f"{name}{form.format(_short(found), _short(expected))}"


def _rest(entries: list[str], most: int) -> str:
    return f" and {len(entries) - most} more" if len(entries) > most else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
