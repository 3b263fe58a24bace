"""Finds the extension, or says why it is not there."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

BUILD = "GLORA_BUILD_CUDA=1 pip install --no-build-isolation -e ."
_NAME = "glora_kernels._C"


def load() -> Any:
    """The module. Raises ImportError if it is not built, or was built for another PyTorch."""
    import torch  # noqa: F401  # its libraries have to be there first

    return import_module(_NAME)


@cache
def fault() -> str | None:
    """Why the extension cannot be used, or None if it can. Tried once per process."""
    if find_spec(_NAME) is None:
        return f"the extension is not built; `{BUILD}` in the source tree builds it where nvcc is"
    try:
        load()
    except ImportError as error:
        return f"the extension does not load, it may have been built for another PyTorch ({error}); `{BUILD}`"
    return None
