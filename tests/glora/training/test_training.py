"""Training: what moves, what does not, and that a run that was cut has the same bits as one that was not."""

import copy
import itertools
import math
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from glora import (
    PathConfig,
    Recipe,
    SearchSpace,
    evaluate,
    get_paths,
    glora_layers,
    inject,
    merge,
    set_paths,
    train,
    trainable_parameters,
)
from glora.training.batches import StepSampler, fingerprint
from glora.training.batches import batches as steps_of
from tests.glora.toys import (
    IN_FEATURES,
    adapted_mlp,
    generator,
    kill_while_writing,
    mlp,
    points,
    same_bits,
    seeded,
    state,
    tiny_vit,
    trained_mlp,
    unchanged,
)

SPACE = SearchSpace((2, 1))
RECIPE = Recipe(steps=12, batch_size=5, lr=0.05, weight_decay=0.1, warmup=0.25, seed=3, checkpoint_every=4)


class CutError(Exception):
    """The run ends here."""


def cut_at(last_step):
    def on_step(step, loss):
        if step == last_step:
            raise CutError

    return on_step


def run(model, recipe=RECIPE, dataset=None, **options):
    return train(model, dataset or points(), recipe, progress=False, **options)


def recipe(**changes):
    return Recipe(**{**vars(RECIPE), **changes})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoint.pt"


# -- the order of samples --------------------------------------------------------------------------


def batches(size=10, batch_size=3, seed=0, start=0, stop=20):
    return list(StepSampler(size, batch_size, seed, start, stop))


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (10, 5), (4, 7), (1, 3), (10, 10)])
def test_every_epoch_is_a_permutation(size, batch_size):
    row = [index for batch in batches(size, batch_size, stop=10 * size) for index in batch]
    epochs = [row[i : i + size] for i in range(0, len(row), size)]
    assert len(epochs) == 10 * batch_size
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 10, 19, 20])
def test_a_batch_depends_on_its_step_alone(start):
    assert batches(start=start) == batches()[start:]
    assert len(StepSampler(10, 3, 0, start, 20)) == 20 - start


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = batches(batch_size=10, stop=2)
    assert first != second
    assert batches(seed=0) != batches(seed=1)
    assert batches(seed=1) == batches(seed=1)


# -- what moves ------------------------------------------------------------------------------------


def test_a_supernet_learns():
    summary = run(adapted_mlp(), recipe(steps=150), space=SPACE)
    assert sum(summary.losses[-20:]) < 0.7 * sum(summary.losses[:20])


def test_a_compiled_model_learns_the_same():
    """There a gradient of what is not read is zero, with which an optimiser would move it by its weight decay."""
    model, compiled = trained_mlp(), trained_mlp()
    run(model, recipe(steps=4), space=SPACE)
    run(torch.compile(compiled, backend="eager"), recipe(steps=4), space=SPACE)
    for name, tensor in state(model).items():
        torch.testing.assert_close(state(compiled)[name], tensor, msg=name)


def test_a_compiled_model_that_is_trained_again_raises_no_warning():
    """A graph that was compiled before does not call hooks that are put on later."""
    model = torch.compile(trained_mlp(), backend="eager")
    for _ in range(2):
        run(model, recipe(steps=1), space=SPACE)


def test_layers_that_on_step_replaces_are_trained():
    model, paths = trained_mlp(), set()

    def on_step(step, loss):
        paths.add(model.fc1.path)
        model.fc1 = copy.deepcopy(model.fc1)

    run(model, recipe(steps=6), space=SPACE, on_step=on_step)
    assert len(paths) > 3
    with pytest.raises(ValueError, match="expected at least one adapted layer"):
        run(model, recipe(steps=3), space=SPACE, on_step=lambda *_: merge(model))


def test_summary_and_on_step_tell_every_step():
    seen = []
    summary = run(adapted_mlp(), space=SPACE, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(summary.losses, 1))
    assert (summary.steps, summary.resumed_from) == (12, 0)
    assert summary.images_per_second == pytest.approx(12 * 5 / summary.seconds)


