"""Several processes train as one does and search the same history; what would go wrong unnoticed is refused."""

import math
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, TensorDataset

import glora
from glora import PathConfig, Recipe, SearchSettings, SearchSpace, evolve, glora_layers, search, sync_gradients, train
from glora.distributed import _same_everywhere, share, unwrapped, whole
from glora.peft import export_peft, import_peft
from glora.processes import process_rank
from glora.training.batches import StepSampler
from tests.glora.evolution.test_evolution import LAYERS, Counted, additive, scored
from tests.glora.evolution.test_halving import RUNGS, SAMPLES, Parts, of_part
from tests.glora.toys import (
    adapted_mlp,
    generator,
    mlp,
    on_ranks,
    points,
    randomize,
    same_bits,
    seeded,
    tiny_vit,
    trained_mlp,
)
from tests.glora.training.test_training import CutError, Pairs, cut_at
from tests.tiers import at

ROOT = Path(__file__).resolve().parents[2]
SPACE = SearchSpace((2, 1))
RECIPE = Recipe(steps=20, batch_size=6, lr=0.01, weight_decay=0.1, clip_norm=0.5, seed=3, checkpoint_every=4)
QUICK = SearchSettings(population=10, top=3, crossover=5, mutation=5, generations=3)
HALVED = SearchSettings(**{**vars(QUICK), "objective": "front", "halving": RUNGS})


def recipe(**changes):
    return Recipe(**{**vars(RECIPE), **changes})


def own_mlp():
    """Of other weights on every rank, the frozen ones too."""
    model = adapted_mlp()
    randomize(model, process_rank())
    with torch.no_grad():
        model.fc1.weight.add_(process_rank())
    return model


def vit():
    """In fp64: where a gradient is zero but for rounding (E constant before a layer norm), AdamW makes a whole step of
    the noise, and two orders of summation in fp32 part ways."""
    with seeded():
        return glora.inject(tiny_vit(), 2).double()


def images():
    x = torch.randn(12, 1, 8, 8, generator=generator(), dtype=torch.float64)
    return TensorDataset(x, torch.arange(12) % 3)


def replicated(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "blocks", []):
        fully_shard(block)
    return fully_shard(model)


def scaled_mlp():
    model = trained_mlp()
    for layer in glora.glora_layers(model).values():
        layer.scales = glora.Scales(A={"lora": 4.0}, B={"vector": 0.25, "constant": 0.5}, E={"vector": 2.0})
    return model


MODELS = {
    "mlp": (own_mlp, points, 1e-6),
    "seeded-mlp": (trained_mlp, points, 1e-6),
    "scaled-mlp": (scaled_mlp, points, 1e-6),
    "vit": (vit, images, 1e-5),
}
WRAPPERS = {"plain": lambda model: model, "replicated": replicated, "sharded": sharded}
CASES = [
    *[("mlp", "plain", batch_size) for batch_size in (6, 5, 2, 1)],
    *[("seeded-mlp", wrapper, batch_size) for wrapper in ("replicated", "sharded") for batch_size in (6, 5, 1)],
    *[("scaled-mlp", wrapper, 5) for wrapper in WRAPPERS],
    *[("vit", wrapper, 5) for wrapper in WRAPPERS],
]


def tensors(model):
    return {name: whole(tensor.detach()).clone() for name, tensor in unwrapped(model).state_dict().items()}


def trained(name, wrapper, batch_size, **options):
    """``(tensors, losses)`` after a run during which only what was read had a gradient."""
    make, data, _ = MODELS[name]
    model = WRAPPERS[wrapper](make())
    layers = glora_layers(model).values()

    def check(step, loss):
        read = {id(p) for layer in layers for p in layer.support_parameters(layer.path)}
        for layer in layers:
            assert all((p.grad is not None) == (id(p) in read) for p in layer.support_parameters())

    options = {"on_step": check, "recipe": recipe(batch_size=batch_size), **options}
    summary = train(model, data(), space=SPACE, progress=False, **options)
    return tensors(model), summary.losses


@cache
def in_one_process(name, batch_size):
    return trained(name, "plain", batch_size)


