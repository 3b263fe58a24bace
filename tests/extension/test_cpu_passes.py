"""The passes for CPUs: operators against fp64, layers under the numerical contract, and where they are not taken."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import glora
from glora_kernels import glora_linear
from glora_kernels._torch import passes
from tests.glora.toys import adapted_mlp, randomize
from tests.helpers import WEIGHT_CHOICES, assert_contract, make_call, oracle, results, unwritten_is_nan, upstream

PAIRS = list(itertools.product(WEIGHT_CHOICES, WEIGHT_CHOICES))
RESTS = (("lora_3", "vector", "constant"), ("vector", "constant", "vector"), ("none", "none", "vector"))
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
with_passes = pytest.mark.usefixtures("cpu_passes")


class Called(TorchDispatchMode):
    """Names of the operators of the passes that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function._schema.name.partition("::")
        if space == "glora_cpu":
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(found, formula, *operands, terms):
    """``formula`` in fp64, with an error of at most ``terms + 8`` roundings of the sum of all magnitudes."""
    exact = formula(*(o if o is None else o.double() for o in operands))
    size = formula(*(o if o is None else o.double().abs() for o in operands))
    unit = torch.finfo(found.dtype).eps / 2
    assert found.dtype != torch.float64 or unit < 1e-15
    assert ((found.double() - exact).abs() <= (terms + 8) * unit * size + 1e-300).all()


# -- operators ---------------------------------------------------------------------------------------------------------


@with_passes
@WIDE
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (9, 17), (130, 67), (257, 300)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_effective_weight(shape, rank, dtype):
    """Every combination of what may be added and multiplied; storages that are parts of larger ones."""
    rows, columns = shape
    weight = random(rows, columns + 3, dtype=dtype)[:, :columns]
    vectors = random(rows, dtype=dtype, seed=1), random(columns, dtype=dtype, seed=2)
    down, up = (
        random(rows, rank + 1, dtype=dtype, seed=3)[:, :rank],
        random(rank + 1, columns, dtype=dtype, seed=4)[:rank],
    )
    other, shift = random(rank, rows, dtype=dtype, seed=5).t(), random(rows, 2, dtype=dtype, seed=6)[:, 1]
    for scaling, shifting, adding in itertools.product(("none", "rows", "columns", "factors"), *[(False, True)] * 2):
        given = {
            "row_scale": vectors[0] if scaling == "rows" else None,
            "column_scale": vectors[1] if scaling == "columns" else None,
            "scale": (down, up) if scaling == "factors" else None,
            "row_shift": shift if shifting else None,
            "shift": (other, up) if adding else None,
        }

        def formula(weight, row_scale, column_scale, a, b, row_shift, c, d):
            scale = torch.ones_like(weight) if a is None else 1 + a @ b
            scale = scale if row_scale is None else row_scale[:, None].expand_as(weight)
            scale = scale if column_scale is None else column_scale.expand_as(weight)
            out = weight * scale
            out = out if row_shift is None else out + row_shift[:, None]
            return out if c is None else out + c @ d

        operands = [weight, given["row_scale"], given["column_scale"], *(given["scale"] or (None, None))]
        operands += [given["row_shift"], *(given["shift"] or (None, None))]
        with unwritten_is_nan():
            found = passes.effective_weight(weight, **given)
        assert_near(found, formula, *operands, terms=2 * rank)
        out = torch.full(shape, torch.nan, dtype=dtype)
        assert passes.effective_weight(weight, **given, out=out) is out
        assert torch.equal(out, found)


@with_passes
@WIDE
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 64), (33, 130), (517, 300), (5, 1100)], ids=str)
@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (8, 5)], ids=str)
def test_read_gradient(shape, ranks, dtype):
    """Every choice of two or more sums, with rows of dy and y further apart than they are long."""
    count, columns = shape
    dy, y = (random(count, columns + 5, dtype=dtype, seed=s)[:, :columns] for s in (0, 1))
    tokens, rows = random(ranks[0], count, dtype=dtype, seed=2), random(columns, ranks[1], dtype=dtype, seed=3).t()
    for asked in itertools.product((False, True), repeat=4):
        sums, output, given, through = asked
        with Called() as called:
            operands = dy, sums, y if output else None, tokens if given else None, rows if through else None
            found = passes.read_gradient(*operands)
        assert called.names == (["read_tokens"] if sum(asked) > 1 else [])
        assert [part is not None for part in found] == list(asked)
        near = lambda part, formula, *operands: part is None or assert_near(part, formula, *operands, terms=60)  # noqa: E731
        near(found.sums, lambda dy: dy.sum(0), dy)
        near(found.dots, lambda dy, y: (dy * y).sum(0), dy, y)
        near(found.contracted, torch.matmul, tokens, dy)
        near(found.through, lambda rows, dy: rows @ dy.t(), rows, dy)


