"""An adapted layer where a linear one may stand: what PyTorch does to modules and around them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import glora
from glora import GLoRALinear, PathConfig, SearchSpace, get_paths, glora_layers, inject, sample_paths, set_paths
from tests.glora.toys import (
    CLASSES,
    IN_FEATURES,
    adapted_mlp,
    generator,
    mlp,
    randomize,
    same_bits,
    state,
    trained_mlp,
    unchanged,
)
from tests.helpers import assert_contract, oracle

PATHS = [
    PathConfig("lora_2", "lora_1", "lora_2", "vector", "constant"),
    PathConfig("vector", "lora_2", "vector", "constant", "vector"),
    PathConfig("constant", "constant", "none", "none", "none"),
]
each_path = pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
each_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def batch(seed=0, count=4):
    return torch.randn(count, IN_FEATURES, generator=generator(seed))


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- precision -------------------------------------------------------------------------------------------------------


def layer_results(layer, x, dy):
    """Output and gradients by the names of the oracle."""
    y = layer(x)
    storages, _ = layer.terms().flatten()
    found = torch.autograd.grad(y, [x, *storages], dy)
    names = ["x", *(f"{slot}{i}" for slot, term in layer.terms().active for i in range(len(term.storages)))]
    return {"y": y.detach(), **dict(zip(names, found))}


@each_half
@each_path
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half-base"])
def test_half_precision_keeps_the_contract(half, path, autocast):
    """Under autocast, and with a base that is half itself: fp32 support tensors, and gradients of theirs."""
    layer = GLoRALinear(IN_FEATURES, 5, rank=2, dtype=torch.float32 if autocast else half)
    randomize(layer)
    layer.path = path
    values = batch().to(half).to(torch.float32 if autocast else half)
    x = values.requires_grad_()
    dy = torch.randn(4, 5, generator=generator(1)).to(half)
    with torch.autocast("cpu", half, enabled=autocast):
        got = layer_results(layer, x, dy)
    assert got["y"].dtype == half
    assert {got[name].dtype for name in got if name not in ("x", "y")} == {torch.float32}
    assert got["x"].dtype == x.dtype
    want, scale = oracle(x, layer.weight.to(half), layer.bias.to(half), layer.terms(), dy)
    assert_contract(got, want, scale, half)


@each_half
def test_autocast_around_a_model(half):
    model, x = trained_mlp(), batch()
    with torch.autocast("cpu", half):
        y = model(x)
        assert y.dtype == model.fc1(x).dtype == half
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_half_base_trains_in_fp32():
    """A step that bf16 cannot resolve moves the support tensors."""
    model = trained_mlp(dtype=torch.bfloat16)
    model.head.float()
    parameters = [p for layer in glora_layers(model).values() for p in layer.support_parameters(layer.path)]
    before = [p.detach().clone() for p in parameters]
    hidden = nn.Sequential(*list(model)[:-1])
    hidden(batch().bfloat16()).float().square().sum().backward()
    torch.optim.SGD(parameters, lr=1e-5).step()
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before)]
    assert all(moved)
    assert any(torch.equal(p.bfloat16(), old.bfloat16()) for p, old in zip(parameters, before))


# -- accumulating gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forwards_first", [False, True])
def test_accumulation_over_paths_adds_up(forwards_first):
    """Each micro-batch under a path of its own: the sum of the gradients it has alone, None where none reads."""
    model, gen = trained_mlp(), generator(3)
    draws = [sample_paths(model, SearchSpace((2, 1)), gen) for _ in range(3)]
    alone = []
    for seed, paths in enumerate(draws):
        model.zero_grad()
        set_paths(model, paths)
        model(batch(seed)).square().sum().backward()
        alone.append(grads(model))
    model.zero_grad()
    losses = []
    for seed, paths in enumerate(draws):
        set_paths(model, paths)
        losses.append(model(batch(seed)).square().sum())
        if not forwards_first:
            losses.pop().backward()
    for loss in losses:
        loss.backward()
    found = grads(model)
    assert found.keys() == set().union(*alone)
    for name, got in found.items():
        first, *rest = [one[name] for one in alone if name in one]
        assert torch.equal(got, sum(rest, start=first)), name


# -- torch.func ------------------------------------------------------------------------------------------------------


@pytest.fixture
def functional():
    model = trained_mlp().double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    return model, parameters, loss


def test_functional_call_takes_other_parameters(functional):
    model, parameters, _ = functional
    other = copy.deepcopy(model)
    randomize(other, seed=9)
    swapped = {name: p for name, p in other.named_parameters() if name in parameters}
    x = batch().double()
    with unchanged(model):
        found = functional_call(model, swapped, (x,))
    assert torch.equal(found, other(x))
    assert not torch.equal(found, model(x))


def test_func_grad(functional):
    model, parameters, loss = functional
    x = batch().double()
    found = grad(loss)(parameters, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            want = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-12)


def test_func_grad_of_each_sample(functional):
    _, parameters, loss = functional
    x = batch().double()
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, row in enumerate(x):
        want = grad(loss)(parameters, row)
        for name in parameters:
            torch.testing.assert_close(found[name][index], want[name], rtol=1e-10, atol=1e-12)
    assert any(tensor.abs().sum() > 0 for tensor in found.values())


def test_vmap_over_models():
    """An ensemble: one batched call over stacked parameters, base included."""
    models = [trained_mlp().double() for _ in range(3)]
    for seed, model in enumerate(models):
        randomize(model, seed)
    parameters, buffers = stack_module_state(models)
    x = batch().double()
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    for got, model in zip(found, models):
        torch.testing.assert_close(got, model(x), rtol=1e-10, atol=1e-12)


def test_jvp(functional):
    model, parameters, _ = functional
    x = batch().double()
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, found = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangents,))
    step = 1e-6
    ends = [
        functional_call(model, {name: p + sign * step * tangents[name] for name, p in parameters.items()}, (x,))
        for sign in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


# -- copies, files, devices ------------------------------------------------------------------------------------------


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_state(model):
    other = adapted_mlp()
    other.load_state_dict(model.state_dict())
    return other


def assigned(model):
    with torch.device("meta"):
        other = inject(mlp(), 2)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def emptied(model):
    with torch.device("meta"):
        other = inject(mlp(), 2)
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "made",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_whole, from_state, assigned, emptied],
    ids=["deepcopy", "pickle", "torch.save", "state-dict", "meta-assign", "meta-empty"],
)
def test_another_one_that_does_the_same(made):
    """Same output and gradients, same flags, and nothing shared that training would change."""
    model, x = trained_mlp(), batch()
    before = state(model)
    other = made(model)
    assert get_paths(other) == get_paths(model)
    assert same_bits(state(other), before)
    flags = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (model, other)]
    assert flags[0] == flags[1]
    losses = [m(x).square().sum() for m in (model, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert same_bits(grads(model), grads(other))
    if made is not assigned:
        randomize(other, seed=5)
        assert same_bits(state(model), before)


def test_a_state_dict_is_a_weights_file():
    file, model = io.BytesIO(), trained_mlp()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=True), state(model))


def test_support_of_an_emptied_layer_can_be_reset():
    with torch.device("meta"):
        layer = GLoRALinear(3, 4, rank=2)
    layer.to_empty(device="cpu")
    linear = nn.Linear(3, 4)
    layer.load_state_dict(linear.state_dict())
    layer.reset_support()
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), linear(x))


def test_runs_on_meta():
    with torch.device("meta"):
        model = inject(mlp(), 2)
        x = torch.empty(4, IN_FEATURES)
    y = model(x)
    assert (y.shape, y.device.type) == ((4, CLASSES), "meta")
    y.sum().backward()
    assert model.fc1.Ad.grad.device.type == "meta"


def test_moves_and_casts_as_a_module():
    model, x = trained_mlp(), batch()
    for dtype in (torch.bfloat16, torch.float64):
        moved = copy.deepcopy(model).to(dtype)
        assert {p.dtype for p in moved.parameters()} == {dtype}
        assert get_paths(moved) == get_paths(model)
        torch.testing.assert_close(moved(x.to(dtype)).float(), model(x), rtol=0.05, atol=0.1)
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


# -- modules that share or read a linear layer ------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Embedding, one linear layer, and an output layer with the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.lm_head(self.body(self.embed(tokens)))


def test_an_output_layer_tied_to_the_embedding():
    """Adapts the output alone; the embedding is frozen and stays tied; merging unties, and says so."""
    model, tokens = LanguageModel(), torch.arange(6).reshape(2, 3)
    embedded = model.embed.weight.detach().clone()
    inject(model, 2, heads=())
    assert model.lm_head.weight is model.embed.weight
    assert not model.embed.weight.requires_grad
    randomize(model)
    before = model(tokens)
    before.square().sum().backward()
    assert model.lm_head.Au.grad.abs().sum() > 0
    with pytest.warns(UserWarning, match="merge: 'lm_head' had the weight or bias of another module") as caught:
        report = glora.merge(model, keep=True)
    assert {warning.filename for warning in caught} == {__file__}  # the line that merges
    assert [layer.untied for layer in report.layers] == [False, True]
    assert "no longer tied: ['lm_head']" in str(report)
    assert torch.equal(model(tokens), before)
    assert torch.equal(model.embed.weight, embedded)
    assert not torch.equal(model.lm_head.weight, embedded)
    glora.unmerge(model, report)
    assert model.lm_head.weight is model.embed.weight


def test_two_linear_layers_with_one_weight():
    """Support tensors of their own, one frozen weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    inject(model, 2)
    randomize(model)
    assert model[0].weight is model[1].weight
    assert not torch.equal(model[0].Ad, model[1].Ad)
    x = torch.randn(3, 4)
    before = model(x)
    with pytest.warns(UserWarning, match="merge: '0', '1' had the weight or bias of another module"):
        report = glora.merge(model)
    assert [layer.untied for layer in report.layers] == [True, True]
    assert torch.equal(model(x), before)


