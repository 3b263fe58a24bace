"""What a prepared layer keeps of the paths that it has run: so much that none is planned twice, and no more."""

import gc
import itertools
import tracemalloc

import pytest
import torch

from glora_kernels import PreparedLinear, glora_linear
from glora_kernels.ops import prepared
from glora_kernels.path_encoding import decode, encode

N, K, R = 5, 6, 2
FACTORS, VALUES = (("none", 0), ("lora", 1), ("lora", 2), ("vector", 0), ("constant", 0)), (("none", 0), ("vector", 0))


def some_choices(count):
    every = itertools.product(FACTORS, FACTORS, FACTORS[:4], VALUES, VALUES)
    return [dict(zip("ABCDE", kinds)) for kinds in itertools.islice(every, count)]


def layer(x, outputs=N, product="hadamard"):
    """A prepared layer, and what it holds by name."""
    shapes = {
        "Ad": (outputs if product == "hadamard" else K, R),
        "Au": (R, K),
        "Bd": (outputs, R),
        "Bu": (R, K),
        "Cd": (K, R),
        "Cu": (R, 1),
    }
    shapes |= {"D": (outputs,), "E": (outputs,)}
    storages = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    held = {"weight": torch.randn(outputs, K), "bias": torch.randn(outputs), **storages}
    return PreparedLinear(x, held["weight"], held["bias"], tuple(storages.values()), product), held


@pytest.fixture
def planned(monkeypatch):
    """The calls that are planned."""
    made = []

    class Counted(prepared.PlannedCall):
        __slots__ = ()

        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(prepared, "PlannedCall", Counted)
    return made


def test_a_path_is_planned_once_for_all_layers_alike(planned):
    x, choices = torch.randn(3, K), some_choices(40)
    first, others = layer(x), [layer(x), layer(x)]
    for call, held in (first, *others, first):
        for chosen in choices:
            terms = decode(list(held.values())[2:], encode(chosen), "hadamard")
            want = glora_linear(x, held["weight"], held["bias"], terms)
            assert torch.equal(call(x, held, chosen), want)
    assert len(planned) == len(choices)


def test_other_layers_and_inputs_have_plans_of_their_own(planned):
    chosen = some_choices(40)[-1]
    x, trained = torch.randn(3, K), torch.randn(3, K, requires_grad=True)
    for call, held in (layer(x), layer(x, outputs=N + 1), layer(x, product="matmul")):
        call(x, held, chosen)
    call, held = layer(trained)
    call(trained, held, chosen)
    assert len(planned) == 4


def test_equal_paths_of_other_identity_are_bounded(monkeypatch):
    """The oldest goes first; what is in use stays."""
    monkeypatch.setattr(prepared, "MAX_USES", 8)
    x = torch.randn(3, K)
    call, held = layer(x)
    for chosen in some_choices(20):
        call(x, held, dict(chosen))
    assert len(call._uses) == 8
    assert [use.choices for use in call._uses.values()] == some_choices(20)[-8:]


def test_plans_go_with_their_layers():
    x = torch.randn(3, K)
    call, held = layer(x, outputs=7)
    call(x, held, some_choices(3)[-1])
    ours = [key for key in prepared._runs if (7, K) in [kind and tuple(kind[0]) for kind in key[0][:2]]]
    assert len(ours) == 1
    del call
    gc.collect()
    assert ours[0] not in prepared._runs


def test_hundreds_of_paths_take_little_memory():
    """48 layers of 4 shapes and 900 paths: 64 MiB, as a share for 100 paths."""
    x = torch.randn(3, K)
    layers = [layer(x, outputs) for outputs in (4, 8, 12, 16) for _ in range(12)]
    choices = some_choices(100)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for call, held in layers:
        for chosen in choices:
            call(x, held, chosen)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken < 64 * 2**20 * len(choices) / 900