@with_passes
def test_sums_of_many_tokens_of_one_sign():
    """Rounding errors do not grow with the number of tokens: 8 u S are promised."""
    dy = random(12608, 96, dtype=torch.float32).abs()
    found = passes.read_gradient(dy, True, dy, None, None)
    for part, exact in ((found.sums, dy.double().sum(0)), (found.dots, dy.double().square().sum(0))):
        assert ((part - exact).abs() <= 7 * 2**-24 * exact).all()


@with_passes
def test_threads():
    """W_eff has the same bits for any number; each number adds up sums in one order, every time."""
    weight, down, up = (random(*s, dtype=torch.float32) for s in ((1031, 257), (1031, 8), (8, 257)))
    before, weights, sums = torch.get_num_threads(), [], {}
    try:
        for threads in (1, 2, 3, 2, 3):
            torch.set_num_threads(threads)
            weights.append(passes.effective_weight(weight, scale=(down, up), shift=(down, up)))
            read = passes.read_gradient(weight, True, weight, random(4, 1031, dtype=torch.float32), up)
            former = sums.setdefault(threads, read)
            assert all(torch.equal(one, other) for one, other in zip(read, former))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(weights[0], other) for other in weights)


@with_passes
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"row_scale": torch.ones(5)}, "row_scale"),
        ({"row_scale": torch.ones(4, dtype=torch.float64)}, "row_scale"),
        ({"scale": (torch.ones(4, 2), torch.ones(2, 5))}, "scale"),
        ({"out": torch.ones(6, 4).t()}, "out"),
    ],
    ids=["length", "dtype", "factors", "strides"],
)
def test_operands_that_do_not_fit_are_named(change, name):
    with pytest.raises(RuntimeError, match=f"^{name}: expected"):
        passes.effective_weight(torch.ones(4, 6), **change)


# -- layers ------------------------------------------------------------------------------------------------------------


@with_passes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_kinds_keeps_the_contract(pair, product, dtype):
    index = PAIRS.index(pair)
    for shape in ((70, 65, 130), (3, 70, 66)):
        call = make_call((*pair, *RESTS[index % 3]), shape, bias=bool(index % 2), product=product, dtype=dtype)
        dy = upstream(call)
        with unwritten_is_nan():
            got = results(glora_linear, *call, dy)
        assert_contract(got, *oracle(*call, dy), dtype)


@with_passes
def test_a_layer_takes_them():
    x, *rest = make_call(("vector", "lora_3", "none", "vector", "vector"), (70, 65, 66), dtype=torch.float32)
    with Called() as called:
        glora_linear(x, *rest).square().sum().backward()
    assert called.names == ["effective_weight", "read_tokens", "effective_weight"]


@with_passes
def test_a_merged_model_has_the_same_bits():
    model = adapted_mlp(rank=2)
    randomize(model)
    x = random(50, 6, dtype=torch.float32)
    for seed in range(20):
        glora.set_paths(
            model, glora.sample_paths(model, glora.SearchSpace((2, 1)), torch.Generator().manual_seed(seed))
        )
        merged = adapted_mlp(rank=2)
        merged.load_state_dict(model.state_dict())
        assert glora.merge(merged).largest_difference == 0
        assert torch.equal(merged(x), model(x))


@with_passes
def test_another_default_device():
    call = make_call(("lora_3", "lora_3", "none", "vector", "vector"), (70, 65, 66), dtype=torch.float32)
    with torch.device("meta"):
        assert glora_linear(*call).device.type == "cpu"


# -- where they are not taken ------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


@with_passes
@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(4, 6).t(),
        torch.ones(4, 6).half(),
        torch.ones(4, 6, device="meta"),
        torch.ones(4, 6).as_subclass(Subclass),
        torch.ones(4, 1).expand(4, 6),
    ],
    ids=["columns", "half", "meta", "subclass", "expanded"],
)
def test_other_matrices_are_left_to_pytorch(matrix):
    assert passes.takes(torch.ones(4, 6)) and passes.takes(nn.Parameter(torch.ones(4, 6)))
    assert not passes.takes(matrix)


def test_a_machine_without_the_instructions(monkeypatch):
    monkeypatch.setitem(sys.modules, passes.NAME, SimpleNamespace(can_run=lambda: False, __spec__=object()))
    passes.fault.cache_clear()
    try:
        assert passes.fault() == "this processor does not have their AVX2 instructions"
        assert not passes.takes(torch.ones(4, 6))
    finally:
        passes.fault.cache_clear()


def test_a_module_that_does_not_load(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(passes, "find_spec", lambda name: object())
    monkeypatch.setattr(passes, "import_module", fail)
    passes.fault.cache_clear()
    try:
        assert "may have been built for another PyTorch (undefined symbol)" in passes.fault()
        monkeypatch.setattr(passes, "find_spec", lambda name: None)
        passes.fault.cache_clear()
        assert passes.BUILD in passes.fault()
    finally:
        passes.fault.cache_clear()
