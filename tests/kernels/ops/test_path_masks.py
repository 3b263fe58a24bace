"""Kinds and ranks as data on the device: every path as the ordinary layer, and nothing of what is not read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels import (
    glora_conv2d,
    glora_linear,
    masked_terms,
    path_masks,
    row_scaled_linear,
    row_scaled_terms,
    storages_read,
)
from glora_kernels.path_encoding import STORAGES, decode
from tests.helpers import ALL_PATHS, assert_contract, generator_for, oracle, results
from tests.masked_cases import RANK, config_of, make, masked_linear


def row_scaled(x, weight, bias, storages, config, product):
    return row_scaled_linear(x, weight, bias, row_scaled_terms(weight, bias, storages, path_masks(config, RANK)))


def named_gradients(y, x, storages):
    leaves = {"x": x, **dict(zip(STORAGES, storages))}
    dy = torch.randn(y.shape, generator=generator_for("dy"), dtype=torch.float64).to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)))


def flat(y, gradients, names):
    return torch.cat([y.flatten(), *(gradients[name].flatten() for name in names)])


def assert_equal_to_the_ordinary_layer(function, path, product, bias):
    x, weight, b0, storages = make(product=product, bias=bias)
    config = config_of(path)
    y = function(x, weight, b0, storages, config, product)
    want = glora_linear(x, weight, b0, decode(storages, config, product))
    found, expected = named_gradients(y, x, storages), named_gradients(want, x, storages)
    present = [name for name, gradient in expected.items() if gradient is not None]
    assert not any(g.count_nonzero() for name, g in found.items() if g is not None and name not in present), path
    got, other = flat(y, found, present), flat(want, expected, present)
    torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-10, msg=f"{path}")
    assert torch.equal(got == 0, other == 0), f"{path}: zero where nothing is read"


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_every_path_as_the_ordinary_layer(product):
    """All 432 kinds, ranks of 1 and 3 of 4, with and without a bias."""
    for index, path in enumerate(ALL_PATHS):
        assert_equal_to_the_ordinary_layer(masked_linear, path, product, bias=index % 2 == 0)


def test_every_path_of_a_row_scale():
    for index, path in enumerate(path for path in ALL_PATHS if not path[0].startswith("lora")):
        assert_equal_to_the_ordinary_layer(row_scaled, path, "hadamard", bias=index % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("function", "product"), [(masked_linear, "hadamard"), (masked_linear, "matmul"), (row_scaled, "hadamard")]
)
def test_numerical_contract(function, product, dtype):
    """Against fp64, on every 13th path: that of the ordinary layer."""
    for index, path in enumerate(ALL_PATHS[::13]):
        if function is row_scaled and path[0].startswith("lora"):
            continue
        x, weight, b0, storages = make((24, 17, 20), product=product, dtype=dtype, seed=index)
        config = config_of(path)
        terms = decode(storages, config, product)
        dy = torch.randn(24, 17, generator=generator_for("dy", index)).to(dtype)
        got = results(lambda x, w, b, t: function(x, w, b, storages, config, product), x, weight, b0, terms, dy)  # noqa: B023
        assert_contract(got, *oracle(x, weight, b0, terms, dy), dtype)


@pytest.mark.parametrize(
    ("function", "product"), [(masked_linear, "hadamard"), (masked_linear, "matmul"), (row_scaled, "hadamard")]
)
def test_nan_in_what_is_not_read_does_not_leak(function, product):
    for path in ALL_PATHS[::7]:
        if function is row_scaled and path[0].startswith("lora"):
            continue
        x, weight, b0, storages = make(product=product)
        config = config_of(path)
        clean = function(x, weight, b0, storages, config, product)
        read = {id(s) for _, term in decode(storages, config, product).active for s in term.storages}
        expected = named_gradients(clean, x, storages)
        with torch.no_grad():
            for storage, gradient in zip(storages, list(expected.values())[1:]):
                unread = torch.ones_like(storage, dtype=torch.bool) if id(storage) not in read else gradient == 0
                storage[unread] = torch.nan
        again = function(x, weight, b0, storages, config, product)
        assert torch.equal(again, clean), path
        for name, gradient in named_gradients(again, x, storages).items():
            same = gradient is None if expected[name] is None else torch.equal(gradient, expected[name])
            assert same, f"{path} {name}"  # no row scale has a gradient of Au


def test_storages_read():
    config = torch.stack([config_of(p) for p in [("lora_1", "vector", "lora_3", "none", "constant"), ("none",) * 5]])
    assert storages_read(path_masks(config, RANK)).tolist() == [[1, 1, 1, 0, 1, 1, 0, 1], [0] * 8]


@pytest.mark.parametrize("leading", [(5,), (2, 3), (0, 2), ()], ids=str)
@pytest.mark.parametrize("function", [masked_linear, row_scaled])
def test_any_leading_shape(function, leading):
    """And after a row scale any successor, such as ReLU(inplace=True)."""
    _, weight, b0, storages = make()
    x = torch.randn(*leading, 6, dtype=torch.float64, generator=generator_for("x")).requires_grad_()
    config = config_of(("vector", "lora_3", "vector", "constant", "vector"))
    relu = torch.relu_ if function is row_scaled else torch.relu
    y = relu(function(x, weight, b0, storages, config, "hadamard"))
    want = torch.relu(glora_linear(x, weight, b0, decode(storages, config, "hadamard")))
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    found, expected = named_gradients(y, x, storages), named_gradients(want, x, storages)
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


# Cost -----------------------------------------------------------------------------------------------------------------


class Dense(TorchDispatchMode):
    """Counts new tensors of the size of the weight."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        if len(returns) == 1 and returns[0].alias_info is None and isinstance(out, torch.Tensor):
            self.count += out.numel() == self.elements
        return out


