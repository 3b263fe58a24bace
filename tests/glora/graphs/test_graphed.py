"""GraphedStep: one step for every path, as the ordinary training loop takes it."""

import copy
from contextlib import contextmanager
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import glora
from glora.graphs.capture import Captured, graphs_for
from glora.graphs.selective_update import SelectiveUpdate
from tests import graph_emulation
from tests.glora.toys import CLASSES, adapted_mlp, generator, randomize, same_bits, state, tiny_vit

SPACE = glora.SearchSpace((2, 1))
MODES = ("whole", "piecewise")
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.3),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "adamax": partial(torch.optim.Adamax, lr=0.02, weight_decay=0.3),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5, weight_decay=0.3),
    "radam": partial(torch.optim.RAdam, lr=0.02, weight_decay=0.3),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
}


def make(product="hadamard", dtype=torch.float64, bias=True):
    model = adapted_mlp(rank=2, product=product, dtype=dtype, bias=bias)
    randomize(model)
    return model


def batches(count, model, size=7):
    gen, like = generator(1), next(model.parameters())
    for _ in range(count):
        x = torch.randn(size, 6, generator=gen).to(like)
        yield x, torch.randint(CLASSES, (size,), generator=gen)


def ordinary_step(model, optimizer, x, target, paths, clip_norm=None):
    """The loop that glora.train runs."""
    glora.set_paths(model, paths)
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(glora.trainable_parameters(model), clip_norm)
    optimizer.step()
    return loss.detach()


def optimizer_for(model, name):
    return OPTIMIZERS[name](glora.trainable_parameters(model))


def assert_gradients_of_the_ordinary_layer(model, step, x, target, tolerance=1e-10):
    """Of a step on a random path, which is taken back; zero or None where the ordinary layer has none."""
    before = copy.deepcopy(model.state_dict())
    loss = step(x, target)
    model.load_state_dict(before)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    parameters = [p for p in model.parameters() if p.requires_grad]
    with glora.using_paths(model, step.paths):
        want = F.cross_entropy(model(x), target)
        expected = torch.autograd.grad(want, parameters, allow_unused=True)
    torch.testing.assert_close(loss, want.detach(), rtol=tolerance, atol=tolerance)
    for (name, gradient), other in zip(found.items(), expected):
        if other is None:
            assert gradient is None or not gradient.count_nonzero(), name
        else:
            torch.testing.assert_close(gradient, other, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(params=["plain", "emulated"])
def graphs(request, monkeypatch):
    """Operations one by one, or the code of CUDA graphs over an emulation of them."""
    if request.param == "plain":
        return None
    return emulate(monkeypatch)


def emulate(monkeypatch):
    found = graph_emulation.emulate(monkeypatch)
    for name in graph_emulation.CAPTURABLE:
        options = {"capturable": True, "foreach": True, "lr": torch.tensor(OPTIMIZERS[name].keywords["lr"])}
        monkeypatch.setitem(OPTIMIZERS, name, partial(OPTIMIZERS[name], **options))  # foreach: a GPU's default
    return found


# The ordinary layer's gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_200_random_paths(mode, product, graphs):
    """Loss and every gradient, from one capture; fp64."""
    model = make(product)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode=mode)
    for x, target in batches(200, model):
        assert_gradients_of_the_ordinary_layer(model, step, x, target)
    if graphs is not None:
        pieces = {"hadamard": 8, "matmul": 4}[product]  # two layers; forward and backward
        assert graphs.captures == (1 if mode == "whole" else pieces)
        assert graphs.replays == (200 if mode == "whole" else 201 * 4)  # pieces are tried once


# The ordinary optimiser's trajectory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clip_norm"), [("adamw", None), ("adamw", 0.5), ("momentum", None), ("sgd", 0.5), ("rmsprop", None)]
)
@pytest.mark.parametrize("mode", MODES)
def test_fifty_steps_of_the_ordinary_loop(mode, name, clip_norm, graphs):
    """Parameters and all state; whatever the paths of a step do not read keeps its bits."""
    assert_trajectory_of_the_ordinary_loop(50, mode, name, clip_norm)


