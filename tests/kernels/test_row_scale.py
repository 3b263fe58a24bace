"""Which rows of da are formed anew: no row is kept that a comparison by the whole product loses."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels._torch import row_scale
from glora_kernels._torch.passes import column_dots
from glora_kernels.gradient_routes import ACCEPTED_LOSS, PROBED_PART, PROBED_TOKENS
from tests.tiers import at

M, N, K, R = 70, 40, 64, 3
PART = K // PROBED_PART
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def operands(dtype, seed, bias_scale=1.0, b_scale=1.0):
    """dy, x, weight, scale, b_eff and B as thin factors; in each third of the inputs W0 may be small."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dy, x, weight, scale, b_eff, down, up = (
        made.to(dtype)
        for made in (
            randn(M, N) * 10.0 ** randn(N),
            randn(M, K),
            randn(N, K) * 10.0 ** (2 * randn(N, 1) * (torch.arange(K) >= (seed % 3) * PART)),
            randn(N),
            randn(N) * bias_scale,
            randn(N, R) * b_scale,
            randn(R, K),
        )
    )
    tokens = up @ x.t()
    return dy, x, weight, scale.to(wide), b_eff.to(wide), (down.t(), up, tokens, tokens @ dy)


def lost_by_the_whole(dy, x, weight, scale, b_eff, thin):
    """The comparison in fp64, row by row: the lost rows, and by how much each is on its side of the border."""
    rows, columns, *_ = (part.double() for part in thin)
    count = min(M, PROBED_TOKENS)
    probe = torch.arange(count) * M // count
    weights, inputs = dy[probe].double().abs(), x[probe].double().abs()
    lost = (weights * (b_eff.double().abs() + inputs @ columns.abs().t() @ rows.abs())).sum(0)
    allowed = (weights * (inputs @ weight.double().abs().t())).sum(0) * scale.double().abs()
    accepted = ACCEPTED_LOSS[dy.dtype] * allowed
    return ~(lost < accepted), (lost - accepted).abs() / (lost + accepted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_of_the_whole_product(dtype):
    kept, lost, stages = 0, 0, set()
    scales = itertools.product((0.0, 1e-3, 1.0, 30.0, 1e3), (0.0, 1e-2, 1.0, 10.0))
    for seed, (bias_scale, b_scale) in itertools.product(range(at(6, 60)), scales):
        made = operands(dtype, seed, bias_scale, b_scale)
        want, distance = lost_by_the_whole(*made)
        with FlopCounterMode(display=False) as counted:
            got = row_scale._lost_rows(*made)
        clear = ~(distance < 1e-5)
        assert torch.equal(got[clear], want[clear])
        kept, lost = kept + int((~want).sum()), lost + int(want.sum())
        stages.add(counted.get_total_flops())
    assert kept > 100
    assert lost > 100
    assert len(stages) > 3  # no second stage, one for some rows, and one for all


def border(dtype, factor, where):
    """Rows whose ``lost`` is ``factor`` times what is accepted, where W0 has values only in ``where`` of the inputs."""
    dy, x, weight, scale, b_eff, thin = operands(dtype, 0, 1.0, 0.0)
    weight = torch.zeros_like(weight).index_copy_(1, where, weight[:, where].clamp(-4, 4))
    x = (x.abs() + 0.5).to(dtype)
    count = min(M, PROBED_TOKENS)
    probe = torch.arange(count) * M // count
    weights = dy[probe].double().abs()
    allowed = (weights * (x[probe].double() @ weight.double().abs().t())).sum(0) * scale.double().abs()
    b_eff = (factor * ACCEPTED_LOSS[dtype] * allowed / weights.sum(0)).to(b_eff)
    return dy, x, weight, scale, b_eff, thin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [range(PART), range(PART, K), range(K)], ids=["part", "rest", "all"])
def test_on_either_side_of_the_border(dtype, where):
    where = torch.tensor(where)
    assert row_scale._lost_rows(*border(dtype, 1.001, where)).all()
    assert not row_scale._lost_rows(*border(dtype, 0.999, where)).any()
    assert not row_scale._lost_rows(*border(dtype, 0.05, where)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_evidence_are_lost(dtype):
    dy, x, weight, scale, b_eff, thin = operands(dtype, 1, 1e-3, 0.0)
    scale[3], weight[6], scale[7], dy[:, 8] = 0, 0, torch.nan, torch.nan
    dy[torch.arange(PROBED_TOKENS) * M // PROBED_TOKENS, 5] = 0
    assert row_scale._lost_rows(dy, x, weight, scale, b_eff, thin)[[3, 5, 6, 7, 8]].all()


@pytest.mark.parametrize("spoilt", ["nan in W0", "inf in W0", "nan in x", "overflow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_part_misses_is_formed_anew(dtype, spoilt):
    """A NaN or infinity outside of the part, or an output that overflows where z does not: da is that of z."""
    dy, x, weight, scale, _, _ = operands(dtype, 2, 0.0, 0.0)
    scale.fill_(1.5)
    if spoilt == "overflow":
        weight[2] = 0.8 * torch.finfo(dtype).max / x.double().sum(1).abs().max()
        dy[:, 2] = 1e-3
    else:
        (x[0] if spoilt.endswith("x") else weight[2])[-1] = float(spoilt.split()[0])
    output = (x @ (weight * scale[:, None]).to(dtype).t()).to(dtype)
    arguments = dy, x, weight, scale - 1
    found = row_scale.row_scale_gradient(*arguments, column_dots(dy, output), None, dy.sum(0, dtype=scale.dtype), None)
    exact = row_scale.row_scale_gradient(*arguments, None, None, None, None)
    rows = ~output.isfinite().all(0)
    assert rows.any()
    assert torch.isfinite(exact[2]) or spoilt != "overflow"
    torch.testing.assert_close(found[rows], exact[rows], equal_nan=True)


def test_what_rows_that_are_clearly_kept_cost():
    made = operands(torch.float32, 0, 1e-3, 1e-4)
    weight = torch.randn(N, K)
    with FlopCounterMode(display=False) as counted:
        lost = row_scale._lost_rows(*made[:2], weight, torch.ones(N), *made[4:])
    assert not lost.any()
    thin = 2 * PROBED_TOKENS * (N + K) * R
    assert counted.get_total_flops() == 2 * PROBED_TOKENS * N * PART + thin
