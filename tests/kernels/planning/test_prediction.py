"""The cost model: it lists what is launched, and its crossovers are those of the study it comes from."""

import itertools
import timeit
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels import Constant, LowRank, Terms, Vector
from glora_kernels.planning import prediction, problem, settings
from glora_kernels.planning.machines import MACHINES, machine_for, nearest
from glora_kernels.planning.prediction import STRATEGIES, predict, rounded, strategy_for
from glora_kernels.planning.prices import BLAS, CONTRACTED, FUSED
from glora_kernels.planning.problem import Problem
from glora_kernels.precision import tf32_allowed

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "strategies.md"
KINDS = ("lora", "vector", "constant", "none")
PROMPTS = ("lora", "vector", "none")
BIASES = ("vector", "constant", "none")
STORED = 12  # ranks of a storage, of which some are read


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def make_term(kind, rows, columns, rank, dtype):
    if kind == "none":
        return None
    down = empty(rows, max(rank, STORED), dtype=dtype)
    if kind == "lora":
        return LowRank(down, empty(max(rank, STORED), columns, dtype=dtype), rank)
    return Vector(down) if kind == "vector" else Constant(down)


def make_terms(kinds, outputs, inputs, product="hadamard", rank=8, dtype=torch.float32):
    """Terms on no device, of the kinds of A to E."""
    a_rows = outputs if product == "hadamard" else inputs
    sides = ((a_rows, inputs), (outputs, inputs), (inputs, 1), (outputs, 1), (outputs, 1))
    terms = (make_term(kind, *side, rank, dtype) for kind, side in zip(kinds, sides))
    return Terms(*terms, product=product)


BOTH = ("lora", "lora", "none", "none", "none")  # A and B low rank
FULL = ("lora", "lora", "lora", "vector", "vector")
SCALE = ("vector", "lora", "none", "vector", "vector")


def make_problem(outputs, inputs, architecture, kinds=BOTH, *, dtype=torch.bfloat16, rank=8, product="hadamard"):
    """Every gradient is wanted; there is a bias."""
    return problem_of(
        empty(outputs, inputs, dtype=dtype), make_terms(kinds, outputs, inputs, product, rank), architecture
    )


def problem_of(weight, terms, architecture, bias=True, wanted=None, wants_x=True):
    wanted = frozenset(slot for slot, _ in terms.active) if wanted is None else wanted
    bias = empty(weight.shape[0], dtype=weight.dtype) if bias else None
    return Problem.of(weight, bias, terms, wanted, wants_x, architecture)


def launches(tokens, problem, strategy):
    """What forward and backward launch, with operations and bytes."""
    way = predict(problem, tokens, strategy)
    return way.forward, way.backward


# What is launched -----------------------------------------------------------------------------------------------------


class DenseProducts(TorchDispatchMode):
    """Writes dense products into a list of launches."""

    def __init__(self, launched):
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.launched.append("dense")
        return function(*args, **(kwargs or {}))


def run(tokens, outputs, inputs, terms, has_bias, wanted, wants_x, strategy):
    """What forward and backward launch on a pretended GPU."""
    from glora_kernels._triton import TritonBackend, device, launch
    from glora_kernels.gradient_routes import reuses_output

    x, weight = empty(tokens, inputs, dtype=torch.bfloat16), empty(outputs, inputs, dtype=torch.bfloat16)
    bias = empty(outputs, dtype=torch.bfloat16) if has_bias else None
    with device.pretended("sm_90"):
        plan = TritonBackend(strategy).plan(weight, bias, terms, wanted, wants_x)
        with launch.recorded() as forward_launches, DenseProducts(forward_launches):
            y, projected, b_eff = plan.forward(x, weight, bias, terms.storages)
        output = y if "A" in wanted and reuses_output(tokens, inputs, terms) else None
        with launch.recorded() as backward_launches, DenseProducts(backward_launches):
            plan.backward(y, x, weight, bias, terms.storages, output, b_eff, projected, None)
    return forward_launches, backward_launches


def names(launched):
    return [item if isinstance(item, str) else item.kernel.fn.__name__.removesuffix("_kernel") for item in launched]


def predicted_names(listed):
    return [{BLAS: "dense", FUSED: "fused"}.get(launch.category, launch.name) for launch in listed]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("a", KINDS)