def test_a_bias_that_was_tied_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    inject(model, 2)
    with pytest.warns(UserWarning, match="merge: '0', '1' had the weight or bias of another module"):
        glora.merge(model)


def test_a_layer_used_twice_is_not_tied_to_another():
    shared = nn.Linear(4, 4)
    report = glora.merge(inject(nn.Sequential(shared, nn.ReLU(), shared), 2))
    assert [layer.untied for layer in report.layers] == [False]
    assert "tied" not in str(report)


def test_what_is_excluded_may_not_go_on_training_a_frozen_weight():
    model = LanguageModel()
    message = r"^exclude, heads: expected modules that share no .* named \['embed.weight', 'lm_head.weight'\]"
    for names in ({"exclude": ("embed",), "heads": ()}, {"heads": ("embed",)}):
        with unchanged(model), pytest.raises(ValueError, match=message):
            inject(model, 2, **names)
    model.embed.weight.requires_grad_(False)
    inject(model, 2, exclude=("embed",), heads=())
    assert isinstance(model.lm_head, GLoRALinear)


def test_a_tied_weight_that_is_excluded_everywhere_is_left_alone():
    model = inject(LanguageModel(), 2, exclude=("embed", "lm_head"))
    assert list(glora_layers(model)) == ["body"]
    assert model.embed.weight.requires_grad


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_multihead_attention_stays_as_it_is():
    """Its projections are a bare parameter and a linear layer that it reads: neither can be adapted."""
    model, x = Attention().eval(), torch.randn(2, 3, 4)
    before = model(x)
    with pytest.warns(UserWarning, match=r"cannot be adapted and stay frozen: 1 MultiheadAttention \('attention'\)"):
        inject(model, 2)
    assert list(glora_layers(model)) == ["out"]
    torch.testing.assert_close(model(x), before)
    assert not any(p.requires_grad for p in model.attention.parameters())