@pytest.mark.parametrize("name", ["adamax", "adadelta", "radam"])
def test_ten_steps_of_other_optimisers(name, graphs):
    assert_trajectory_of_the_ordinary_loop(10, "whole", name, None)


def assert_trajectory_of_the_ordinary_loop(count, mode, name, clip_norm):
    model = make(bias=name != "sgd")
    other = copy.deepcopy(model)
    optimizer, reference = optimizer_for(model, name), optimizer_for(other, name)
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE, mode=mode, clip_norm=clip_norm)
    names = {parameter: key for key, parameter in model.named_parameters()}
    for x, target in batches(count, model):
        before = everything(optimizer, names)
        loss = step(x, target)
        want = ordinary_step(other, reference, x, target, step.paths, clip_norm)
        torch.testing.assert_close(loss, want, rtol=1e-8, atol=1e-10)
        after = everything(optimizer, names)
        read = {names[p] for p in glora.trainable_parameters(model, step.paths)}
        for key in before.keys() - read:
            assert same_bits(before[key], {k: after[key][k] for k in before[key]}), key
        assert all(not torch.equal(before[key]["value"], after[key]["value"]) for key in read if "head" in key)
    expected = everything(reference, {parameter: key for key, parameter in other.named_parameters()})
    for key, tensors in everything(optimizer, names).items():
        for kind, tensor in tensors.items():
            never = kind not in expected[key]  # never read: made beforehand, and still zero
            wanted = torch.zeros_like(tensor) if never else expected[key][kind]
            torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=1e-9, msg=f"{key} {kind}")


def everything(optimizer, names):
    """Copies of every parameter and of its state, by name."""
    found = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        kept = {k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, torch.Tensor)}
        found[names[parameter]] = {k: v.detach().clone() for k, v in {"value": parameter, **kept}.items()}
    return found


# A compiled graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_one_compiled_graph_for_200_paths(product):
    """Loss and gradients as without a compiler and as the ordinary layer's."""
    torch.compiler.reset()
    model = make(product)
    counter = CompileCounterWithBackend("aot_eager")
    compiler = partial(torch.compile, fullgraph=True, backend=counter)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, compiler=compiler)
    for x, target in batches(200, model):
        assert_gradients_of_the_ordinary_layer(model, step, x, target)
    assert counter.frame_count == 1


# Other models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_vit(mode, graphs):
    """As timm makes it, in fp32: its layers share sizes, and its first one has an input without gradient."""
    model = glora.inject(tiny_vit(), 2)
    randomize(model)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode=mode)
    gen = generator(2)
    for _ in range(10):
        x, target = torch.randn(3, 1, 8, 8, generator=gen), torch.randint(CLASSES, (3,), generator=gen)
        assert_gradients_of_the_ordinary_layer(model, step, x, target, tolerance=1e-4)


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("mode", MODES)
def test_convolutions(mode, product, graphs):
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 6, 2, 2, bias=False, groups=2))
    net = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), body, nn.Flatten(), nn.Linear(6, CLASSES)).double()
    model = glora.inject(net, rank=2, product=product, convolutions=True)
    randomize(model)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode=mode)
    for x, target in batches(15, model):
        assert_gradients_of_the_ordinary_layer(model, step, x, target)


@pytest.mark.parametrize("mode", MODES)
def test_capturing_leaves_no_trace(mode, monkeypatch):
    """Dropout and batch norm go on as without graphs: warming up has drawn no number and counted no batch."""

    def run():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, CLASSES))
        model = glora.inject(net.double(), rank=2).train()
        randomize(model)
        step = glora.GraphedStep(model, optimizer_for(model, "momentum"), F.cross_entropy, SPACE, mode=mode)
        torch.manual_seed(1)
        return [step(x, target) for x, target in batches(5, model)], state(model)

    losses, tensors = run()
    emulate(monkeypatch)
    again, others = run()
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=1e-12)
    assert others["1.num_batches_tracked"] == 5
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpoints(mode, graphs):
    """What is run again in backward is run as data, too. Pieces share memory, so none may run again: refused."""
    model = _Checkpointed(make())
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode=mode)
    if mode == "piecewise" and graphs is not None:
        for model.use_reentrant in (False, True):
            x, target = next(batches(1, model))
            with pytest.raises(ValueError, match=r"model: expected no activation checkpointing .* got .* 'body.fc1', "):
                step(x.requires_grad_(), target)
        return
    for x, target in batches(10, model):
        assert_gradients_of_the_ordinary_layer(model, step, x, target)


