"""Layers whose weight another module reads without a call are named, or left alone where they are never called."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import glora
from glora import glora_layers, inject
from glora.models.readers import read_by_others


class Reads(nn.Module):
    """Never calls ``read``; reads no more than the form of ``called``."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)
        self.read.weight.data.normal_()

    def forward(self, x):
        x = x.to(self.called.weight.dtype)  # self.called.weight
        return self.called(self._project(x))

    def _project(self, x):
        return F.linear(x, self.read.weight) if isinstance(self.called.weight, torch.Tensor) else x


class ReadsAtTimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.sure = nn.Linear(4, 4), False

    def forward(self, x):
        return self.fc1(x) if self.sure else F.linear(x, self.fc1.weight)


def test_what_is_read_by_its_source():
    model = Reads()
    assert read_by_others([model], always=True) == {model.read: "Reads"}
    assert read_by_others([model], always=False) == {}
    at_times = ReadsAtTimes()
    assert read_by_others([at_times], always=False) == {at_times.fc1: "ReadsAtTimes"}


def test_a_layer_that_is_never_called_is_not_adapted():
    with pytest.warns(UserWarning, match=r"1 modules .* cannot be adapted and stay frozen: 1 Linear \('read'\)"):
        model = inject(Reads(), 2)
    assert list(glora_layers(model)) == ["called"]
    assert "which Reads reads without calling it" in glora.summary(model).frozen["read.weight"]
    with pytest.raises(TypeError, match=r"'read' belongs to Reads, which reads its weight without calling it"):
        inject(Reads(), 2, targets=["read"])


def test_a_layer_that_is_read_at_times_is_named():
    said = r"ReadsAtTimes reads the weight of 'fc1' without a call, in some branch at least"
    with pytest.warns(UserWarning, match=f"model: {said}"):
        model = inject(ReadsAtTimes(), 2)
    with pytest.warns(UserWarning, match=f"model: {said}"):
        glora.merge(model)


def test_a_class_without_source_is_passed_over():
    scope = {"nn": nn}
    exec("class Typed(nn.Module):\n def forward(self, x):\n  return x @ self.fc1.weight", scope)
    model = scope["Typed"]()
    model.fc1 = nn.Linear(4, 4)
    assert read_by_others([model], always=True) == {}


def test_merging_names_layers_that_did_not_run_where_others_did():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            alias = self.fc2
            return F.linear(self.fc1(x), alias.weight)

    model = inject(Aliased(), 2)
    glora.merge(inject(Aliased(), 2))  # nothing has run: nothing can be said
    model(torch.randn(2, 4))
    with pytest.warns(UserWarning, match=r"merge: 'fc2' did not run where other layers did"):
        glora.merge(model)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: next(layer(x) for layer in self.layers),
        lambda self, x: self.fc1(x) + self.fc1.weight.norm(),
        lambda self, x: self.body(x) @ self.body.fc.weight.shape,
        lambda self, x: torch.matmul(x.to(self.fc1.weight), self.fc1.weight.dtype),
        lambda self, x: "self.fc1.weight @ x",
    ],
    ids=["list", "penalty", "shape", "form", "text"],
)
def test_what_only_looks_like_it_is_not_taken_for_it(forward):
    model = of_forward(forward)
    assert read_by_others([model], always=True) == {} == read_by_others([model], always=False)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.matmul(x, self.fc1.weight.t()),
        lambda self, x: x @ self.fc1.weight,
        lambda self, x: torch.einsum("mk,nk->mn", x, self.fc1.weight.to(x.dtype)),
        lambda self, x: F.linear(x, weight=self.fc1.weight[:2]),
    ],
    ids=["matmul", "operator", "einsum", "keyword"],
)
def test_products_with_a_weight_are_seen(forward):
    model = of_forward(forward)
    assert read_by_others([model], always=True) == {model.fc1: "Looks"}


def of_forward(forward):
    model = type("Looks", (nn.Module,), {"forward": forward, "__module__": __name__})()
    model.fc1, model.body = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})
    return model
