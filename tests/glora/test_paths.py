"""Reading, setting and drawing the paths of a model."""

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock

import pytest
import torch

from glora import (
    PathConfig,
    SearchSpace,
    count_parameters,
    get_paths,
    load_adapter,
    load_lycoris,
    merge,
    peft,
    sample_paths,
    save_adapter,
    save_lycoris,
    set_paths,
    using_paths,
)
from tests.glora.toys import IN_FEATURES, adapted_mlp, generator, mlp, same_bits, state, trained_mlp, unchanged
from tests.tiers import at

OLD = {"fc1": PathConfig("lora_2"), "fc2": PathConfig(B="vector")}
NEW = {"fc1": PathConfig("vector", "lora_1"), "fc2": PathConfig(E="constant")}
WRONG = {
    "missing": ({"fc1": NEW["fc1"]}, ValueError, r"missing \['fc2'\], unknown \[\]"),
    "unknown": ({**NEW, "fc3": PathConfig()}, ValueError, r"missing \[\], unknown \['fc3'\]"),
    "head": ({**NEW, "head": PathConfig()}, ValueError, r"unknown \['head'\]"),
    "empty": ({}, ValueError, r"missing \['fc1', 'fc2'\]"),
    "rank": ({**NEW, "fc2": PathConfig("lora_3")}, ValueError, r"ranks up to 2 .*\(layer 'fc2'\)"),
    "type": ({**NEW, "fc2": "lora_2"}, TypeError, r"expected glora.PathConfig for 'fc2', got str"),
}
each_wrong = pytest.mark.parametrize(("paths", "error", "message"), WRONG.values(), ids=WRONG)


@pytest.fixture
def model():
    model = adapted_mlp(rank=2)
    set_paths(model, OLD)
    return model


def test_gets_what_was_set(model):
    assert get_paths(model) == OLD
    set_paths(model, NEW)
    assert get_paths(model) == NEW


def test_order_of_names_does_not_matter(model):
    set_paths(model, dict(reversed(NEW.items())))
    assert get_paths(model) == NEW


@each_wrong
def test_setting_is_all_or_nothing(model, paths, error, message):
    with unchanged(model), pytest.raises(error, match=message):
        set_paths(model, paths)


@pytest.mark.parametrize(("function", "arguments"), [(set_paths, ({},)), (sample_paths, (SearchSpace(), generator()))])
def test_a_model_without_layers_is_refused(function, arguments):
    with pytest.raises(ValueError, match="at least one adapted layer, found none"):
        function(mlp(), *arguments)


def test_a_model_without_layers_has_no_paths():
    assert get_paths(mlp()) == {}


# -- for a block -----------------------------------------------------------------------------------


def test_using_paths_for_a_block_only(model):
    with using_paths(model, NEW) as used:
        assert used is model
        assert get_paths(model) == NEW
    assert get_paths(model) == OLD


def test_using_paths_restores_after_an_error(model):
    with pytest.raises(KeyError), using_paths(model, NEW):
        raise KeyError
    assert get_paths(model) == OLD


def test_merging_inside_of_using_paths(model):
    layer = model.fc1
    with using_paths(model, NEW):
        report = merge(model, keep=True)
    assert report.layers[0].path == NEW["fc1"]
    assert layer.path == OLD["fc1"]
    assert get_paths(model) == {}


@each_wrong
def test_using_paths_refuses_before_the_block(model, paths, error, message):
    with unchanged(model), pytest.raises(error, match=message), using_paths(model, paths):
        pytest.fail("entered")


# -- drawing ---------------------------------------------------------------------------------------


