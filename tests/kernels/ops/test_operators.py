"""The operators of torch.library: the same results as glora_linear, schema, fake and autograd registrations."""

import pytest
import torch

from glora_kernels import Terms, configured_linear, encode, glora_linear, use_backend
from glora_kernels.path_encoding import STORAGES, decode, pack
from glora_kernels.torch_private import next_node
from tests.helpers import ALL_PATHS, make_call

PATHS = [
    ("lora_3", "lora_1", "vector", "vector", "constant"),
    ("vector", "none", "lora_3", "none", "vector"),
    ("constant", "vector", "none", "constant", "none"),
    ("none", "constant", "vector", "none", "constant"),
    ("none",) * 5,
]
NONE_READ = encode({})


def make(path, product="hadamard", *, bias=True, dtype=torch.float64, leading=(2, 3)):
    """``(x, weight, bias, storages, config)``: all eight storages, also those that are not read."""
    full = make_call(("lora_3", "lora_3", "lora_3", "vector", "vector"), leading=leading, product=product, dtype=dtype)
    x, weight, b0, _ = make_call(path, leading=leading, product=product, dtype=dtype, bias=bias)
    storages = [s.detach().nan_to_num(0.3).requires_grad_() for s in pack(full[3])[0]]
    kinds = {slot: choice.partition("_") for slot, choice in zip("ABCDE", path)}
    config = encode({slot: (kind, int(rank or 0)) for slot, (kind, _, rank) in kinds.items()})
    return x, weight, b0, storages, config


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_equals_glora_linear(product, bias):
    """Every 7th of the 900 paths; the gradient of what is not read is zero."""
    for path in ALL_PATHS[::7]:
        x, weight, b0, storages, config = make(path, product, bias=bias)
        y = configured_linear(x, weight, b0, storages, config, product)
        want = glora_linear(x, weight, b0, decode(storages, config, product))
        torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
        leaves = [x, *storages]
        got = torch.autograd.grad(y.square().sum(), leaves)
        expected = torch.autograd.grad(want.square().sum(), leaves, allow_unused=True)
        for name, g, w in zip(("x", *STORAGES), got, expected):
            w = torch.zeros_like(g) if w is None else w
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10, msg=f"{path} {name}")


def test_the_reference_backend_can_be_trained():
    """Its gradients are those of the closed form."""
    for path in PATHS:
        call = make(path)
        leaves, found = [call[0], *call[3]], []
        for backend in ("reference", "torch"):
            with use_backend(backend):
                y = configured_linear(*call)
                found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*found)


def test_a_weight_without_rows():
    gradient = []
    for function in (configured_linear, lambda *call: glora_linear(*call[:3], decode(*call[3:], "hadamard"))):
        storages = [torch.ones(0, 2), torch.ones(2, 6, requires_grad=True), *[None] * 6]
        x = torch.ones(5, 6, requires_grad=True)
        y = function(x, torch.ones(0, 6), None, storages, encode({"A": ("lora", 2)}))
        gradient.append(torch.autograd.grad(y.sum(), [x, storages[1]]))
    assert all(g.count_nonzero() == 0 and torch.equal(g, w) for g, w in zip(*gradient))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own, of its copies
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_opcheck(path, product):
    x, weight, b0, storages, config = make(path, product, dtype=torch.float32)
    strided = x.detach().transpose(0, 1).requires_grad_()
    for tokens, bias in ((x, b0), (strided, None)):
        torch.library.opcheck(torch.ops.glora.linear, (tokens, weight, bias, *storages, config, product))
        detached = [None if s is storages[-1] else s.detach() for s in storages]
        config_without_e = config.clone()
        config_without_e[-1] = 0
        needs = [True, *(s is not None for s in detached)]
        dy = torch.randn(*tokens.shape[:-1], weight.shape[0])
        operands = (dy, tokens.detach(), weight, bias, *detached, config_without_e, product, needs)
        torch.library.opcheck(torch.ops.glora.linear_backward, operands)


