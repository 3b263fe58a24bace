"""What a path can be beside the presets, and what it cannot: the claims of docs/presets.md."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from glora import GLoRALinear, PathConfig, preset_path
from tests.glora.methods import stored
from tests.glora.toys import every_path, generator, randomize

N, K, RANK = 6, 4, 2


def randn(gen, *shape):
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def make_layer(product, path):
    layer = GLoRALinear(K, N, rank=RANK + 1, product=product, dtype=torch.float64)
    randomize(layer)
    layer.path = path
    return layer


def assert_computes(layer, values, expected, x):
    """What ``layer`` computes if its tensors hold ``values``, and NaN in all that is not read."""
    torch.testing.assert_close(functional_call(layer, stored(layer, values), x), expected, rtol=1e-11, atol=1e-11)


# -- what cannot be ---------------------------------------------------------------------------------


def affine_gap(function, gen):
    """How far ``function`` is from ``f(2a - b) = 2 f(a) - f(b)``, at 16 random pairs."""
    a, b = randn(gen, 16, K), randn(gen, 16, K)
    return float((function(2 * a - b) - 2 * function(a) + function(b)).abs().max())


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_every_path_is_affine_and_takes_each_token_by_itself(product):
    """So no path is an adapter with a nonlinearity, nor a token that others attend to."""
    gen, layer = generator(), make_layer(product, PathConfig())
    x = randn(gen, 3, K)
    other = torch.stack([x[0], randn(gen, K), x[2]])
    with torch.no_grad():
        for path in every_path(RANK):
            layer.path = path
            assert affine_gap(layer, gen) < 1e-12
            torch.testing.assert_close(layer(x)[[0, 2]], layer(other)[[0, 2]], rtol=0, atol=1e-13)


def test_an_adapter_with_a_relu_is_not_affine():
    """AdaptFormer: W0 x + s Wu relu(Wd x)."""
    gen = generator()
    weight, down, up = randn(gen, N, K), randn(gen, RANK, K), randn(gen, N, RANK)
    assert affine_gap(lambda x: x @ weight.T + 0.1 * torch.relu(x @ down.T) @ up.T, gen) > 0.1


# -- what can -----------------------------------------------------------------------------------------


def test_one_layer_of_fact_is_a_low_rank_b():
    """FacT-TT: W0 + s U S V', U and V shared by all layers. One layer is a B; that layers share it is not in a path."""
    gen, layer = generator(), make_layer("hadamard", PathConfig(B="lora_2"))
    U, S, V, x = randn(gen, N, 2), randn(gen, 2, 2), randn(gen, K, 2), randn(gen, 5, K)
    expected = F.linear(x, layer.weight + 0.5 * U @ S @ V.T, layer.bias)
    assert_computes(layer, {"Bd": 0.5 * U @ S, "Bu": V.T}, expected, x)


def test_a_trained_dora_layer_is_a_vector_a_and_a_low_rank_b():
    """DoRA with norms of rows: m V / |V|, V = W0 + B A. Its weight is a path; its gradient through |V| is not."""
    gen, layer = generator(), make_layer("hadamard", PathConfig(A="vector", B="lora_2"))
    A, B, m, x = randn(gen, 2, K), randn(gen, N, 2), randn(gen, N), randn(gen, 5, K)
    V = layer.weight + B @ A
    scale = m / V.norm(dim=1)
    values = {"Ad": scale - 1, "Bd": scale[:, None] * B, "Bu": A}
    assert_computes(layer, values, F.linear(x, scale[:, None] * V, layer.bias), x)


def test_repadapter_with_groups_is_a_subset_of_its_preset():
    """Its grouped convolution is an Ad with zeros, which the preset would train."""
    gen, layer = generator(), make_layer("matmul", preset_path("repadapter", 2))
    down, up = nn.Conv1d(K, 2, 1).double(), nn.Conv1d(2, K, 1, groups=2).double()
    x = randn(gen, 5, K)
    Ad = torch.block_diag(*up.weight[:, :, 0].reshape(2, K // 2, 1))
    values = {"Ad": Ad, "Au": down.weight[:, :, 0], "Cd": Ad @ down.bias + up.bias}
    assert_computes(layer, values, F.linear(x + up(down(x.T)).T, layer.weight, layer.bias), x)
    assert (Ad == 0).sum() == K


def test_a_layer_norm_in_front_is_a_matmul_vector_a_and_a_vector_c():
    """Its scale g and shift s become g' and s'; where g has no zero."""
    gen, layer = generator(), make_layer("matmul", PathConfig(A="vector", C="vector"))
    g, s, new_g, new_s = randn(gen, 4, K)
    x = randn(gen, 5, K)
    expected = F.linear(F.layer_norm(x, (K,), new_g, new_s), layer.weight, layer.bias)
    values = {"Ad": new_g / g - 1, "Cd": new_s - new_g / g * s}
    assert_computes(layer, values, expected, F.layer_norm(x, (K,), g, s))


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_the_bias_of_a_layer_norm_in_front_is_a_vector_c(product):
    gen, layer = generator(), make_layer(product, PathConfig(C="vector"))
    g, s, new_s = randn(gen, 3, K)
    x = randn(gen, 5, K)
    expected = F.linear(F.layer_norm(x, (K,), g, new_s), layer.weight, layer.bias)
    assert_computes(layer, {"Cd": new_s - s}, expected, F.layer_norm(x, (K,), g, s))


def test_input_scaling_is_also_a_hadamard_low_rank_of_one():
    gen, layer = generator(), make_layer("hadamard", PathConfig(A="lora_1"))
    scale, x = randn(gen, K), randn(gen, 5, K)
    values = {"Ad": torch.ones(N, 1, dtype=torch.float64), "Au": (scale - 1)[None]}
    assert_computes(layer, values, F.linear(scale * x, layer.weight, layer.bias), x)