def test_only_what_a_step_read_has_a_gradient_and_moves():
    model = adapted_mlp()
    before = state(model)
    layers = glora_layers(model)
    steps = []

    def check(step, loss):
        read = {id(p) for layer in layers.values() for p in layer.support_parameters(layer.path)}
        read |= {id(p) for p in model.head.parameters()}
        assert {id(p) for p in model.parameters() if p.grad is not None} == read
        moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved <= read
        before.update(state(model))
        steps.append((tuple(get_paths(model).values()), len(moved)))

    run(model, recipe(steps=30), space=SPACE, on_step=check)
    assert len({paths for paths, _ in steps}) == 30
    assert sum(moved for _, moved in steps) > 30


def test_what_is_never_read_keeps_its_bits_and_has_no_optimizer_state(file):
    model = trained_mlp()
    before = state(model)
    narrow = SearchSpace((2,), A=("none",), B=("vector",), C=("none",), D=("none",), E=("constant",))
    run(model, space=narrow, checkpoint=file)
    trained = {"fc1.Bd", "fc1.E", "fc2.Bd", "fc2.E", "head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for p in trainable_parameters(model)]
    with_moments = torch.load(file, weights_only=True)["optimizer"]["state"]
    assert {order[index] for index in with_moments} == trained


def test_the_base_keeps_its_bits():
    model = adapted_mlp()
    run(model, space=SPACE)
    base = {name: tensor for name, tensor in state(model).items() if name in state(mlp()) and "head" not in name}
    assert same_bits(base, {name: state(mlp())[name] for name in base})


def test_paths_are_as_before_afterwards():
    model = trained_mlp()
    paths = get_paths(model)
    run(model, space=SPACE)
    assert get_paths(model) == paths


def test_paths_are_as_before_after_an_error():
    model = trained_mlp()
    paths = get_paths(model)
    with pytest.raises(CutError):
        run(model, space=SPACE, on_step=cut_at(2))
    assert get_paths(model) == paths


def test_a_step_that_reads_nothing_is_no_error():
    model = inject(nn.Sequential(nn.Linear(IN_FEATURES, 3)), 2)
    nothing = dict.fromkeys("ABCDE", ("none",))
    with unchanged(model.train()):
        assert len(run(model, space=SearchSpace((2,), **nothing)).losses) == 12


def test_a_fixed_path_trains_without_a_space():
    model = adapted_mlp()
    set_paths(model, {name: PathConfig(E="vector") for name in ("fc1", "fc2")})
    before = state(model)
    run(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"fc1.E", "fc2.E", "head.weight", "head.bias"}


def test_a_plain_model_trains():
    model = mlp()
    summary = run(model, recipe(steps=150))
    assert summary.losses[-1] < 0.5 * summary.losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_any_loss_will_do():
    x = torch.randn(20, IN_FEATURES, generator=generator())
    summary = run(adapted_mlp(), recipe(steps=150), TensorDataset(x, x[:, :3]), space=SPACE, loss_fn=F.mse_loss)
    assert sum(summary.losses[-20:]) < 0.7 * sum(summary.losses[:20])


def test_learning_rate_warms_up_and_falls_as_a_cosine(file):
    rates = []

    def read(step, loss):
        rates.append(torch.load(file, weights_only=True)["optimizer"]["param_groups"][0]["lr"])

    run(adapted_mlp(), recipe(checkpoint_every=1), space=SPACE, checkpoint=file, on_step=read)
    warm = [0.05 * (1 / 4 + t / 4) for t in range(3)]
    fall = [0.05 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(3, 12)]
    assert rates == pytest.approx(warm + fall)


@pytest.mark.parametrize("clip_norm", [1e-3, None])
def test_gradients_are_clipped_only_if_asked(clip_norm):
    model, norms = adapted_mlp(), []

    def measure(step, loss):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))

    run(model, recipe(clip_norm=clip_norm), space=SPACE, on_step=measure)
    assert (max(norms) <= 1.0001e-3) == (clip_norm is not None)


def test_the_bar_shows_loss_accuracy_and_speed(capfd):
    train(adapted_mlp(), points(), recipe(steps=3), space=SPACE)
    last = capfd.readouterr().err.splitlines()[-1]
    assert all(word in last for word in ("train: 100%", "3/3", "loss ", "accuracy ", "samples/s"))


