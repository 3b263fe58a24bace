"""Private names of PyTorch and Triton stand in two files (docs/private-names.md), and another would be noticed."""

import ast
import re
from importlib.util import find_spec

import pytest
import torch

from tests.test_layering import GLORA, KERNELS, ROOT

SEAMS = (ROOT / "glora_kernels" / "torch_private.py", ROOT / "glora_kernels" / "_triton" / "launch.py")
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}  # of named tuples
OVERRIDDEN = {"_load_from_state_dict", "_save_to_state_dict", "_apply", "_replicate_for_data_parallel"}  # docs say so


# Names that PyTorch and we have; a later PyTorch may come to have others of ours, which says nothing about our files.
BOTH = OVERRIDDEN | {"_autograd", "_check", "_device", "_functions", "_parameters", "_scale", "_values", "_version"}


MODULE = {name for name in dir(torch.nn.Module) if name.startswith("_") and not name.startswith("__")}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree):
    """Private names that a file defines: functions, classes, variables, attributes that it assigns."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def torch_names():
    """Private names of modules, tensors, optimisers, loaders and of the packages themselves, in this PyTorch."""
    linear = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW([linear.weight])
    things = [linear, torch.nn.Conv2d(1, 1, 1), linear.weight, optimizer, torch, torch._C, torch.nn, torch.autograd]
    things += [torch.nn.parallel.DistributedDataParallel, torch.utils.data.DataLoader([0]), torch.amp.GradScaler("cpu")]
    things += [torch.optim.lr_scheduler.LRScheduler, torch.nn.modules.batchnorm, (linear.weight * 1).grad_fn]
    if find_spec("triton"):
        from triton.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction

        things += [JITFunction, CompiledKernel]
    return {name for thing in things for name in dir(thing) if is_private(name)}


def private_names(tree, ours, theirs):
    """Private names of others that a file uses.

    A private name that none of our files defines is somebody else's. One that both have is ours only where the file
    that says it defines it, and says it of ``self`` or ``cls``. A method that every module has is not to be
    defined.
    """
    texts = {
        id(part) for node in ast.walk(tree) if isinstance(node, (ast.Expr, ast.JoinedStr)) for part in _parts(node)
    }
    defined = {name for node in ast.walk(tree) for name in own_names(node) if isinstance(node, ast.FunctionDef)}
    within = {id(node): f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in PUBLIC:
            holder, name = ast.unparse(node.value), node.attr
            if holder == "super()":
                if within.get(id(node)) != name or name not in OVERRIDDEN:
                    yield name
            elif name not in ours or (name in BOTH and not (holder in ("self", "cls") and name in defined)):
                yield name
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in _foreign(alias.name, ours))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (part for alias in node.names for part in _foreign(f"{node.module}.{alias.name}", ours))
        elif (
            isinstance(node, ast.FunctionDef)
            and node.name in set(dir(torch.nn.Module)) - OVERRIDDEN
            and is_private(node.name)
        ):
            yield from [node.name] if "self" in [argument.arg for argument in node.args.args[:1]] else []
        elif isinstance(node, ast.Constant) and id(node) not in texts and re.fullmatch(r"[\w.]+", str(node.value)):
            # a suffix of ours such as "_kernel" is no name, if PyTorch has none like it
            parts = _foreign(str(node.value), set())
            yield from (part for part in parts if part in theirs or "." in str(node.value))


def _parts(node):
    """The text of a docstring, or those of an f-string."""
    return [node.value] if isinstance(node, ast.Expr) else node.values


def _foreign(dotted, ours):
    """The private parts of a dotted name, of packages that are not ours."""
    package, *_ = dotted.split(".")
    known = set() if package in ("torch", "triton", "") else ours
    return [part for part in dotted.split(".") if is_private(part) and part not in known and "glora" not in package]


OUTER = [ROOT / "setup.py", *sorted((ROOT / "bench").rglob("*.py"))]
TREES = {file: ast.parse(file.read_text()) for file in (*KERNELS, *GLORA, *OUTER)}
OURS = {name for tree in TREES.values() for name in own_names(tree) if is_private(name)}
OURS |= {part for file in TREES for part in file.with_suffix("").relative_to(ROOT).parts if is_private(part)}
THEIRS = torch_names()


@pytest.mark.parametrize("file", sorted(TREES.keys() - set(SEAMS)), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_private_names_of_pytorch_and_triton_stand_behind_the_seams(file):
    assert not set(private_names(TREES[file], OURS, THEIRS))


@pytest.mark.parametrize(
    "text",
    [
        "from torch._C import _autograd",
        "import torch._dynamo",
        "x = torch._dynamo",
        "import_module('torch._dynamo')",
        "import_module('._dynamo', 'torch')",
        "sys.modules['triton._C.libtriton']",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "getattr(m, '_forward_hooks')",
        "NAME = '_modules'",
        "attrgetter('_modules')",
        "vars(m)['_parameters']",
        "m.__dict__.get('_buffers')",
        "module._buffers",
        "tensor._base",
        "self._parameters = {}",
        "self._parameters",
        "kernel._init_handles()",
        "class L:\n def _apply(self): pass\n\nm._apply(g)",
        "class L:\n def _apply(self): super()._save_to_state_dict()",
        "class L:\n def _call_impl(self): pass",
        "x._nobody_has_this",
    ],
)
def test_a_private_name_would_be_noticed(text):
    assert set(private_names(ast.parse(text), OURS, THEIRS))