def test_lists_are_what_is_launched(a, product, strategy):
    """For every kind, with and without a bias, whatever wants a gradient: the same launches in the same order."""
    pytest.importorskip("triton")
    paths = itertools.product(KINDS, PROMPTS, BIASES, BIASES, (16, 256), (True, False), range(3))
    for number, (b, c, d, e, tokens, bias, which) in enumerate(paths):
        if number % 5:
            continue  # 5 is prime to all the numbers of choices: each is seen with each
        terms = make_terms((a, b, c, d, e), 128, 192, product)
        active = frozenset(slot for slot, _ in terms.active if slot != "D" or bias)
        wanted = (active, active - {"A"}, frozenset())[which]
        wants_x = which != 1
        forward, backward = run(tokens, 128, 192, terms, bias, wanted, wants_x, strategy)
        problem = problem_of(empty(128, 192, dtype=torch.bfloat16), terms, "sm_90", bias, wanted, wants_x)
        listed = launches(tokens, problem, strategy)
        case = (a, b, c, d, e, tokens, bias, which)
        assert names(forward) == predicted_names(listed[0]), case
        assert names(backward) == predicted_names(listed[1]), case
        assert len(forward) <= 2 and len(backward) <= 5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_scratch_is_what_is_allocated(product, strategy):
    """W_eff, dW, g and the partial sums."""
    pytest.importorskip("triton")
    weight = empty(1024, 768, dtype=torch.bfloat16)
    paths = itertools.product(KINDS, KINDS, ("lora", "none"), ("constant", "none"), (True, False), (True, False))
    for a, b, c, e, bias, whole in paths:
        terms = make_terms((a, b, c, "vector", e), 1024, 768, product)
        active = frozenset(slot for slot, _ in terms.active if slot != "D" or bias)
        wanted = active if whole else active & {"A"}
        forward, backward = run(512, 1024, 768, terms, bias, wanted, True, strategy)
        problem = problem_of(weight, terms, "sm_90", bias, wanted)
        scaled = a == "constant" or (a == "vector" and product == "matmul")
        expected = max(scratch_of(forward, scaled), scratch_of(backward, scaled))
        assert predict(problem, 512, strategy).scratch_bytes == expected, (a, b, c, e, bias, whole)


def scratch_of(launched, scaled):
    """The bytes of temporary matrices that launches work on."""
    names = {"w_eff_ptr", "dw_ptr", "partials_ptr"} | ({"other_ptr"} if scaled else set())
    pairs = ((n, t) for item in launched if not isinstance(item, str) for n, t in item.arguments.items())
    found = {id(tensor): tensor.nbytes for name, tensor in pairs if name in names and tensor is not None}
    return sum(found.values())


def test_bytes_and_operations_of_the_main_launches():
    """M = 512, N = 1024, K = 768 in bf16, against the matrices that each reads and writes; the rest is below 6%."""
    x, y, weight, unit = 512 * 768 * 2, 512 * 1024 * 2, 1024 * 768 * 2, 2 * 512 * 1024 * 768
    wants = {
        ("assemble", FULL): {"assemble": 2 * weight, "y": x + weight + y, "dW": x + weight + y, "dx": x + weight + y},
        ("fused", FULL): {"y": x + weight + y, "dx": x + weight + y},
        ("assemble", SCALE): {"weight_pass": 2 * weight},
        ("fused", SCALE): {"weight_pass": weight},
    }
    for (strategy, kinds), expected in wants.items():
        listed = [*itertools.chain(*launches(512, make_problem(1024, 768, "sm_90", kinds, rank=4), strategy))]
        found = {launch.name: launch for launch in listed}
        for name, size in expected.items():
            assert size <= found[name].bytes <= 1.06 * size, (strategy, name)
        assert found["y"].flops == pytest.approx(unit, rel=0.03)
        assert all(
            unit <= launch.flops < 1.04 * unit for launch in listed if launch.category in (BLAS, FUSED, CONTRACTED)
        )


def test_what_does_not_fit_the_cache_is_read_twice():
    """x by the token pass, W0 where V has to be known first; an sm_86 has no cache to speak of."""
    size = 512 * 768 * 2
    with settings.forced_tiles({"token_pass": settings.Tile(64, 64, 64, 4, 2)}):
        small, large = (
            {one.name: one for part in launches(512, make_problem(768, 768, name, SCALE), "fused") for one in part}
            for name in ("sm_90", "sm_86")
        )
    assert large["token_pass"].bytes - small["token_pass"].bytes == size
    weight = 768 * 768 * 2
    small, large = (
        launches(512, make_problem(768, 768, name, product="matmul"), "assemble") for name in ("sm_90", "sm_86")
    )
    assert large[0][0].bytes - small[0][0].bytes == weight


# What it predicts -----------------------------------------------------------------------------------------------------

FROM_STUDY = {"sm_80": 448, "sm_86": 448, "sm_89": 768, "sm_90": 256, "sm_100": 256}  # see test_times_of_the_study


