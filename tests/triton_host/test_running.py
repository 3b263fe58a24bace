"""Plans and passes on the host: what is found again, what is planned again, and what a call hands to a kernel."""

import itertools
import tracemalloc
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import glora
from bench.stubbed import does_nothing, fault, stubbed
from glora.config import make_path
from glora_kernels import Constant, LowRank, Terms, Vector
from glora_kernels._triton import TritonBackend, launch, plan
from glora_kernels._triton.device import pretended
from glora_kernels._triton.kernels import KERNELS
from glora_kernels._triton.launch import recorded
from glora_kernels.ops import prepared
from glora_kernels.ops.explain import explain
from glora_kernels.planning.prediction import STRATEGIES
from glora_kernels.planning.prices import BLAS, FUSED
from glora_kernels.planning.settings import Tile, forced_tiles
from tests.tiers import at

SIZE = (96, 64)  # N, K
TOKENS = 128
RANKS = ("lora_8", "lora_4")
PATHS = list(
    itertools.product(
        (*RANKS, "vector", "constant", "none"),
        (*RANKS, "vector", "constant", "none"),
        (*RANKS, "vector", "none"),
        ("vector", "constant", "none"),
        ("vector", "constant", "none"),
    )
)


def on_meta(*shape, dtype=torch.float32, wanted=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=wanted)


def term(kind, rows, columns, wanted):
    down, up = on_meta(rows, 8, wanted=wanted), on_meta(8, columns, wanted=wanted)
    if kind.startswith("lora"):
        return LowRank(down, up, int(kind[5:]))
    return None if kind == "none" else Vector(down) if kind == "vector" else Constant(down)


def call_of(path, product, wanted):
    """x, W0, b0 and the terms of a path, on no device."""
    outputs, inputs = SIZE
    sides = ((outputs if product == "hadamard" else inputs, inputs), (outputs, inputs), (inputs, 1))
    sides += ((outputs, 1), (outputs, 1))
    terms = Terms(*(term(kind, *side, wanted) for kind, side in zip(path, sides)), product=product)
    x = on_meta(TOKENS, inputs, dtype=torch.bfloat16, wanted=wanted)
    weight, bias = (on_meta(*size, dtype=torch.bfloat16, wanted=False) for size in (SIZE, SIZE[:1]))
    return x, weight, bias, terms


def launched(call, strategy, grad):
    """The kernels of forward and backward, in order."""
    x, weight, bias, terms = call
    wanted, storages = frozenset(slot for slot, _ in terms.active), terms.storages
    with pretended("sm_90"), torch.no_grad(), recorded() as found:
        planned = TritonBackend(strategy).plan(weight, bias, terms, wanted, True)
        y, projected, b_eff = planned.forward(x, weight, bias, storages)
        if grad:
            output = y if isinstance(terms.A, Vector) and terms.product == "hadamard" else None
            planned.backward(y, x, weight, bias, storages, output, b_eff, projected, None)
    return [one.kernel.fn.__name__.removesuffix("_kernel") for one in found]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_explain_says_what_is_launched(product, strategy, grad):
    """All 900 paths of two ranks; in the short run every seventh, which is prime to all numbers of choices."""
    for path in PATHS[:: at(7, 1)]:
        call = call_of(path, product, grad)
        (way,) = (way for way in explain(*call, architecture="sm_90").predictions if way.strategy == strategy)
        kernels = [one for one in (*way.forward, *way.backward) if one.category != BLAS]
        said = ["fused" if one.category == FUSED else one.name for one in kernels]
        assert launched(call, strategy, grad) == said, path


# -- a layer that is called again --------------------------------------------------------------------------------------

needs_stub = pytest.mark.skipif(fault() is not None, reason=str(fault()))


@pytest.fixture
def layer():
    """Planned here and by nobody else."""
    with pytest.MonkeyPatch.context() as patch, stubbed():
        patch.setattr(plan, "_plan", cache(plan._plan.__wrapped__))
        patch.setattr(prepared, "_runs", {})
        made = glora.GLoRALinear(64, 96, rank=8)
        made.path = make_path("none", "lora_8", "lora_8", "vector", "vector")  # a pass reads x and dy
        yield made


