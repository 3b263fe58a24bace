"""Types of optional packages: known only once something else has loaded the package."""

from __future__ import annotations

import sys
from typing import Any


def loaded(module: str, name: str) -> Any:
    """The class, or None if its module is not loaded. Then nobody has an object of it."""
    return getattr(sys.modules.get(module), name, None)


def is_a(value: object, module: str, name: str) -> bool:
    """``isinstance(value, module.name)``, without loading ``module``."""
    kind = loaded(module, name)
    return kind is not None and isinstance(value, kind)
