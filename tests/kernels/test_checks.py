"""Bad input: an error that names the argument, what was expected and what came, before any work."""

import pytest
import torch

from glora_kernels import Constant, LowRank, Terms, Vector, explain, glora_linear, glora_merge

N, K, R = 4, 3, 2


def t(*shape, **options):
    return torch.ones(*shape, **options)


GOOD = {"x": t(5, K), "weight": t(N, K), "bias": t(N), "terms": Terms(B=LowRank(t(N, R), t(R, K)))}

CALLS = {
    "x-not-a-tensor": ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    "x-integer": ({"x": t(5, K).int()}, TypeError, "x: expected a floating dtype .* got torch.int32"),
    "x-0d": ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension"),
    "x-last-dimension": (
        {"x": t(5, 9)},
        ValueError,
        r"x: expected the last dimension to be K = 3 .* got shape \(5, 9\)",
    ),
    "x-dtype": ({"x": t(5, K).half()}, TypeError, "x: expected the dtype of weight, torch.float32, got torch.float16"),
    "x-meta": ({"x": t(5, K, device="meta")}, ValueError, "x: expected device cpu .* got meta"),
    "x-sparse": ({"x": t(5, K).to_sparse()}, TypeError, "x: expected a dense .* got layout torch.sparse_coo"),
    "weight-1d": ({"weight": t(N)}, ValueError, r"weight: expected shape \(N, K\), got \(4,\)"),
    "weight-requires-grad": ({"weight": t(N, K, requires_grad=True)}, ValueError, "weight: expected a frozen tensor"),
    "bias-requires-grad": ({"bias": t(N, requires_grad=True)}, ValueError, "bias: expected a frozen tensor"),
    "bias-shape": ({"bias": t(N + 1)}, ValueError, r"bias: expected shape \(4,\), got \(5,\)"),
    "bias-dtype": ({"bias": t(N).double()}, TypeError, "bias: expected the dtype of weight, torch.float32"),
    "bias-meta": ({"bias": t(N, device="meta")}, ValueError, "bias: expected device cpu, got meta"),
    "terms-type": ({"terms": None}, TypeError, "terms: expected glora_kernels.Terms, got NoneType"),
}

TERMS = {
    "a-down-rows": (Terms(A=LowRank(t(9, R), t(R, K))), ValueError, r"A.down: expected shape \(4, R\), got \(9, 2\)"),
    "a-up": (Terms(A=LowRank(t(N, R), t(R, K + 1))), ValueError, r"A.up: expected shape \(2, 3\), got \(2, 4\)"),
    "a-matmul-rows": (
        Terms(A=LowRank(t(N, R), t(R, K)), product="matmul"),
        ValueError,
        r"A.down: expected shape \(3, R\), got \(4, 2\)",
    ),
    "rank-0": (Terms(B=LowRank(t(N, R), t(R, K), 0)), ValueError, "B.rank: expected 1 to 2 .* got 0"),
    "rank-above": (Terms(B=LowRank(t(N, R), t(R, K), 3)), ValueError, "B.rank: expected 1 to 2 .* got 3"),
    "rank-type": (Terms(B=LowRank(t(N, R), t(R, K), 1.0)), TypeError, "B.rank: expected an int or None, got float"),
    "empty-storage": (Terms(B=LowRank(t(N, 0), t(0, K))), ValueError, "B.rank: expected 1 to 0"),
    "vector-length": (Terms(B=Vector(t(K))), ValueError, r"B: expected a vector of shape \(4,\) .* got \(3,\)"),
    "vector-3d": (Terms(E=Vector(t(N, 1, 1))), ValueError, r"E: expected a vector of shape \(4,\)"),
    "constant-empty": (Terms(E=Constant(t(0))), ValueError, "E: expected a constant of at least one element"),
    "prompt-up": (Terms(C=LowRank(t(K, R), t(R, 2))), ValueError, r"C.up: expected shape \(2, 1\)"),
    "integer": (Terms(D=Vector(t(N).int())), TypeError, "D: expected a floating dtype"),
    "not-a-tensor": (Terms(D=Vector([1.0])), TypeError, "D: expected a torch.Tensor, got list"),
    "meta": (Terms(E=Vector(t(N, device="meta"))), ValueError, "E: expected device cpu, got meta"),
}


@pytest.mark.parametrize("function", [glora_linear, explain])
@pytest.mark.parametrize(("change", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_call(function, change, error, message):
    with pytest.raises(error, match=message):
        function(**{**GOOD, **change})


@pytest.mark.parametrize("backend_sees", ["linear", "merge"])
@pytest.mark.parametrize(("terms", "error", "message"), TERMS.values(), ids=TERMS)
def test_bad_terms(backend_sees, terms, error, message):
    with pytest.raises(error, match=message):
        if backend_sees == "linear":
            glora_linear(GOOD["x"], GOOD["weight"], GOOD["bias"], terms)
        else:
            glora_merge(GOOD["weight"], GOOD["bias"], terms)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_merge_checks_the_layer(name):
    bad = {**GOOD, name: t(7)}
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        glora_merge(bad["weight"], bad["bias"], bad["terms"])


@pytest.mark.parametrize(
    ("slot", "term", "message"),
    [
        ("C", Constant(t(1)), "C: expected LowRank, Vector or None, got Constant"),
        ("D", LowRank(t(N, R), t(R, 1)), "D: expected Vector, Constant or None, got LowRank"),
        ("A", t(N, K), "A: expected LowRank, Vector, Constant or None, got Tensor"),
    ],
)
def test_kind_a_slot_does_not_have(slot, term, message):
    with pytest.raises(TypeError, match=message):
        Terms(**{slot: term})


def test_unknown_product():
    with pytest.raises(ValueError, match=r"product: expected one of .* got 'kronecker'"):
        Terms(product="kronecker")


@pytest.mark.parametrize("function", [glora_linear, explain])
def test_autocast_keeps_the_messages(function):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, got str"):
            function(GOOD["x"], "W", GOOD["bias"], GOOD["terms"])
        function(GOOD["x"].half(), GOOD["weight"], GOOD["bias"], GOOD["terms"])  # mixed, as F.linear allows there