def assert_close(got, expected, tolerance):
    assert list(got[0]) == list(expected[0])
    for name, tensor in got[0].items():
        difference = float((tensor.double() - expected[0][name]).abs().max())
        assert difference <= tolerance, (name, difference)
    assert got[1] == pytest.approx(expected[1], rel=0, abs=1e-6)


def known_to_first(file):
    """``file`` on rank 0; on others, which are not to touch it, one that cannot be."""
    return Path("/nowhere") / file.name if process_rank() else file


def searched(folder, ranks):
    """History and count of evaluations of two searches, one with a journal."""
    options = {"space": SPACE, "validation": points(), "limit": 60, "settings": QUICK, "progress": False}
    model = trained_mlp()
    first = search(model, metric="loss", **options)
    second = search(model, metric="loss", journal=known_to_first(folder / f"{ranks}.jsonl"), **options)
    return first.history, first.evaluated, second.history, second.evaluated


def halved():
    """A search by halving for the front."""
    options = {"space": SPACE, "validation": points(), "settings": HALVED, "metric": "loss", "progress": False}
    result = search(trained_mlp(), limit=60, **options)
    return result.history, result.front, result.evaluated, result.cost


# -- two processes -----------------------------------------------------------------------------------


class Recorded(Pairs):
    """Keeps which samples were read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def noisy(folder, cut=None):
    """A run with dropout, and with samples that are drawn anew: ``(tensors, losses, samples read, draws)``."""
    options = {"checkpoint": folder / "noisy.pt", "on_step": cut_at(cut)} if cut else {}
    model, data, draws = adapted_mlp(dropout=0.3), Recorded(), []

    def loss_fn(output, target):
        draws.append(float(torch.rand(())))
        return nn.functional.cross_entropy(output, target)

    losses = train(model, data, RECIPE, space=SPACE, progress=False, loss_fn=loss_fn, **options).losses
    return tensors(model), losses, data.read[-3 * len(draws) :], draws  # before, what tells the data from others


def cut(name, wrapper, file):
    try:
        trained(name, wrapper, 6, checkpoint=file, on_step=cut_at(10))
    except CutError:
        return
    raise AssertionError("expected to be cut")


def noisy_and_cut(folder):
    uncut = noisy(folder)
    try:
        noisy(folder, cut=10)
    except CutError:
        torch.manual_seed(process_rank())  # whatever happens in between
    return uncut, noisy(folder, cut=99)


def two_processes(folder):
    results = {case: trained(*case) for case in CASES}
    results["search"], results["halved"] = searched(folder, 2), halved()
    results["noisy"] = noisy_and_cut(folder)
    for wrapper in WRAPPERS:
        cut("vit", wrapper, known_to_first(folder / f"{wrapper}.pt"))
        file = known_to_first(folder / f"one-{wrapper}.pt")
        results["from one", wrapper] = trained("vit", wrapper, 6, checkpoint=file)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def two(folder):
    for wrapper in WRAPPERS:
        cut("vit", "plain", folder / f"one-{wrapper}.pt")
    return on_ranks(2, folder / "two", two_processes, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_trains_as_one_process_on_the_same_batches(two, case):
    name, _, batch_size = case
    for results in two:
        assert_close(results[case], in_one_process(name, batch_size), MODELS[name][2])
    assert same_bits(two[0][case][0], two[1][case][0])
    assert two[0][case][1] == two[1][case][1]


def test_the_weights_move_much_further_than_the_tolerance():
    before, after = tensors(own_mlp()), in_one_process("mlp", 6)[0]
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 0.05
    assert math.dist(in_one_process("mlp", 6)[1], in_one_process("mlp", 5)[1]) > 0.1


def test_search_has_the_history_of_one_process(two, folder):
    expected = searched(folder, 1)
    assert [results["search"] for results in two] == [expected, expected]
    assert scored(folder / "2.jsonl") == scored(folder / "1.jsonl")


def test_halving_for_the_front_has_the_history_of_one_process(two):
    assert [results["halved"] for results in two] == [halved()] * 2


def test_resumed_run_has_the_bits_of_an_uncut_one(two):
    for results in two:
        uncut, resumed = results["noisy"]
        assert same_bits(uncut[0], resumed[0])
        assert uncut[1] == resumed[1]
        assert (uncut[2][8 * 3 :], uncut[3][8:]) == resumed[2:]


def test_each_rank_reads_its_share_alone(two):
    batches = StepSampler(12, RECIPE.batch_size, RECIPE.seed, 0, RECIPE.steps)
    first, second = (results["noisy"][0][2] for results in two)
    assert [first[3 * i : 3 * i + 3] + second[3 * i : 3 * i + 3] for i in range(RECIPE.steps)] == list(batches)


def test_ranks_and_steps_draw_differently(two):
    draws = [draw for results in two for draw in results["noisy"][0][3]]
    assert len(set(draws)) == len(draws) == 2 * RECIPE.steps


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_resumes_what_one_process_began(two, wrapper):
    for results in two:
        assert_close(results["from one", wrapper], in_one_process("vit", 6), 1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_process_resumes_what_two_began(two, folder, wrapper):
    file = folder / f"{wrapper}.pt"
    assert torch.load(file, weights_only=True)["step"] == 8
    assert_close(trained("vit", "plain", 6, checkpoint=file), in_one_process("vit", 6), 1e-5)


# -- three processes ---------------------------------------------------------------------------------


def three_processes(folder):
    results = {batch_size: trained("mlp", "plain", batch_size) for batch_size in (5, 2)}
    results["search"], results["halved"] = searched(folder, 3), halved()
    results["resumed"] = trained("vit", "plain", 6, checkpoint=folder / "from-two.pt")
    counted, parts = Counted(), Parts()
    torn = evolve(LAYERS, SPACE, counted, settings=QUICK, journal=folder / "torn.jsonl", progress=False)
    results["torn"], results["calls"] = (torn.history, torn.evaluated), len(counted.seen)
    torn = race(parts, folder / "torn-race.jsonl")
    results["torn race"], results["samples"] = (torn.history, torn.cost), parts.samples
    return results


def race(evaluate, journal):
    return evolve(LAYERS, SPACE, evaluate, settings=HALVED, samples=SAMPLES, journal=journal, progress=False)


def tear(file, copy):
    """The first half of a journal; returns how many lines there are in it beside the first."""
    content = file.read_bytes()
    copy.write_bytes(content[: len(content) // 2])
    return content[: len(content) // 2].count(b"\n") - 1


def test_three_processes(two, folder):
    """Some of them with nothing of a batch; a run that two began; a journal of which one process wrote a part."""
    (folder / "from-two.pt").write_bytes((folder / "plain.pt").read_bytes())
    complete = evolve(LAYERS, SPACE, additive, settings=QUICK, journal=folder / "complete.jsonl", progress=False)
    whole_race = race(of_part, folder / "complete-race.jsonl")
    known = tear(folder / "complete.jsonl", folder / "torn.jsonl")
    tear(folder / "complete-race.jsonl", folder / "torn-race.jsonl")
    known_samples = sum(stop - start for _, start, stop, _ in scored(folder / "torn-race.jsonl", torn=True)[1])
    three = on_ranks(3, folder / "three", three_processes, folder)
    for results in three:
        for batch_size in (5, 2):
            assert_close(results[batch_size], in_one_process("mlp", batch_size), 1e-6)
        assert results["search"] == searched(folder, 1)[:2] * 2
        assert_close(results["resumed"], in_one_process("vit", 6), 1e-5)
        assert results["halved"] == halved()
        assert results["torn"] == (complete.history, len(complete.history) - known)
        assert results["torn race"] == (whole_race.history, whole_race.cost)
    assert sum(results["calls"] for results in three) == len(complete.history) - known
    assert sum(results["samples"] for results in three) == whole_race.cost * SAMPLES - known_samples
    for name in ("", "-race"):
        assert scored(folder / f"torn{name}.jsonl") == scored(folder / f"complete{name}.jsonl")


# -- gradients ---------------------------------------------------------------------------------------

PATHS = [
    {"fc1": PathConfig(A="lora_2", E="vector"), "fc2": PathConfig(B="vector")},
    {"fc1": PathConfig(A="constant"), "fc2": PathConfig(C="lora_1", E="constant")},
]
READ = {"fc1.Ad", "fc1.Au", "fc1.E", "fc2.Bd", "fc2.Cd", "fc2.Cu", "fc2.E", "head.weight", "head.bias"}


def accumulated(who, sync):
    """Gradients of rank ``who``'s samples over two passes under different paths."""
    model = trained_mlp()
    x, target = points().tensors
    for paths in PATHS:
        glora.set_paths(model, paths)
        nn.functional.cross_entropy(model(x[who::2]), target[who::2]).backward()
    if sync:
        sync_gradients(model)
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def half_precision():
    model = adapted_mlp(dtype=torch.bfloat16)
    randomize(model)
    for parameter in glora.trainable_parameters(model):
        parameter.grad = torch.full_like(parameter, 1.0 + 2 * process_rank())
    model.fc1.Ad.grad = torch.ones(2, 8).t() * process_rank()
    sync_gradients(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def other_paths(rank_of_other):
    model = trained_mlp()
    paths = {**PATHS[0], **({"fc2": PathConfig(B="constant")} if process_rank() == rank_of_other else {})}
    glora.set_paths(model, paths)
    model(points().tensors[0]).sum().backward()
    sync_gradients(model)


def other_union():
    model = trained_mlp()
    for paths in PATHS if process_rank() else PATHS[1:]:
        glora.set_paths(model, paths)
        model(points().tensors[0]).sum().backward()
    sync_gradients(model)


def sparse():
    model = nn.Embedding(3, 2, sparse=True)
    model(torch.tensor([0])).sum().backward()
    sync_gradients(model)


# -- what is refused -----------------------------------------------------------------------------------


class FailingData(Dataset):
    """Whose sample cannot be read on rank 1."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if process_rank() == 1:
            raise OSError("no such image")
        return points()[index]


def start(model, dataset=None, **options):
    train(
        model,
        points() if dataset is None else dataset,
        **{"recipe": RECIPE, "space": SPACE, "progress": False, **options},
    )


def nan_on_one(output, target):
    return output.sum() * (math.nan if process_rank() == 1 else 1)


def default_ddp(**options):
    return DistributedDataParallel(trained_mlp(), **options)


def static_graph():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return default_ddp(find_unused_parameters=True, static_graph=True)


def partly_sharded():
    from torch.distributed.fsdp import fully_shard

    model = trained_mlp()
    fully_shard(model.fc1)
    return model


def sharded_over_part():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(trained_mlp(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))


def failing_score(paths):
    if process_rank() == 1:
        raise OSError("no such image")
    return 0.0


def search_of(model, **options):
    search(model, SPACE, points(), settings=QUICK, progress=False, **options)


PATHS_DIFFER = r"paths: expected the same on every rank, got 'fc2' .*B='constant'.* on rank 1 and .*B='vector'.* rank 0"
UNREAD = r"^model: expected DistributedDataParallel with find_unused_parameters=True and without static_graph"
ITSELF = "averages gradients itself"
NO_IMAGE = (r"^rank 1 failed: OSError: no such image", r"^no such image")
REFUSED = {
    "path": (lambda: other_paths(1), ValueError, PATHS_DIFFER),
    "path-of-first": (lambda: other_paths(0), ValueError, r"'fc2' .*B='vector'.* on rank 1 and .*B='constant'"),
    "union": (other_union, ValueError, r"paths: .* got 'fc1.Au' gradient .* on rank 1 and None on rank 0"),
    "sparse": (sparse, ValueError, r"model: expected dense gradients, got torch.sparse_coo for 'weight'"),
    "sync-of-ddp": (lambda: sync_gradients(default_ddp()), ValueError, ITSELF),
    "sync-of-fsdp": (lambda: sync_gradients(sharded(trained_mlp())), ValueError, ITSELF),
    "ddp": (lambda: start(DistributedDataParallel(adapted_mlp())), ValueError, UNREAD),
    "ddp-fixed-path": (lambda: start(default_ddp(), space=None), ValueError, UNREAD),
    "static-graph": (lambda: start(static_graph()), ValueError, UNREAD),
    "ddp-inside": (lambda: start(nn.Sequential(default_ddp())), ValueError, "around the whole model or none"),
    "partly-sharded": (
        lambda: start(partly_sharded()),
        ValueError,
        r"fully_shard on the whole model, got it on a part; without it are \['fc2.weight'",
    ),
    "two-meshes": (lambda: start(sharded_over_part()), ValueError, "fully_shard over one dimension of all 2 ranks"),
    "batch-norm": (
        lambda: start(nn.Sequential(nn.BatchNorm1d(6), trained_mlp())),
        ValueError,
        r"batch norm, .* got '0'; use torch.nn.SyncBatchNorm",
    ),
    "recipe": (
        lambda: start(trained_mlp(), recipe=recipe(lr=0.1 + process_rank())),
        ValueError,
        r"^arguments: expected the same on every rank, got 'recipe' .*'lr': 1.1.* on rank 1",
    ),
    "steps-of-checkpoints": (
        lambda: start(trained_mlp(), recipe=recipe(checkpoint_every=1 + process_rank()), checkpoint="/nowhere/file.pt"),
        ValueError,
        r"^arguments: expected the same on every rank, got 'checkpoint_every' 2 on rank 1 and 1 on rank 0",
    ),
    "checkpoint-of-one": (
        lambda: start(trained_mlp(), checkpoint="/nowhere/file.pt" if process_rank() else None),
        ValueError,
        r"^arguments: expected the same on every rank, got 'checkpoint' True on rank 1 and False on rank 0",
    ),
    "journal-of-one": (
        lambda: search_of(trained_mlp(), journal="/nowhere/search.jsonl" if process_rank() else None),
        ValueError,
        r"^arguments: expected the same on every rank, got 'journal' True on rank 1 and False on rank 0",
    ),
    "fixed-paths": (
        lambda: start(trained_mlp(seed=process_rank()), space=None),
        ValueError,
        r"^arguments: .* got 'paths' ",
    ),
    "model": (
        lambda: start(trained_mlp(rank=2 + process_rank())),
        ValueError,
        r"^model: .* got 'fc1.Ad' torch.float32 torch.strided \(8, 3\) on rank 1",
    ),
    "one-empty": (
        lambda: start(trained_mlp(), TensorDataset(torch.ones(process_rank(), 6), torch.zeros(process_rank()).long())),
        (ValueError, RuntimeError),
        (r"^dataset: expected at least one sample", r"^rank 0 failed: ValueError: dataset: expected"),
    ),
    "data": (lambda: start(trained_mlp(), FailingData()), (RuntimeError, OSError), NO_IMAGE),
    "nan": (
        lambda: start(trained_mlp(), loss_fn=nan_on_one),
        ValueError,
        r"^loss: expected a finite value, got nan at step 0",
    ),
    "folder": (
        lambda: start(trained_mlp(), checkpoint="/nowhere/file.pt"),
        ValueError,
        "checkpoint: expected an existing folder, got /nowhere",
    ),
    "score": (
        lambda: evolve(LAYERS, SPACE, failing_score, settings=QUICK, progress=False),
        (RuntimeError, OSError),
        NO_IMAGE,
    ),
    "journal": (
        lambda: search_of(trained_mlp(), journal="/nowhere/search.jsonl"),
        ValueError,
        "journal: expected an existing folder, got /nowhere",
    ),
    "weights": (
        lambda: search_of(trained_mlp(seed=process_rank())),
        ValueError,
        r"^arguments: expected the same on every rank, got 'scored_by' ",
    ),
    "settings": (
        lambda: evolve(LAYERS, SPACE, additive, settings=SearchSettings(seed=process_rank()), progress=False),
        ValueError,
        r"^arguments: expected the same on every rank, got 'settings' ",
    ),
    "search-of-ddp": (lambda: search_of(default_ddp()), ValueError, "pass model.module"),
    "lycoris-of-fsdp": (
        lambda: glora.save_lycoris(sharded(trained_mlp()), "/nowhere/a.safetensors"),
        ValueError,
        "expected whole parameters",
    ),
    "official-of-fsdp": (
        lambda: glora.save_official(sharded(trained_mlp()), "/nowhere/a.pt"),
        ValueError,
        "expected whole parameters",
    ),
    "search-of-fsdp": (lambda: search_of(sharded(trained_mlp())), ValueError, "expected whole parameters"),
    "merge-of-fsdp": (lambda: glora.merge(sharded(trained_mlp())), ValueError, "expected whole parameters"),
    "file-of-fsdp": (
        lambda: glora.save_adapter(sharded(trained_mlp()), "/nowhere/adapter.safetensors"),
        ValueError,
        "expected whole parameters",
    ),
}


def all_read(wrap):
    """Under a fixed path that reads every tensor default DDP is right."""
    model = wrap(adapted_mlp())
    start(model, space=None)
    return tensors(model)


def agreement():
    return [
        _same_everywhere({"fc1": text}, torch.device("cpu"))
        for text in ("A", f"A{process_rank()}", f"A{1 - process_rank()}")
    ]


def refusals():
    def outcome(call):
        try:
            call()
        except Exception as error:
            return error

    return {name: outcome(call) for name, (call, *_) in REFUSED.items()}


def sharded_gradients():
    """What ``fully_shard`` itself does with tensors that were not read, and, if told to reduce them, what is done then:
    names of those with a gradient."""
    found = []
    for zeros in (False, True):
        model = sharded(trained_mlp())
        if zeros:  # newer than torch 2.11
            model.set_reduce_scatter_unused_params(zeros)
        glora.set_paths(model, PATHS[0])
        model(points().tensors[0]).sum().backward()
        found.append({name for name, p in model.named_parameters() if p.grad is not None})
    glora.drop_unread_gradients(model)
    return [*found, {name for name, p in model.named_parameters() if p.grad is not None}]


def gathered():
    """A sharded model's parameters in a whole one, as the guide says."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole, model = sharded(trained_mlp()), adapted_mlp()
    state = get_model_state_dict(whole, options=options)
    if process_rank() == 0:
        with pytest.warns(UserWarning, match="expected the paths of the support tensors too"):
            model.load_state_dict(state)
        glora.set_paths(model, glora.get_paths(whole))
        assert glora.get_paths(model) == glora.get_paths(trained_mlp())
    return tensors(model)


def save_everywhere(folder):
    """Every rank writes every kind of file to one path, again and again; returns how often that failed."""
    model, failed = trained_mlp(), 0
    glora.set_paths(model, dict.fromkeys(("fc1", "fc2"), PathConfig("lora_2", "lora_2")))
    matmul = trained_mlp(product="matmul")
    glora.set_paths(matmul, dict.fromkeys(("fc1", "fc2"), PathConfig("lora_2", "lora_2")))
    for _ in range(at(20, 60)):
        for save in (
            lambda: glora.save_adapter(model, folder / "own.safetensors"),
            lambda: glora.save_official(model, folder / "official.pt"),
            lambda: glora.save_lycoris(matmul, folder / "lycoris.safetensors", adapters_only=True),
            lambda: export_peft(model, folder / "peft"),
        ):
            try:
                save()
            except Exception:
                failed += 1
    return failed


@pytest.mark.filterwarnings("ignore:.*holds no paths")  # of load_official
def test_every_rank_may_save_to_one_path(tmp_path):
    """Of 120 saves 34 failed."""
    folder = tmp_path / "saved"
    folder.mkdir()
    assert on_ranks(2, tmp_path / "two", save_everywhere, folder) == [0, 0]
    names = ["lycoris.safetensors", "official.pt", "own.safetensors", "peft"]
    assert sorted(file.name for file in folder.iterdir()) == names
    for load, name in zip((glora.load_lycoris, glora.load_official, glora.load_adapter, import_peft), names):
        load(mlp(), folder / name)


def gradients_and_refusals():
    checks = gathered(), all_read(DistributedDataParallel), agreement()
    return accumulated(process_rank(), True), half_precision(), sharded_gradients(), *checks, refusals()


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("checked") / "two", gradients_and_refusals)


