"""Checks of arguments' types, and their messages."""

from __future__ import annotations

import os

FILE = (str, os.PathLike, type(None))


def require_type(argument: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError, naming the argument, unless ``value`` is of ``kind``, which ``expected`` says in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: expected {expected}, got {type_of(value)}")


def require_function(argument: str, value: object, expected: str) -> None:
    """Raise TypeError unless ``value`` can be called with values; a class would be made, not called."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{argument}: expected {expected}, got {type_of(value)}")


def require_integer(argument: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{argument}: expected an integer from {least}, got {value!r}")


def type_of(value: object) -> str:
    """What ``value`` is, for a message."""
    return f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__
