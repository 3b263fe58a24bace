"""The builds that are listed and compiled ahead of time are those that layers launch, down to Triton's cache keys."""

import itertools
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from glora_kernels import builds_for
from glora_kernels._triton.builds import builds_of
from glora_kernels._triton.device import pretended
from glora_kernels._triton.kernels import KERNELS
from glora_kernels._triton.recording import launches_of
from glora_kernels._triton.shipped import VIT_B, shipped
from glora_kernels.planning import cases as module
from glora_kernels.planning.cases import Layer, cases, paths
from glora_kernels.planning.prediction import STRATEGIES
from glora_kernels.planning.steps import Launch
from glora_kernels.terms import PRODUCTS
from tests.tiers import at

ROOT = Path(__file__).resolve().parents[2]
VIT_SHAPES = [(layer.outputs, layer.inputs) for layer in VIT_B]


def what(build):
    """All of a build but its label."""
    constants = sorted((name, str(value)) for name, value in build.constexprs.items())
    rest = build.num_warps, build.num_stages, build.matrix, build.plain_loop
    return build.kernel, tuple(sorted(build.signature.items())), build.divisible, tuple(constants), *rest


def drawn(number, ranks, seed=0):
    return random.Random(seed).sample(list(paths(ranks)), number)


# Lists ----------------------------------------------------------------------------------------------------------------


def test_builds_are_distinct_and_whole():
    found = builds_for(VIT_SHAPES, (8, 4), torch.bfloat16, "gfx942", strategies=STRATEGIES)
    assert len({what(build) for build in found}) == len({build.label for build in found}) == len(found)
    assert {build.kernel for build in found} == set(KERNELS)
    for build in found:
        assert set(build.signature) | set(build.constexprs) == set(build.function.arg_names)
        assert not set(build.signature) & set(build.constexprs)
        assert build.divisible <= set(build.signature)
    assert pickle.loads(pickle.dumps(found)) == found  # other processes compile them


def test_numbers_that_vary_are_not_built_in():
    """Tokens, ranks and places in the buffer change from call to call."""
    for build in builds_for([(768, 768)], (8,), torch.bfloat16, "sm_80", strategies=STRATEGIES):
        for name in ("M", "rank_a", "rank_b", "rank_c", "slices", "at_db", "at_a", "jobs"):
            assert name not in build.constexprs
            assert name not in build.divisible


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cases_that_are_alike_have_the_same_builds(product, strategy, monkeypatch):
    """For sizes that are multiples of 16 or not, small or not; ranks of every padding; and numbers of 64 bits."""
    shapes = [(768, 1024), (272, 768), (1000, 257), (771, 259), (1, 64), (48, 63), (255, 512), (11008, 4096)]
    layers = [Layer(*shape, bias) for shape, bias in zip(shapes, itertools.cycle((True, True, False)))]
    calls = list(itertools.product(layers, (1, 80, 9000, 2**20)))
    types = {"rank": 64, "product": product, "dtype": torch.float16, "factors": torch.float16, "architecture": "sm_90"}
    taken = drawn(at(6, 40), (1, 2, 8, 15, 16, 17, 32, 48, 64))
    listed = list(cases(calls, taken, [strategy], **types, keeps_output=(True, False)))
    alike = builds_of(listed)
    assert len({case.representative for case in listed}) < len(listed)
    monkeypatch.setattr(module.Case, "representative", property(lambda case: case))
    assert {what(build) for build in alike} == {what(build) for build in builds_of(listed)}
    assert any("i64" in build.signature.values() for build in alike)


def test_a_list_is_that_of_its_parts():
    """Every argument adds what it says: more shapes, ranks, tokens, products, strategies and gradients, more builds."""

    def found(**changes):
        options = {"shapes": [(96, 64)], "ranks": (8,), "dtype": torch.bfloat16, "architecture": "sm_90"}
        options |= {"strategies": ("assemble",), "input_gradients": (True,)} | changes
        return {what(build) for build in builds_for(**options)}

    least = found(training=False)
    assert {kernel for kernel, *_ in least} == {"assemble"}
    whole = found()
    assert whole > least
    for changes in (
        {"shapes": [(96, 64), (96, 33)]},
        {"ranks": (8, 64)},
        {"tokens": (12608, 4)},
        {"products": PRODUCTS},
        {"strategies": STRATEGIES},
        {"input_gradients": (True, False)},
        {"kept_outputs": (True, False)},
    ):
        assert found(**changes) > whole, changes
    for changes in ({"dtype": torch.float16}, {"architecture": "sm_80"}, {"bias": False}):
        assert found(**changes) - whole, changes


