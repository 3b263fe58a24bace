"""Inputs formed again in backward: the same bits, nothing kept twice, and x itself kept wherever it has to be."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench.counting import saved_bytes
from glora import GLoRALinear, PathConfig
from glora_kernels import (
    Terms,
    Vector,
    blocked_linear,
    glora_linear,
    recompute_inputs,
    reference,
    row_scaled_linear,
    use_backend,
)
from glora_kernels.ops import recompute
from tests.glora.toys import randomize
from tests.helpers import make_call, results, upstream
from tests.kernels.ops.test_row_blocks import Blocks

SHAPE = (70, 65, 66)  # enough tokens and inputs for y to be kept where A is a vector
K = SHAPE[2]
PATHS = {
    "all low rank": ("lora_3", "lora_3", "lora_3", "vector", "constant"),
    "A low rank": ("lora_1", "none", "none", "none", "vector"),
    "A vector": ("vector", "lora_3", "none", "vector", "none"),
    "A constant": ("constant", "vector", "vector", "constant", "vector"),
    "B low rank": ("none", "lora_3", "none", "none", "none"),
    "token sums": ("none", "vector", "none", "none", "vector"),
    "no x": ("none", "none", "lora_3", "vector", "vector"),
}
READ_X = [name for name in PATHS if name not in ("token sums", "no x")]
LOW_RANK = PATHS["all low rank"]
MAKERS = {
    "gelu": F.gelu,
    "tanh gelu": lambda h: F.gelu(h, approximate="tanh"),
    "layer norm": lambda h: F.layer_norm(h, (K,), *affine(h), 1e-6),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Of x; and norms are tried anew in each test."""
    monkeypatch.setattr(recompute, "_forming", {})
    monkeypatch.setattr(recompute, "FEWEST_ELEMENTS", 0)


def affine(h):
    """The weight and bias of a norm; with statistics in fp32 where the input is of a half type."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    return torch.linspace(0.5, 2, K, dtype=dtype), torch.linspace(-1, 1, K, dtype=dtype)


def made(h, make):
    """x as the output of ``make``, whose input is no leaf."""
    return make(h * 1.5)


def through(make, function=glora_linear, enabled=True):
    """``function`` of ``make(h)``, as a function of h; nothing but autograd has the output of ``make`` afterwards."""

    def composed(h, *rest):
        with recompute_inputs(enabled):
            return function(made(h, make), *rest)

    return composed


def assert_same_bits(found, want):
    assert found.keys() == want.keys()
    for name in want:
        assert found[name] is want[name] is None or torch.equal(found[name], want[name]), name


def keeps_x(x, *rest, function=glora_linear):
    """Whether the node of a layer saves x itself."""
    saved = function(x, *rest).grad_fn.saved_tensors
    return any(t is not None and t.data_ptr() == x.data_ptr() for t in saved)


def a_call(path=LOW_RANK, **options):
    return make_call(path, SHAPE, **{"dtype": torch.float32, **options})


@each_path
@each_maker
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_bits(path, make, product, dtype):
    call = a_call(path, product=product, dtype=dtype, leading=(2, 35))
    dy = upstream(call)
    assert_same_bits(results(through(make), *call, dy), results(through(make, enabled=False), *call, dy))


@each_path
@each_maker
def test_x_is_freed_where_it_is_not_kept(path, make):
    h, *rest = a_call(path)
    for enabled in (True, False):
        with recompute_inputs(enabled):
            x = made(h, make)
            alive, y = weakref.ref(x), glora_linear(x, *rest)
            del x
            reads_x = path in [PATHS[name] for name in READ_X]
            assert (alive() is not None) == (reads_x and not enabled)
            assert y.grad_fn is not None


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(96)], ids=["gelu", "gelu and layer norm"])
def test_bytes_kept_for_backward(norm):
    """Of a small perceptron: exactly the output of the GELU less, and that of the norm."""
    first, second = GLoRALinear(96, 128, rank=2), GLoRALinear(128, 96, rank=2)
    model = nn.Sequential(nn.Linear(96, 96), norm(), first, nn.GELU(), nn.Dropout(0.0), second)
    tokens = torch.randn(50, 96)
    kept = {}
    for enabled in (True, False):
        with recompute_inputs(enabled):
            kept[enabled] = saved_bytes(lambda: model(tokens), (tokens,), "cpu")
    spared = 128 + (96 if len(list(model[1].parameters())) else 0)
    assert kept[False] - kept[True] == spared * 50 * 4


def test_a_small_input_is_kept(monkeypatch):
    monkeypatch.undo()
    h, *rest = a_call()
    assert keeps_x(F.gelu(h), *rest)
    monkeypatch.setattr(recompute, "FEWEST_ELEMENTS", h.numel())
    assert not keeps_x(F.gelu(h), *rest)


# -- where x has to be kept --------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def changed_unseen(x):
    with torch.no_grad():
        x.mul_(2)
    return x


def changed_before(h, make):
    """``make`` of h, which is changed then; x is right, and the backward pass of ``make`` is not possible."""
    h = h * 1.5
    x = make(h)
    with torch.no_grad():
        h.mul_(2)
    return x


def released(h, make):
    """x, whose maker's backward has run for another reader of x."""
    x = make(h * 1.5)
    x.sum().backward(inputs=[h])
    h.grad = None
    return x


