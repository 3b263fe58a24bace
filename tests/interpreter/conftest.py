"""Kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreter``, in a process of its own.

Triton decides as its modules are imported whether kernels are interpreted, so nothing here is collected without it.
"""

import os

import pytest

from tests.helpers import unwritten_is_nan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.interpreter.shim import install

    install()


def pytest_report_collectionfinish():
    return [] if INTERPRETED else "tests/interpreter is not collected: it needs TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def poisoned_memory():
    with unwritten_is_nan():
        yield
