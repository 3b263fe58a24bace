"""What explain() says is what happens: dense GEMMs, operations, bytes kept for backward."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels import Constant, LowRank, Terms, Vector, explain, glora_linear, use_backend
from glora_kernels.gradient_routes import PROBED_PART, PROBED_TOKENS

TOKENS, SIZE, RANK = 2048, 1024, 8
UNIT = 2 * TOKENS * SIZE * SIZE


def storage(*shape):
    return (torch.randn(*shape) * 0.01).requires_grad_()  # W0 has entries of 0.03


def weight_term(kind):
    if kind == "none":
        return None
    down, up = storage(SIZE, RANK), storage(RANK, SIZE)
    return {"lora": LowRank(down, up), "vector": Vector(down), "constant": Constant(down)}[kind]


def make(a, b, product="hadamard"):
    x = torch.randn(TOKENS, SIZE, requires_grad=True)
    weight, bias = torch.randn(SIZE, SIZE) / SIZE**0.5, torch.randn(SIZE)
    prompt = LowRank(storage(SIZE, RANK), storage(RANK, 1))
    terms = Terms(weight_term(a), weight_term(b), prompt, Vector(storage(SIZE)), Vector(storage(SIZE)), product)
    return x, weight, bias, terms


def counted(call):
    """Operations of forward and backward as PyTorch counts them."""
    with FlopCounterMode(display=False) as forward:
        y = glora_linear(*call)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


KINDS = ("lora", "vector", "constant", "none")
HADAMARD = [("hadamard", a, b) for a in KINDS for b in KINDS]
MATMUL = [("matmul", a, b) for a in KINDS for b in ("lora", "vector", "none")]


@pytest.mark.parametrize(("product", "a", "b"), HADAMARD + MATMUL)
def test_counted_operations(product, a, b):
    """At most 2.05 units a step, 3.05 where A is a hadamard low rank; as predicted within 1%."""
    call = make(a, b, product)
    forward, backward = counted(call)
    plan = explain(*call)
    assert (forward + backward) / UNIT <= limit(product, a, b)
    assert plan.forward_units + plan.backward_units == round((forward + backward) / UNIT)
    assert plan.forward_flops == pytest.approx(forward, rel=0.01)
    assert plan.backward_flops == pytest.approx(backward, rel=0.01)


def limit(product, a, b):
    if product == "hadamard" and a == "lora":
        return 3.05
    # Two low-rank terms of a matmul product are LoRA's thin products twice: nothing to share.
    return 2.08 if product == "matmul" and (a, b) == ("lora", "lora") else 2.05


@pytest.mark.parametrize(("product", "a", "b"), HADAMARD + MATMUL)
def test_saved_bytes(product, a, b):
    """Beside the parameters and the output at most x's own bytes; a number a token, or nothing, where that serves."""
    call = make(a, b, product)
    x, weight, bias, terms = call
    known = {t.untyped_storage().data_ptr() for t in (weight, bias, *terms.flatten()[0])}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = glora_linear(*call)
    del y
    beside = sum(size for pointer, size in saved.items() if pointer not in known)
    thin = {"none": 0, "vector": TOKENS * x.itemsize, "constant": TOKENS * x.itemsize}
    assert beside <= (thin[b] if a == "none" and b in thin else 1.01 * x.nbytes)
    plan = explain(*call)  # under hooks y is not kept, nor the bias that was added to it
    assert beside == plan.saved_bytes - ("y" in plan.saved) * (x.nbytes + bias.nbytes)


def test_output_is_kept_only_where_its_reuse_pays():
    """Kept: the output itself, not a copy; not under saved-tensor hooks; freed by backward."""
    call = make("vector", "lora")
    y = glora_linear(*call)
    assert y.grad_fn.output.data_ptr() == y.data_ptr()
    y.sum().backward()
    assert y.grad_fn.output is None
    assert "y" in explain(*call).saved
    for other in ("lora", "constant", "none"):
        call = make(other, "lora")
        assert glora_linear(*call).grad_fn.output is None
        assert "y" not in explain(*call).saved


def test_explain_counts_what_wants_a_gradient():
    x, weight, bias, terms = make("lora", "lora")
    for leaf in (x, *terms.flatten()[0]):
        leaf.requires_grad_(False)
    plan = explain(x, weight, bias, terms)
    assert (plan.backward_units, plan.saved, plan.saved_bytes) == (0, (), 0)
    assert explain(x.requires_grad_(), weight, bias, terms).backward_units == 1


def test_explain_is_plain_data():
    call = make("vector", "none")
    plan = json.loads(json.dumps(explain(*call).to_dict()))
    assert (plan["backend"], plan["architecture"], plan["predictions"]) == ("torch", None, [])
    plan = json.loads(json.dumps(explain(*call, architecture="sm_90").to_dict()))
    assert plan["backend"] == "triton"
    assert {launch["name"] for launch in plan["predictions"][0]["backward"]} >= {"token_pass", "dx", "finish"}