class _Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.use_reentrant = body, False

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant, preserve_rng_state=False)


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_what_is_not_read_stays_where_it_is(mode, graphs):
    model = make()
    path = glora.PathConfig(A="vector", B="lora_1", C="none", D="none", E="constant")
    read = {id(p) for layer in glora.glora_layers(model).values() for p in layer.support_parameters(path)}
    unread = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in read and "head" not in n}
    with torch.no_grad():
        for parameter in unread.values():
            parameter.fill_(torch.nan)
    step = glora.GraphedStep(model, optimizer_for(model, "adamw"), F.cross_entropy, SPACE, mode=mode, clip_norm=1.0)
    for x, target in batches(3, model):
        assert step(x, target, dict.fromkeys(glora.get_paths(model), path)).isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.isnan().all() if name in unread else parameter.isfinite().all(), name


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, graphs):
    """As the ordinary layer under autocast, to the precision of bf16."""
    model = make(dtype=torch.float32)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode=mode, amp="bfloat16")
    for x, target in batches(5, model):
        before = copy.deepcopy(model.state_dict())
        loss = step(x, target)
        model.load_state_dict(before)
        with glora.using_paths(model, step.paths), torch.autocast("cpu", torch.bfloat16):
            want = F.cross_entropy(model(x), target)
        torch.testing.assert_close(loss, want.detach(), rtol=0.03, atol=0.03)
        assert loss != F.cross_entropy(model(x), target)  # fp32 is not of the same bits


def test_products_of_each_mode():
    """Units of 2 M N K a step: 3 whole, whatever the path; in pieces 2, or 3 where A is a low rank."""
    model = glora.inject(nn.Sequential(nn.GELU(), nn.Linear(256, 256)), rank=2, heads=())
    x, target = torch.randn(128, 256, requires_grad=False), torch.randn(128, 256)
    x = nn.Parameter(x)  # so that dx is formed
    net = _Shifted(x, model)
    for mode, a, units in [("whole", "vector", 3), ("piecewise", "vector", 2), ("piecewise", "lora_2", 3)]:
        step = glora.GraphedStep(net, optimizer_for(net, "sgd"), F.mse_loss, SPACE, mode=mode)
        with FlopCounterMode(display=False) as counter:
            step(torch.zeros(()), target, dict.fromkeys(glora.get_paths(net), glora.PathConfig(A=a)))
        assert units <= counter.get_total_flops() / (2 * 128 * 256 * 256) <= units + 0.2


class _Shifted(nn.Module):
    """A trained input, plus the given one."""

    def __init__(self, start, body):
        super().__init__()
        self.start, self.body = start, body

    def forward(self, x):
        return self.body(self.start + x)


# What may change between steps, and what is refused -------------------------------------------------------------------


def test_learning_rates_of_any_scheduler(graphs):
    """One that torch's schedulers write into a tensor, and one that is put in its place as timm does."""
    for assign in (lambda group, rate: group.update(lr=rate), _fill):
        model = make()
        other = copy.deepcopy(model)
        optimizer, reference = optimizer_for(model, "adamw"), optimizer_for(other, "adamw")
        step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
        for index, (x, target) in enumerate(batches(6, model)):
            for group in (*optimizer.param_groups, *reference.param_groups):
                assign(group, 0.5**index)
            torch.testing.assert_close(step(x, target), ordinary_step(other, reference, x, target, step.paths))


def _fill(group, rate):
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def test_hyperparameters_that_a_graph_would_not_see(monkeypatch):
    emulate(monkeypatch)
    for name, key in [("adamw", "weight_decay"), ("sgd", "lr")]:
        model = make()
        optimizer = optimizer_for(model, name)
        step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
        (x, target), *_ = batches(1, model)
        step(x, target)
        optimizer.param_groups[0][key] = 0.5
        with pytest.raises(ValueError, match=f"optimizer: expected .*{key}.* as when the step was captured, got"):
            step(x, target)