def test_averages_what_any_pass_read_and_nothing_else(checked):
    own = [accumulated(who, False) for who in (0, 1)]
    for gradients, *_ in checked:
        assert {name for name, gradient in gradients.items() if gradient is not None} == READ
        for name in READ:
            torch.testing.assert_close(gradients[name], (own[0][name] + own[1][name]) / 2, rtol=1e-6, atol=1e-7)


def test_averages_each_dtype_and_layout(checked):
    for _, gradients, *_ in checked:
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32, torch.bfloat16}
        for name, gradient in gradients.items():
            assert torch.equal(gradient, torch.full_like(gradient, 0.5 if name == "fc1.Ad" else 2.0))


def test_fully_shard_leaves_unread_gradients_none(checked):
    read = {"fc1.Ad", "fc1.Au", "fc1.E", "fc2.Bd", "head.weight", "head.bias"}
    everything = {name for name, p in trained_mlp().named_parameters() if p.requires_grad}
    assert [names for _, _, names, *_ in checked] == [[read, everything, read]] * 2


def test_a_sharded_model_is_gathered_into_a_whole_one(checked):
    assert same_bits(checked[0][3], tensors(trained_mlp()))


def test_default_ddp_is_taken_where_every_tensor_is_read(checked):
    expected = all_read(lambda model: model)
    for _, _, _, _, got, *_ in checked:
        assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-6


