"""Plain layers that merging fills: they are what their constructor makes, which runs once for each geometry."""

import copy

import pytest
import torch
from torch import nn

from glora.layers.adapters import adapted


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 3)


MAKES = {
    "linear": lambda: nn.Linear(3, 5),
    "without bias": lambda: nn.Linear(3, 5, bias=False),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=2, groups=2, padding_mode="reflect"),
    "same padding": lambda: nn.Conv2d(4, 6, (3, 2), padding="same", bias=False),
    "conv1d": conv1d,
}


@pytest.fixture(params=MAKES)
def base(request):
    return MAKES[request.param]()


def settings(module):
    return {name: value for name, value in vars(module).items() if name != "_parameters"}


def test_merged_layers_have_what_their_type_makes(base):
    merged = adapted(copy.deepcopy(base), 2, "hadamard").merge()
    assert type(merged) is type(base)
    assert settings(merged) == settings(base)
    assert list(merged._parameters) == list(base._parameters)
    for name, parameter in base.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter)


def test_merged_layers_share_no_hooks(base):
    layer = adapted(base, 2, "hadamard")
    one, other = layer.merge(), layer.merge()
    one.register_forward_hook(lambda *call: None)
    one.register_buffer("scale", torch.ones(1))
    assert not other._forward_hooks
    assert not dict(other.named_buffers())
    assert settings(layer.merge()) == settings(other)


def test_merging_draws_no_initial_weights(base, monkeypatch):
    layer, kind = adapted(base, 2, "hadamard"), type(base)
    want = layer.merge()
    calls, made = [], kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, *sizes, **options: calls.append(sizes) or made(self, *sizes))
    state = torch.get_rng_state()
    got = layer.merge()
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