def test_paths_are_drawn_or_given():
    """Reproducibly; the layers' own paths are neither read nor changed."""
    model = make()
    own, (x, target) = glora.get_paths(model), next(iter(batches(1, model)))
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, generator=generator(5))
    step(x, target)
    assert step.paths == glora.sample_paths(model, SPACE, generator(5))
    given = dict.fromkeys(own, glora.PathConfig(E="constant"))
    step(x, target, given)
    assert step.paths == given
    assert glora.get_paths(model) == own
    with pytest.raises(ValueError, match="paths: expected exactly the 2 adapted layers"):
        step(x, target, {})
    with pytest.raises(ValueError, match=r"paths: expected ranks up to 2 \(storage of layer 'fc1'\)"):
        step(x, target, dict.fromkeys(own, glora.PathConfig(A="lora_3")))


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_another_form_run_without_graphs(mode, graphs):
    """A smaller last one, say. They take the same step, gradients are where they were, and graphs serve the others."""
    model = make()
    other = copy.deepcopy(model)
    optimizer, reference = optimizer_for(model, "adamw"), optimizer_for(other, "adamw")
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE, mode=mode)
    replays = []
    for index, (x, target) in enumerate(batches(8, model)):
        if index in (3, 6):
            x, target = x[:2], target[:2]
        before = 0 if graphs is None else graphs.replays
        loss = step(x, target)
        torch.testing.assert_close(loss, ordinary_step(other, reference, x, target, step.paths))
        for (name, found), expected in zip(model.named_parameters(), other.parameters()):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=name)
            if expected.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=name)
        assert step.replays(x, target) == (index not in (3, 6))
        replays.append(0 if graphs is None else graphs.replays - before)
    if graphs is not None:
        assert [count > 0 for count in replays] == [index not in (3, 6) for index in range(8)]


def test_a_layer_whose_input_changes_its_form(monkeypatch):
    """In batches of one shape: tokens that are dropped, or another dtype, are not copied into the captured input."""
    graphs = emulate(monkeypatch)
    model, other = (_Dropping(make()) for _ in range(2))
    other.load_state_dict(model.state_dict())
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode="piecewise")
    reference, replays = optimizer_for(other, "sgd"), []
    for kept, (x, target) in zip((7, 7, 1, 3, 7), batches(5, model)):
        model.kept = other.kept = kept
        before = graphs.replays
        loss = step(x, target)
        torch.testing.assert_close(loss, ordinary_step(other, reference, x, target, step.paths))
        replays.append(graphs.replays - before)
    assert replays == [8, 4, 0, 0, 4]  # the first one is tried before
    for found, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


class _Dropping(nn.Module):
    """The outputs of the first samples, and zeros."""

    def __init__(self, body):
        super().__init__()
        self.body, self.kept = body, None

    def forward(self, x):
        return F.pad(self.body(x[: self.kept]), (0, 0, 0, len(x) - self.kept))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("a", ["lora_2", "vector", "none"])
def test_the_paths_that_layers_have(a, mode, graphs):
    """Without a space: with the products and the pieces of that path alone; in pieces the path may change."""
    model = make()
    paths = dict.fromkeys(glora.get_paths(model), glora.PathConfig(A=a, B="lora_1", E="vector"))
    glora.set_paths(model, paths)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, None, mode=mode)
    for x, target in batches(4, model):
        assert_gradients_of_the_ordinary_layer(model, step, x, target)
        assert step.paths == paths
    if graphs is not None:
        assert graphs.captures == (1 if mode == "whole" else 4)
    other = dict.fromkeys(paths, glora.PathConfig(A="vector" if a == "lora_2" else "lora_1"))
    glora.set_paths(model, other)
    if mode == "piecewise":
        assert_gradients_of_the_ordinary_layer(model, step, x, target)
    else:
        with pytest.raises(ValueError, match=r"paths: expected an A of a kind that the step was made for, got .*fc1"):
            step(x, target)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_measured_beside_the_loss(mode, graphs):
    model = make()
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode=mode, measure=_right)
    found = []
    for x, target in batches(6, model):
        before = copy.deepcopy(model)
        step(x, target)
        found.append(step.measured)
        with glora.using_paths(before, step.paths):
            assert step.measured == _right(before(x), target)
    assert len({float(value) for value in found}) > 1  # each in memory of its own