@pytest.fixture
def patch(layer):
    """Undone before the stub is, which the fixture ``monkeypatch`` is not."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def compiled(patch):
    """The kernels that are compiled, by name."""
    found = []

    def compile_for(kernel, values, tile):
        found.append(kernel.fn.__name__)
        return SimpleNamespace(run=does_nothing, function=0, packed_metadata=())

    patch.setattr(launch, "compile_for", compile_for)
    patch.setattr(launch, "_compiled", {})
    return found


def train(layer, tokens=16, offset=0):
    x = torch.zeros(tokens * 64 + offset)[offset:].view(tokens, 64).requires_grad_()
    layer(x).backward(torch.ones(tokens, 96))


@needs_stub
def test_another_number_of_tokens_needs_no_other_build(layer, compiled):
    for tokens in (16, 24, 32, 40):
        train(layer, tokens)
    first = list(compiled)
    assert len(first) == len(set(first)) > 2
    with torch.no_grad():
        layer(torch.zeros(48, 64))
    assert compiled == first


@needs_stub
def test_a_tensor_that_is_not_aligned_has_another_build(layer, compiled):
    """A wide load from it would fault. A tensor that is aligned finds its build again."""
    train(layer)
    aligned = list(compiled)
    train(layer, offset=1)
    other = compiled[len(aligned) :]
    assert "token_pass_kernel" in other and set(other) <= set(aligned)
    train(layer)
    train(layer, offset=1)
    assert compiled == [*aligned, *other]


@needs_stub
def test_other_tiles_are_planned_again(layer):
    train(layer)
    train(layer)
    tile = Tile(32, 32, 32, 4, 2)
    with recorded() as found, forced_tiles(dict.fromkeys(("assemble", "fused", "token_pass", "contract"), tile)):
        train(layer)
    assert {one.tile for one in found if one.kernel.fn.__name__ in ("assemble_kernel", "fused_kernel")} == {tile}
    with recorded() as found:
        train(layer)
    assert tile not in {one.tile for one in found}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_setting_for_products_is_followed(strategy):
    """By fp32 layers, forward and backward, whatever it was when the call was planned."""
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []
    x, weight, bias, terms = call_of(("none", "lora_8", "none", "none", "none"), "hadamard", False)
    x, weight, bias = x.float(), weight.float(), bias.float()
    with pretended("sm_90"):
        planned = plan.plan(weight, bias, terms, frozenset("B"), True, strategy)
        try:
            for setting in ("ieee", "tf32", "ieee"):
                matmul.fp32_precision = setting
                with recorded() as found:
                    y, *_ = planned.forward(x, weight, bias, terms.storages)
                    planned.backward(y, x, weight, bias, terms.storages, None, None, None, None)
                seen.append({one.arguments["DOT"] for one in found if "DOT" in one.arguments})
        finally:
            matmul.fp32_precision = before
    assert seen == [{"ieee"}, {"tf32"}, {"ieee"}]


@needs_stub
def test_a_direct_call_that_fails_is_repeated_the_public_way(layer, patch):
    """Before it was started; every further launch goes that way at once."""
    tried, public = [], []

    def run(*arguments):
        tried.append(arguments)
        raise TypeError("function takes exactly 20 arguments")

    compiled = SimpleNamespace(run=run, function=0, packed_metadata=())
    patch.setattr(launch, "compile_for", lambda kernel, values, tile: compiled)
    patch.setattr(launch, "_compiled", {})
    patch.setattr(launch, "direct", True)
    patch.setattr(type(KERNELS["assemble"]), "__getitem__", lambda kernel, _: lambda *a, **k: public.append(kernel))
    with pytest.warns(RuntimeWarning, match="cannot be called directly"):
        train(layer)
    assert len(tried) == 1 and len(public) > 2
    train(layer)
    assert len(tried) == 1


@needs_stub
def test_plans_of_a_supernet_are_bounded():
    """48 layers of four shapes with 900 paths each, from a part of them: below 64 MiB."""
    part, alike = 60, 3
    with stubbed():
        shapes = [(24, 72), (24, 24), (24, 96), (96, 24)]
        layers = [glora.GLoRALinear(*shape, rank=8) for shape in shapes for _ in range(alike)]
        inputs = {size: torch.zeros(8, size, requires_grad=True) for size in (24, 96)}

        def visit(paths, chosen):
            for path, layer in itertools.product(paths, chosen):
                layer.path = make_path(*path)
                layer(inputs[layer.in_features]).sum().backward()
                layer.zero_grad()

        some = PATHS[:: len(PATHS) // part][:part]
        visit(PATHS[1:3], layers)
        tracemalloc.start()
        try:
            visit(some, layers[::alike])
            plans, _ = tracemalloc.get_traced_memory()
            visit(some, layers)
            uses, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    a_plan, a_use = plans / (part * len(shapes)), (uses - plans) / (part * len(shapes) * (alike - 1))
    assert len(PATHS) * (4 * a_plan + 44 * a_use) < 64 * 2**20, (a_plan, a_use)
