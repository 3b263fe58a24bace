"""bench refuses to time what is wrong."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from bench import entrants
from bench.agreement import Truth, require_agreement, results, truth
from bench.entrants import names
from bench.oracle import oracle_model
from bench.workloads import LayerWorkload
from glora import PathConfig, SearchSpace
from glora.layers.linear import GLoRALinear
from glora_kernels import use_backend

ALL = {"linear": names.all_low_rank(2)}


def make_field(bias=True, who=entrants.ENTRANTS):
    torch.manual_seed(0)
    return entrants.make_field(nn.Sequential(OrderedDict(linear=nn.Linear(6, 5, bias))), ["linear"], 2, who)


@pytest.fixture
def field():
    made = make_field()
    assert not made.missing
    return made


@pytest.fixture
def workload():
    gen = torch.Generator().manual_seed(1)
    return LayerWorkload(torch.randn(7, 6, generator=gen).requires_grad_(), torch.randn(7, 5, generator=gen))


def some_paths():
    options = SearchSpace(ranks=(2,)).options
    paths = [PathConfig(a, b, c) for a in options["A"] for b in options["B"] for c in options["C"]]
    return [{"linear": path} for path in (*paths, *(PathConfig(D=d, E=e) for d in options["D"] for e in options["E"]))]


def test_every_entrant_agrees_with_the_oracle(field, workload):
    field.check(workload, some_paths(), 8.0)
    assert not field.refused
    assert set(field.errors) == set(field.models) == set(entrants.ENTRANTS)
    assert 0 < max(field.errors[name] for name in (names.OURS, names.OURS_MATMUL)) <= 8


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("product", [names.OURS, names.OURS_MATMUL])
def test_the_oracle_agrees_with_the_reference_formula(workload, bias, product):
    """Two independent writings of the formula, in fp64."""
    model = make_field(bias, [product]).models[product].double()
    wide = workload.double()
    for paths in some_paths():
        model.linear.path = paths["linear"]
        with use_backend("reference"):
            want = results(wide, model)
        found = results(wide, oracle_model(model))
        assert set(found) == set(want)
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("who", [name for name in entrants.ENTRANTS if name != names.FROZEN])
def test_an_entrant_that_is_a_little_off_is_refused_and_leaves(field, workload, who):
    field.models[who].linear.register_forward_hook(lambda _module, _inputs, y: y * 1.001)
    field.check(workload, [ALL], 8.0)
    assert set(field.refused) == {who}
    assert "expected errors over u S" in field.refused[who]
    assert who not in field.models


@pytest.mark.parametrize("who", [names.LORA, names.GLORA, names.HIRA, names.LYCORIS])
def test_a_peer_with_other_factors_is_refused(field, workload, who):
    trained = next(parameter for parameter in field.models[who].parameters() if parameter.requires_grad)
    with torch.no_grad():
        trained.mul_(1.1)
    field.check(workload, [], 8.0)
    assert set(field.refused) == {who}


def test_a_layer_that_misreads_its_path_is_refused(field, workload, monkeypatch):
    """The oracle reads the path for itself."""
    right = GLoRALinear.terms
    monkeypatch.setattr(GLoRALinear, "terms", lambda self, path=None: right(self, PathConfig(B="vector")))
    field.check(workload, [ALL], 8.0)
    assert {names.OURS, names.OURS_MATMUL} <= set(field.refused)
    assert not {names.LORA, names.GLORA, names.HIRA} & set(field.refused)


def test_an_entrant_that_raises_does_not_end_the_run_of_the_others(field, workload):
    def fail(*_):
        raise RuntimeError("no such kernel")

    field.models[names.GLORA].linear.register_forward_hook(fail)
    field.check(workload, [ALL], 8.0)
    assert field.refused == {names.GLORA: "RuntimeError: no such kernel"}


def test_a_package_that_is_not_installed_is_said(monkeypatch):
    from bench.entrants import field as module

    monkeypatch.setattr(module, "find_spec", lambda package: None if package == "lycoris" else package)
    made = make_field()
    assert set(made.missing) == {names.LYCORIS, names.LYCORIS_BYPASS}
    assert made.missing[names.LYCORIS] == "the package lycoris is not installed"


def test_the_truth_is_in_fp64_and_its_scale_bounds_it(field, workload):
    want, scale = truth(workload, field.models[names.OURS])
    assert set(want) == set(scale)
    for name, tensor in want.items():
        assert tensor.dtype == torch.float64
        assert (tensor.abs() <= scale[name] * (1 + 1e-6)).all()


def relative(**tensors):
    return Truth({name: torch.tensor(values, dtype=torch.float64) for name, values in tensors.items()}, None)


def test_a_missing_gradient_is_found():
    with pytest.raises(ValueError, match="expected results"):
        require_agreement("peer", {"output": torch.ones(2)}, relative(output=[1, 1], x=[1, 1]), 1e-4)


def test_renamed_results_are_compared():
    want = relative(output=[1, 1], Bd=[1, 1, 1])
    got = {"output": torch.ones(2), "lora_B": torch.ones(3) * 1.01}
    assert require_agreement("peer", got, want, 0.1, {"Bd": "lora_B"}) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="lora_B"):
        require_agreement("peer", got, want, 1e-3, {"Bd": "lora_B"})


def test_one_wrong_element_of_many_is_found():
    want = torch.ones(10_000, dtype=torch.float64)
    got = want.float()
    got[77] += 1e-5
    with pytest.raises(ValueError, match="expected errors over u S up to 8"):
        require_agreement("ours", {"output": got}, Truth({"output": want}, {"output": want}), 8.0)


def test_a_result_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        require_agreement("peer", {"output": torch.tensor([1.0, torch.nan])}, relative(output=[1, 1]), 1e-3)