def test_ranks_notice_that_they_differ(checked):
    assert [found for *_, found, _ in checked] == [[True, False, False]] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(checked, name):
    _, expected, pattern = REFUSED[name]
    patterns = (pattern, pattern) if isinstance(pattern, str) else pattern
    for pattern, (*_, outcomes) in zip(patterns, checked):
        assert isinstance(outcomes[name], expected)
        assert re.search(pattern, str(outcomes[name])), str(outcomes[name])


# -- in one process, and by torchrun ---------------------------------------------------------------------


def test_one_process_is_left_alone():
    model = trained_mlp()
    model(points().tensors[0]).sum().backward()
    before = {name: p.grad for name, p in model.named_parameters()}
    bits = {name: gradient.clone() for name, gradient in before.items() if gradient is not None}
    sync_gradients(model)
    assert all(p.grad is before[name] for name, p in model.named_parameters())
    assert same_bits({name: before[name] for name in bits}, bits)


@pytest.mark.parametrize("call", [lambda: start(trained_mlp()), lambda: search_of(trained_mlp())])
def test_processes_of_torchrun_without_a_group_are_refused(call, monkeypatch):
    """Each would train the whole and write the same checkpoint."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^process group: expected torch.distributed.init_process_group\(\)"):
        call()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_a_partition(count, ranks, monkeypatch):
    monkeypatch.setattr("glora.distributed.world_size", lambda: ranks)
    taken = []
    for own in range(ranks):
        monkeypatch.setattr("glora.distributed.process_rank", lambda own=own: own)
        part, counted = share(count)
        assert counted in (count // ranks, -(-count // ranks))
        assert len(range(count)[part]) == max(counted, 1)
        taken += list(range(count)[part])[:counted]
    assert taken == list(range(count))


PROJECT = """
import atexit, contextlib, glob, os, time, torch, glora
from tests.glora.toys import adapted_mlp, points
from tests.glora.test_distributed import QUICK, RECIPE, SPACE
make_model, train_set, validation_set, recipe, space, settings = adapted_mlp, points(), points(), RECIPE, SPACE, QUICK

