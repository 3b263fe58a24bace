"""The terms that masks select, through the Triton kernels: every path is one form to them."""

import pytest
import torch

from glora_kernels import use_backend
from glora_kernels.path_encoding import decode
from tests.helpers import ALL_PATHS, assert_contract, generator_for, oracle, results
from tests.interpreter.cases import PRODUCTS, STRATEGIES
from tests.masked_cases import config_of, make, masked_linear


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_contract(product, strategy):
    """Every 97th path, in fp32."""
    for path in ALL_PATHS[::97]:
        x, weight, bias, storages = make((33, 20, 24), product=product, dtype=torch.float32)
        config = config_of(path)
        terms = decode(storages, config, product)
        dy = torch.randn(33, 20, generator=generator_for("dy"))
        with use_backend("triton", strategy=strategy):
            got = results(
                lambda x, w, b, _: masked_linear(x, w, b, storages, config, product),  # noqa: B023
                *(x, weight, bias, terms, dy),
            )
        assert_contract(got, *oracle(x, weight, bias, terms, dy), torch.float32)
