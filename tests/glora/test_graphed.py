"""GraphedStep: one step for every path, as the ordinary training loop takes it."""

import copy
import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import glora
from tests.glora.toys import CLASSES, adapted_mlp, generator, randomize, same_bits, seeded, state, tiny_vit
from tests.graph_emulation import EmulatedGraphs

SPACE = glora.SearchSpace((2, 1))
MODES = ("whole", "piecewise")
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.3),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.05),
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


@pytest.fixture(params=["plain", "emulated"])
def graphs(request, monkeypatch):
    """Operations one by one, or the code of CUDA graphs over an emulation of them."""
    if request.param == "plain":
        return None
    return emulate(monkeypatch)


def emulate(monkeypatch):
    found = EmulatedGraphs()
    monkeypatch.setattr("glora.graphed_step.graphs_for", lambda device: found)
    # capturable optimisers refuse a CPU
    for module in ("adam", "rmsprop"):
        defining = importlib.import_module(f"torch.optim.{module}")
        monkeypatch.setattr(defining, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    for name in ("adamw", "rmsprop"):
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
        before = state(model)
        loss = step(x, target)
        model.load_state_dict(before)
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        with glora.using_paths(model, step.paths):
            want = F.cross_entropy(model(x), target)
            want.backward()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-10, atol=1e-10)
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                assert found[name] is None or not found[name].count_nonzero(), name
            else:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)
            parameter.grad = found[name]
    if graphs is not None:
        pieces = {"hadamard": 8, "matmul": 4}[product]  # two layers; forward and backward
        assert graphs.captures == (1 if mode == "whole" else pieces)
        assert graphs.replays == 200 * (1 if mode == "whole" else 4)


# The ordinary optimiser's trajectory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_fifty_steps_of_the_ordinary_loop(mode, name, clip_norm, graphs):
    """Parameters and all state; whatever the paths of a step do not read keeps its bits."""
    model = make(bias=name != "sgd")
    other = copy.deepcopy(model)
    optimizer, reference = optimizer_for(model, name), optimizer_for(other, name)
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE, mode=mode, clip_norm=clip_norm)
    names = {parameter: key for key, parameter in model.named_parameters()}
    for x, target in batches(50, model):
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
            never = kind not in expected[key]  # never read in 50 steps: made beforehand, and still zero
            wanted = torch.zeros_like(tensor) if never else expected[key][kind]
            torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=1e-9, msg=f"{key} {kind}")


def everything(optimizer, names):
    """Copies of every parameter and of its state, by name."""
    found = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        kept = {k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, torch.Tensor)}
        found[names[parameter]] = {k: v.detach().clone() for k, v in {"value": parameter, **kept}.items()}
    return found