def _right(output, target):
    return (output.argmax(-1) == target).sum()


def test_a_compiled_model_is_refused():
    for compiled in (torch.compile(make(), backend="eager"), make()):
        if isinstance(compiled, nn.Sequential):
            compiled.fc1.compile(backend="eager")
        with pytest.raises(ValueError, match=r"model: expected one that is not compiled, got torch.compile around"):
            glora.GraphedStep(compiled, optimizer_for(compiled, "sgd"), F.cross_entropy, SPACE)


def test_other_batches_and_modes_are_refused():
    model = make()
    optimizer = optimizer_for(model, "sgd")
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
    (x, target), *_ = batches(1, model)
    step(x, target)
    with pytest.raises(ValueError, match=r"x: expected device cpu .* got meta"):
        step(x.to("meta"), target)
    with pytest.raises(TypeError, match=r"target: expected a torch.Tensor, got list"):
        step(x, target.tolist())
    model.eval()
    with pytest.raises(RuntimeError, match="model: expected training=True as captured, got False"):
        step(x, target)
    model.train()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="optimizer: expected the state that was captured"):
        step(x, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "model: expected at least one adapted layer"),
        ({"mode": "half"}, "mode: expected one of .'whole', 'piecewise'., got 'half'"),
        ({"space": glora.SearchSpace((8,))}, "space: expected ranks up to 2"),
        ({"clip_norm": 0.0}, "clip_norm: expected a number above 0 or None, got 0.0"),
        ({"amp": "float16"}, "amp: expected 'bfloat16' or None, got 'float16'"),
        ({"mode": "piecewise", "compiler": torch.compile}, "compiler: expected None in the mode 'piecewise'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    model = make()
    arguments = {"model": model, "optimizer": optimizer_for(model, "sgd"), "loss_fn": F.cross_entropy, "space": SPACE}
    with pytest.raises(ValueError, match=message):
        glora.GraphedStep(**{**arguments, **change})


def test_models_that_do_not_fit(monkeypatch):
    model = make()
    optimizer = optimizer_for(model, "sgd")
    model.fc2.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model: expected layers that run the forward of their class, .*'fc2'"):
        glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
    del model.fc2.forward
    monkeypatch.setattr(glora.GLoRALinear, "merges_exactly", False)  # as of a quantised base
    with pytest.raises(ValueError, match=r"model: expected no quantised base, .*'fc1', 'fc2'"):
        glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
    monkeypatch.undo()
    monkeypatch.setattr("glora.graphs.checks.world_size", lambda: 2)
    with pytest.raises(ValueError, match="model: expected one process and a model without wrappers"):
        glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)


def test_optimisers_that_do_not_fit():
    model = make()
    parameters = glora.trainable_parameters(model)
    for optimizer, message in [
        (torch.optim.SGD(parameters[1:], lr=0.1), "optimizer: expected every parameter .* lacks .'fc1.Ad'."),
        (torch.optim.NAdam(parameters), "optimizer: expected one whose state starts at zero .* got NAdam without"),
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.1), "without dampening.* got SGD without"),
    ]:
        with pytest.raises(ValueError, match=message):
            glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
        assert not any(value for value in optimizer.state.values())


def test_an_optimiser_that_has_its_state_may_be_any():
    """Adagrad makes it at once."""
    model = make()
    other = copy.deepcopy(model)
    optimizer, reference = (torch.optim.Adagrad(glora.trainable_parameters(m), lr=0.05) for m in (model, other))
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE)
    for x, target in batches(20, model):
        torch.testing.assert_close(step(x, target), ordinary_step(other, reference, x, target, step.paths))