def test_multihead_attention_as_a_target_is_refused():
    model = Attention()
    message = r"'attention.out_proj' belongs to an nn.MultiheadAttention, which reads its weight .* exclude it"
    with unchanged(model), pytest.raises(TypeError, match=message):
        inject(model, 2, targets=["out_proj", "out"])


def test_multihead_attention_with_a_plain_output_is_refused():
    model = Attention()
    model.attention.out_proj = nn.Linear(4, 4)
    with unchanged(model), pytest.raises(TypeError, match=r"'attention.out_proj' belongs to an nn.Multihead"):
        inject(model, 2)
    assert list(glora_layers(inject(model, 2, exclude=("attention",)))) == ["out"]


def test_training_warns_of_timm_modules_that_read_their_linear():
    """BEiT's attention multiplies by ``qkv.weight`` and calls the rest."""
    from timm.models.beit import Beit
    from torch.utils.data import TensorDataset

    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    data = TensorDataset(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    recipe = glora.Recipe(steps=1, batch_size=2)
    with pytest.warns(UserWarning, match=r"Attention reads the weight of 'blocks.0.attn.qkv' without a call"):
        model = inject(Beit(**sizes, num_classes=2), 2)
    with pytest.warns(UserWarning, match=r"did not run in the first step: \['blocks.0.attn.qkv'\]; .* exclude them"):
        glora.train(model, data, recipe, progress=False)
    again = inject(Beit(**sizes, num_classes=2), 2, exclude=("qkv", "head"))
    glora.train(again, data, recipe, progress=False)
