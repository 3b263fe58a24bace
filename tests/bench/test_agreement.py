"""bench refuses to time what is wrong."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from bench.agreement import require_agreement
from bench.tasks import LayerTask
from glora import PathConfig, SearchSpace

pytest.importorskip("peft")
from bench import peers


@pytest.fixture
def entrants():
    torch.manual_seed(0)
    return peers.make_entrants(nn.Sequential(OrderedDict(linear=nn.Linear(6, 5))), ["linear"], rank=2)


@pytest.fixture
def task():
    gen = torch.Generator().manual_seed(1)
    return LayerTask(torch.randn(7, 6, generator=gen).requires_grad_(), torch.randn(7, 5, generator=gen))


def test_every_entrant_agrees_with_the_reference(entrants, task):
    options = SearchSpace(ranks=(2,)).options
    paths = [PathConfig(a, b, c) for a in options["A"] for b in options["B"] for c in options["C"]]
    paths += [PathConfig(D=d, E=e) for d in options["D"] for e in options["E"]]
    assert peers.check_entrants(entrants, task, [{"linear": path} for path in paths], 1e-4) < 1e-4


@pytest.mark.parametrize("who", [peers.FROZEN, peers.OURS, peers.OFFICIAL, peers.LORA, peers.GLORA])
def test_an_entrant_that_is_a_little_off_is_refused(entrants, task, who):
    def off(_module, _inputs, y):
        return y * 1.001 if y.dtype == torch.float32 else y

    entrants[who].linear.register_forward_hook(off)
    with pytest.raises(ValueError, match=f"{who}: not timed"):
        peers.check_entrants(entrants, task, [{"linear": peers.all_low_rank(2)}], 1e-4)


@pytest.mark.parametrize("who", [peers.LORA, peers.GLORA])
def test_a_peer_with_other_factors_is_refused(entrants, task, who):
    trained = next(parameter for parameter in entrants[who].parameters() if parameter.requires_grad)
    with torch.no_grad():
        trained.mul_(1.1)
    with pytest.raises(ValueError, match=f"{who}: not timed"):
        peers.check_entrants(entrants, task, [], 1e-4)


def test_a_missing_gradient_is_found():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="expected results"):
        require_agreement("peer", {"output": one}, {"output": one, "x": one}, 1e-4)


def test_renamed_results_are_compared():
    want = {"output": torch.ones(2, dtype=torch.float64), "Bd": torch.ones(3, dtype=torch.float64)}
    got = {"output": torch.ones(2), "lora_B": torch.ones(3) * 1.01}
    assert require_agreement("peer", got, want, 0.1, {"Bd": "lora_B"}) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="lora_B"):
        require_agreement("peer", got, want, 1e-3, {"Bd": "lora_B"})