def test_only_needed_gradients():
    x, weight, b0, storages, config = make(PATHS[0])
    for leaf in (x, *storages[1:]):
        leaf.requires_grad_(False)
    y = configured_linear(x, weight, b0, storages, config)
    y.sum().backward()
    assert storages[0].grad is not None
    assert all(leaf.grad is None for leaf in (x, *storages[1:]))


def test_dtypes_and_empty_batches():
    x, weight, b0, storages, config = make(PATHS[0], dtype=torch.bfloat16)
    wide = [s.detach().float().requires_grad_() for s in storages]
    y = configured_linear(x[:0], weight, b0, wide, config)
    y.sum().backward()
    assert (y.shape, y.dtype) == ((0, 3, 7), torch.bfloat16)
    assert all(s.grad.dtype == torch.float32 and s.grad.count_nonzero() == 0 for s in wide)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias, storages, config):
            return configured_linear(x, weight, bias, storages, config)

    x, weight, b0, storages, config = make(PATHS[0], dtype=torch.float32)
    arguments = (x.detach(), weight, b0, [s.detach() for s in storages], config)
    program = torch.export.export(Layer(), arguments)
    other = make(PATHS[1], dtype=torch.float32)[4]
    found = program.module()(*arguments[:-1], other)
    torch.testing.assert_close(found, configured_linear(*arguments[:-1], other))


def test_pack_is_the_inverse_of_decode():
    for path in ALL_PATHS[::5]:
        terms = make_call(path, product="matmul")[3]
        storages, config = pack(terms)
        again = decode(storages, config, "matmul")
        assert [slot for slot, _ in again.active] == [slot for slot, _ in terms.active]
        assert all(a is b for a, b in zip(again.flatten()[0], terms.flatten()[0]))
        assert torch.equal(pack(again)[1], config)


def test_a_configuration_may_say_since_when_it_holds():
    """Run again in backward for an earlier node, it is refused; for a later one, and outside, it is not read."""
    x, weight, b0, storages, _ = make(PATHS[0])
    early = x.detach().clone().requires_grad_().sin()
    since = next_node()
    late = x.detach().clone().requires_grad_().sin()
    plain, dated = encode({"B": ("lora", 2)}), encode({"B": ("lora", 2)}, since)
    want, found = configured_linear(x, weight, b0, storages, plain), []

    def again(_):
        found.append(configured_linear(x, weight, b0, storages, dated))

    early.register_hook(again)
    late.register_hook(again)
    assert torch.equal(configured_linear(x, weight, b0, storages, dated), want)
    late.sum().backward()
    assert torch.equal(*found, want)
    with pytest.raises(RuntimeError, match="config: expected that of the forward pass which this backward pass runs"):
        early.sum().backward()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), r"config: expected shape \(5, 2\) or \(6, 2\), got \(4, 2\)"),
        (torch.zeros(5, 2, dtype=torch.int64, device="meta"), "config: expected a CPU tensor, got one on meta"),
        (NONE_READ + 9, "config: A: expected a kind of 0 to 3, got 9"),
        (encode({"B": ("lora", 5)}), "B.rank: expected 1 to 4 .* got 5"),
        (torch.tensor([[0, 0]] * 3 + [[3, 1]] + [[0, 0]]), "config: D: expected vector, constant or none, got lora"),
    ],
    ids=["shape", "device", "kind", "rank", "lora-of-d"],
)
def test_bad_configuration(config, message):
    x, weight, b0, storages, _ = make(PATHS[0])
    with pytest.raises(ValueError, match=message):
        configured_linear(x, weight, b0, storages, config)


def test_storage_that_is_read_and_absent():
    x, weight, b0, storages, config = make(PATHS[0])
    storages[1] = None
    with pytest.raises(ValueError, match="au: expected a tensor, since config reads A as lora; got None"):
        configured_linear(x, weight, b0, storages, config)


