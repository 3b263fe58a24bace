"""The sdist and the wheel, built from a copy of this tree and tried outside of it."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.run import ROOT

SOURCES = {"glora": ROOT / "glora", "glora_kernels": ROOT / "glora_kernels", "glora_bench": ROOT / "bench"}
DATA = {
    "glora/py.typed",
    "glora/report/published.json",
    *(f"glora/runs/recipes/{name}.toml" for name in ("fewshot", "imagenet", "own_images", "own_texts", "vtab1k")),
    "glora_kernels/planning/settings.json",
    "glora_kernels/py.typed",
}
LEFT = ("*.egg-info", "__pycache__", "*.so", "results")  # what an earlier build or run has made


def run(*command, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": cwd, "env": {**environment, **variables}, "capture_output": True, "text": True}
    done = subprocess.run([str(part) for part in command], check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both: ``build`` makes the wheel from the sdist."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in ("bench", "csrc", "glora", "glora_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*LEFT))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", out, tree]
    run(*command, cwd=tree, GLORA_BUILD_CPU="0", GLORA_BUILD_CUDA="0")
    return out


@pytest.fixture(scope="module")
def wheel(built):
    [wheel] = built.glob("glora-*-none-any.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The only folder that is searched before what this Python has."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_has_every_module_and_the_data(wheel):
    """Each folder with an ``__init__.py`` is a package, and has to be in pyproject.toml."""
    modules = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for init in folder.rglob("__init__.py")
        for file in init.parent.glob("*.py")
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules | DATA


def test_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    assert "License-Expression: Apache-2.0" in lines and "License-File: LICENSE" in lines
    assert f"{Path(name).parent}/licenses/LICENSE" in archive.namelist()
    assert "Requires-Python: >=3.10" in lines
    assert [line[-4:] for line in lines if line.startswith("Classifier: Programming Language :: Python :: 3.")] == [
        "3.10",
        "3.11",
        "3.12",
        "3.13",
    ]


def test_the_sdist_has_the_sources_of_the_modules_in_cpp(built):
    [sdist] = built.glob("glora-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


PIPELINE = """
import sys
import glora, glora_kernels
assert "torch" in sys.modules and not {"triton", "transformers"} & set(sys.modules)
print([glora.__file__, glora_kernels.__file__])

import torch
from torch import nn
from torch.utils.data import TensorDataset
torch.manual_seed(0)
model = glora.inject(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)), rank=2)
x = torch.randn(32, 8)
data = TensorDataset(x, (x[:, 0] > 0).long())
summary = glora.train(model, data, glora.Recipe(steps=3, batch_size=8), progress=False)
assert summary.steps == 3
expected = model.eval()(x)
assert glora.merge(model, x[:4]).layers
assert not any(isinstance(module, glora.GLoRALayer) for module in model.modules())
torch.testing.assert_close(model(x), expected)
"""


def test_outside_of_the_tree(installed, tmp_path):
    """A model is adapted, trained and merged by what the wheel has installed."""
    out = run(sys.executable, "-c", PIPELINE, cwd=tmp_path, PYTHONPATH=str(installed))
    assert ast.literal_eval(out) == [str(installed / name / "__init__.py") for name in ("glora", "glora_kernels")]


def test_its_commands(installed, tmp_path):
    assert run(sys.executable, "-m", "glora", "--help", cwd=tmp_path, PYTHONPATH=str(installed)).startswith("usage:")
    findings = json.loads(run(installed / "bin" / "glora", "doctor", "--json", cwd=tmp_path, PYTHONPATH=str(installed)))
    assert findings["problems"] == []