@pytest.mark.parametrize(
    ("function", "product", "units", "dense"),
    [(masked_linear, "hadamard", 3, 2), (masked_linear, "matmul", 2, 1), (row_scaled, "hadamard", 2, 1)],
)
def test_cost(function, product, units, dense):
    """Dense products and new (N, K) tensors of a step, whatever the path; at fp32 none of them is kept for backward."""
    shape = (512, 384, 320)  # tokens, N, K: no two products of them are equal
    x, weight, b0, storages = make(shape, product=product, dtype=torch.float32)
    for path in [("lora_3", "lora_3", "lora_3", "vector", "vector"), ("none",) * 5]:
        kept = []
        note = lambda t: kept.append(t) or t  # noqa: E731, B023
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            function(x, weight, b0, storages, config_of(path), product)
        assert not any(t.numel() == weight.numel() and t.data_ptr() != weight.data_ptr() for t in kept)
        with FlopCounterMode(display=False) as flops, Dense(weight.numel()) as made:
            function(x, weight, b0, storages, config_of(path), product).sum().backward()
        unit = 2 * 512 * 384 * 320
        assert units <= flops.get_total_flops() / unit <= units + 0.35  # thin products are large at this size
        assert made.count == dense


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    _, weight, b0, storages = make()
    masks = path_masks(config_of(("none",) * 5), RANK)
    for change, message in [
        (
            {"masks": masks[:4]},
            r"masks: expected torch.bool of shape \(5, 5\) and a rank from 4, got torch.bool \(4, 5",
        ),
        ({"masks": masks[..., :3]}, r"a rank from 4, got torch.bool \(5, 5, 3\)"),
        ({"masks": masks.float()}, r"masks: expected torch.bool .* got torch.float32"),
        ({"masks": masks.to("meta")}, "masks: expected device cpu .that of weight., got meta"),
        ({"storages": storages[:7]}, "storages: expected the 8 tensors"),
        (
            {"storages": [*storages[:3], storages[3][:, 1:], *storages[4:]]},
            r"bu: expected shape \(4, 6\), got \(4, 5\)",
        ),
        ({"product": "cross"}, "product: expected one of"),
        ({"weight": weight[0]}, r"weight: expected shape \(N, K\), got \(6,\)"),
    ]:
        arguments = {"weight": weight, "bias": b0, "storages": storages, "masks": masks} | change
        with pytest.raises(ValueError, match=message):
            masked_terms(**arguments)
    with pytest.raises(ValueError, match=r"config: expected shape \(..., 5, 2\), got \(5, 3\)"):
        path_masks(torch.zeros(5, 3, dtype=torch.int64), RANK)
    with pytest.raises(ValueError, match="rank: expected an integer from 1, got 0"):
        path_masks(torch.zeros(5, 2, dtype=torch.int64), 0)
    x, weight, b0, storages = make()
    with pytest.raises(ValueError, match="terms: expected a hadamard A as a vector"):
        row_scaled_linear(x, weight, b0, masked_terms(weight, b0, storages, masks))


# Other operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_convolutions_take_the_same_terms(product):
    for path in ALL_PATHS[::31]:
        _, weight, b0, storages = make((1, 7, 12), product=product)
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=generator_for("image")).requires_grad_()
        kernel, config = weight.reshape(7, 3, 2, 2), config_of(path)
        y = glora_conv2d(x, kernel, b0, masked_terms(weight, b0, storages, path_masks(config, RANK), product))
        want = glora_conv2d(x, kernel, b0, decode(storages, config, product))
        torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
        expected = named_gradients(want, x, storages)
        for name, gradient in named_gradients(y, x, storages).items():
            other = torch.zeros_like(gradient) if expected[name] is None else expected[name]
            torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10, msg=f"{path} {name}")


def test_autocast():
    """As of the ordinary layer: x, W0 and b0 are cast, the terms are not."""
    for function, product, a in [
        (masked_linear, "hadamard", "lora_3"),
        (masked_linear, "matmul", "lora_3"),
        (row_scaled, "hadamard", "vector"),
    ]:
        x, weight, b0, storages = make(product=product, dtype=torch.float32)
        config = config_of((a, "lora_3", "vector", "vector", "vector"))
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight, b0, storages, config, product)
        assert torch.equal(y, function(x.bfloat16(), weight.bfloat16(), b0.bfloat16(), storages, config, product))


def test_a_projected_factor_is_formed_in_the_compute_dtype():
    """``W0 Ad`` of a half-type layer, as the ordinary operations form it."""
    _, weight, b0, storages = make((5, 70, 60), product="matmul", dtype=torch.bfloat16, terms_dtype=torch.float32)
    masks = path_masks(config_of(("lora_3", "none", "none", "none", "none")), RANK)
    projected = masked_terms(weight, b0, storages, masks, "matmul").B.down[:, :3]
    torch.testing.assert_close(projected, weight.float() @ storages[0][:, :3], rtol=1e-5, atol=1e-5)