def last_fused(outputs, inputs, architecture, kinds=BOTH):
    """The most tokens, a multiple of 64, with which fused is chosen; 0 if it never is."""
    sizes = range(64, 4097, 64)
    taken = [m for m in sizes if strategy_for(make_problem(outputs, inputs, architecture, kinds), m) == "fused"]
    return max(taken, default=0)


@pytest.mark.parametrize("architecture", FROM_STUDY)
def test_crossovers_of_the_study(architecture):
    """4096 x 4096, A and B low rank: fused up to the study's crossover, assemble from three times as much.

    The study took blocks of 64 rows for the contraction. The tiles for sm_80 have 32, which leave twice the sums.
    """
    known = FROM_STUDY[architecture]
    assert strategy_for(make_problem(4096, 4096, architecture), known) == "fused"
    assert known <= last_fused(4096, 4096, architecture) <= 3 * known
    for tokens in (1, 16, 64, 128, 256):
        assert strategy_for(make_problem(4096, 4096, architecture), tokens) == "fused", tokens


@pytest.mark.parametrize("architecture", MACHINES)
def test_many_tokens_are_assembled(architecture):
    """ViT-B at batch size 64, and 4,096 tokens or more of a language model."""
    shapes = [(64 * 197, *shape) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]
    shapes += [(tokens, *shape) for tokens in (4096, 8192) for shape in ((4096, 4096), (11008, 4096), (4096, 11008))]
    for (tokens, *shape), kinds in itertools.product(shapes, (BOTH, FULL, SCALE)):
        assert strategy_for(make_problem(*shape, architecture, kinds), tokens) == "assemble", (shape, kinds)


def test_times_of_the_study():
    """A study that is not in this repository, in us: 768 -> 3072 with 12,608 tokens, and 4096 -> 4096 with 2,048."""
    for (tokens, *shape), forward, backward in (
        ((12608, 3072, 768), 3 + 77, 19.5 + 98 + 4 + 93 + 2),
        ((2048, 4096, 4096), 17 + 91, 4 + 91 + 25 + 91 + 2),
    ):
        way = predict(make_problem(*shape, "sm_90", FULL), tokens, "assemble")
        assert way.forward_seconds * 1e6 == pytest.approx(forward, rel=0.2)
        assert way.backward_seconds * 1e6 == pytest.approx(backward, rel=0.25)


def test_nothing_takes_less_than_memory_and_arithmetic_allow():
    """Not below the machine's peaks; and more tokens on the same route never take less, within 5%."""
    for architecture, strategy, kinds in itertools.product(MACHINES, STRATEGIES, (BOTH, FULL)):
        machine, before = machine_for(architecture), 0.0
        for tokens in (1, 17, 64, 200, 512, 1000, 4096, 12608):
            way = predict(make_problem(3072, 768, architecture, kinds), tokens, strategy)
            every = (*way.forward, *way.backward)
            assert way.seconds >= sum(launch.flops for launch in every) / machine.half
            fastest = max(machine.bandwidth, machine.cache_bandwidth)
            assert way.seconds >= sum(launch.bytes for launch in every) / fastest + len(every) * machine.overhead
            assert way.seconds > 0.95 * before
            before = way.seconds


def test_single_precision_is_slower_and_tf32_in_between(monkeypatch):
    def time_of(dtype):
        return predict(make_problem(1024, 1024, "sm_90", dtype=dtype), 4096, "assemble").seconds

    half, single = time_of(torch.bfloat16), time_of(torch.float32)
    monkeypatch.setattr(problem, "tf32_allowed", lambda: True)
    assert half < time_of(torch.float32) < single
    assert not make_problem(64, 64, "gfx942", dtype=torch.float32).tf32


def test_no_gradient_no_backward():
    problem = make_problem(512, 512, "sm_90")._replace(wanted=frozenset(), wants_x=False)
    way = predict(problem, 64, "fused")
    assert way.backward == () and way.backward_seconds == 0
    assert way.seconds == way.forward_seconds > 0


def test_scratch_grows_with_the_rank():
    """More rank, smaller blocks, more slices: what the docs warn of."""
    small, large = (predict(make_problem(4096, 4096, "sm_90", SCALE, rank=rank), 8192, "fused") for rank in (8, 64))
    assert large.scratch_bytes > 7 * small.scratch_bytes


# Problems and architectures -------------------------------------------------------------------------------------------


