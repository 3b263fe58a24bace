"""Kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreter``, in a process of its own.

Triton decides as its modules are imported whether kernels are interpreted, so nothing here is collected without it.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.interpreter.shim import install

    install()


def pytest_report_collectionfinish():
    return [] if INTERPRETED else "tests/interpreter is not collected: it needs TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills what it allocates with NaN or the largest integer: an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    yield
    torch.use_deterministic_algorithms(before)