def test_the_planner_chooses_the_strategy():
    """Path by path; a ViT at batch 64 forms W_eff, a few tokens are multiplied with it as it is formed."""
    many, few = (builds_for([(768, 768)], (8,), torch.bfloat16, "sm_90", tokens=(number,)) for number in (12608, 64))
    assert "fused" not in {build.kernel for build in many}
    assert {"fused", "assemble"} <= {build.kernel for build in few}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": []}, "shapes: expected at least one, got none"),
        ({"shapes": [768]}, r"shapes: expected pairs \(out, in\), got 768"),
        ({"shapes": [(768, 0)]}, "shapes: expected integers from 1, got 0"),
        ({"ranks": (8, 65)}, "ranks: expected integers from 1 to 64, got 65"),
        ({"ranks": (True,)}, "ranks: expected integers, got True"),
        ({"dtype": torch.float64}, "dtype: expected some of torch.bfloat16, torch.float16, torch.float32, got"),
        ({"architecture": "sm_1"}, "architecture: expected one of sm_80, .* got 'sm_1'"),
        ({"tokens": (0,)}, "tokens: expected integers from 1, got 0"),
        ({"tokens": 64}, "tokens: expected a sequence, got 64"),
        ({"ranks": 8}, "ranks: expected a sequence, got 8"),
        ({"products": "hadamard"}, "products: expected a sequence, got 'hadamard'"),
        ({"products": ("outer",)}, r"products: expected some of hadamard, matmul, got \['outer'\]"),
        ({"strategies": ()}, r"strategies: expected some of assemble, fused, got \[\]"),
        ({"architecture": None}, "architecture: expected a name such as sm_90 or gfx942, got None"),
        ({"input_gradients": (None,)}, "input_gradients: expected some of True, False, got"),
    ],
)
def test_bad_arguments(changes, message):
    options = {"shapes": [(768, 768)], "ranks": (8,), "dtype": torch.bfloat16, "architecture": "sm_90"}
    with pytest.raises((ValueError, TypeError), match=message):
        builds_for(**options | changes)


def test_iterators_are_read_once():
    options = {"shapes": [(768, 768)], "ranks": (8,), "dtype": torch.bfloat16, "architecture": "sm_90"}
    names = {"products": ["hadamard"], "strategies": ["fused"], "input_gradients": [True], "kept_outputs": [True]}
    listed = builds_for(**options, **names)
    assert listed and builds_for(**options, **{name: iter(values) for name, values in names.items()}) == listed


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_recorded_launches_are_those_of_the_schedules(product, strategy):
    """What is timed and tuned is what layers launch."""
    types = {"product": product, "dtype": torch.bfloat16, "factors": torch.float32, "architecture": "sm_90"}
    calls, taken = [(Layer(96, 64), 128), (Layer(64, 96, bias=False), 16)], drawn(8, (8, 4))
    for case in cases(calls, taken, [strategy], rank=8, **types, wants_x=(True, False), keeps_output=(True, False)):
        with pretended("sm_90"):
            recorded = launches_of(case, "meta")
        for schedule, launches in zip(case.schedules, recorded):
            steps = [step for step in schedule.steps if isinstance(step, Launch)]
            assert [(KERNELS[step.kernel], step.tile) for step in steps] == [(one.kernel, one.tile) for one in launches]


# The gate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_gate_has_every_build_of_a_vit(architecture):
    """Of all 900 paths at batch 64, both products, with x wanting a gradient and not."""
    gate = shipped(architecture)
    assert max(Counter(build.label for build in gate).values()) == 1
    listed = {what(build) for build in gate}
    assert len(listed) == len(gate)
    strategies = at(("assemble",), None)  # the planner's choice, which takes longer
    found = builds_for(VIT_SHAPES, (8, 4), torch.bfloat16, architecture, products=PRODUCTS, strategies=strategies)
    assert {what(build) for build in found} <= listed


def test_the_gate_and_launches_have_the_same_cache_keys():
    """Layers ask Triton's cache for what was compiled ahead of time, and for nothing else; nothing is compiled here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_host.keys", "--paths", str(at(5, 40))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert list(counts) == ["cuda:80", "cuda:90", "hip:gfx942"] and all(int(count) > 50 for count in counts.values())
