"""bench/counting.py on steps whose cost is known."""

import torch
from torch import nn
from torch.nn import functional as F

from bench import counting


def test_flops_of_a_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert counting.flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = nn.Linear(4, 8)
    x = torch.ones(16, 4)

    def forward():
        y = layer(x)
        return y.exp() + y.exp() + (x[:2] * y[:2, :4]).sum()

    # x, once for two views of it; the two results of exp
    assert counting.saved_bytes(forward, (layer,)) == x.nbytes + 2 * 16 * 8 * 4
    assert counting.saved_bytes(lambda: F.linear(x, layer.weight)) == x.nbytes


def test_peak_bytes_rise_with_what_lives_at_once():
    size = 2**20

    def one_after_the_other():
        for _ in range(3):
            torch.empty(size, dtype=torch.uint8)

    def at_once():
        return [torch.empty(size, dtype=torch.uint8) for _ in range(3)]

    assert size <= counting.peak_bytes(one_after_the_other, "cpu") < 1.1 * size
    assert 3 * size <= counting.peak_bytes(at_once, "cpu") < 3.1 * size
