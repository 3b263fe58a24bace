"""Every private name of PyTorch, taken away and made to raise in turn: results stay right, or what is off is said."""

import ast
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from glora import GLoRALinear, PathConfig
from glora.cli import main
from glora_kernels import LowRank, Terms, Vector, glora_linear, reference, torch_private
from tests.glora.toys import randomize

SOURCE = Path(torch_private.__file__)
CODE = compile(SOURCE.read_text(), SOURCE, "exec")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "private-names.md"
TRIED = [
    node.args[0].value
    for node in ast.walk(ast.parse(SOURCE.read_text()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_tried"
]
MODULE_NAMES = [*torch_private._CALL_HOOKS, *torch_private._STATE_HOOKS, torch_private._COMPILED]
NODES = "_C._current_autograd_node", "_C._autograd._get_sequence_nr", "autograd.graph.Node._sequence_nr"
PATHS = [PathConfig("vector", "lora_2", "lora_1", "vector", "vector"), PathConfig("lora_1", "vector"), PathConfig()]


def seam_without(*names: str, raising: bool = False) -> ModuleType:
    """The seam as it is made where the last parts of ``names`` are missing, or are functions that raise."""
    taken = {name.rpartition(".")[2] for name in names}

    def absent(holder, name, *default):
        if name not in taken:
            return getattr(holder, name, *default)
        if raising:
            return broken
        if default:
            return default[0]
        raise AttributeError(name)

    def broken(*_, **__):
        raise RuntimeError("changed")

    made = ModuleType("glora_kernels.torch_private")
    made.__package__ = "glora_kernels"
    vars(made).update(getattr=absent, hasattr=lambda holder, name: name not in taken and hasattr(holder, name))
    exec(CODE, vars(made))
    return made


@pytest.fixture
def in_use(monkeypatch):
    """A function that puts another seam in the place of ours, in every module."""

    def put(seam: ModuleType) -> ModuleType:
        for module in [m for name, m in sys.modules.items() if name.partition(".")[0] in ("glora", "glora_kernels")]:
            for name, value in list(vars(module).items()):
                same = callable(value) and value is vars(torch_private).get(name)
                if same and not isinstance(value, type) and module is not torch_private:
                    monkeypatch.setattr(module, name, vars(seam)[name])
        return seam

    return put


each_fault = pytest.mark.parametrize("raising", [False, True], ids=["absent", "raises"])
each_name = pytest.mark.parametrize("name", TRIED)


def make_layer():
    layer = GLoRALinear(70, 70, rank=2, dtype=torch.float64)
    randomize(layer)
    return layer


def grads_of(layer):
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def assert_same(found, want):
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-10, atol=1e-10, msg=name)


def expected(layer, x, path):
    """The formula, by autograd."""
    layer.zero_grad()
    y = reference.glora_linear(x, layer.weight, layer.bias, layer.terms(path))
    y.square().sum().backward()
    return y.detach(), {"x": x.grad, **grads_of(layer)}


def fresh(x):
    return x.detach().clone().requires_grad_()


@each_name
@each_fault
def test_layers_compute_what_they_did(name, raising, in_use):
    """Prepared calls with changing paths, and an operation in place after them."""
    in_use(seam_without(name, raising=raising))
    layer, x = make_layer(), torch.randn(3, 30, 70, dtype=torch.float64)
    for path in [*PATHS, *PATHS]:
        layer.path = path
        want_y, want = expected(layer, x_want := fresh(x), path)
        want["x"] = x_want.grad
        layer.zero_grad()
        y = layer(x_got := fresh(x))
        y.square().sum().backward()
        assert_same({"y": y.detach(), "x": x_got.grad, **grads_of(layer)}, {"y": want_y, **want})
        with torch.no_grad():
            torch.testing.assert_close(layer(x), want_y)
        layer.zero_grad()
        layer(x_got := fresh(x)).tanh_().sum().backward()  # overwrites the output, which is no view
        found = {"x": x_got.grad, **grads_of(layer)}
        layer.zero_grad()
        reference.glora_linear(x_want := fresh(x), layer.weight, layer.bias, layer.terms()).tanh().sum().backward()
        assert_same(found, {"x": x_want.grad, **grads_of(layer)})
    assert (layer._prepared is None) == (name == TRIED[0])


@each_name
@each_fault
def test_modes(name, raising, in_use):
    """Autocast, batched and second gradients, forward-mode AD, torch.func, fake tensors."""
    in_use(seam_without(name, raising=raising))
    weight, a, x = (torch.randn(size, dtype=torch.float64) for size in ((70, 70), (70,), (80, 70)))
    a.requires_grad_()

    def function(linear, x):
        return linear(x, weight, None, Terms(A=Vector(a), B=LowRank(weight[:, :2], weight[:2])))

    ours, formula = partial(function, glora_linear), partial(function, reference.glora_linear)
    basis = torch.eye(70, dtype=torch.float64)[:5]

    def batched(function):
        return torch.autograd.grad(function(x)[0], a, basis, is_grads_batched=True)[0]

    def second(function):
        return torch.autograd.grad(torch.autograd.grad(function(x).square().sum(), a, create_graph=True)[0].sum(), a)[0]

    def forward_mode(function):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    for way in (batched, second, forward_mode):
        torch.testing.assert_close(way(ours), way(formula))
    if name == "_C._are_functorch_transforms_active":
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.grad(lambda x: ours(x).sum())(x)
    else:
        torch.testing.assert_close(
            torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: formula(x).sum())(x)
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert glora_linear(x.float(), weight.float(), None, Terms()).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert glora_linear(mode.from_tensor(x), mode.from_tensor(weight), None, Terms()).shape == (80, 70)


@each_name
@each_fault
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(name, raising, use_reentrant, in_use):
    """With the path kept until backward is done; with another path set before, unless that is said to be off."""
    seam = in_use(seam_without(name, raising=raising))
    off = any("checkpointing" in feature for feature in seam.FEATURES_OFF.values())
    assert off == (name in (*NODES, "ones"))
    layer, x = make_layer(), torch.randn(80, 70, dtype=torch.float64)
    for path, later in zip(PATHS, [*PATHS[1:], PATHS[0]]):
        layer.path = path
        _, want = expected(layer, fresh(x), path)
        layer.zero_grad()
        y = checkpoint(layer, x_got := fresh(x), use_reentrant=use_reentrant)
        if not off:
            layer.path = later
        y.square().sum().backward()
        assert_same(grads_of(layer), {k: v for k, v in want.items() if k != "x"})
        assert x_got.grad is not None


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("raising", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["absent", "raises"])
def test_compiled(name, raising, in_use):
    in_use(seam_without(name, raising=raising))
    layer, x = make_layer(), torch.randn(80, 70, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for path in PATHS[:2]:
        layer.path = path
        want_y, want = expected(layer, fresh(x), path)
        layer.zero_grad()
        y = compiled(x_got := fresh(x))
        y.square().sum().backward()
        found = {"y": y.detach(), "x": x_got.grad, **grads_of(layer)}
        assert_same({k: found[k] for k in want if k != "x"}, {k: v for k, v in want.items() if k != "x"})
        torch.testing.assert_close(found["y"], want_y)


def test_the_ways_without_a_name_say_the_same():
    """Each function of the seam against itself without any private name, inside and outside of what it asks for."""
    ours, seam = torch_private, seam_without(*TRIED, "_parameters")
    tensor, found = torch.ones(3, requires_grad=True), []

    def ask(name, *arguments):
        found.append(name)
        assert getattr(seam, name)(*arguments) == getattr(ours, name)(*arguments), name
        return getattr(ours, name)(*arguments)

    with torch.autocast("cpu", torch.bfloat16):
        assert ask("autocast_is_on")
    with torch.autograd.forward_ad.dual_level():
        assert ask("forward_mode_is_on")
    with FakeTensorMode() as mode:
        assert ask("is_fake", mode.from_tensor(torch.ones(2)))
    assert not any((ask("autocast_is_on"), ask("forward_mode_is_on"), ask("is_fake", tensor), ask("in_backward")))
    assert seam.graph_task() == ours.graph_task() == ours.NO_TASK
    tensor.register_hook(lambda _: found.append(ask("in_backward")))
    (tensor * 2).sum().backward()
    torch.autograd.grad((tensor * 2).sum(), tensor)
    assert found.count(True) == 2
    assert torch.func.vmap(lambda x: x * (2 if seam.is_batched(x) else 3))(torch.ones(2)).tolist() == [2, 2]
    assert not ask("is_batched", tensor)
    assert seam.hooks_on_top() is not None
    assert seam.version_of(tensor) is None
    assert seam.unsafe_view(tensor, (3, 1)).shape == (3, 1)
    targets = [torch.zeros(2), torch.zeros(3)]
    seam.copy_each(targets, [torch.ones(2), torch.ones(3)])
    assert all(target.eq(1).all() for target in targets)
    twice = nn.Linear(3, 3)
    twice.again = twice.weight
    assert list(seam.held_parameters(twice)) == list(ours.held_parameters(twice)) == ["weight", "bias", "again"]
    assert isinstance(nn.BatchNorm2d(1), seam.BATCH_NORMS)
    assert issubclass(nn.LazyBatchNorm2d, ours.BATCH_NORMS)
    assert not isinstance(nn.InstanceNorm2d(1), (*seam.BATCH_NORMS, *ours.BATCH_NORMS))


def test_guards_of_another_meaning_are_not_taken():
    class Guards:
        def __init__(self, *_, **__):
            self.check = lambda *_: True

    made = ModuleType("glora_kernels.torch_private")
    vars(made).update(
        getattr=lambda holder, name, *other: Guards if name == "TensorGuards" else getattr(holder, name, *other)
    )
    exec(CODE, vars(made))
    assert not made.can_guard()


IMPORTED_WITHIN = """
import torch
with {mode}:
    import glora_kernels
from glora_kernels import torch_private
print([name for name, value in vars(torch_private).items() if value is None], torch_private.FEATURES_OFF)
"""


@pytest.mark.parametrize("mode", ["torch.no_grad()", "torch.inference_mode()", "torch.device('cuda')"])
def test_import_within_another_mode_finds_the_same(mode):
    code = IMPORTED_WITHIN.format(mode=mode)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[] {}\n", 0), done.stderr


def test_import_warns_of_what_is_off():
    code = "import torch; del torch._C._current_autograd_node; import glora_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeWarning: PyTorch" in done.stderr
    assert "has no torch._C._current_autograd_node: a forward pass" in done.stderr


def test_setting_a_path_in_backward_is_refused_without_the_id_of_the_engine_too(in_use):
    in_use(seam_without("_C._current_graph_task_id"))
    layer = make_layer()
    y = layer(torch.randn(2, 70, dtype=torch.float64, requires_grad=True))
    y.register_hook(lambda _: setattr(layer, "path", PATHS[1]))
    with pytest.raises(RuntimeError, match="path: expected to be set outside of backward"):
        y.sum().backward()


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_what_a_module_lacks_is_said(name):
    seam = seam_without(name)
    assert list(seam.FEATURES_OFF) == [f"torch.nn.Module.{name}"]
    for asked in (seam.has_call_hooks, seam.has_state_hooks, seam.is_compiled_in_place):
        assert asked(nn.Linear(1, 1)) is False


def test_parts_of_modules_in_the_public_way():
    seam, shared = seam_without("_parameters", "_modules"), nn.Linear(2, 2, bias=False)
    module = nn.Sequential(shared, nn.Sequential(nn.ReLU()), shared)
    assert seam.children_of(module) == torch_private.children_of(module) == list(zip("012", module))
    assert list(seam.held_parameters(shared)) == ["weight"]
    assert list(torch_private.held_parameters(shared)) == ["weight", "bias"]


@pytest.mark.parametrize("taken", [(), ("_data",), ("encodekey",)], ids=lambda names: "-".join(names) or "none")
def test_variables_of_the_environment(taken, monkeypatch):
    class Environment(dict):
        _data = property(lambda self: self)

        def encodekey(self, key):
            return key

    environment = Environment(SET="1")
    for name in taken:
        monkeypatch.delattr(Environment, name)
    monkeypatch.setattr(torch_private.os, "environ", environment)
    assert torch_private.watched("SET")()
    is_set = torch_private.watched("LATER")
    assert not is_set()
    environment["LATER"] = ""
    assert is_set()


def test_what_is_off_is_said(monkeypatch, capsys):
    assert torch_private.FEATURES_OFF == {}
    torch_private.warn_of_features_off()  # warnings are errors here
    seam = seam_without(NODES[0])
    with pytest.warns(RuntimeWarning, match=r"has no torch\._C\._current_autograd_node: .* keep the paths"):
        seam.warn_of_features_off()
    monkeypatch.setattr("glora.doctor.FEATURES_OFF", seam.FEATURES_OFF)
    main(["doctor"])
    assert "off with this PyTorch\n  torch._C._current_autograd_node: a forward pass" in capsys.readouterr().out


def test_the_document_has_every_name():
    named = re.findall(r"^\| `([^`]+)`", PAGE.read_text(), re.M)
    expected = [f"torch.{name}" for name in dict.fromkeys(TRIED) if "_" in name]
    expected += [f"torch.nn.Module.{name}" for name in MODULE_NAMES]
    assert not set(expected) - set(named)
