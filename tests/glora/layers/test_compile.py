"""torch.compile: one graph serves every path; training it leaves what is not read alone."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import glora
from tests.glora.toys import generator, randomize, tiny_vit

SIZE = 24


class Net(nn.Module):
    """Six linear layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(SIZE, SIZE), nn.GELU())))

    def forward(self, x):
        return self.body(x)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def make(product="hadamard"):
    model = glora.inject(Net(), rank=8, product=product, heads=())
    for parameter in glora.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_one_graph_for_thirty_paths(product):
    """Over six layers, kinds and ranks sampled anew each time; gradients as without a compiler."""
    model, x = make(product), torch.randn(5, SIZE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    space, generator = glora.SearchSpace(ranks=(8, 4, 2)), torch.Generator().manual_seed(0)
    parameters = glora.trainable_parameters(model)
    for _ in range(30):
        glora.set_paths(model, glora.sample_paths(model, space, generator))
        got = torch.autograd.grad(compiled(x).square().sum(), parameters)
        want = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_unread_tensors_are_left_alone():
    """Between backward and step: AdamW would move a tensor whose gradient is zero by its weight decay."""
    model, x = make(), torch.randn(5, SIZE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    path = glora.PathConfig(A="vector", B="lora_4")
    glora.set_paths(model, dict.fromkeys(glora.get_paths(model), path))
    optimizer = torch.optim.AdamW(glora.trainable_parameters(model), weight_decay=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compiled(x).square().sum().backward()
    glora.drop_unread_gradients(model)
    optimizer.step()
    read = {id(p) for layer in glora.glora_layers(model).values() for p in layer.support_parameters(path)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in read), name


def test_path_as_data_follows_the_layer():
    """Through copies, pickles and moves; it is no entry of the state dict."""
    import copy
    import pickle

    model = make()
    path = glora.PathConfig(A="constant", C="lora_2")
    glora.set_paths(model, dict.fromkeys(glora.get_paths(model), path))
    x = torch.randn(5, SIZE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
    assert not any("config" in name for name in model.state_dict())


def test_autocast():
    """After a plain linear layer, whose output is bf16 there."""
    model, x = make(), torch.randn(5, SIZE)
    both = nn.Sequential(nn.Linear(SIZE, SIZE), model)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, want = compiled(x), both(x)
    assert found.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(found, want)


def test_path_set_in_inference_mode_can_be_trained():
    model, x = make(), torch.randn(5, SIZE)
    with torch.inference_mode():
        glora.set_paths(model, dict.fromkeys(glora.get_paths(model), glora.PathConfig(B="lora_2")))
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()


def test_one_graph_for_a_vit():
    """As timm makes it, whole: attention, norms, head and all."""
    model, x = glora.inject(tiny_vit(), 4), torch.randn(2, 1, 8, 8, generator=generator())
    randomize(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    parameters, gen = glora.trainable_parameters(model), generator()
    for _ in range(10):
        glora.set_paths(model, glora.sample_paths(model, glora.SearchSpace((4, 2)), gen))
        got = torch.autograd.grad(compiled(x).square().sum(), parameters)
        want = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


class Checkpointed(nn.Module):
    def __init__(self, body, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


FIRST, SECOND = glora.PathConfig("lora_4", "vector"), glora.PathConfig("vector", "lora_8", E="vector")


def gradients(model, run, changed):
    """Under one path; ``changed``: with another one set before backward."""
    model.zero_grad()
    glora.set_paths(model, dict.fromkeys(glora.get_paths(model), FIRST))
    loss = run(torch.ones(5, SIZE, requires_grad=True)).square().sum()
    if changed:
        glora.set_paths(model, dict.fromkeys(glora.get_paths(model), SECOND))
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def assert_close(found, want):
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-5)


def test_checkpoint_inside_of_a_graph_keeps_the_path():
    model = make()
    compiled = torch.compile(Checkpointed(model, False), fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, compiled, True), gradients(model, model, True))


def make_convolutions():
    net = nn.Sequential(nn.Unflatten(1, (SIZE, 1, 1)), nn.Conv2d(SIZE, SIZE, 1), nn.GELU(), nn.Conv2d(SIZE, 4, 1))
    model = glora.inject(net, rank=8, convolutions=True)
    for parameter in glora.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("make", [make, make_convolutions], ids=["linear", "convolutions"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_a_graph_is_refused_rather_than_wrong(use_reentrant, make):
    model = make()
    run = Checkpointed(torch.compile(model, fullgraph=True, backend="aot_eager"), use_reentrant)
    assert_close(gradients(model, run, False), gradients(model, model, False))
    with pytest.raises(RuntimeError, match="config: expected that of the forward pass which this backward pass runs"):
        gradients(model, run, True)


def test_a_pickle_carries_no_numbers_of_nodes():
    """They mean nothing in another process, where a checkpoint around its graph would be refused for them."""
    import pickle

    model = make()
    for _ in range(3):
        gradients(model, model, True)
    other = pickle.loads(pickle.dumps(model))
    assert {int(layer._config[-1, 0]) for layer in glora.glora_layers(other).values()} == {0}
    assert all(int(layer._config[-1, 0]) > 0 for layer in glora.glora_layers(model).values())


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_convolutions_have_one_graph_for_every_path(product):
    """With and without a bias of their own; the head is a linear layer. Gradients as without a compiler."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 6, 2, 2, bias=False, groups=2))
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(24, 4))
    model = glora.inject(net, rank=4, product=product, convolutions=True)
    for parameter in glora.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    space, generator = glora.SearchSpace(ranks=(4, 2)), torch.Generator().manual_seed(0)
    parameters, x = glora.trainable_parameters(model), torch.randn(2, 3, 4, 4)
    for _ in range(15):
        glora.set_paths(model, glora.sample_paths(model, space, generator))
        got = torch.autograd.grad(compiled(x).square().sum(), parameters)
        want = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_a_penalty_on_what_a_path_reads_is_traced():
    layer = glora.GLoRALinear(SIZE, SIZE)
    randomize(layer)

    def loss(x):
        return layer(x).sum() + sum(parameter.sum() for parameter in layer.support_parameters(layer.path))

    x = torch.randn(2, SIZE)
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(x), loss(x))
