"""Imports point one way: glora_kernels, then glora, then the command line."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "glora_kernels").rglob("*.py"))
HEAVY = (
    "triton",
    "timm",
    "torchvision",
    "matplotlib",
    "sklearn",
    "safetensors",
    "peft",
    "transformers",
    "bitsandbytes",
    "torchao",
    "torch.distributed.tensor",
)
GLORA = sorted((ROOT / "glora").rglob("*.py"))
# Packages whose types are adapted, imported when such a layer is made or read; and one that makes models.
LAZY = {
    ROOT / "glora" / "layers" / "conv1d.py": ("transformers",),
    ROOT / "glora" / "layers" / "quantised_formats.py": ("bitsandbytes", "torchao"),
    ROOT / "glora" / "runs" / "text_models.py": ("transformers",),
}
# Derives from classes of Transformers; nothing else imports it.
TRAINER = ROOT / "glora" / "trainer.py"
# Two files work on PEFT's own layers: one derives from them, the other loads the first when it is called.
PEFT_LAYERS, PEFT_USER = ROOT / "glora" / "peft" / "layers.py", ROOT / "glora" / "peft" / "acceleration.py"


def imported(file, walk=ast.walk):
    """Absolute names of the modules that a file imports, relative imports resolved."""
    package = file.relative_to(ROOT).parent.parts
    for node in walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{name}.{alias.name}" for alias in node.names)
            yield name


def walk_outside_of_functions(node):
    """The nodes that run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from walk_outside_of_functions(child)


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


@pytest.mark.parametrize(
    "file",
    [f for f in GLORA if f.parent.name != "cli" and f.name != "__main__.py"],
    ids=lambda f: f.relative_to(ROOT).as_posix(),
)
def test_nothing_imports_the_command_line(file):
    assert not any(within(name, "glora.cli") or within(name, "argparse") for name in imported(file))


@pytest.mark.parametrize("file", KERNELS + GLORA, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_tests_and_benchmarks_stand_outside(file):
    assert not any(within(name, outside) for name in imported(file) for outside in ("tests", "bench", "pytest"))


@pytest.mark.parametrize("file", KERNELS + GLORA, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_peft_is_imported_in_one_file_and_lazily_in_another(file):
    packages = ("peft", "glora.peft.layers")
    if file not in (PEFT_LAYERS, PEFT_USER):
        assert not any(within(name, package) for name in imported(file) for package in packages)
    if file == PEFT_USER:
        at_import = list(imported(file, walk_outside_of_functions))
        assert not any(within(name, package) for name in at_import for package in packages)


@pytest.mark.parametrize("file", KERNELS + GLORA, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_optional_packages_are_imported_lazily_each_in_its_file(file):
    assert not any(within(name, "glora.trainer") for name in imported(file))
    if file == TRAINER:
        return
    allowed = LAZY.get(file, ())
    for package in {package for packages in LAZY.values() for package in packages}:
        found = imported(file, walk_outside_of_functions) if package in allowed else imported(file)
        assert not any(within(name, package) for name in found), package


def importers_of(folder):
    """Which files and sub-folders of ``folder`` each of them imports from, whatever stands between."""
    package = ".".join(folder.relative_to(ROOT).parts)
    parts = {f.stem for f in folder.glob("*.py")} | {f.name for f in folder.iterdir() if any(f.glob("*.py"))}
    found = {part: set() for part in parts - {"__init__"}}
    for file in (file for file in KERNELS + GLORA if file.is_relative_to(folder) and file != folder / "__init__.py"):
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        for name in imported(file):
            if within(name, package) and name != package:
                found[own].add(name.removeprefix(package + ".").partition(".")[0])
    return {part: names & set(found) - {part} for part, names in found.items()}


FOLDERS = sorted({file.parent for file in KERNELS + GLORA})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_circles_and_no_import_runs_back_up(folder):
    """The files and sub-folders of each folder stand on floors: each imports from lower floors only.

    A circle of files is one of the folder in which they meet. Imports inside functions count too.
    """
    waiting = importers_of(folder)
    while free := [part for part, below in waiting.items() if not below & set(waiting)]:
        for part in free:
            del waiting[part]
    assert not waiting, waiting


def public():
    """The names and the modules of ``glora``, without an import."""
    tree = ast.parse((ROOT / "glora" / "api.py").read_text())
    [listed] = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    named = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return ast.literal_eval(listed), named


def test_public_names_are_those_imported_and_none_is_hidden_by_a_module():
    """The import of a module sets an attribute of the package, which would replace a function of that name."""
    names, imported_names = public()
    assert len(names) == len(set(names)) and set(names) == imported_names
    modules = {file.stem for file in (ROOT / "glora").glob("*.py")} | {file.parent.name for file in GLORA}
    assert modules & set(names) == {"peft"}


PACKAGE = f"""
import importlib, pickle, pydoc, sys
import glora, glora.cli
assert isinstance(glora.__version__, str)
assert not hasattr(glora, "__wrapped__") and not hasattr(glora, "_private")
assert not any(hasattr(glora, name) for name in ("x.y", "config.y", "", "a name"))
assert not {{"torch", "numpy", "glora_kernels", "glora.api"}} & set(sys.modules)
modules = {sorted(file.stem for file in (ROOT / "glora").glob("[!_]*.py"))}
for name in modules:
    assert getattr(glora, name) is sys.modules["glora." + name], name
from glora import *
from glora import api, peft
assert glora.__all__ is api.__all__ and set(glora.__all__) <= set(dir(glora))
for name in glora.__all__:
    assert globals()[name] is getattr(glora, name) is getattr(api, name), name
assert peft is sys.modules["glora.peft"]
assert pickle.loads(pickle.dumps([glora.inject, glora.PathConfig])) == [glora.inject, glora.PathConfig]
assert "inject(model" in pydoc.plain(pydoc.render_doc(glora))
try:
    glora.ingect
except AttributeError as error:
    assert str(error) == "module 'glora' has no attribute 'ingect'" and error.name == "ingect" and error.obj is glora
else:
    raise AssertionError
"""


SET_BEFORE = """
import glora
fake = glora.search = object()
assert callable(glora.inject) and glora.search is fake
"""
WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
try:
    import glora.trainer
except ModuleNotFoundError as error:
    assert "pip install 'glora[peft]'" in str(error) and error.name == "transformers", error
else:
    raise AssertionError
"""


@pytest.mark.parametrize("code", [PACKAGE, SET_BEFORE, WITHOUT_TRANSFORMERS], ids=["names", "set before", "no package"])
def test_names_are_loaded_when_they_are_used(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LIGHT = ["glora_kernels", "glora", "glora.cli", "glora.api", "glora.peft", "glora.protocols"]
IMPORTS = f"""
import importlib, json, sys, torch
before, found = set(sys.modules), {{}}
for package in {LIGHT}:
    importlib.import_module(package)
    found[package] = [name for name in {HEAVY} if name in set(sys.modules) - before]
    assert not torch.cuda.is_initialized(), package
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded_by():
    """The modules that are loaded after each import, one after the other in one process."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", LIGHT)
def test_import_is_light(package, loaded_by):
    """Beyond what torch itself imports: no Triton, no timm, no plotting; and no CUDA context."""
    assert not loaded_by[package]
