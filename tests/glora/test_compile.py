"""torch.compile: one graph serves every path; training it leaves what is not read alone."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import glora

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
    model = glora.inject(Net(), rank=8, product=product, exclude=())
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
