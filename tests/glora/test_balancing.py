"""Balance: measured steps are those of a real optimiser, and nothing else of the model changes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import glora
from glora import PathConfig, Recipe, Scales, SearchSpace
from glora.config import KINDS
from tests.glora.toys import adapted_mlp, on_ranks, points, same_bits, seeded, state, tiny_vit, trained_mlp, unchanged

LR = 1e-2
ALL_KINDS = [(slot, kind) for slot, kinds in KINDS.items() for kind in kinds if kind != "none"]


def net(product="hadamard"):
    with seeded():
        model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(inplace=True), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5))
        model.insert(0, nn.Identity())
        return glora.inject(model, 4, heads=("5",), product=product)


def batch(width=48, count=64):
    with seeded(1):
        return torch.randn(count, width), torch.randint(5, (count,))


def change_of_a_real_step(model, kind, x, y):
    """By layer: the relative change of its output by one AdamW step of all layers under this kind alone."""
    model = copy.deepcopy(model)
    slot, name = kind
    glora.set_paths(model, PathConfig(**{slot: "lora_4" if name == "lora" else name}))
    layers, seen = glora.glora_layers(model), {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, own=own: seen.__setitem__(own, (args[0].clone(), out.clone())))
        for own, layer in layers.items()
    ]
    optimizer = torch.optim.AdamW(glora.trainable_parameters(model), lr=LR, weight_decay=0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return {own: float((layers[own](i) - o).norm() / o.norm()) for own, (i, o) in seen.items()}


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("kind", ALL_KINDS, ids=" ".join)
def test_it_measures_what_an_optimiser_does(product, kind):
    model, (x, y) = net(product), batch()
    expected = change_of_a_real_step(model, kind, x, y)
    found = glora.balance(model, (x, y), lr=LR).changes
    for name, own in found.items():
        assert math.isclose(own[kind], expected[name], rel_tol=2e-2), (name, own[kind], expected[name])


@pytest.mark.parametrize("kind", ALL_KINDS, ids=" ".join)
def test_afterwards_every_kind_moves_outputs_by_the_target(kind):
    model, (x, y) = net(), batch()
    glora.balance(model, (x, y), target=0.02, lr=LR)
    for change in change_of_a_real_step(model, kind, x, y).values():
        assert 0.02 / 1.5 < change < 0.02 * 1.5  # scales are powers of two


def test_scales_are_powers_of_two_and_capped():
    report = glora.balance(net(), batch(), target=1e-9)
    factors = [factor for scales in report.scales.values() for factor in scales.factors.values()]
    assert set(factors) == {2.0**-10}
    report = glora.balance(net(), batch(), target=1e9)
    assert {factor for scales in report.scales.values() for factor in scales.factors.values()} == {2.0**5}


def test_only_scales_change():
    model = glora.inject(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)), 2, heads=()
    )
    model.train()
    generator = torch.get_rng_state()
    with unchanged(model):
        glora.balance(model, (torch.randn(9, 6), torch.randint(4, (9,))))
        after = torch.get_rng_state()
    assert all(p.grad is None for p in model.parameters()) and len(generator) == len(after)
    x = torch.randn(5, 6)
    plain = copy.deepcopy(model.eval())
    for layer in glora.glora_layers(plain).values():
        layer.scales = Scales()
    assert torch.equal(model(x), plain(x))  # everything is zero still


def test_a_vision_transformer_and_its_table():
    model = glora.inject(tiny_vit(), 2)
    report = glora.balance(
        model, (torch.randn(8, 1, 8, 8), torch.randint(3, (8,))), space=SearchSpace((2,), B=("vector",))
    )
    assert len(report.scales) == len(glora.glora_layers(model)) == 8
    assert ("B", "lora") not in report.changes["blocks.0.attn.qkv"]
    table = str(report)
    assert table.splitlines()[0].split() == ["kind", "one", "step", "before", "after", "scales"]
    assert len(table.splitlines()) == 1 + 10


def test_a_convolution():
    with seeded():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 4))
    glora.inject(model, 2, convolutions=True, heads=("3",))
    report = glora.balance(model, (torch.randn(8, 3, 6, 6), torch.randint(4, (8,))))
    assert all(change > 0 for change in report.changes["0"].values())


def test_a_layer_without_a_bias_and_one_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.fc(torch.tanh(self.fc(x))))

    model = glora.inject(Twice(), 2, heads=("out",))
    report = glora.balance(model, (torch.randn(9, 6), torch.randint(3, (9,))))
    assert report.changes["fc"]["D", "vector"] == 0 and report.scales["fc"].of("D", "vector") == 1
    assert report.changes["fc"]["B", "lora"] > 0


def test_half_precision():
    exact, half = glora.inject(net_plain(), 4, heads=("4",)), glora.inject(net_plain().bfloat16(), 4, heads=("4",))
    half.load_state_dict(exact.state_dict())
    x, y = batch()
    one = glora.balance(exact, (x, y)).changes
    other = glora.balance(half, (x.bfloat16(), y)).changes
    for name, own in one.items():
        for kind, change in own.items():
            assert math.isclose(change, other[name][kind], rel_tol=0.25), (name, kind)


def net_plain():
    with seeded():
        return nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5))


def test_a_compiled_model():
    model = adapted_mlp()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    compiled(points().tensors[0])
    assert glora.balance(compiled, points()[:]).scales == glora.balance(twin, points()[:]).scales


def test_dictionaries_and_a_loss_of_ones_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, values):
            return self.fc(values)

    model = glora.inject(Named(), 2, heads=())
    x, y = points()[:]
    glora.balance(model, {"values": x, "labels": y})
    first = model.fc.scales
    glora.balance(model, (x, F.one_hot(y).float()), lambda output, target: (output - target).square().mean())
    assert first.factors and model.fc.scales.factors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": 0}, ValueError, "target: expected a number above 0, got 0"),
        ({"lr": float("nan")}, ValueError, "lr: expected a number above 0, got nan"),
        ({"space": "all"}, TypeError, "space: expected a glora.SearchSpace or None, got str"),
        ({"batch": torch.zeros(3, 6)}, TypeError, "batch: expected"),
        ({"model": trained_mlp()}, ValueError, "model: expected one that is not trained yet"),
        ({"model": nn.Linear(6, 3)}, ValueError, "at least one adapted layer"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"model": adapted_mlp(), "batch": points()[:], **change}
    with pytest.raises(error, match=message):
        glora.balance(arguments.pop("model"), arguments.pop("batch"), **arguments)


def test_a_layer_that_the_loss_does_not_reach():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x)

    model = glora.inject(Aside(), 2, heads=())
    with pytest.raises(ValueError, match=r"which it does not on 'idle'; leave them out"):
        glora.balance(model, points()[:])


# -- in training -------------------------------------------------------------------------------------

SPACE = SearchSpace((2, 1))
RECIPE = Recipe(steps=9, batch_size=5, lr=0.02, seed=3, checkpoint_every=4, balance=0.01)


class CutError(Exception):
    """The run ends here."""


def test_training_measures_before_its_first_step():
    model, twin = adapted_mlp(), adapted_mlp()
    glora.train(model, points(), RECIPE, space=SPACE, progress=False)
    first = next(iter(glora.training.batches.batches(points(), RECIPE, 0)))
    expected = glora.balance(twin, first, target=0.01, space=SPACE).scales
    assert {name: layer.scales for name, layer in glora.glora_layers(model).items()} == expected
    ordinary = Recipe(**{**vars(RECIPE), "balance": None})
    glora.train(twin, points(), ordinary, space=SPACE, progress=False)  # with the scales that were set by hand
    assert same_bits(state(model), state(twin))


def test_a_run_that_was_cut_has_the_same_bits(tmp_path):
    whole, cut, file = adapted_mlp(), adapted_mlp(), tmp_path / "c.pt"
    summary = glora.train(whole, points(), RECIPE, space=SPACE, progress=False)

    def stop(step, loss):
        if step == 6:
            raise CutError

    with pytest.raises(CutError):
        glora.train(cut, points(), RECIPE, space=SPACE, progress=False, checkpoint=file, on_step=stop)
    again = adapted_mlp()
    resumed = glora.train(again, points(), RECIPE, space=SPACE, progress=False, checkpoint=file)
    assert resumed.resumed_from == 4 and resumed.losses == summary.losses
    assert same_bits(state(again), state(whole)) and again.fc1.scales == whole.fc1.scales != Scales()


def test_a_checkpoint_of_other_scales_brings_its_own(tmp_path):
    recipe, file = Recipe(steps=4, lr=0.02), tmp_path / "c.pt"
    model = adapted_mlp()
    model.fc1.scales = Scales(B={"vector": 0.25})
    glora.train(model, points(), recipe, space=SPACE, progress=False, checkpoint=file)
    other = adapted_mlp()
    glora.train(other, points(), recipe, space=SPACE, progress=False, checkpoint=file)
    assert other.fc1.scales == model.fc1.scales and other.fc2.scales == Scales()


def test_a_fixed_path_measures_its_kinds_alone():
    model = adapted_mlp()
    glora.set_paths(model, PathConfig(B="lora_2", E="vector"))
    glora.train(model, points(), RECIPE, progress=False)
    assert {kind for layer in glora.glora_layers(model).values() for kind in layer.scales.factors} <= {
        ("B", "lora"),
        ("E", "vector"),
    }


def test_random_augmentation_and_a_loader():
    loader = torch.utils.data.DataLoader(points(), 5, shuffle=True)
    models = [adapted_mlp(), adapted_mlp()]
    for model in models:
        glora.train(model, loader, RECIPE, space=SPACE, progress=False)
    assert same_bits(*map(state, models)) and models[0].fc1.scales == models[1].fc1.scales


def test_training_with_a_balance_refuses():
    for bad in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"balance: expected a number above 0 or None, got {bad}"):
            Recipe(balance=bad)
    with pytest.raises(ValueError, match="at least one adapted layer"):
        glora.train(nn.Linear(6, 3), points(), RECIPE, progress=False)
    with pytest.raises(ValueError, match="expected one that is not trained yet"):
        glora.train(trained_mlp(), points(), RECIPE, space=SPACE, progress=False)


# -- the warning ---------------------------------------------------------------------------------------


def wide(path, **recipe):
    with seeded():
        model = glora.inject(nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 5)), 4, heads=("2",))
    glora.set_paths(model, path)
    x, y = batch(256)
    recipe = Recipe(**{"steps": 20, "warmup": 0.5, "lr": 1e-2, "batch_size": 64, **recipe})
    return model, TensorDataset(x, y), recipe


def test_a_step_that_moves_a_layer_far_is_warned_of():
    model, data, recipe = wide(PathConfig(A="lora_4", B="vector", E="vector"))
    with pytest.warns(UserWarning, match=r"one step at lr=0\.01 moves it, as .* shows: B as vector by") as caught:
        glora.train(model, data, recipe, progress=False)
    message = str(caught[0].message)
    assert "A as lora" not in message and "E as vector" not in message and "in '0'" in message
    assert caught[0].filename == __file__
    share = float(message.split("B as vector by ")[1].split("%")[0]) / 100
    twin, *_ = wide(PathConfig())
    assert math.isclose(share, glora.balance(twin, data[:]).changes["0"]["B", "vector"], rel_tol=0.2)


@pytest.mark.filterwarnings("error")
def test_no_warning_of_small_steps_balanced_or_resumed_ones(tmp_path):
    path = PathConfig(A="lora_4", B="vector", E="vector")
    model, data, recipe = wide(path, lr=1e-3)
    glora.train(model, data, recipe, progress=False)
    model, data, recipe = wide(path, balance=0.02)
    glora.train(model, data, recipe, progress=False)


def balanced_in_a_process():
    model = adapted_mlp()
    glora.train(model, points(), Recipe(steps=3, batch_size=6, lr=0.02, balance=0.01), space=SPACE, progress=False)
    return {name: layer.scales for name, layer in glora.glora_layers(model).items()}, state(model)


def test_two_processes_have_the_same_scales(tmp_path):
    (scales, one), (others, other) = on_ranks(2, tmp_path / "ranks", balanced_in_a_process)
    assert scales == others and scales["fc1"].factors and same_bits(one, other)


@pytest.mark.parametrize("options", [{"amp": "bfloat16"}, {"amp": "bfloat16", "balance": 0.02}])
def test_autocast(options):
    model = adapted_mlp()
    recipe = Recipe(steps=3, batch_size=6, lr=0.1, **options)
    assert len(glora.train(model, points(), recipe, space=SPACE, progress=False).losses) == 3


class Wrapped(nn.Module):
    """Runs an adapted model in a way of its own."""

    def __init__(self, run):
        super().__init__()
        self.inner, self.run = adapted_mlp(), run

    def forward(self, x):
        return self.run(self.inner, x)


def in_half_precision(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


UNUSUAL = {
    "autocast": in_half_precision,
    "rows": lambda model, x: torch.stack([model(row) for row in x]),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "keywords": lambda model, x: model.head(model.fc2(input=model.act(model.fc1(input=x)))),
}


@pytest.mark.parametrize("run", UNUSUAL.values(), ids=UNUSUAL)
def test_the_look_at_the_first_step_ends_no_run(run):
    recipe = Recipe(steps=2, batch_size=6, lr=0.5)
    assert len(glora.train(Wrapped(run), points(), recipe, space=SPACE, progress=False).losses) == 2


@pytest.mark.parametrize("name", ["autocast", "rows", "keywords"])
def test_unusual_models_are_measured(name):
    found = glora.balance(Wrapped(UNUSUAL[name]), points()[:]).changes["inner.fc1"]
    plain = glora.balance(Wrapped(lambda model, x: model(x)), points()[:]).changes["inner.fc1"]
    for kind, change in plain.items():
        assert math.isclose(found[kind], change, rel_tol=0.05), kind


def test_buffers_and_generators_are_left_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted_mlp()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x + torch.randn_like(x))

    model, before = Noisy(), torch.get_rng_state()
    glora.balance(model, points()[:])
    assert float(model.calls) == 0 and torch.equal(torch.get_rng_state(), before)


def test_what_is_not_finite_is_refused():
    x, y = points()[:]
    with pytest.raises(
        ValueError, match="expected outputs and gradients that are finite, got others for 'A lora of fc1'"
    ):
        glora.balance(adapted_mlp(), (x * math.nan, y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint(reentrant):
    checkpoint = torch.utils.checkpoint.checkpoint

    def run(model, x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    if not reentrant:
        assert glora.balance(Wrapped(run), points()[:]).changes["inner.fc1"]["A", "lora"] > 0
        return
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant"):
        glora.balance(Wrapped(run), points()[:])


def test_a_refit_does_not_measure_again():
    supernet = adapted_mlp()
    glora.train(supernet, points(), RECIPE, space=SPACE, progress=False)
    models = [copy.deepcopy(supernet) for _ in range(2)]
    for model, balance in zip(models, (0.01, None)):
        glora.refit(model, PathConfig(B="lora_2"), points(), Recipe(steps=3, balance=balance), progress=False)
    assert same_bits(*map(state, models)) and models[0].fc1.scales == supernet.fc1.scales
