"""Saying in what two descriptions differ, for errors that people read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The innermost entries that differ, such as ``"limit 9000, expected 3; settings seed 0, expected 1"``."""
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return "; ".join(f"{name} {_differing(found.get(name), expected.get(name))}" for name in names)


def _differing(found: Any, expected: Any) -> str:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return differences(found, expected)
    return f"{_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
