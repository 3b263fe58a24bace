"""Activation checkpointing while paths change: a forward pass that is run again takes the path of its first run."""

import copy
import pickle
import random
import threading
from functools import partial
from itertools import cycle, islice

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import glora
from glora import GLoRALinear, PathConfig, SearchSpace, get_paths, sample_paths, set_paths, using_paths
from glora.layers.path_history import LONGEST
from tests.glora.toys import IN_FEATURES, generator, randomize, seeded, tiny_vit, trained_mlp

SPACE = SearchSpace((2, 1))
each_kind = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def draws(model, count):
    """Paths that differ from draw to draw in every layer."""
    gen, found = generator(3), []
    while len(found) < count:
        paths = sample_paths(model, SPACE, gen)
        if all(paths[name] != other[name] for other in found for name in paths):
            found.append(paths)
    return found


def gradients(model, losses, backward=None):
    """Of the losses formed under paths of their own each, the paths changed once more before any backward pass."""
    model.zero_grad(set_to_none=True)
    formed = []
    *paths, last = draws(model, len(losses) + 1)
    for own, loss in zip(paths, losses):
        set_paths(model, own)
        formed.append(loss())
    set_paths(model, last)
    for one in formed:
        (backward or torch.Tensor.backward)(one)
    assert get_paths(model) == last
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, want):
    assert found.keys() == want.keys()
    assert any(grad is not None for grad in want.values())
    for name, grad in want.items():
        assert (found[name] is None) == (grad is None), name
        assert grad is None or torch.equal(found[name], grad), name


def inputs(count):
    """Several batches, the first of which returns: the same tensor under several paths."""
    made = [torch.randn(4, IN_FEATURES, generator=generator(seed)).requires_grad_() for seed in range(2)]
    return list(islice(cycle(made), count))


def whole(model, x, use_reentrant):
    return checkpoint(model, x, use_reentrant=use_reentrant).square().sum()


def plain(model, x, use_reentrant=None):
    return model(x).square().sum()


@each_kind
@pytest.mark.parametrize("forwards", [1, 3])
def test_gradients_are_those_without_checkpointing(use_reentrant, forwards):
    """Also when every forward pass of an accumulation comes before its backward passes."""
    model, xs = trained_mlp(), inputs(forwards)
    found = gradients(model, [lambda x=x: whole(model, x, use_reentrant) for x in xs])
    assert_same(found, gradients(model, [lambda x=x: plain(model, x) for x in xs]))


@each_kind
def test_one_backward_for_several_forwards(use_reentrant):
    """Nodes made under different paths in one graph."""
    model, (x, y) = trained_mlp(), inputs(2)

    def loss(form):
        one, other, last = draws(model, 3)
        model.zero_grad(set_to_none=True)
        set_paths(model, one)
        first = form(model, x, use_reentrant)
        set_paths(model, other)
        second = form(model, y, use_reentrant)
        set_paths(model, last)
        (first * second).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    assert_same(loss(whole), loss(plain))


@each_kind
def test_backward_twice(use_reentrant):
    """retain_graph: the second backward pass runs forward once more, after a further change of paths."""
    model, (x, _) = trained_mlp(), inputs(2)

    def twice(loss):
        loss.backward(retain_graph=True)
        set_paths(model, draws(model, 6)[-1])
        loss.backward()
        set_paths(model, draws(model, 2)[-1])

    found = gradients(model, [lambda: whole(model, x, use_reentrant)], twice)
    assert_same(found, gradients(model, [lambda: plain(model, x)], twice))


def test_the_last_node_before_a_change():
    model, (x, _) = trained_mlp(), inputs(2)

    def ones(y):
        y.backward(torch.ones_like(y))

    found = gradients(model, [lambda: checkpoint(model, x, use_reentrant=True)], ones)
    assert_same(found, gradients(model, [lambda: model(x)], ones))


def nested(model, x, inner, outer):
    def body(z):
        z = checkpoint(lambda t: model.act(model.fc1(t)), z.sin(), use_reentrant=inner)
        return checkpoint(model.fc2, z, use_reentrant=inner).cos()

    return model.head(checkpoint(body, x, use_reentrant=outer)).square().sum()


def unnested(model, x):
    return model.head(model.fc2(model.act(model.fc1(x.sin()))).cos()).square().sum()


# torch's own, of an inner reentrant checkpoint whose outer one runs it without gradients
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in-a-thread"])
@pytest.mark.parametrize("inner", [False, True], ids=["inner-non-reentrant", "inner-reentrant"])
@pytest.mark.parametrize("outer", [False, True], ids=["outer-non-reentrant", "outer-reentrant"])
def test_nested(inner, outer, elsewhere):
    """Backward in a thread of its own, as on a GPU: what a reentrant checkpoint makes there is numbered anew."""
    model, xs = trained_mlp(), inputs(3)
    backward = in_a_thread if elsewhere else torch.Tensor.backward
    found = gradients(model, [lambda x=x: nested(model, x, inner, outer) for x in xs], backward)
    assert_same(found, gradients(model, [lambda x=x: unnested(model, x) for x in xs]))