def test_draws_for_every_layer_from_the_generator_alone(model):
    space = SearchSpace((2, 1))
    draws = [sample_paths(model, space, generator(5)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert list(draws[0]) == ["fc1", "fc2"]


def test_drawing_goes_on_where_it_stopped(model):
    gen = generator()
    assert len({tuple(sample_paths(model, SearchSpace((2, 1)), gen).values()) for _ in range(10)}) == 10


@pytest.mark.parametrize("limit", [None, 60])
def test_drawing_leaves_the_model_alone(model, limit):
    with unchanged(model):
        sample_paths(model, SearchSpace((2,)), generator(), limit)


@pytest.mark.parametrize("limit", [0, 1, 10, 40, 90, 10_000])
def test_a_limit_always_holds(model, limit):
    gen = generator()
    counts = [count_parameters(model, sample_paths(model, SearchSpace((2,)), gen, limit)) for _ in range(100)]
    assert max(counts) <= limit


def test_refuses_ranks_above_the_storage(model):
    with pytest.raises(ValueError, match=r"ranks up to 2 \(storage of layer 'fc1'\), got \(4, 2\)"):
        sample_paths(model, SearchSpace((4, 2)), generator())


def test_ranks_that_no_tensor_takes_do_not_matter(model):
    narrow = dict.fromkeys("ABC", ("vector", "none"))
    assert sample_paths(model, SearchSpace((64,), **narrow), generator())


# -- several threads -------------------------------------------------------------------------------


def inputs():
    return torch.randn(7, IN_FEATURES, generator=generator(2))


def in_thread(function):
    """What it returns or raises, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_second_thread_within_using_paths_is_refused():
    model = trained_mlp()
    before, empty = get_paths(model), dict.fromkeys(get_paths(model), PathConfig())

    def enter():
        with using_paths(model, before):
            return model(inputs())

    with using_paths(model, empty):
        for change in (enter, lambda: set_paths(model, before), lambda: using_paths(model.fc1, {}).__enter__()):
            with pytest.raises(RuntimeError, match=r"one thread at a time .* lock .* copy.deepcopy\(model\)"):
                in_thread(change)
        assert get_paths(model) == empty
        with using_paths(model, before):  # the same thread may
            assert get_paths(model) == before
        assert get_paths(model) == empty
        other = copy.deepcopy(model)
        assert in_thread(lambda: get_paths(other)) == empty
        in_thread(lambda: set_paths(other, before))
    assert get_paths(model) == before
    assert torch.equal(in_thread(enter), enter())


LOADERS = {
    "own": (save_adapter, load_adapter, "a.safetensors"),
    "lycoris": (partial(save_lycoris, adapters_only=True), load_lycoris, "l.safetensors"),
    "peft": (peft.export_peft, peft.import_peft, "folder"),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_is_not_half_loaded_within_another_threads_block(kind, tmp_path):
    """Other paths than the file's are in force there, and cannot be set."""
    save, load, name = LOADERS[kind]
    product = "matmul" if kind == "lycoris" else "hadamard"
    path = PathConfig("lora_2") if kind == "lycoris" else PathConfig("vector", "vector")
    saved, model = trained_mlp(seed=1, product=product), trained_mlp(product=product)
    set_paths(saved, path)
    save(saved, tmp_path / name)
    with using_paths(model, get_paths(model)):
        before = state(model)
        with pytest.raises(RuntimeError, match="one thread at a time"):
            in_thread(lambda: load(model, tmp_path / name))
        assert same_bits(state(model), before)


def test_threads_that_hold_a_lock_get_what_they_would_alone():
    model, lock = trained_mlp(), Lock()
    paths = [sample_paths(model, SearchSpace((2, 1)), generator(seed)) for seed in range(4)]

    def alone(path):
        with lock, using_paths(model, path):
            return model(inputs())

    expected = [alone(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(at(5, 50)):
            assert all(map(torch.equal, pool.map(alone, paths), expected))


def test_a_block_that_fails_lets_others_in():
    model = trained_mlp()
    with pytest.raises(ValueError, match="paths"), using_paths(model, {}):
        pass
    with pytest.raises(KeyError), using_paths(model, get_paths(model)):
        raise KeyError
    in_thread(lambda: set_paths(model, get_paths(model)))


def test_tasks_of_one_thread_are_told_apart():
    model = trained_mlp()

    async def enter():
        with using_paths(model, get_paths(model)):
            await asyncio.sleep(0)

    async def both():
        return await asyncio.gather(enter(), enter(), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, RuntimeError)


# -- of some layers --------------------------------------------------------------------------------


def test_some_paths_of_unknown_layers(model):
    message = r"^paths: expected names of adapted layers, unknown .* are 'fc8', 'module.fc9'; glora.get_paths\(model\)"
    with unchanged(model), pytest.raises(ValueError, match=message):
        set_paths(model, {"fc8": PathConfig(), "fc1": PathConfig(), "module.fc9": PathConfig()}, partial=True)


def test_some_paths_with_a_layer_twice(model):
    twice = {"fc1": PathConfig(), "_orig_mod.fc1": PathConfig("vector")}
    with unchanged(model), pytest.raises(ValueError, match=r"^paths: expected each layer once, .*'_orig_mod.fc1'"):
        set_paths(model, twice, partial=True)