def test_without_progress_nothing_is_printed(capfd):
    run(adapted_mlp(), space=SPACE)
    assert capfd.readouterr() == ("", "")


# -- epochs, precision, smoothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "samples", "batch_size", "steps"), [(500, 800, 64, 6250), (1, 3, 64, 1), (3, 10, 4, 8)]
)
def test_epochs_as_steps(epochs, samples, batch_size, steps):
    made = Recipe.for_epochs(epochs, samples, batch_size, warmup_epochs=epochs / 10, lr=0.3)
    assert (made.steps, made.batch_size, made.warmup, made.lr) == (steps, batch_size, pytest.approx(0.1), 0.3)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 8, 4), "epochs"), ((1, 0, 4), "samples"), ((1, 8, 0), "batch_size")]
)
def test_refuses_epochs(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected a number above 0, got 0"):
        Recipe.for_epochs(*arguments)
    with pytest.raises(ValueError, match="warmup_epochs: expected a number from 0 and below epochs=2, got 2"):
        Recipe.for_epochs(2, 8, 4, warmup_epochs=2)


def test_first_peak_and_last_learning_rate(tmp_path):
    """As timm's CosineLRScheduler has it: ``lr_min + (lr - lr_min) (1 + cos(pi t / T)) / 2`` after the warm-up."""
    log = tmp_path / "log.csv"
    run(adapted_mlp(), recipe(steps=20, lr=0.05, warmup=0.2, warmup_lr=0.001, min_lr=0.01), space=SPACE, log=log)
    rates = [float(row.split(",")[2]) for row in log.read_text().splitlines()[1:]]
    expected = [0.001 + t * (0.05 - 0.001) / 4 for t in range(4)]
    expected += [0.01 + 0.04 * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(4, 20)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_is_that_of_the_cross_entropy():
    def smoothed(output, target):
        return F.cross_entropy(output, target, label_smoothing=0.2)

    expected = run(adapted_mlp(), loss_fn=smoothed, space=SPACE)
    assert run(adapted_mlp(), recipe(label_smoothing=0.2), space=SPACE).losses == expected.losses
    assert run(adapted_mlp(), space=SPACE).losses != expected.losses
    with pytest.raises(ValueError, match=r"loss_fn: expected the default with label_smoothing=0\.2"):
        run(adapted_mlp(), recipe(label_smoothing=0.2), loss_fn=smoothed)


def test_autocast_of_forward_and_loss():
    model, seen = adapted_mlp(), []
    model.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    summary = run(model, recipe(amp="bfloat16"), space=SPACE)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert summary.losses == pytest.approx(run(adapted_mlp(), space=SPACE).losses, rel=0.05)


def test_float16_needs_a_gpu():
    with pytest.raises(ValueError, match="amp: expected 'bfloat16' or None on a CPU, got 'float16'"):
        run(adapted_mlp(), recipe(amp="float16"), space=SPACE)


# -- random numbers of a sample ------------------------------------------------------------------------


class Drawing(Dataset):
    """Samples drawn from all three global generators."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([index, *drawn], dtype=torch.float64), 0


def read(start=0, workers=0, seed=3, steps=9):
    found = list(steps_of(Drawing(), Recipe(steps, batch_size=4, seed=seed), start, workers))
    return torch.stack([x for x, _ in found])


def test_draws_depend_on_the_seed_and_the_step_alone():
    all_steps = read()
    for workers in (0, 1, 2):
        assert torch.equal(read(workers=workers), all_steps)
        assert torch.equal(read(start=5, workers=workers), all_steps[5:])
    drawn = all_steps.flatten(0, 1)[:, 1:]
    assert len(drawn.flatten().unique()) == drawn.numel()  # a sample read twice is drawn twice
    assert not torch.equal(read(seed=4), all_steps)


def test_reading_leaves_the_global_generators_alone():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw(), draw()
    seed()
    first = draw()
    read()
    assert (first, draw()) == expected


@pytest.mark.parametrize("workers", [-1, 1.5, True])
def test_refuses_workers(workers):
    with pytest.raises(ValueError, match="workers: expected an integer from 0"):
        run(adapted_mlp(), workers=workers)


# -- the log -------------------------------------------------------------------------------------------


def test_the_log_tells_every_step(tmp_path):
    log = tmp_path / "log.csv"
    summary = run(adapted_mlp(), space=SPACE, log=log)
    header, *rows = [line.split(",") for line in log.read_text().splitlines()]
    assert header == ["step", "epoch", "lr", "loss", "accuracy"]
    assert [int(row[0]) for row in rows] == list(range(1, 13))
    assert [float(row[1]) for row in rows] == pytest.approx([5 * t / len(points()) for t in range(1, 13)], abs=1e-4)
    assert [float(row[3]) for row in rows] == pytest.approx(summary.losses, rel=1e-5)
    assert all(0 <= float(row[4]) <= 1 for row in rows)


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_the_log_of_a_run_that_was_cut_is_that_of_an_uncut_one(file, tmp_path, step):
    logs = tmp_path / "uncut.csv", tmp_path / "cut.csv"
    start("supernet", log=logs[0])
    start_and_cut("supernet", step, checkpoint=file, log=logs[1])
    assert logs[1].exists() == (step >= 4)
    start("supernet", checkpoint=file, log=logs[1])
    assert logs[1].read_bytes() == logs[0].read_bytes()


def test_no_accuracy_where_there_are_no_classes(tmp_path):
    x, target = points().tensors
    dataset = TensorDataset(x, torch.nn.functional.one_hot(target, 3).float())
    run(adapted_mlp(), dataset=dataset, loss_fn=F.mse_loss, log=tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text().splitlines()[1].endswith(",")


def test_refuses_a_folder_for_a_log_or_a_checkpoint(tmp_path):
    for name in ("log", "checkpoint"):
        with pytest.raises(ValueError, match=rf"^{name}: expected a file, got the folder "):
            run(adapted_mlp(), **{name: tmp_path}, on_step=lambda *_: pytest.fail("trained"))


def test_refuses_a_log_in_no_folder(tmp_path):
    with pytest.raises(ValueError, match="log: expected an existing folder"):
        run(adapted_mlp(), log=tmp_path / "nowhere" / "log.csv")


def test_seconds_add_up_over_cuts(file):
    start_and_cut("supernet", 9, checkpoint=file)
    resumed, _ = start("supernet", checkpoint=file)
    assert resumed.total_seconds > resumed.seconds > 0


# -- a run that was cut --------------------------------------------------------------------------------


class Pairs(Dataset):
    """Single samples, noisy from torch's generator, which a loader has to collate."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x, target = points()[index]
        return x + 0.1 * torch.randn(IN_FEATURES), int(target)


def normed():
    """A plain model with running statistics and a counter."""
    return nn.Sequential(nn.BatchNorm1d(IN_FEATURES), mlp(dropout=0.2))


HALF = TensorDataset(points().tensors[0].bfloat16(), points().tensors[1])
RUNS = {
    "supernet": lambda **o: (adapted_mlp(dropout=0.3), {"space": SPACE, **o}),
    "matmul": lambda **o: (adapted_mlp(dropout=0.3, product="matmul"), {"space": SPACE, **o}),
    "half": lambda **o: (adapted_mlp(dropout=0.3, dtype=torch.bfloat16), {"space": SPACE, "dataset": HALF, **o}),
    "fixed-path": lambda **o: (trained_mlp(dropout=0.3), o),
    "plain": lambda **o: (mlp(dropout=0.3), o),
    "buffers": lambda **o: (normed(), o),
    "collated": lambda **o: (adapted_mlp(dropout=0.3), {"space": SPACE, "dataset": Pairs(), **o}),
    "workers": lambda **o: (adapted_mlp(dropout=0.3), {"space": SPACE, "dataset": Pairs(), "workers": 2, **o}),
    "amp": lambda **o: (adapted_mlp(dropout=0.3), {"space": SPACE, "recipe": recipe(amp="bfloat16"), **o}),
}


def start(kind, **options):
    """A new model and a run of it: ``(summary, bits)``."""
    model, arguments = RUNS[kind](**options)
    return run(model, **arguments), state(model)


def start_and_cut(kind, step, **options):
    with pytest.raises(CutError):
        start(kind, on_step=cut_at(step), **options)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("step", [1, 4, 7, 8, 11, 12])
def test_resumed_run_has_the_bits_of_an_uncut_one(kind, step, file):
    uncut, bits = start(kind)
    start_and_cut(kind, step, checkpoint=file)
    torch.manual_seed(99)  # whatever happens in between
    resumed, resumed_bits = start(kind, checkpoint=file)
    assert resumed.resumed_from == (step if step == 12 else step // 4 * 4)
    assert resumed.losses == uncut.losses
    assert same_bits(resumed_bits, bits)


def test_a_run_cut_again_and_again(file):
    uncut, bits = start("supernet")
    for step in (2, 5, 6, 9, 10):
        start_and_cut("supernet", step, checkpoint=file)
    resumed, resumed_bits = start("supernet", checkpoint=file)
    assert resumed.losses == uncut.losses
    assert same_bits(resumed_bits, bits)


def test_a_resumed_vit(file):
    dataset = TensorDataset(torch.randn(8, 1, 8, 8, generator=generator()), torch.arange(8) % 3)

    def start_vit(**options):
        with seeded():
            model = inject(tiny_vit(), 2)
        run(model, dataset=dataset, space=SPACE, **options)
        return state(model)

    bits = start_vit()
    with pytest.raises(CutError):
        start_vit(checkpoint=file, on_step=cut_at(6))
    assert same_bits(start_vit(checkpoint=file), bits)


def test_evaluating_meanwhile_changes_nothing(file):
    uncut, bits = start("supernet")
    model = adapted_mlp(dropout=0.3)

    def watch(step, loss):
        evaluate(model, points())
        model.train()
        cut_at(6)(step, loss)

    with pytest.raises(CutError):
        run(model, space=SPACE, checkpoint=file, on_step=watch)
    resumed, resumed_bits = start("supernet", checkpoint=file)
    assert resumed.losses == uncut.losses
    assert same_bits(resumed_bits, bits)


def test_steps_between_checkpoints_may_change(file):
    uncut, bits = start("supernet")
    start_and_cut("supernet", 5, checkpoint=file, recipe=recipe(checkpoint_every=5))
    resumed, resumed_bits = start("supernet", checkpoint=file, recipe=recipe(checkpoint_every=1))
    assert (resumed.resumed_from, resumed.losses) == (5, uncut.losses)
    assert same_bits(resumed_bits, bits)


def test_a_finished_run_is_only_loaded(file):
    first, bits = start("supernet", checkpoint=file)
    again, again_bits = start("supernet", checkpoint=file, on_step=lambda step, loss: pytest.fail("trained"))
    assert (again.steps, again.resumed_from, again.losses) == (12, 12, first.losses)
    assert same_bits(again_bits, bits)


def test_same_seed_same_bits_another_seed_others():
    assert same_bits(start("supernet")[1], start("supernet")[1])
    assert not same_bits(start("supernet")[1], start("supernet", recipe=recipe(seed=4))[1])


# -- killed ----------------------------------------------------------------------------------------

LONG = recipe(steps=300, checkpoint_every=1)


def train_long(file=None):
    torch.set_num_threads(1)
    model = adapted_mlp(dropout=0.3)
    return run(model, LONG, space=SPACE, checkpoint=file), state(model)


def test_killed_while_it_writes_checkpoints(file):
    moments, steps = random.Random(0), []
    for _ in range(10):
        assert kill_while_writing(file, moments.uniform(0, 0.03), train_long, file) == -signal.SIGKILL
        steps.append(torch.load(file, weights_only=True)["step"])
    assert steps == sorted(set(steps))
    resumed, resumed_bits = train_long(file)
    uncut, bits = train_long()
    assert resumed.losses == uncut.losses
    assert same_bits(resumed_bits, bits)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": recipe(lr=0.01)}, r"another run: recipe lr: 0\.05 in the checkpoint, 0\.01 now; go on as it was"),
        ({"recipe": recipe(steps=13)}, "checkpoint of another run"),
        ({"recipe": recipe(seed=4)}, "checkpoint of another run"),
        ({"space": SearchSpace((2,))}, "checkpoint of another run"),
        ({"space": None}, "checkpoint of another run"),
    ],
    ids=["lr", "steps", "seed", "space", "no-space"],
)
def test_refuses_a_checkpoint_of_another_run(file, options, message):
    start("supernet", checkpoint=file)
    model = adapted_mlp().eval()
    with unchanged(model), pytest.raises(ValueError, match=message):
        run(model, **{"space": SPACE, "checkpoint": file, **options})


def test_the_message_says_what_differs_and_no_more(file):
    """Of a ViT-tiny it had 9,940 characters."""

    def vit(lr=0.05, path=PathConfig()):
        with seeded():
            model = inject(tiny_vit(), 2)
        set_paths(model, dict.fromkeys(get_paths(model), path))
        data = TensorDataset(torch.randn(8, 1, 8, 8, generator=generator()), torch.arange(8) % 3)
        run(model, dataset=data, recipe=recipe(lr=lr, steps=2), checkpoint=file)

    vit()
    with pytest.raises(
        ValueError, match=r"another run: recipe lr: 0\.05 in the checkpoint, 0\.01 now; go on"
    ) as raised:
        vit(lr=0.01)
    assert len(str(raised.value)) < 150 + len(str(file))
    with pytest.raises(ValueError, match=r"another run: paths blocks\.0\.attn\.qkv A: .* and 8 more; go on") as raised:
        vit(path=PathConfig(A="vector", E="vector"))
    assert len(str(raised.value)) < 1000


def square(product):
    with seeded():
        return inject(nn.Sequential(nn.Linear(IN_FEATURES, IN_FEATURES)), 2, product=product)


@pytest.mark.parametrize("products", [("hadamard", "matmul"), ("matmul", "hadamard")])
def test_refuses_a_checkpoint_of_the_other_product(file, products):
    """Of square layers, whose tensors have the same shapes in both."""
    run(square(products[0]), checkpoint=file)
    model = square(products[1])
    with (
        unchanged(model),
        pytest.raises(ValueError, match=rf"run: products 0: '{products[0]}' in the checkpoint, '{products[1]}' now"),
    ):
        run(model, checkpoint=file)


class Shifted(Pairs):
    def __getitem__(self, index):
        x, target = super().__getitem__(index)
        return x + 1, target


class Reader(Pairs):
    """Whose samples are what a function of the index says."""

    def __init__(self, read):
        self.read = read

    def __getitem__(self, index):
        return self.read(index)


OTHER = TensorDataset(points().tensors[0] + 1, points().tensors[1])
RELABELLED = TensorDataset(points().tensors[0], points().tensors[1].flip(0))


@pytest.mark.parametrize(
    ("first", "second"),
    [(points(), OTHER), (points(), RELABELLED), (Pairs(), Shifted()), (points(), Pairs())],
    ids=["inputs", "targets", "collated", "another kind"],
)
def test_refuses_a_checkpoint_of_other_data_of_equal_length(file, first, second):
    run(adapted_mlp(), dataset=first, checkpoint=file)
    model = adapted_mlp()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"checkpoint of another run: data set: \d+ in the checkpoint"),
    ):
        run(model, dataset=second, checkpoint=file)


