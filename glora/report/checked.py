"""JSON objects from disk, each entry read with its type checked; errors name the file and the entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..runs.folder import read_json

T = TypeVar("T")


class Entries:
    """The entries of a JSON object.

    Args:
        file: the file that it is from.
        content: the object.
        prefix: put before its entries in messages: the way to it from the file's outermost object.
    """

    def __init__(self, file: Path, content: dict[str, Any], prefix: str = ""):
        self.file, self.content, self.prefix = file, content, prefix

    @staticmethod
    def read(file: Path) -> Entries:
        """The object that ``file`` holds.

        Raises:
            ValueError: it is no JSON, or no object.
        """
        return Entries(file, read_json(file))

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raise ValueError for the entry ``name``, saying what came."""
        got = repr(self.content[name]) if name in self.content else "nothing"
        got = got if len(got) <= 200 else f"{got[:200]}..."
        raise ValueError(f"{self.file}: {self.prefix}{name}: expected {expected}, got {got}")

    def text(self, name: str) -> str:
        value = self.content.get(name)
        return value if isinstance(value, str) and value else self.fail(name, "a text")

    def integer(self, name: str) -> int:
        value = self.content.get(name)
        return value if type(value) is int else self.fail(name, "an integer")

    def count(self, name: str) -> int:
        value = self.content.get(name)
        return value if type(value) is int and value >= 0 else self.fail(name, "an integer from 0")

    def number(self, name: str) -> float:
        value = self.content.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.fail(name, "a number")
        return float(value)

    def share(self, name: str) -> float:
        """A number from 0 to 1."""
        value = self.number(name)
        return value if 0 <= value <= 1 else self.fail(name, "a number from 0 to 1")

    def list(self, name: str) -> list[Any]:
        value = self.content.get(name)
        return value if isinstance(value, list) else self.fail(name, "a list")

    def table(self, name: str) -> Entries:
        value = self.content.get(name)
        if not isinstance(value, dict):
            self.fail(name, "an object")
        return Entries(self.file, value, f"{self.prefix}{name}.")

    def optional(self, name: str, read: Callable[[Entries, str], T]) -> T | None:
        """``read(self, name)``, or None if the entry is null or absent."""
        return None if self.content.get(name) is None else read(self, name)