def hooked(h, make):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: pytest.fail("unpacked")):
        return make(h)


KEPT = {
    "a view": lambda h, make: made(h, make).view(h.shape),
    "a slice": lambda h, make: made(h, make)[:7],
    "a cast": lambda h, make: made(h.double(), make).float(),
    "changed in place": lambda h, make: made(h, make).mul_(2),
    "changed in place unseen": lambda h, make: changed_unseen(made(h, make)),
    "h changed": changed_before,
    "released": released,
    "without grad": lambda h, make: made(h.detach(), make),
    "detached": lambda h, make: made(h, make).detach().requires_grad_(),
    "a subclass": lambda h, make: made(h.as_subclass(Subclass), make),
    "another operation": lambda h, make: F.silu(h),
    "hooks at its maker": hooked,
}


@each_maker
@pytest.mark.parametrize("way", KEPT.values(), ids=KEPT)
def test_x_itself_is_kept(way, make):
    h, *rest = a_call()
    x = way(h, make)
    assert keeps_x(x, *rest)
    storages = rest[-1].storages
    dy = torch.randn(*x.shape[:-1], SHAPE[1])
    want = torch.autograd.grad(glora_linear(x.detach().as_subclass(torch.Tensor), *rest), storages, dy)
    found = torch.autograd.grad(glora_linear(x, *rest), storages, dy)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize(
    "norm",
    [
        lambda h: F.layer_norm(h, (2, K), torch.ones(2, K), torch.ones(2, K)),
        lambda h: F.layer_norm(h, (K,)),
        lambda h: F.layer_norm(h, (K,), torch.ones(K)),
        lambda h: F.layer_norm(h.transpose(0, 1), (K,), torch.ones(K), torch.ones(K)),
    ],
    ids=["two dimensions", "no weight", "no bias", "strides"],
)
def test_a_norm_that_is_not_formed_again(norm):
    h, *rest = a_call(leading=(35, 2))
    assert keeps_x(norm(h), *rest)


def test_a_norm_elsewhere_than_on_a_cpu_is_not_formed_again():
    x, weight, bias, terms = (
        t.map(lambda t: t.detach().to("meta").requires_grad_()) if isinstance(t, Terms) else t.detach().to("meta")
        for t in a_call()
    )
    x.requires_grad_()
    affine = torch.ones(2, K, device="meta")
    assert glora_linear(F.layer_norm(x, (K,), *affine), weight, bias, terms).grad_fn.form_x is None
    assert glora_linear(F.gelu(x), weight, bias, terms).grad_fn.form_x is not None


def test_a_norm_with_rounded_statistics_is_not_formed_again():
    """On a CPU those of a half type with a weight of its type; on a GPU none are."""
    h, *rest = a_call(dtype=torch.bfloat16)
    x = F.layer_norm(h, (K,), *(t.bfloat16() for t in affine(h)))
    assert keeps_x(x, *rest)


def test_a_norm_that_rounds_in_another_way_is_not_formed_again(monkeypatch):
    h, *rest = a_call()
    monkeypatch.setattr(recompute, "_norm", lambda h, mean, rstd, weight, bias: ((h - mean) * rstd) * weight + bias)
    assert keeps_x(MAKERS["layer norm"](h), *rest)
    assert list(recompute._forming.values()) == [False]


