"""What the threads of a warp do together."""

import pytest

from .machine.faults import Fault
from .snippets import lanes

LANES = list(range(32))


@pytest.mark.parametrize(
    "form, by, clamp, expected",
    [
        ("bfly", 1, 31, [lane + 1 if lane % 2 == 0 else lane - 1 for lane in LANES]),
        ("bfly", 16, 31, [*range(16, 32), *range(16)]),
        ("bfly", 31, 31, [31 - lane for lane in LANES]),
        ("bfly", 33, 31, [lane + 1 if lane % 2 == 0 else lane - 1 for lane in LANES]),  # 5 bits count
        ("idx", 5, 31, [5] * 32),
        ("idx", 37, 31, [5] * 32),
        ("up", 1, 0, [0, *range(31)]),
        ("up", 8, 0, [*range(8), *range(24)]),
        ("down", 1, 31, [*range(1, 32), 31]),
        ("down", 8, 31, [*range(8, 32), *range(24, 32)]),
    ],
)
def test_values_are_shuffled(form, by, clamp, expected):
    body = f"mov.u32 %r1, %tid.x; add.s32 %r1, %r1, 100; shfl.sync.{form}.b32 %r2, %r1, {by}, {clamp}, -1;"
    assert lanes(body, "r2") == [100 + lane for lane in expected]


def test_each_lane_may_ask_for_another():
    body = "shfl.sync.idx.b32 %r2, %r1, %r3, 31, 0xffffffff;"
    reverse = [31 - lane for lane in LANES]
    assert lanes(body, "r2", r1=[lane * lane for lane in LANES], r3=reverse) == [lane * lane for lane in reverse]


def test_warps_are_shuffled_on_their_own():
    found = lanes("mov.u32 %r1, %tid.x; shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;", "r2", threads=96)
    assert found == [3] * 32 + [35] * 32 + [67] * 32


@pytest.mark.parametrize(
    "form, values, expected",
    [
        ("add.s32", [0xFFFFFFFF] * 32, 0xFFFFFFE0),
        ("add.u32", [0x80000000, 0x80000000, 5] + [0] * 29, 5),
        ("min.s32", [0xFFFFFFFE, *range(31)], 0xFFFFFFFE),
        ("min.u32", [0xFFFFFFFE, *range(4, 35)], 4),
        ("max.s32", [0x80000000, *range(31)], 30),
        ("max.u32", [0x80000000, *range(31)], 0x80000000),
        ("and.b32", [0xFF0F] * 31 + [0xF0FF], 0xF00F),
        ("or.b32", [1 << lane for lane in LANES], 0xFFFFFFFF),
        ("xor.b32", [*LANES[:-1], 0xF0], 0xF0 ^ 31),
    ],
)
def test_values_of_a_warp_are_reduced(form, values, expected):
    assert lanes(f"redux.sync.{form} %r2, %r1, -1;", "r2", r1=values) == [expected] * 32


def test_warps_are_reduced_on_their_own():
    body = "mov.u32 %r1, %tid.x; redux.sync.max.u32 %r2, %r1, 0xffffffff;"
    assert lanes(body, "r2", threads=64) == [31] * 32 + [63] * 32


def test_a_reduction_takes_one_number_for_all():
    assert lanes("mov.b32 %r1, 3; redux.sync.add.s32 %r2, %r1, -1;", "r2") == [96] * 32


@pytest.mark.parametrize(
    "body", ["shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "redux.sync.add.s32 %r2, %r1, -1;", "bar.warp.sync -1;"]
)
def test_a_part_of_a_warp_is_a_fault_and_one_of_two_warps_is_none(body):
    part = f"mov.u32 %r1, %tid.x; mov.b32 %r2, 0; setp.ge.s32 %p1, %r1, %r3; @%p1 {body}"
    with pytest.raises(Fault, match="not all threads of a warp take part"):
        lanes(part, "r2", threads=64, r3=31)
    assert lanes(part, "r2", threads=64, r3=32)[:32] == [0] * 32
