"""The stub of libcuda: compiled when it is first wanted, and loaded into this process for good."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import torch
from triton.backends.nvidia import driver

from bench import stubbed

NAME = "libcuda.so.1"
SOURCE = Path(__file__).with_name("stub.c")
INCLUDE = Path(driver.__file__).with_name("include")
BUILD = Path(__file__).resolve().parents[3] / "build"


def fault() -> str | None:
    """Why the stub cannot be used here, if that is so."""
    if torch.cuda.is_available():
        return "there is a GPU, and with it another libcuda"
    return stubbed.fault() or (None if compiler() else "there is no C compiler")


def compiler() -> str | None:
    """The C compiler that Triton would take."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@cache
def load() -> ctypes.CDLL:
    """The library. From now on it is what any code of this process finds under its name.

    Raises:
        RuntimeError: there is another libcuda, or no C compiler.
    """
    reason = fault()
    if reason is not None:
        raise RuntimeError(f"stub of libcuda: {reason}")
    ctypes.CDLL(str(compiled()), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(NAME)
    if not hasattr(library, "stub_on_launch"):
        raise RuntimeError(f"stub of libcuda: another {NAME} has been loaded before")
    return library


@contextmanager
def found_by_triton() -> Iterator[None]:
    """Inside, Triton links what it compiles to the stub, wherever it has found a libcuda before."""
    _forget()
    try:
        with patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(compiled().parent)):
            yield
    finally:
        _forget()


def _forget() -> None:
    driver.libcuda_dirs.cache_clear()
    driver.library_dirs.cache_clear()


@cache
def compiled() -> Path:
    """The library's file. Its folder is named for what it is made of."""
    made_of = sha256(SOURCE.read_bytes() + (INCLUDE / "cuda.h").read_bytes()).hexdigest()[:16]
    library = BUILD / f"libcuda-{made_of}" / NAME
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name(f"{NAME}.{os.getpid()}")
        flags = ["-shared", "-fPIC", "-O1", f"-I{INCLUDE}", f"-Wl,-soname,{NAME}", "-o", unfinished]
        subprocess.run([compiler(), *flags, SOURCE], check=True)
        os.replace(unfinished, library)  # at once, whoever else compiles it too
    return library