def in_a_thread(loss):
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


def test_part_of_a_region():
    """Backward enters the checkpointed region at a node that was made before its layer ran."""
    model, (x, _) = trained_mlp(), inputs(2)

    def loss(run):
        early, late = run(lambda z: (z.sin(), model(z.exp())))
        return early.sum() + late.square().sum()

    found = gradients(model, [lambda: loss(lambda f: checkpoint(f, x, use_reentrant=False))])
    assert_same(found, gradients(model, [lambda: loss(lambda f: f(x))]))


@each_kind
def test_paths_changed_and_changed_back(use_reentrant):
    model, (x, _) = trained_mlp(), inputs(2)
    one, other = draws(model, 2)

    def grads(form):
        model.zero_grad(set_to_none=True)
        set_paths(model, one)
        loss = form(model, x, use_reentrant)
        with using_paths(model, other):
            form(model, x.detach().requires_grad_(), use_reentrant).backward()
            other_loss = form(model, x, use_reentrant)
        loss.backward()
        other_loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    assert_same(grads(whole), grads(plain))


def test_double_backward():
    """The paths change before each of the two passes."""
    model, (x, _) = trained_mlp(), inputs(2)

    def twice(loss):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        set_paths(model, draws(model, 6)[-1])
        dx.square().sum().backward()
        set_paths(model, draws(model, 2)[-1])

    found = gradients(model, [lambda: whole(model, x, False)], twice)
    assert_same(found, gradients(model, [lambda: plain(model, x)], twice))


def blocks(model, x, call):
    return model.head(call(model.fc2, call(lambda z: model.act(model.fc1(z.sin())), x)) * x.sum())


def siblings(model, x, call):
    return model.head(model.fc2(call(model.fc1, x) * call(lambda z: model.fc1(z * 2), x)))


def three_deep(model, x, call):
    return call(lambda z: call(lambda u: model.head(call(model.fc2, u.exp())), call(model.fc1, z.sin()).tanh()), x)


def history(seed, checkpoints):
    """Gradients after every backward of a random history: forward passes, changes of paths, backward passes."""
    chance, gen, model = random.Random(seed), generator(seed), trained_mlp()
    pending, seen = [], []
    for _ in range(12):
        action = chance.choice(("paths", "forward", "forward", "backward"))
        reentrant, form = chance.choice(((False, blocks), (True, blocks), (True, siblings), (False, three_deep)))
        keep, place = chance.random() < 0.4, chance.random()
        if action == "paths":
            set_paths(model, sample_paths(model, SPACE, gen))
        elif action == "forward":
            x = torch.randn(3, IN_FEATURES, generator=gen).requires_grad_()
            call = partial(checkpoint, use_reentrant=reentrant) if checkpoints else lambda f, z: f(z)
            pending.append((form(model, x, call).square().mean(), x))
        elif pending:
            loss, x = pending.pop(int(place * len(pending)))
            loss.backward(retain_graph=keep)
            seen += [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            pending += [(loss, x)] * keep
    return seen


def test_any_order_of_calls():
    compared = 0
    for seed in range(40):
        found, want = history(seed, True), history(seed, False)
        assert len(found) == len(want), seed
        for got, expected in zip(found, want):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=f"history {seed}")
        compared += len(found)
    assert compared > 500


# -- the switches of timm and transformers ---------------------------------------------------------------------------


def images(seed):
    return torch.randn(2, 1, 8, 8, generator=generator(seed))


@each_kind
def test_timm(use_reentrant):
    """``set_grad_checkpointing``, and nothing else."""
    from timm.layers import set_reentrant_ckpt
    from timm.layers.config import use_reentrant_ckpt

    with seeded():
        model = glora.inject(tiny_vit(), 2)
    randomize(model)
    model.pos_embed.requires_grad_()  # a reentrant checkpoint needs an input that requires grad
    losses = [lambda seed=seed: model(images(seed)).square().sum() for seed in range(2)]
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(use_reentrant)
    try:
        model.set_grad_checkpointing(True)
        found = gradients(model, losses)
        model.set_grad_checkpointing(False)
    finally:
        set_reentrant_ckpt(before)
    assert_same(found, gradients(model, losses))


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with seeded():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False))
        glora.inject(model, 2, exclude=("lm_head",))
    randomize(model)
    return model.train()


@each_kind
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")
def test_transformers(llama, use_reentrant):
    """``gradient_checkpointing_enable``, and for the reentrant kind an input that requires grad."""
    tokens = [torch.randint(0, 32, (2, 5), generator=generator(seed)) for seed in range(2)]
    losses = [lambda ids=ids: llama(input_ids=ids, labels=ids).loss for ids in tokens]
    llama.enable_input_require_grads()
    want = gradients(llama, losses)
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    try:
        assert llama.is_gradient_checkpointing
        assert_same(gradients(llama, losses), want)
    finally:
        llama.gradient_checkpointing_disable()
        llama.disable_input_require_grads()