@pytest.mark.parametrize("step", [0, torch.zeros((), device="meta")], ids=["number", "other-device"])
def test_state_that_a_graph_would_not_change_is_refused(step):
    """As Adam's step count, on the host without capturable=True."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"step": step}
    with pytest.raises(ValueError, match=r"optimizer: expected state in tensors on cpu, got .* as 'step' of SGD; "):
        SelectiveUpdate(optimizer, {parameter: 0})


def test_a_layer_that_runs_twice_has_no_pieces(monkeypatch):
    """Its second run would overwrite what backward of the first reads. Whole, it is right."""
    emulate(monkeypatch)
    net = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, CLASSES))
    net = nn.Sequential(net[0], net[1], net[0], net[2]).double()
    model = glora.inject(net, 2, heads=())
    randomize(model)
    (x, target), *_ = batches(1, model)
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE, mode="piecewise")
    with pytest.raises(ValueError, match=r"model: expected every adapted layer to run once a step, got .*'0': 2"):
        step(x, target)
    whole = glora.GraphedStep(model, optimizer_for(model, "sgd"), F.cross_entropy, SPACE)
    for x, target in batches(5, model):
        assert_gradients_of_the_ordinary_layer(model, whole, x, target)


def test_a_value_read_on_the_host_cannot_be_captured(monkeypatch):
    """The emulation refuses what a GPU would: a loss that looks at a value."""
    emulate(monkeypatch)
    model = make()
    loss_fn = lambda y, target: F.cross_entropy(y, target) * (2.0 if y.sum() > 0 else 1.0)  # noqa: E731
    step = glora.GraphedStep(model, optimizer_for(model, "sgd"), loss_fn, SPACE)
    (x, target), *_ = batches(1, model)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        step(x, target)


def test_what_is_asked_of_torch_cuda(monkeypatch):
    """Without a GPU, of stand-ins: warm-up on a stream that waits and is waited for, then one capture, replayed."""
    calls, graph = [], Mock()
    side, main = Mock(), Mock()
    side.wait_stream.side_effect = lambda other: calls.append(("side waits", other is main))
    main.wait_stream.side_effect = lambda other: calls.append(("main waits", other is side))
    note = lambda name: lambda *_, **options: _noting(calls, (name, options) if options else name)  # noqa: E731

    def of_earlier_versions(*given, allow_unused_input):  # what they capture with is all that can be chosen
        options = torch.cuda.graph.keywords if isinstance(torch.cuda.graph, partial) else {}
        calls.append((given, {"allow_unused_input": allow_unused_input, "graph": options}))

    def of_later_versions(*given, allow_unused_input, capture_error_mode="global"):
        options = {"allow_unused_input": allow_unused_input, "capture_error_mode": capture_error_mode}
        calls.append((given, options))

    for name, value in {
        "Stream": lambda: side,
        "current_stream": lambda: main,
        "device": note("device"),
        "stream": note("stream"),
        "graph": note("graph"),
        "CUDAGraph": lambda: graph,
        "make_graphed_callables": of_earlier_versions,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    graphs = graphs_for(torch.device("cuda", 0))
    doubled = Captured(lambda x: calls.append("run") or 2 * x, (torch.ones(2),), graphs)
    warm_up = ["device", "stream", *["run"] * 3, "end of stream", "end of device"]
    warm_up[1:1], warm_up[-1:-1] = [("side waits", True)], [("main waits", True)]
    captured = "graph", {"capture_error_mode": "thread_local"}
    assert calls == [*warm_up, "device", captured, "run", f"end of {captured}", "end of device"]
    doubled(torch.ones(2))
    graph.replay.assert_called_once_with()
    assert calls[-1] == "end of device"  # nothing runs in Python
    piece, x = nn.Identity(), torch.ones(1)
    graphs.capture_pieces([piece], [x])
    given = (piece,), ((x,),)
    assert calls[-2] == ((given), {"allow_unused_input": True, "graph": captured[1]})
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", of_later_versions)
    graphs.capture_pieces([piece], [x])
    assert calls[-2] == (given, {"allow_unused_input": True, "capture_error_mode": "thread_local"})
    assert graphs_for(torch.device("cpu")) is None


@contextmanager
def _noting(calls, name):
    calls.append(name)
    yield
    calls.append(f"end of {name}")
