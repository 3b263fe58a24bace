"""One thread (results and timings do not depend on the machine's load) and no backend chosen outside."""

import pytest
import torch

pytest_plugins = ["tests.tiers"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_chosen_backend(monkeypatch):
    monkeypatch.delenv("GLORA_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_report_header():
    return f"torch {torch.__version__}"