def test_a_forward_is_run_again_at_all():
    """The tests above would pass without a second run."""
    model, runs = trained_mlp(), []
    model.fc1.register_forward_hook(lambda *_: runs.append(get_paths(model)))
    loss = whole(model, inputs(1)[0], True)
    set_paths(model, draws(model, 1)[0])
    loss.backward()
    assert len(runs) == 2
    assert runs[0] != runs[1]


# -- other surroundings ----------------------------------------------------------------------------------------------


@each_kind
def test_autocast(use_reentrant):
    model, xs = trained_mlp(), inputs(2)

    def form(run, x):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, x, use_reentrant)

    found = gradients(model, [lambda x=x: form(whole, x) for x in xs])
    assert_same(found, gradients(model, [lambda x=x: form(plain, x) for x in xs]))


def test_torch_autograd_grad():
    model, (x, _) = trained_mlp(), inputs(2)
    parameters = glora.trainable_parameters(model)

    def grads(form):
        one, other = draws(model, 2)
        set_paths(model, one)
        loss = form(model, x, False)
        set_paths(model, other)
        return dict(enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)))

    assert_same(grads(whole), grads(plain))


def test_forward_in_a_thread():
    """Forward, and the changes of its paths, in one thread that is not the one that made the model."""
    model, (x, _) = trained_mlp(), inputs(2)
    set_paths(model, draws(model, 5)[-1])
    found = {}

    def work():
        found.update(gradients(model, [lambda: whole(model, x, False)]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same(found, gradients(model, [lambda: plain(model, x)]))


def test_forwards_in_several_threads_are_refused_rather_than_wrong():
    model, (x, _) = trained_mlp(), inputs(2)
    one, other, last = draws(model, 3)
    set_paths(model, one)
    losses = [whole(model, x, False)]
    set_paths(model, other)
    thread = threading.Thread(target=lambda: losses.append(whole(model, x, False)))
    thread.start()
    thread.join()
    set_paths(model, last)
    for loss in losses:
        with pytest.raises(RuntimeError, match="forward passes of a layer in one thread, got several"):
            loss.backward()


def test_what_is_no_longer_known_is_refused():
    layer = GLoRALinear(3, 3, rank=2)
    randomize(layer)
    x = torch.randn(2, 3, requires_grad=True)
    layer.path = PathConfig("lora_2")
    old = checkpoint(layer, x, use_reentrant=True).sum()
    for step in range(LONGEST):
        layer.path = PathConfig("lora_1" if step % 2 else "vector")
        recent = checkpoint(layer, x, use_reentrant=True).sum()
    layer.path = PathConfig()
    with pytest.raises(RuntimeError, match=f"at most {LONGEST} changes between"):
        old.backward()
    recent.backward()
    assert layer.Au.grad.abs().sum() > 0


def test_a_long_history_is_bounded():
    layer = GLoRALinear(3, 3, rank=2)
    for step in range(3 * LONGEST):
        layer.path = PathConfig("lora_1" if step % 2 else "vector")
        layer(torch.ones(1, 3))
    assert len(pickle.dumps(layer._history)) < 1000
    assert len(layer._history._starts) == len(layer._history._paths) == LONGEST


def test_changes_without_a_graph_are_not_kept():
    """A search sets thousands of paths, and makes no node."""
    layer = GLoRALinear(3, 3, rank=2)
    layer(torch.ones(1, 3))
    for step in range(9):
        layer.path = PathConfig("lora_1" if step % 2 else "vector")
        with torch.no_grad():
            layer(torch.ones(1, 3))
    assert len(layer._history._paths) == 2


def test_setting_a_path_during_backward_is_refused():
    model, (x, _) = trained_mlp(), inputs(2)
    before = get_paths(model)
    hidden = model.fc1(x)
    hidden.register_hook(lambda _: set_paths(model, draws(model, 1)[0]))
    with pytest.raises(RuntimeError, match=r"^path: expected to be set outside of backward"):
        model.fc2(hidden).sum().backward()
    assert get_paths(model) == before


def test_layer_runs_at_the_end_of_backward():
    """In a callback there is no node: the path is that of now."""
    model, (x, _) = trained_mlp(), inputs(2)
    want, found = model(x), []
    hidden = x.sin()
    hidden.register_hook(
        lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: found.append(model(x)))
    )
    hidden.sum().backward()
    assert torch.equal(found[0], want)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m._replicate_for_data_parallel()],
    ids=["copy", "deepcopy", "pickle", "replica"],
)
def test_copies_have_a_path_and_a_history_of_their_own(copied):
    layer = GLoRALinear(3, 3, rank=2)
    layer.path = PathConfig("lora_2")
    layer(torch.ones(1, 3))
    other = copied(layer)
    layer.path = PathConfig("vector")
    assert other.path == PathConfig("lora_2")
    assert other._history is not layer._history