def test_what_tells_data_from_others():
    base = fingerprint(points())
    assert base == fingerprint(points()) is not None
    samples = (
        lambda i: (torch.full((2,), float(i)), i),
        lambda i: (torch.full((2,), float(i)), i + 1),
        lambda i: (torch.full((2,), float(i)).double(), i),
        lambda i: {"pixels": torch.full((2,), float(i)), "labels": i},
        lambda i: {"pixels": np.full(2, float(i)), "labels": np.int64(i)},
        lambda i: (torch.rand(2), i),
        lambda i: (random.random(), np.random.rand(), "text", None, b"bytes", [True]),
    )
    found = [fingerprint(Reader(read)) for read in samples]
    assert None not in found
    assert len({base, *found}) == len(samples) + 1


def test_data_in_memory_is_the_same_data():
    """Whether images fit into memory depends on the machine."""
    x, targets = points().tensors
    assert fingerprint(Reader(lambda i: (x[i], int(targets[i])))) == fingerprint(points())
    assert fingerprint(Reader(lambda i: [x[i].numpy(), np.int64(targets[i])])) == fingerprint(points())


own = itertools.count()


def broken(index):
    raise OSError("no such image")


@pytest.mark.parametrize("read", [lambda i: (next(own), i), lambda i: (object(), i), broken])
def test_data_of_which_nothing_can_be_told(read):
    assert fingerprint(Reader(read)) is None


