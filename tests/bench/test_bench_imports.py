"""Every module of the benchmarks can be imported, also those that only a GPU can run."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(file.relative_to(ROOT).with_suffix("") for file in (ROOT / "bench").rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_import(module):
    pytest.importorskip("triton")
    importlib.import_module(".".join(module.parts).removesuffix(".__init__"))