def test_a_norm_is_tried_once_for_each_size(monkeypatch):
    tried = []
    monkeypatch.setattr(recompute, "_try_norm", lambda *key: tried.append(key) or True)
    for dtype in (torch.float32, torch.float64) * 2:
        h, *rest = a_call(dtype=dtype)
        assert not keeps_x(MAKERS["layer norm"](h), *rest)
    assert len(tried) == len(set(tried)) == 2


@each_maker
def test_hooks_at_the_layer_see_x(make):
    """Offloading moves x, as it would without."""
    h, *rest = a_call()
    x, seen = made(h, make), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        glora_linear(x, *rest)
    assert x.data_ptr() in seen


# -- what happens between forward and backward -------------------------------------------------------------------------


@each_maker
def test_x_may_be_overwritten_afterwards(make):
    call = a_call()
    h, *rest = call
    dy = upstream(call)
    want = results(through(make), *call, dy)
    x = made(h, make)
    y = glora_linear(x, *rest)
    with torch.no_grad():
        x.zero_()
    grads = torch.autograd.grad(y, [h, *rest[-1].storages], dy)
    assert all(map(torch.equal, grads, list(want.values())[1:]))


@each_maker
def test_h_may_not_be_overwritten_afterwards(make):
    h, *rest = a_call()
    before = h * 1.5
    y = glora_linear(make(before), *rest)
    with torch.no_grad():
        before.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), rest[-1].storages)


@each_maker
def test_x_that_is_there_is_not_formed_again(make, monkeypatch):
    h, *rest = a_call()
    x = made(h, make)
    y = glora_linear(x, *rest)
    monkeypatch.setattr(recompute.FormAgain, "__slots__", ())
    monkeypatch.setattr(y.grad_fn.form_x, "_function", lambda *_: pytest.fail("formed again"))
    y.sum().backward()
    assert x.grad_fn is not None


@each_maker
def test_backward_twice(make):
    h, *rest = a_call()
    y = through(make)(h, *rest)
    storages = rest[-1].storages
    first = torch.autograd.grad(y.sum(), [h, *storages], retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), [h, *storages]), first))


@each_maker
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_second_derivatives(make, product):
    """In h, x being gone, and in every storage."""
    h, weight, bias, terms = make_call(LOW_RANK, (4, 5, K), product=product, dtype=torch.float64)

    def penalty(function, h):
        y = through(make, function)(h, weight, bias, terms)
        grads = torch.autograd.grad(y.square().sum(), [h, *terms.storages], create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(total, [h, *terms.storages])

    for found, want in zip(penalty(glora_linear, h), penalty(reference.glora_linear, h)):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@each_maker
def test_second_derivatives_in_x(make):
    """x is held by the caller, so that they go through it."""
    h, weight, bias, terms = make_call(LOW_RANK, (4, 5, K))

    def second(function):
        x = made(h, make)
        y = function(x, weight, bias, terms)
        (grad,) = torch.autograd.grad(y.square().sum(), terms.storages[:1], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, h])

    for found, want in zip(second(glora_linear), second(reference.glora_linear)):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@each_maker
def test_third_derivatives(make):
    h, weight, bias, terms = make_call(("vector", "lora_1", "none", "none", "none"), (2, 2, K), dtype=torch.float64)

    def third(function):
        y, first = through(make, function)(h, weight, bias, terms), terms.storages[0]
        grad = y.square().sum()
        for _ in range(2):
            grad = sum(g.sin().sum() for g in torch.autograd.grad(grad, [h, first], create_graph=True))
        return torch.autograd.grad(grad, [h, first])

    for found, want in zip(third(glora_linear), third(reference.glora_linear)):
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-8)


def test_second_derivatives_in_the_weight_of_a_norm():
    h, *rest = make_call(LOW_RANK, (4, 5, K))
    norm = nn.LayerNorm(K, dtype=torch.float64)

    def second(function):
        y = through(norm, function)(h, *rest)
        (grad,) = torch.autograd.grad(y.square().sum(), rest[-1].storages[:1], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [h, norm.weight, norm.bias])

    for found, want in zip(second(glora_linear), second(reference.glora_linear)):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@each_maker
