"""Imports point one way: glora_kernels, then glora, then the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "glora_kernels").rglob("*.py"))
HEAVY = (
    *("triton", "timm", "torchvision", "matplotlib", "sklearn", "safetensors"),
    *("transformers", "bitsandbytes", "torchao", "torch.distributed.tensor"),
)
GLORA = sorted((ROOT / "glora").rglob("*.py"))


def imported(file):
    """Absolute names of the modules that a file imports, relative imports resolved."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{name}.{alias.name}" for alias in node.names)
            yield name


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("file", KERNELS, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_kernels_know_tensors_only(file):
    for name in imported(file):
        assert not within(name, "glora"), f"{file} imports {name}"
        assert not within(name, "torch.nn.Module"), f"{file} imports {name}"
        assert name == "torch.nn.functional" or name == "torch.nn" or not within(name, "torch.nn")


@pytest.mark.parametrize("file", GLORA, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_glora_never_imports_triton_or_private_kernels(file):
    for name in imported(file):
        assert not within(name, "triton"), f"{file} imports {name}"
        assert not any(part.startswith("_") for part in name.split(".")[1:2] if within(name, "glora_kernels"))


@pytest.mark.parametrize("file", [f for f in GLORA if f.name not in ("cli.py", "__main__.py")], ids=lambda f: f.name)
def test_nothing_imports_the_command_line(file):
    assert not any(within(name, "glora.cli") or within(name, "argparse") for name in imported(file))


@pytest.mark.parametrize("file", KERNELS + GLORA, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_tests_and_benchmarks_stand_outside(file):
    assert not any(within(name, outside) for name in imported(file) for outside in ("tests", "bench", "pytest", "peft"))


@pytest.mark.parametrize("package", ["glora_kernels", "glora", "glora.cli"])
def test_import_is_light(package):
    """Beyond what torch itself imports: no Triton, no timm, no plotting; and no CUDA context."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {package}\n"
        f"loaded = [name for name in {HEAVY} if name in set(sys.modules) - before]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
