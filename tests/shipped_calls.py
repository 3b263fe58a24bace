"""A few calls of small layers that launch every build that is shipped for an architecture.

Layers of real models are too large to be executed on a CPU, or to be compared there with an oracle. A build does not
depend on the size of a layer beyond what Triton asks of a number, nor on the number of tokens beyond its class. So the
layers here are small, and have the tiles of the real number of tokens.
"""

from functools import cache
from unittest.mock import patch

import torch

from glora_kernels._aot.covering import cover, traits
from glora_kernels._triton.builds import builds_of
from glora_kernels._triton.plan import plan
from glora_kernels._triton.shipped import cases_for
from glora_kernels.planning import schedule, settings
from glora_kernels.planning.cases import Case, Layer
from glora_kernels.planning.problem import LOW_RANK, keeps_output
from tests.helpers import assert_contract, make_call, oracle, upstream

SIZE, TOKENS = 256, 200  # at most


@cache
def calls(architecture: str) -> list[Case]:
    found = list(dict.fromkeys(small(case.representative) for case in cases_for(architecture)))
    return [found[place] for place in cover([frozenset(map(traits, builds_of([case]))) for case in found])]


def small(case: Case) -> Case:
    outputs, inputs, bias = case.layer
    return case._replace(layer=Layer(min(outputs, SIZE), min(inputs, SIZE), bias))


def check_case(case: Case, device: str = "cpu") -> None:
    """Forward and backward with few tokens and the tiles of many, within the contract."""
    kinds = tuple(f"lora_{rank}" if kind == LOW_RANK else kind for kind, rank in case.path)
    shape = (min(case.tokens, TOKENS), case.layer.outputs, case.layer.inputs)
    types = {"dtype": case.dtype, "terms_dtype": case.factors, "storage_rank": case.rank}
    call = make_call(kinds, shape, bias=case.layer.bias, product=case.product, **types)
    call[0].requires_grad_(case.wants_x)
    x, weight, bias = (None if one is None else one.detach().to(device) for one in call[:3])
    terms, dy = call[3].map(lambda t: t.detach().to(device).requires_grad_()), upstream(call)
    of_many = settings.class_of(case.architecture, case.tokens)
    with torch.no_grad(), patch.object(schedule, "class_of", lambda *_: of_many):
        planned = plan(weight, bias, terms, case.problem.wanted, case.wants_x, case.strategy)
        storages, _ = terms.flatten()
        y, projected, b_eff = planned.forward(x, weight, bias, storages)
        output = y if case.keeps_output and keeps_output(case.problem, case.tokens) else None
        dx, grads = planned.backward(dy.to(device), x, weight, bias, storages, output, b_eff, projected, None)
    names = [f"{slot}{number}" for slot, term in terms.active for number in range(len(term.storages))]
    got = {"y": y, **({"x": dx} if case.wants_x else {}), **dict(zip(names, grads))}
    got = {name: None if value is None else value.cpu() for name, value in got.items()}
    assert_contract(got, *oracle(*call, dy), case.dtype)