def test_data_of_which_nothing_can_be_told_goes_on(file):
    def noisy(seed):
        draws = generator(seed)
        return Reader(lambda i: (torch.rand(IN_FEATURES, generator=draws), i % 3))

    run(adapted_mlp(), dataset=noisy(0), checkpoint=file)
    run(adapted_mlp(), dataset=noisy(1), checkpoint=file)
    run(adapted_mlp(), dataset=Pairs(), checkpoint=file)


def test_telling_the_data_leaves_the_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert fingerprint(Reader(lambda i: (random.random(), np.random.rand(), torch.rand(2)))) is not None
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_one_line_says_from_where(file, capfd):
    start_and_cut("supernet", 5, checkpoint=file)
    assert "goes on" not in capfd.readouterr().err
    model, arguments = RUNS["supernet"](checkpoint=file)
    train(model, points(), RECIPE, **{**arguments, "progress": True})
    assert f"train: continues from {file}, step 4 of 12\n" in capfd.readouterr().err


def test_a_checkpoint_of_format_2_goes_on(file):
    """Which says nothing of products and data."""
    uncut, bits = start("supernet")
    start_and_cut("supernet", 5, checkpoint=file)
    state = torch.load(file, weights_only=True)
    del state["identity"]["products"], state["identity"]["data"]
    torch.save({**state, "format": 2}, file)
    resumed, resumed_bits = start("supernet", checkpoint=file)
    assert (resumed.resumed_from, resumed.losses) == (4, uncut.losses)
    assert same_bits(resumed_bits, bits)