def test_problem_of_a_call():
    terms = make_terms(("lora", "vector", "lora", "constant", "none"), 32, 48, rank=4)
    problem = problem_of(empty(32, 48, dtype=torch.float16), terms, "sm_90")
    assert problem[:2] == (32, 48)
    assert [part.kind for part in problem.parts] == ["low rank", "vector", "low rank", "constant", "none"]
    assert [part.rank for part in problem.parts] == [4, 0, 4, 0, 0]
    assert problem.storages == ("ad", "au", "bd", "cd", "cu", "d")
    assert (problem.element, problem.factor_bytes) == (2, 4 * 4 * (32 + 48))
    whole = Terms(LowRank(empty(32, 6), empty(6, 48)))
    assert problem_of(empty(32, 48), whole, "sm_90").rank("A") == 6
    assert hash(problem) == hash(problem_of(empty(32, 48, dtype=torch.float16), terms, "sm_90"))
    assert Terms.unflatten(terms.storages, problem.structure).structure == terms.structure


def test_a_new_number_of_tokens_costs_microseconds():
    """Language models change it at every step."""
    problem = make_problem(512, 512, "sm_90", FULL)
    best = min(timeit.repeat(lambda: strategy_for(problem, 64), number=500, repeat=20))
    assert best / 500 < 30e-6


def test_lengths_share_their_decisions():
    """Rounded to four significant bits: by 1/16 or less, and exact below 16."""
    assert [rounded(tokens) for tokens in range(17)] == list(range(17))
    assert all(abs(rounded(tokens) - tokens) <= tokens / 16 for tokens in range(1, 20_000))
    before = prediction._faster.cache_info().misses
    for tokens in range(1024, 2048):
        strategy_for(make_problem(96, 160, "sm_90"), tokens)
    assert prediction._faster.cache_info().misses - before == 9


def test_nearest_architecture():
    known = ("sm_80", "sm_90", "gfx942")
    asked = {"sm_90": "sm_90", "sm_89": "sm_80", "sm_120": "sm_90", "gfx950": "gfx942"}
    assert {name: nearest(name, known) for name in asked} == asked
    assert [nearest(name, known) for name in ("sm_75", "gfx90a", "gfx1100", "cpu", "sm_90a", "")] == [None] * 6
    assert machine_for("sm_87") is MACHINES["sm_86"]
    assert machine_for("interpreter") is MACHINES["sm_90"]
    for name in ("sm_75", "gfx90a", "H100"):
        with pytest.raises(ValueError, match=rf"architecture: expected one of sm_80, .*gfx942.* got '{name}'"):
            machine_for(name)


# The tables of docs/strategies.md -------------------------------------------------------------------------------------

SHAPES = ((768, 768), (3072, 768), (4096, 4096), (11008, 4096))  # N, K
STEPS = ((64, 4096, 4096), (256, 4096, 4096), (2048, 4096, 4096), (788, 3072, 768), (12608, 3072, 768))  # M, N, K


def crossover_table():
    rows = [[name, *(str(last_fused(*shape, name)) for shape in SHAPES)] for name in MACHINES]
    return markdown(["", *(f"{inputs} -> {outputs}" for outputs, inputs in SHAPES)], rows)


def time_table():
    rows = []
    for (tokens, outputs, inputs), kinds in itertools.product(STEPS, (FULL, SCALE)):
        row = [f"{inputs} -> {outputs}, {tokens}", kinds[0].replace("lora", "low rank")]
        for name in ("sm_80", "sm_89", "sm_90"):
            ways = [predict(make_problem(outputs, inputs, name, kinds), tokens, way) for way in STRATEGIES]
            row += [f"{way.forward_seconds * 1e6:.0f} + {way.backward_seconds * 1e6:.0f}" for way in ways]
        rows.append(row)
    heads = [f"{name} {strategy}" for name in ("sm_80", "sm_89", "sm_90") for strategy in STRATEGIES]
    return markdown(["layer, tokens", "A", *heads], rows)


def markdown(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


@pytest.mark.parametrize("table", [crossover_table, time_table])
def test_document_shows_what_the_model_says(table):
    assert table() in DOCUMENT.read_text(), f"docs/strategies.md: put this table there\n{table()}"


@pytest.mark.parametrize("name", MACHINES)
def test_document_shows_the_machines(name):
    machine = MACHINES[name]
    row = [name, f"{machine.half / 1e12:.0f}", f"{machine.triton:.2f}", f"{machine.assembled:.2f}"]
    row += [f"{machine.bandwidth / 1e12:.2f}", f"{machine.overhead * 1e6:.1f}"]
    assert f"| {' | '.join(row)} |" in DOCUMENT.read_text()


def test_tf32_follows_every_setting_of_torch():
    """The present one and the one before it; asking for the older after the present one was set raises in torch."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, expected in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = setting
            assert tf32_allowed() == expected
    finally:
        matmul.fp32_precision = before
