"""bench/counting.py on steps whose cost is known."""

import torch
from torch import nn

from bench import counting


def test_flops_of_a_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert counting.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert counting.flops(lambda: torch.zeros(3, 7).addmm_(a, b)) == 2 * 3 * 5 * 7


class Keeps(torch.autograd.Function):
    """Keeps a tensor of its own outside of ``save_for_backward``, where no hook sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x * 2
        return x * 3

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.kept


def test_saved_bytes_are_all_that_lives_on_after_forward():
    layer = nn.Linear(4, 8)
    x = torch.ones(16, 4)

    def forward():
        return layer(x).exp().sum(1)

    # x for the weight's gradient, the result of exp; the output is not counted
    assert counting.saved_bytes(forward, (x,), "cpu") == x.nbytes + 16 * 8 * 4
    with torch.no_grad():
        assert counting.saved_bytes(forward, (x,), "cpu") == 0
    leaf = torch.ones(16, 4, requires_grad=True)
    assert counting.saved_bytes(lambda: Keeps.apply(leaf), (leaf,), "cpu") == leaf.nbytes


def test_peak_bytes_rise_with_what_lives_at_once():
    size = 2**20

    def one_after_the_other():
        for _ in range(3):
            torch.empty(size, dtype=torch.uint8)

    def at_once():
        return [torch.empty(size, dtype=torch.uint8) for _ in range(3)]

    assert size <= counting.peak_bytes(one_after_the_other, "cpu") < 1.1 * size
    assert 3 * size <= counting.peak_bytes(at_once, "cpu") < 3.1 * size