def test_refuses_a_checkpoint_of_another_fixed_path(file):
    start("fixed-path", checkpoint=file)
    model = trained_mlp(dropout=0.3)
    set_paths(model, {name: PathConfig() for name in get_paths(model)})
    with unchanged(model), pytest.raises(ValueError, match="checkpoint of another run"):
        run(model, checkpoint=file)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: adapted_mlp(rank=3), r"differ \['fc1.Ad: \(8, 3\) in the model, \(8, 2\) in the file', .*'fc2.Cu"),
        (lambda: inject(mlp(), 2, targets=["fc1"]), r"unknown tensors \['fc2.Ad', .*'fc2.E'\]"),
        (lambda: inject(nn.Sequential(mlp()), 2), r"missing tensors \['0.fc1.Ad', .*unknown tensors .*'head.weight'\]"),
    ],
    ids=["rank", "layers", "names"],
)
def test_refuses_a_checkpoint_of_another_model(file, model, names):
    start("supernet", checkpoint=file)
    model = model().eval()
    with unchanged(model), pytest.raises(ValueError, match=rf"another model: .*{names}"):
        run(model, space=SPACE, checkpoint=file)


def assert_damaged(file):
    model = adapted_mlp().eval()
    with unchanged(model), pytest.raises(ValueError, match="expected a training checkpoint, it is damaged"):
        run(model, space=SPACE, checkpoint=file)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_refuses_a_truncated_checkpoint(file, share):
    start("supernet", checkpoint=file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert_damaged(file)


def test_refuses_random_bytes(file):
    file.write_bytes(bytes(torch.randint(256, (5000,), generator=generator()).tolist()))
    assert_damaged(file)


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(2)], ids=["dict", "list", "tensor"])
def test_refuses_another_torch_file(file, content):
    torch.save(content, file)
    assert_damaged(file)


