"""Real CUDA graphs: captured once, replayed for every path, as the ordinary loop on the same GPU."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import glora
from glora.graphs.capture import CudaGraphs
from glora.training.batches import batches as batches_of
from glora_kernels import use_backend
from tests.glora.toys import generator

if not torch.cuda.is_available():
    pytest.skip(
        "no GPU here: captures ran over an emulation only (tests/glora/graphs/test_graphed.py)", allow_module_level=True
    )

SPACE = glora.SearchSpace((8, 4))
MODES = ("whole", "piecewise")
SIZE, CLASSES = 64, 8


def make(product, dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(SIZE, 96), nn.GELU(), nn.Linear(96, 96, bias=False), nn.GELU(), nn.Linear(96, SIZE)]
    model = nn.Sequential(*layers, nn.Linear(SIZE, CLASSES))
    model = glora.inject(model, rank=8, product=product, exclude=("5",)).to("cuda", dtype)
    for parameter in glora.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def batches(count, dtype):
    gen = generator(1)
    for _ in range(count):
        x, target = torch.randn(32, SIZE, generator=gen), torch.randint(CLASSES, (32,), generator=gen)
        yield x.to("cuda", dtype), target.cuda()


def adamw(model):
    rate = torch.tensor(0.02, device="cuda")
    return torch.optim.AdamW(glora.trainable_parameters(model), lr=rate, weight_decay=0.3, capturable=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_200_random_paths(mode, product, backend, monkeypatch):
    captures = []
    capture = CudaGraphs.capture
    monkeypatch.setattr(CudaGraphs, "capture", lambda self, function: captures.append(1) or capture(self, function))
    model = make(product, torch.float32)
    optimizer = torch.optim.SGD(glora.trainable_parameters(model), lr=0.0)
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE, mode=mode)
    parameters = glora.trainable_parameters(model)
    with use_backend(backend):
        for x, target in batches(200, torch.float32):
            loss = step(x, target)
            found = [parameter.grad for parameter in parameters]
            with glora.using_paths(model, step.paths):
                want = F.cross_entropy(model(x), target)
                expected = torch.autograd.grad(want, parameters, allow_unused=True)
            torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
            for gradient, other in zip(found, expected):
                if other is None:
                    assert gradient is None or not gradient.count_nonzero()
                else:
                    torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)
    assert len(captures) == (mode == "whole")


@pytest.mark.parametrize("compiler", [None, partial(torch.compile, fullgraph=True)], ids=["eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
def test_fifty_steps_of_the_ordinary_loop(mode, compiler):
    if compiler is not None and mode == "piecewise":
        pytest.skip("pieces are chosen by the host")
    model = make("hadamard", torch.float64)
    other = copy.deepcopy(model)
    optimizer, reference = adamw(model), adamw(other)
    step = glora.GraphedStep(model, optimizer, F.cross_entropy, SPACE, mode=mode, clip_norm=1.0, compiler=compiler)
    for x, target in batches(50, torch.float64):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss = step(x, target)
        glora.set_paths(other, step.paths)
        reference.zero_grad()
        want = F.cross_entropy(other(x), target)
        want.backward()
        nn.utils.clip_grad_norm_(glora.trainable_parameters(other), 1.0)
        reference.step()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=1e-8)
        read = {id(parameter) for parameter in glora.trainable_parameters(model, step.paths)}
        for name, parameter in model.named_parameters():
            assert id(parameter) in read or torch.equal(parameter, before[name]), name
    for found, expected in zip(glora.trainable_parameters(model), glora.trainable_parameters(other)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_replays_allocate_nothing():
    model = make("hadamard", torch.float32)
    step = glora.GraphedStep(model, adamw(model), F.cross_entropy, SPACE)
    held = []
    for x, target in batches(20, torch.float32):
        step(x, target)
        held.append(torch.cuda.memory_allocated())
    assert max(held[5:]) <= held[4]


def trained(graphs, checkpoint=None, stop=None, **options):
    model = make("hadamard", torch.float64)
    gen = generator(2)
    data = TensorDataset(torch.randn(64, SIZE, generator=gen).double(), torch.randint(CLASSES, (64,), generator=gen))
    recipe = glora.Recipe(steps=60, batch_size=16, lr=2e-3, clip_norm=1.0, checkpoint_every=20)
    summary = glora.train(
        model, data, recipe, space=SPACE, checkpoint=checkpoint, graphs=graphs, on_step=stop, progress=False, **options
    )
    assert summary.graphs == {"auto": "piecewise"}.get(graphs, graphs)
    return summary.losses, model.state_dict()


@pytest.mark.parametrize("graphs", ["auto", "whole"])
def test_training_is_that_without_graphs(graphs, tmp_path):
    """Sixty steps, of which the loss is read late; again after a cut, at which it is read at once."""
    losses, tensors = trained("off")
    found, others = trained(graphs)
    near = 1e-9 if graphs == "auto" else 1e-4  # in one graph AdamW's rates are fp32
    assert found == pytest.approx(losses, rel=near)
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=near, atol=near, msg=name)

    def stop(step, loss):
        if step == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(graphs, tmp_path / "run.pt", stop)
    again, resumed = trained(graphs, tmp_path / "run.pt")
    assert again == found
    assert all(torch.equal(resumed[name], tensor) for name, tensor in others.items())


def test_a_batch_is_indexed_on_the_gpu():
    """The data set is there, so that no batch is copied from the host."""
    data = TensorDataset(torch.randn(64, SIZE), torch.arange(64))
    recipe = glora.Recipe(steps=9, batch_size=10)
    expected = list(batches_of(data, recipe, 0))
    device = torch.zeros((), device="cuda").device
    found = list(batches_of(data, recipe, 0, device=device))
    assert all(part.device == device for batch in found for part in batch)
    assert all(torch.equal(x.cpu(), y) for batch, own in zip(found, expected, strict=True) for x, y in zip(batch, own))


class Named(nn.Module):
    """Takes its inputs by name, and forms its own loss, as models of Transformers do."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, values, labels):
        logits = self.body(values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_samples_as_dictionaries():
    """Batches of named inputs and the model's own loss, in pieces, as without graphs."""
    gen = generator(5)
    rows = [
        {"values": torch.randn(SIZE, generator=gen, dtype=torch.float64), "labels": index % CLASSES}
        for index in range(64)
    ]
    recipe = glora.Recipe(steps=20, batch_size=16, lr=5e-3)
    losses, models = {}, {}
    for graphs in ("auto", "off"):
        models[graphs] = Named(make("hadamard", torch.float64))
        found = glora.train(models[graphs], rows, recipe, space=SPACE, graphs=graphs, progress=False)
        losses[found.graphs] = found.losses
    assert losses["piecewise"] == pytest.approx(losses["off"], rel=1e-9)
    for one, other in zip(models["auto"].parameters(), models["off"].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