def test_bad_operands_are_named():
    x, weight, b0, storages, config = make(PATHS[0])
    with pytest.raises(ValueError, match="x: expected the last dimension to be K = 6"):
        configured_linear(x[..., :3], weight, b0, storages, config)
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        configured_linear(x, weight.clone().requires_grad_(), b0, storages, config)


def test_a_configuration_with_a_date_is_made_anew_each_time():
    """Graphs keep it for backward: a later one, of the same kinds or others, must leave it alone."""
    made = [encode(kinds, since) for since, kinds in enumerate([{"B": ("lora", 2)}, {"D": ("vector", 0)}] * 2)]
    for since, config in enumerate(made):
        undated = encode([{"B": ("lora", 2)}, {"D": ("vector", 0)}][since % 2])
        assert config.tolist() == [*undated.tolist(), [since, 0]]
        assert (config.dtype, config.device) == (torch.int64, torch.device("cpu"))


def test_encode_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"kinds: expected of .* got F=lora"):
        encode({"F": ("lora", 1)})
    with pytest.raises(ValueError, match=r"kinds: expected of .* got F=lora"):
        encode({"F": ("lora", 1)}, 3)
    with pytest.raises(ValueError, match=r"kinds: .* got A=diagonal"):
        encode({"A": ("diagonal", 0)})


def test_what_it_cannot_differentiate_raises():
    """Forward mode and second derivatives: an error that says what to call, never zeros."""
    x, weight, b0, storages, config = make(PATHS[0])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        configured_linear(dual, weight, b0, storages, config)
    y = configured_linear(x, weight, b0, storages, config)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_backward has no derivative"):
        dx.sum().backward()


def test_compiled_terms_run_the_operator():
    """glora_linear under a compiler is that operator, without a graph break."""
    call = make_call(("lora_3", "lora_1", "vector", "vector", "vector"), dtype=torch.float32)
    compiled = torch.compile(glora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), glora_linear(*call))
    empty = compiled(*call[:3], Terms())
    torch.testing.assert_close(empty, torch.nn.functional.linear(*call[:3]))


@pytest.mark.parametrize("place", ["weight", "storage", "x"])
def test_meta_tensors_among_real_ones(place):
    """They would go to the fake kernel, whose answer is memory that nothing wrote."""
    x, weight, b0, storages, config = make(PATHS[0])
    if place == "weight":
        weight, b0 = weight.to("meta"), b0.to("meta")
    if place == "storage":
        storages[0] = storages[0].detach().to("meta")
    if place == "x":
        x = x.detach().to("meta")
    with pytest.raises(ValueError, match="expected device"):
        configured_linear(x, weight, b0, storages, config)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(inputs):
    """As for glora_linear: x, W0 and b0 are cast, here and in a compiled layer after another."""
    x, weight, b0, storages, config = make(PATHS[0], dtype=torch.float32)
    tokens = x.detach().to(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = configured_linear(tokens, weight, b0, storages, config)
        want = glora_linear(tokens, weight, b0, decode(storages, config, "hadamard"))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_inside_a_compiled_function(backend):
    """Forward mode and gradients of torch.func, compiled: the composed formula, never zeros."""
    x, weight, b0, terms = make_call(PATHS[0], dtype=torch.float32)
    x, terms = x.detach(), terms.map(lambda s: s.detach().nan_to_num(0.3))

    def tangent(z, t):
        return torch.func.jvp(lambda row: glora_linear(row, weight, b0, terms), (z,), (t,))[1]

    def gradient(z):
        return torch.func.grad(lambda row: glora_linear(row, weight, b0, terms).square().sum())(z)

    direction = torch.ones_like(x)
    for function, arguments in ((tangent, (x, direction)), (gradient, (x,))):
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert tangent(x, direction).abs().max() > 0


def test_not_to_be_captured():
    """The path is read on the host: a CUDA graph of the operator would replay one path."""
    for name in ("linear", "linear_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.glora, name).default.tags