def threads():
    for file in glob.glob("/proc/self/task/*/comm"):
        with contextlib.suppress(OSError), open(file) as name:
            yield name.read()

@atexit.register
def tell_whether_the_group_has_ended():
    deadline = time.monotonic() + 5
    while any("gloo" in name for name in threads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    with open(f"left-{os.environ['RANK']}", "w") as file:  # what two ranks print may come interleaved
        file.write("".join(name for name in threads() if "gloo" in name))
"""


def test_the_script_of_the_guide(tmp_path):
    """docs/distributed.md, launched as it says, against one process."""
    [script] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train:   0%") == 1  # rank 0's bar alone
    left = {file.name: file.read_text() for file in tmp_path.glob("left-*")}
    assert left == {"left-0": "", "left-1": ""}  # threads of gloo, after destroy_process_group

    model = adapted_mlp()
    train(model, points(), RECIPE, space=SPACE, progress=False)
    best = search(model, SPACE, points(), limit=60, settings=QUICK, progress=False).best
    loaded = glora.load_adapter(mlp(), tmp_path / "adapter.safetensors")
    assert glora.get_paths(loaded) == best.paths
    for name, tensor in tensors(model).items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert sorted(file.name for file in tmp_path.glob("*.*")) == [
        *("adapter.safetensors", "project.py", "search.jsonl", "supernet.pt", "train.py")
    ]
