"""First children that need not run: which, with the very same bits, within the bytes that were allowed."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from glora import GLoRALinear, PathConfig, SearchSettings, SearchSpace, glora_layers, inject, search
from glora.evaluation import merged_under
from glora.evolution.prefix_reuse import PrefixReuse, _same_bits
from glora.evolution.scoring import CandidateScorer
from tests.glora.toys import IN_FEATURES, generator, points, randomize, seeded, trained_mlp, unchanged

ENOUGH = 2**30
ONE, OTHER = PathConfig(B="vector"), PathConfig(E="vector")


def adapted(make):
    with seeded():
        model = inject(make().eval(), 2)
    randomize(model)
    return model


def vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=4, num_heads=2, num_classes=3, drop_path_rate=0.5
    )


def swin():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "in_chans": 1}
    return SwinTransformer(**sizes, embed_dim=8, depths=(2, 2), num_heads=(2, 2), num_classes=3)


def convnext():
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(in_chans=1, num_classes=3, depths=(2, 1, 1, 1), dims=(4, 8, 8, 8))


SIZES = {vit: 8, swin: 16, convnext: 32}


def images(make, count=5):
    return torch.randn(count, 1, SIZES[make], SIZES[make], generator=generator())


def outputs(model, reuse, paths, batches):
    """Outputs for a candidate; ``reuse`` None: of a run of everything."""
    with torch.no_grad(), merged_under(model, paths, {}) as merged:
        if reuse is None:
            return [merged.eval()(x) for x in batches]
        with reuse.running(paths, len(batches)) as call:
            return [call(merged, number, x) for number, x in enumerate(batches)]


def paths_from(model, first):
    """Paths that are ONE before the adapted layer number ``first``, and OTHER from there on."""
    return {name: ONE if i < first else OTHER for i, name in enumerate(glora_layers(model))}


def assert_same(got, expected):
    assert len(got) == len(expected)
    assert all(_same_bits(a, b) for a, b in zip(got, expected))


def saved_in_second(model, batches, first, second, reuse=None):
    """Children passed over for the second candidate. It runs twice; all is held against runs of everything."""
    reuse = reuse or PrefixReuse(model, ENOUGH)
    saved = [0]
    for paths in (first, second, second):
        assert_same(outputs(model, reuse, paths, batches), outputs(model, None, paths, batches))
        saved.append(reuse.saved)
    return saved[2] - saved[1]


# -- whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [ENOUGH, 60_000, 3_000, 1])
@pytest.mark.parametrize("make", SIZES)
def test_the_bits_are_those_of_running_everything(make, capacity):
    model, x, gen = adapted(make), images(make), generator()
    reuse, batches, count = PrefixReuse(model, capacity), x.split(2), len(glora_layers(model))
    for _ in range(12):
        paths = paths_from(model, int(torch.randint(count + 1, (), generator=gen)))
        with unchanged(model):
            assert_same(outputs(model, reuse, paths, batches), outputs(model, None, paths, batches))
        assert reuse.kept_bytes <= capacity
    assert capacity == 3_000 or (reuse.saved > 0) == (capacity > 1)


@pytest.mark.parametrize(
    ("make", "layer", "saved"),
    [
        (vit, "blocks.0.attn.qkv", 0),
        (vit, "blocks.1.attn.qkv", 1),
        (vit, "blocks.3.mlp.fc2", 3),
        (swin, "layers.0.blocks.1.attn.qkv", 1),
        (swin, "layers.1.downsample.reduction", 2),
        (swin, "layers.1.blocks.1.mlp.fc2", 3),
        (convnext, "stages.0.blocks.1.mlp.fc1", 1),
        (convnext, "stages.3.blocks.0.mlp.fc2", 4),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_children_before_the_first_that_differs_are_passed_over(make, layer, saved):
    model = adapted(make)
    names = list(glora_layers(model))
    first, second = paths_from(model, len(names)), paths_from(model, names.index(layer))
    batches = images(make).split(2)
    assert saved_in_second(model, batches, first, second) == saved * len(batches)


@pytest.mark.parametrize("make", SIZES)
def test_all_children_are_passed_over_for_the_same_candidate(make):
    model = adapted(make)
    reuse, paths = PrefixReuse(model, ENOUGH), paths_from(model, 3)
    saved_in_second(model, [images(make)], paths, paths, reuse)
    children = {vit: 4, swin: 4, convnext: 5}[make]
    assert reuse.counts == (2 * children, children)


def test_a_candidate_between_two_takes_what_it_shares_with_the_one_before_it_alone():
    model = adapted(vit)
    reuse, batches = PrefixReuse(model, ENOUGH), [images(vit)]
    per_block = len(glora_layers(model)) // 4
    for agreeing, saved in [(4, 0), (1, 1), (3, 1), (3, 4), (0, 0), (4, 0)]:
        before = reuse.saved
        paths = paths_from(model, agreeing * per_block)
        assert_same(outputs(model, reuse, paths, batches), outputs(model, None, paths, batches))
        assert reuse.saved - before == saved


# -- where the bytes go --------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", range(6))
def test_first_children_are_kept_first_and_in_every_batch(boundaries):
    model = adapted(vit)
    batches, paths = images(vit, 6).split(2), paths_from(model, 0)
    size = 2 * 5 * 16 * 4  # images, tokens, width, bytes
    reuse = PrefixReuse(model, len(batches) * size * boundaries)
    saved = saved_in_second(model, batches, paths, paths, reuse)
    assert saved == len(batches) * max(boundaries - 1, 0)  # the input is kept too
    assert reuse.kept_bytes == len(batches) * boundaries * size
    reuse.forget()
    assert reuse.kept_bytes == 0
    assert not reuse._trails


def test_what_a_view_holds_counts_as_a_whole():
    class Slice(nn.Module):
        def forward(self, x):
            return x.repeat(1, 100)[:, :IN_FEATURES]

    model = adapted(lambda: nn.Sequential(Slice(), nn.Linear(IN_FEATURES, 3)))
    x = torch.randn(2, IN_FEATURES)
    reuse = PrefixReuse(model, 50 * x.nbytes)
    assert saved_in_second(model, [x], paths_from(model, 0), paths_from(model, 0), reuse) == 0
    assert reuse.kept_bytes == x.nbytes


# -- what may not be passed over ---------------------------------------------------------------------


class Plain(nn.Sequential):
    """A Sequential by another name may do something else in forward."""


class OneByOne(nn.Module):
    """Sees what is between the children."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def forward(self, x):
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return torch.stack(seen)