def test_gradients_batched_by_vmap(make):
    h, *rest = a_call(dtype=torch.float64)
    basis = torch.eye(SHAPE[1], dtype=torch.float64)[:3].unsqueeze(1).expand(3, SHAPE[0], -1)

    def batched(function):
        y = through(make, function)(h, *rest)
        return torch.autograd.grad(y, [h, *rest[-1].storages], basis, is_grads_batched=True)

    for found, want in zip(batched(glora_linear), batched(reference.glora_linear)):
        torch.testing.assert_close(found, want)


@each_maker
def test_hooks_on_x_and_its_gradient(make):
    """Hooks run once and may change the gradient."""
    h, *rest = a_call()
    found = {}
    for enabled in (True, False):
        x, seen = made(h, make), []
        x.register_hook(lambda grad, seen=seen: seen.append(grad) or grad * 2)
        x.retain_grad()
        with recompute_inputs(enabled):
            (grad,) = torch.autograd.grad(glora_linear(x, *rest).sum(), h, retain_graph=True)
            glora_linear(x, *rest).sum().backward()
        assert len(seen) == 2
        found[enabled] = {"h": grad, "seen": seen[0], "x": x.grad}
    assert_same_bits(found[True], found[False])


@each_maker
def test_another_reader_of_x(make):
    h, *rest = a_call()
    other = torch.randn(3, K, requires_grad=True)
    found = {}
    for enabled in (True, False):
        with recompute_inputs(enabled):
            x = made(h, make)
            total = glora_linear(x, *rest).sum() + F.linear(x, other).square().sum()
            del x
        names = "h", "other", *map(str, range(len(rest[-1].storages)))
        found[enabled] = dict(zip(names, torch.autograd.grad(total, [h, other, *rest[-1].storages])))
    assert_same_bits(found[True], found[False])


def perceptron():
    first, second = GLoRALinear(K, 80, rank=2), GLoRALinear(80, K, rank=2)
    for layer in (first, second):
        randomize(layer)
    return nn.Sequential(nn.LayerNorm(K), first, nn.GELU(), second)


def grads_of(model, forward, x):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = forward(x)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **found}


CHECKPOINTED = {
    "whole": lambda model, run: lambda x: run(model, x),
    "layers": lambda model, run: lambda x: run(model[3], model[2](run(model[1], model[0](x)))),
    "makers": lambda model, run: lambda x: model[3](run(model[2], model[1](run(model[0], x)))),
    "maker and layer": lambda model, run: lambda x: run(model[2:], run(model[:2], x)),
}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("split", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointing(split, use_reentrant):
    """The layer, its maker or both within a checkpoint; each checkpoint runs forward again once."""
    model, x, runs = perceptron(), torch.randn(70, K), []

    def run(part, x):
        def counted(x):
            runs.append(part)
            return part(x)

        return checkpoint(counted, x, use_reentrant=use_reentrant)

    with recompute_inputs(False):
        want = grads_of(model, model, x)
    forward = split(model, run)
    assert_same_bits(grads_of(model, forward, x), want)
    assert len(runs) == 2 * len(set(map(id, runs))) or len(runs) == 4


def test_offloading():
    model, x = perceptron(), torch.randn(70, K)
    want = grads_of(model, model, x)
    with torch.autograd.graph.save_on_cpu():
        found = grads_of(model, model, x)
    assert_same_bits(found, want)


def test_prepared_layers():
    """Calls of a layer that has run before, with another path each time."""
    model, x = perceptron(), torch.randn(70, K)
    for path in (
        PathConfig("vector", "lora_2"),
        PathConfig(),
        PathConfig(A="lora_1", C="vector"),
        PathConfig(B="lora_2"),
    ):
        for layer in (model[1], model[3]):
            layer.path = path
        for _ in range(2):
            found = grads_of(model, model, x)
            with recompute_inputs(False):
                want = grads_of(model, model, x)
            assert_same_bits(found, want)


def test_autocast():
    """The layer's input is the bf16 output of a GELU; that of the norm is cast, and so kept."""
    model, x = perceptron(), torch.randn(70, K)
    kept = []

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            x = model[2](model[1](model[0](x)))
            alive, y = weakref.ref(x), model[3](x)
            del x
        kept.append(alive() is not None)
        return y

    found = grads_of(model, forward, x)
    with recompute_inputs(False):
        assert_same_bits(found, grads_of(model, forward, x))
    assert kept == [False, True]


# -- modes -------------------------------------------------------------------------------------------------------------


@each_maker
def test_transforms(make):
    h, *rest = a_call(dtype=torch.float64)

    def loss(function):
        return lambda h: through(make, function)(h, *rest).square().sum()

    h = h.detach()
    for way in (
        lambda f: torch.func.grad(f)(h),
        lambda f: torch.func.vmap(f)(torch.stack([h, 2 * h])),
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([h, 2 * h])),
        lambda f: torch.func.jvp(f, (h,), (h,))[1],
    ):
        torch.testing.assert_close(way(loss(glora_linear)), way(loss(reference.glora_linear)))