def test_refuses_another_format(file):
    torch.save({"format": 5}, file)
    model = adapted_mlp()
    with unchanged(model), pytest.raises(ValueError, match="expected checkpoint format 2 to 4, got 5"):
        run(model, space=SPACE, checkpoint=file)


def test_refuses_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match=r"^model: expected parameters that require grad, found none"):
        run(mlp().requires_grad_(False))


def test_refuses_an_empty_data_set():
    empty = TensorDataset(torch.zeros(0, IN_FEATURES), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^dataset: expected at least one sample, got none"):
        train(mlp(), empty, RECIPE, progress=False)


def test_refuses_a_space_above_the_storage():
    model = adapted_mlp(rank=2).eval()
    with unchanged(model), pytest.raises(ValueError, match=r"^space: expected ranks up to 2"):
        run(model, space=SearchSpace((4,)))


def test_refuses_a_space_for_a_plain_model():
    with pytest.raises(ValueError, match="at least one adapted layer, found none"):
        run(mlp(), space=SPACE)


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
    """A gradient that is not finite reaches the parameters before the loss: that state is not saved."""
    file = tmp_path / "run.pt"
    model = adapted_mlp()
    saved = []

    def loss_fn(output, target):
        factor = math.inf if len(saved) == 2 else 1.0
        return ((output * factor).tanh() / factor if factor > 1 else output).square().mean()

    with pytest.raises(ValueError, match=r"^parameters: expected finite values, not so at step 3"):
        run(
            model,
            recipe=Recipe(steps=4, batch_size=4, checkpoint_every=1),
            space=None,
            loss_fn=loss_fn,
            checkpoint=file,
            on_step=lambda *_: saved.append(file.read_bytes()),
        )
    assert len(saved) == 2
    assert file.read_bytes() == saved[-1]


def test_checkpoint_folder_has_to_exist(tmp_path):
    with pytest.raises(ValueError, match=r"^checkpoint: expected an existing folder, got .*nowhere"):
        run(adapted_mlp(), checkpoint=tmp_path / "nowhere" / "run.pt")


def test_stops_at_a_loss_that_is_not_finite():
    x, target = points().tensors
    model = adapted_mlp()
    paths, before = get_paths(model), state(model)
    with pytest.raises(ValueError, match=r"^loss: expected a finite value, got nan at step 0; try a smaller lr"):
        run(model, dataset=TensorDataset(x * math.nan, target), space=SPACE)
    assert get_paths(model) == paths
    assert same_bits(state(model), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", 0),
        ("batch_size", "32"),
        ("checkpoint_every", 0),
        ("lr", 0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("weight_decay", -1e-4),
        ("weight_decay", math.nan),
        ("clip_norm", 0),
        ("clip_norm", math.nan),
        ("warmup", 1),
        ("warmup", -0.1),
        ("warmup_lr", 0.1),
        ("warmup_lr", -0.1),
        ("min_lr", 0.1),
        ("min_lr", -0.1),
        ("label_smoothing", 1),
        ("label_smoothing", -0.1),
        ("amp", "float8"),
    ],
)
def test_refuses_a_recipe(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Recipe(**{name: value})


def test_a_buffer_may_be_infinite(file):
    """Attention masks are."""
    model = adapted_mlp()
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    assert run(model, checkpoint=file).steps == RECIPE.steps


def test_checkpoint_of_another_backbone_is_refused(file):
    run(adapted_mlp(), checkpoint=file)
    other = adapted_mlp()
    with torch.no_grad():
        other.fc1.weight.add_(1)
    with unchanged(other), pytest.raises(ValueError, match="checkpoint of another run"):
        run(other, checkpoint=file)


def test_a_refused_checkpoint_does_not_reseed_torch(file):
    run(adapted_mlp(), checkpoint=file)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="checkpoint of another run"):
        run(adapted_mlp(), recipe=recipe(seed=99), checkpoint=file)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_are_read_and_not_called_are_named():
    """Where the source does not tell: what it does tell of, inject leaves alone."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = torch.nn.Linear(2, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            read = self.read
            return torch.nn.functional.linear(self.called(x), read.weight)

    model = inject(Reader(), 2)
    data = TensorDataset(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))
    with pytest.warns(UserWarning, match=r"did not run in the first step: \['read'\]"):
        run(model, dataset=data)