class Around(nn.Module):
    """Calls a Sequential as a whole, as ``use`` says."""

    def __init__(self, use, *children):
        super().__init__()
        self.use = use
        self.blocks = nn.Sequential(*children, nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.use(self, x)


class Noisy(nn.Linear):
    """In training mode for ever."""

    def train(self, mode=True):
        return super().train(True)


class Increment(nn.Module):
    """Writes to its input."""

    def forward(self, x):
        return x.add_(1)


def linear_model(use=lambda self, x: self.blocks(x), *children):
    return adapted(lambda: Around(use, nn.Linear(4, 4), *children))


def saved_of(model, batches=None):
    """Of a second candidate that differs in the last layer only."""
    count = len(glora_layers(model))
    batches = [torch.randn(2, 4, generator=generator())] if batches is None else batches
    return saved_in_second(model, batches, paths_from(model, count), paths_from(model, count - 1))


def test_a_plain_chain_is_passed_over():
    assert saved_of(linear_model()) == 2


def test_a_sequential_of_another_type_runs():
    assert saved_of(adapted(lambda: Plain(*(nn.Linear(4, 4) for _ in range(3))))) == 0


def test_children_that_are_called_one_by_one_run():
    assert saved_of(adapted(OneByOne)) == 0


def test_a_module_in_training_mode_runs_and_all_after_it():
    with pytest.warns(UserWarning, match="1 Noisy"):
        model = linear_model(lambda self, x: self.blocks(x), Noisy(4, 4))
    assert saved_of(model) == 1


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.0"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_module_with_a_hook_runs_and_all_after_it(register, place):
    model = linear_model(lambda self, x: self.blocks(x), nn.Sequential(nn.GELU()))
    calls = []
    getattr(model.get_submodule(place), register)(lambda *arguments: calls.append(1))
    assert saved_of(model) == 1
    assert len(calls) == 6  # three runs, each once more without reuse


def test_hooks_of_every_module_see_all():
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert saved_of(linear_model()) == 0
    finally:
        handle.remove()
    assert saved_of(linear_model()) == 2


def test_a_forward_of_its_own_is_left_alone():
    model = linear_model(lambda self, x: self.blocks(x), nn.GELU())
    model.blocks[1].forward = lambda x: x + 1
    assert saved_of(model) == 1
    model.blocks.forward = own = lambda x: x
    assert saved_of(model) == 0
    assert model.blocks.forward is own


@pytest.mark.parametrize(
    ("use", "saved"),
    [
        (lambda self, x: self.blocks(x).add_(1), 2),
        (lambda self, x: (x + self.blocks(x)).mul_(2), 2),
        (lambda self, x: self.blocks(x.clone().t().contiguous().t()), 2),
        (lambda self, x: self.blocks(x) + self.blocks(2 * x), 4),
        (lambda self, x: self.blocks(self.blocks(x)), 2),
    ],
    ids=["output-written", "residual", "transposed", "called-twice", "fed-back"],
)
def test_whatever_the_model_does_around_it(use, saved):
    assert saved_of(linear_model(use)) == saved


@pytest.mark.parametrize("use", [lambda self, x: self.blocks(x) + x, lambda self, x: self.blocks(x.mul(2)) + x])
def test_children_that_write_to_their_input_run(use):
    """The caller may look at it; and what was kept of it is no longer what it was."""
    model = adapted(lambda: Around(use, Increment(), nn.Linear(4, 4)))
    x = torch.randn(2, 4, generator=generator())
    reuse = PrefixReuse(model, ENOUGH)
    for agreeing in (3, 2, 2, 0):
        paths = paths_from(model, agreeing)
        assert_same(outputs(model, reuse, paths, [x.clone()]), outputs(model, None, paths, [x.clone()]))
    assert reuse.saved == 0


def test_an_output_that_the_next_child_writes_to_is_not_used():
    model = linear_model(lambda self, x: self.blocks(x), Increment())
    assert saved_of(model) == 3  # of Linear, Increment, Linear, Linear the last runs
    model = linear_model(lambda self, x: self.blocks(x), nn.Identity(), Increment())
    count = len(glora_layers(model))
    x = [torch.randn(2, 4, generator=generator())]
    reuse = PrefixReuse(model, ENOUGH)
    for agreeing in (count, 1, 1, count, 0):
        paths = paths_from(model, agreeing)
        assert_same(outputs(model, reuse, paths, x), outputs(model, None, paths, x))


def test_other_inputs_run():
    """Also where they are equal as numbers, or different from batch to batch."""
    model = linear_model()
    reuse, paths = PrefixReuse(model, ENOUGH), paths_from(model, 3)
    zero = torch.zeros(2, 4)
    inputs = [
        zero,
        -zero,
        zero.double().float() + 1,
        zero[:1],
        zero.t().contiguous().t(),
        torch.full((2, 4), torch.nan),
    ]
    for x in inputs:
        assert_same(outputs(model, reuse, paths, [x]), outputs(model, None, paths, [x]))
    assert reuse.saved == 0
    assert_same(outputs(model, reuse, paths, inputs[-1:]), outputs(model, None, paths, inputs[-1:]))
    assert reuse.saved == 3  # a NaN is a NaN


def test_a_part_that_a_candidate_does_not_call_is_held_to_the_candidate_that_did():
    class Sometimes(Around):
        def forward(self, x):
            return self.blocks(x) if self.use else x

    model = adapted(lambda: Sometimes(True, nn.Linear(4, 4)))
    reuse, x = PrefixReuse(model, ENOUGH), [torch.randn(2, 4, generator=generator())]
    for model.use, agreeing in [(True, 3), (False, 0), (True, 0), (False, 3), (True, 2)]:
        paths = paths_from(model, agreeing)
        assert_same(outputs(model, reuse, paths, x), outputs(model, None, paths, x))


def test_what_is_no_tensor_goes_through():
    class Pair(nn.Module):
        def forward(self, x):
            return (x, x) if isinstance(x, torch.Tensor) else x[0] + x[1]

    model = adapted(lambda: nn.Sequential(nn.Linear(4, 4), Pair(), Pair(), nn.Linear(4, 4)))
    assert saved_of(model) == 1
    model = adapted(lambda: Around(lambda self, x: self.blocks((x, x)), Pair(), nn.Linear(4, 4)))
    assert saved_of(model) == 0


def test_in_inference_mode_all_runs():
    with torch.inference_mode():
        assert saved_of(linear_model()) == 0


def test_a_cut_run_leaves_forwards_and_modes_as_they_were():
    model = linear_model()
    model.train()
    reuse = PrefixReuse(model, ENOUGH)
    with unchanged(model), pytest.raises(RuntimeError):
        outputs(model, reuse, paths_from(model, 3), [torch.randn(2, 4), torch.randn(2, 5)])
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same(
        outputs(model, reuse, paths_from(model, 2), [torch.ones(2, 4)]),
        outputs(model, None, paths_from(model, 2), [torch.ones(2, 4)]),
    )


# -- of a search ---------------------------------------------------------------------------------------

SPACE = SearchSpace((2,), A=("none",), C=("none",), D=("none",))  # few paths a layer, so that candidates agree
QUICK = SearchSettings(population=8, top=3, crossover=4, mutation=4, generations=3)


def searched(model, make, settings=QUICK, **options):
    data = TensorDataset(images(make, 6), torch.arange(6) % 3)
    return search(model, SPACE, data, settings=settings, metric="loss", progress=False, batch_size=4, **options)


@pytest.mark.parametrize("halving", [(), (0.5, 1)])
@pytest.mark.parametrize("make", [vit, swin])
def test_a_search_has_the_same_history_and_says_what_it_saved(make, halving):
    model = adapted(make)
    settings = SearchSettings(**{**vars(QUICK), "halving": halving})
    with unchanged(model):
        reusing, plain = searched(model, make, settings), searched(model, make, settings, reuse_bytes=0)
    assert reusing.history == plain.history
    assert plain.reused == 0 < reusing.reused < 1
    assert reusing.to_dict()["reused"] == reusing.reused


def test_everything_is_freed_after_the_search(monkeypatch):
    made = []

    def recorded(*arguments):
        scorer = CandidateScorer(*arguments)
        made.append(weakref.ref(scorer.reuse))
        return scorer

    monkeypatch.setattr("glora.evolution.loop.CandidateScorer", recorded)
    model = adapted(vit)
    assert searched(model, vit).reused > 0
    gc.collect()
    assert [reference() for reference in made] == [None]


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_refuses_bytes_that_are_none(value):
    with pytest.raises(ValueError, match=r"^reuse_bytes: expected an integer from 0, got"):
        searched(adapted(vit), vit, reuse_bytes=value)


def test_layers_of_equal_paths_are_merged_once(monkeypatch):
    merged, merge = [], GLoRALinear.merge
    monkeypatch.setattr(
        GLoRALinear, "merge", lambda self, path, **options: merged.append(path) or merge(self, path, **options)
    )
    scorer = CandidateScorer(trained_mlp(), points(), "loss", 4)
    for paths, made in [((ONE, ONE), 2), ((ONE, OTHER), 1), ((ONE, OTHER), 0), ((OTHER, ONE), 2)]:
        before = len(merged)
        assert scorer(dict(zip(("fc1", "fc2"), paths)), 0, 12) == CandidateScorer(trained_mlp(), points(), "loss", 4)(
            dict(zip(("fc1", "fc2"), paths)), 0, 12
        )
        assert len(merged) - before == made + 2


class Augmented(Dataset):
    """Other images at every reading."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.randn(IN_FEATURES), index % 3


def test_images_that_change_are_not_taken_for_those_before():
    scorer = CandidateScorer(trained_mlp(), Augmented(), "loss", 4, reuse_bytes=ENOUGH)
    paths = dict.fromkeys(("fc1", "fc2"), ONE)
    assert scorer(paths, 0, 6) != scorer(paths, 0, 6)
    assert scorer.reuse.saved == 0


def test_layers_outside_of_any_sequential_are_searched_as_ever():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict(OrderedDict(a=nn.Linear(IN_FEATURES, 4), b=nn.Linear(4, 3)))

        def forward(self, x):
            return self.layers["b"](self.layers["a"](x))

    result = search(adapted(Mlp), SPACE, points(), settings=QUICK, progress=False)
    assert result.reused == 0