@each_maker
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(make, mode):
    h, *rest = a_call()
    want = through(make)(h, *rest)
    with mode():
        assert torch.equal(through(make)(h, *rest), want)


@each_maker
def test_tensors_without_values(make):
    h, weight, bias, terms = a_call()

    def to_meta(tensor):
        return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)

    with torch.device("meta"):
        x = made(to_meta(h), make)
        y = glora_linear(x, to_meta(weight), to_meta(bias), terms.map(to_meta))
        del x
    assert torch.autograd.grad(y.sum(), y.grad_fn.saved_tensors[:1])[0].shape == h.shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(h)
        y = through(make)(fake, weight, bias, terms)
        assert torch.autograd.grad(y.sum(), fake)[0].shape == h.shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    model, x = perceptron(), torch.randn(70, K)
    want = grads_of(model, model, x)
    torch._dynamo.reset()
    found = grads_of(model, torch.compile(model, backend=backend, fullgraph=True), x)
    for name in want:
        if want[name] is not None:
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-4)


def test_a_compiled_maker():
    """What a compiled graph makes has another node."""
    h, *rest = a_call()
    torch._dynamo.reset()
    compiled = torch.compile(F.gelu, backend="aot_eager")
    assert keeps_x(compiled(h), *rest)


# -- other functions ---------------------------------------------------------------------------------------------------


@each_maker
def test_a_weight_by_blocks_of_rows(make):
    call = a_call(leading=(2, 35))

    def blocked(x, weight, bias, terms):
        return blocked_linear(x, Blocks(weight), bias, terms)

    dy = upstream(call)
    assert_same_bits(results(through(make, blocked), *call, dy), results(through(make, blocked, False), *call, dy))
    h, *rest = call
    assert not keeps_x(made(h, make), *rest, function=blocked)


@each_maker
def test_a_row_scale_in_a_graph(make):
    x, weight, bias, terms = a_call(("none", "lora_3", "lora_3", "vector", "none"), leading=(2, 35))
    scale = Vector(torch.linspace(-1, 1, SHAPE[1]).requires_grad_())
    call = x, weight, bias, replace(terms, A=scale)
    dy = upstream(call)
    found, want = (results(through(make, row_scaled_linear, on), *call, dy) for on in (True, False))
    assert_same_bits(found, want)
    h, *rest = call
    x = made(h, make)
    alive, y = weakref.ref(x), row_scaled_linear(x, *rest)
    del x
    assert alive() is None and y.grad_fn is not None


def test_the_reference_keeps_what_autograd_keeps():
    h, *rest = a_call()
    with use_backend("reference"):
        through(F.gelu)(h, *rest).sum().backward()
    assert h.grad is not None


# -- the switch --------------------------------------------------------------------------------------------------------


def test_the_innermost_choice_of_the_thread_counts():
    h, *rest = a_call()

    def kept():
        return keeps_x(F.gelu(h), *rest)

    in_a_thread = []
    with recompute_inputs(False):
        assert kept()
        with recompute_inputs(True):
            assert not kept()
        assert kept()
        thread = threading.Thread(target=lambda: in_a_thread.append(kept()))
        thread.start()
        thread.join()
    assert not kept()
    assert in_a_thread == [False]


def test_backward_keeps_the_choice_of_forward():
    call = a_call()
    h, *rest = call
    with recompute_inputs(False):
        want = results(through(F.gelu), *call, upstream(call))
    y = through(F.gelu)(h, *rest)
    with recompute_inputs(False):
        grads = torch.autograd.grad(y, [h, *rest[-1].storages], upstream(call))
    assert all(map(torch.equal, grads, list(want.values())[1:]))


def test_terms_that_read_nothing():
    h, weight, bias, _ = a_call()
    y = through(F.gelu)(h, weight, bias, Terms())
    y.sum().backward()
    assert h.grad is not None
