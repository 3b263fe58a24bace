"""The numerical contract, held against PEFT's own layers in fp64."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from glora.peft import accelerate
from tests.glora.peft.peft_toys import KINDS, adapted, glora_config, hira_config
from tests.helpers import assert_contract, generator_for

M, K, N = 37, 19, 23
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_layer(config, bias, dtype, adapter_dtype):
    """One of PEFT's layers, its base frozen in ``dtype``."""
    layer = adapted(config(target_modules=["0"]), nn.Sequential(nn.Linear(K, N, bias))).get_base_model()[0]
    layer.base_layer.to(dtype)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return layer


def results(layer, x, dy):
    x = x.requires_grad_()
    y = layer(x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], dy)
    return {"y": y.detach(), **dict(zip(["x", *trained], grads))}


def in_double(layer, function):
    """PEFT's layer in fp64, ``function`` applied to every one of its tensors."""
    twin = copy.deepcopy(layer).double()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = function(tensor.data)
    return twin


def hold(layer, dtype):
    gen = generator_for(M, K, N)
    x, dy = torch.randn(M, K, generator=gen).to(dtype), torch.randn(M, N, generator=gen).to(dtype)
    want = results(in_double(layer, lambda t: t), x.double(), dy.double())
    scale = results(in_double(layer, torch.abs), x.double().abs(), dy.double().abs())
    assert not accelerate(nn.Sequential(layer)).kept
    got = results(layer, x, dy)
    assert got["y"].dtype == dtype
    assert all(got[name].dtype == p.dtype for name, p in layer.named_parameters() if p.requires_grad)
    assert_contract(got, want, scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_glora(kinds, bias, dtype):
    hold(make_layer(partial(glora_config, kinds), bias, dtype, torch.float32), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_hira(bias, dtype):
    hold(make_layer(hira_config, bias, dtype, torch.float32), dtype)


@pytest.mark.parametrize("config", [glora_config, hira_config], ids=["glora", "hira"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_adapters_in_half_types(config, dtype):
    hold(make_layer(config, True, dtype, dtype), dtype)


@pytest.mark.parametrize("config", [glora_config, hira_config], ids=["glora", "hira"])
def test_autocast(config):
    """The dtype that PEFT's layer gives, and its own dtype for the gradients."""
    layer = make_layer(config, True, torch.float32, torch.float32)
    x, dy = torch.randn(M, K), torch.randn(M, N).bfloat16()
    want = results(in_double(layer, lambda t: t), x.double(), dy.double())
    accelerate(nn.Sequential(layer))
    with torch.autocast("cpu", torch.bfloat16):
        got = results(layer, x, dy)
    assert got["y"].dtype == torch.bfloat16
    for name, tensor in got.items():
        assert name == "y" or tensor.dtype == torch.float32
        assert (tensor - want[name]).norm() < 0.02 * want[name].norm(), name


def test_leading_dimensions_and_no_tokens():
    layer = make_layer(glora_config, True, torch.float32, torch.float32)
    x = torch.randn(2, 3, K)
    want = layer(x)
    accelerate(nn.Sequential(layer))
    torch.testing.assert_close(layer(x), want)
    assert layer(x[:, :0]).shape == (2, 0, N)