# The Triton backend, pretended ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("product", "a", "b"), HADAMARD + MATMUL)
def test_triton_counts_what_torch_counts(product, a, b):
    """The same units, operations within 1%, the same kept, x for its sums; few tokens, where thin products show.

    Lost rows of da are looked for on all inputs, not on a part of them first.
    """
    x, weight, *rest = make(a, b, product)
    call = x[:64].detach().requires_grad_(), weight, *rest
    plan, here = explain(*call, architecture="sm_90"), explain(*call)
    assert (plan.forward_units, plan.backward_units) == (here.forward_units, here.backward_units)
    assert plan.forward_flops == pytest.approx(here.forward_flops, rel=0.01)
    outputs, inputs = weight.shape
    more = 2 * PROBED_TOKENS * outputs * (inputs - inputs // PROBED_PART) * ("y" in here.saved)
    assert plan.backward_flops == pytest.approx(here.backward_flops + more, rel=0.01)
    sums = "token sums" in here.saved
    assert sums == (a == "none" and b in ("vector", "constant"))
    assert plan.saved == (("x",) if sums else here.saved)
    assert plan.saved_bytes == (call[0].nbytes if sums else here.saved_bytes)
    assert {way.strategy for way in plan.predictions} == {"assemble", "fused"}


def half(tokens, size, a="lora", b="lora"):
    """A call in bf16 on no device."""
    _, _, _, terms = make(a, b)
    terms = terms.map(
        lambda s: torch.empty([size if d == SIZE else d for d in s.shape], device="meta").requires_grad_()
    )
    x, weight, bias = (
        torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((tokens, size), (size, size), (size,))
    )
    return x.requires_grad_(), weight, bias, terms


def test_the_strategy_is_the_one_predicted_to_be_faster():
    for tokens, taken in ((64, "fused"), (8192, "assemble")):
        plan = explain(*half(tokens, 4096), architecture="sm_90")
        first, second = plan.predictions
        assert first.strategy == taken and plan.strategy.startswith(taken)
        assert first.seconds < second.seconds
        assert f"us for {taken} against" in plan.choice
        assert plan.forward_flops == sum(launch.flops for launch in first.forward)
        assert plan.route == "dense" and "contracts dW" in plan.strategy


def test_explain_reads_well():
    lines = str(explain(*half(64, 4096), architecture="gfx942")).splitlines()
    assert lines[0] == "backend   triton (as if on gfx942)"
    assert "predicted for gfx942, route dense:" in lines
    assert sum("backward  " in line and " us, " in line for line in lines) == 2
    only_bias = str(explain(*half(64, 4096, "none", "none"), architecture="gfx942"))
    assert "only the bias is adapted" in only_bias and only_bias.count("scratch") == 1


@pytest.mark.parametrize(("a", "route"), [("vector", "solved"), ("constant", "scaled"), ("none", "thin")])
def test_explain_names_the_route(a, route):
    assert explain(*half(256, 1024, a), architecture="sm_80").route == route


def test_nothing_is_predicted_for_a_pass_that_is_not_run():
    x, weight, bias, terms = half(64, 4096)
    plan = explain(x.detach(), weight, bias, terms.map(torch.Tensor.detach), architecture="sm_90")
    assert plan.backward_units == plan.backward_flops == plan.predictions[0].backward_seconds == 0
    assert plan.strategy == "fused: one GEMM that forms W_eff in registers"


@pytest.mark.parametrize("strategy", ["assemble", "fused"])
def test_a_chosen_strategy_is_explained(strategy, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight, bias, terms = make("lora", "lora")
    with use_backend("triton", strategy=strategy):
        plan = explain(x, weight, bias, terms)
        assert explain(x[:0], weight, bias, terms).predictions == ()
    assert (plan.backend, plan.architecture) == ("triton", "interpreter")
    assert plan.predictions[0].strategy == strategy
    assert plan.choice == f"{strategy}, chosen by use_backend"
    with use_backend("triton"):
        assert "us for assemble against" in explain(x, weight, bias, terms).choice


def test_calls_that_triton_does_not_serve():
    x, weight, bias, terms = make("lora", "lora")
    double = explain(x.double(), weight.double(), bias.double(), terms, architecture="sm_90")
    assert (double.backend, double.predictions) == ("torch", ())
    assert "fp64" in double.reason
    wide = Terms(B=LowRank(storage(SIZE, 65), storage(65, SIZE)))
    assert "rank 65 is above 64" in explain(x, weight, bias, wide, architecture="sm_90").reason


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match=r"architecture: expected one of sm_80, .*gfx942.* got 'sm_75'"):
        explain(*make("lora", "lora"), architecture="sm_75")
    assert explain(*make("lora", "lora"), architecture="sm_103").architecture == "sm_103"
