"""Moves between registers, loads and stores: which bits go where."""

import pytest
import torch

from .snippets import ints, lanes, run, zeros


def test_a_register_is_moved():
    assert lanes("mov.b32 %r2, %r1;", "r2", r1=[1, 0xFFFFFFFF]) == [1, 0xFFFFFFFF]
    assert lanes("mov.f32 %r2, %r1;", "r2", r1=[0xFFC00001]) == [0xFFC00001]
    assert lanes("mov.u64 %rd2, %rd1;", "rd2", rd1=[1 << 63]) == [1 << 63]
    assert lanes("mov.b16 %rs2, %rs1;", "rs2", rs1=[0x8001]) == [0x8001]
    assert lanes("mov.pred %p2, %p1;", "p2", p1=[1, 0]) == [1, 0]


@pytest.mark.parametrize(
    "body, out, expected",
    [
        ("mov.b32 %r1, -1;", "r1", 0xFFFFFFFF),
        ("mov.u32 %r1, 0x7fffffff;", "r1", 0x7FFFFFFF),
        ("mov.b32 %r1, 0f3F800000;", "r1", 0x3F800000),
        ("mov.b64 %rd1, -2;", "rd1", 0xFFFFFFFFFFFFFFFE),
        ("mov.b16 %rs1, -3;", "rs1", 0xFFFD),
        ("mov.u16 %rs1, 0x3F80;", "rs1", 0x3F80),
        ("mov.pred %p1, -1;", "p1", 1),
        ("mov.pred %p1, 0;", "p1", 0),
    ],
)
def test_a_constant_is_moved(body, out, expected):
    assert lanes(body, out)[0] == expected


def test_a_register_is_joined_from_its_parts_the_lowest_first():
    assert lanes("mov.b32 %r1, {%rs1, %rs2};", "r1", rs1=[0x1234], rs2=[0x8765]) == [0x87651234]
    assert lanes("mov.b64 %rd1, {%r1, %r2};", "rd1", r1=[0x89ABCDEF], r2=[0xF1234567]) == [0xF123456789ABCDEF]
    parts = {f"rs{place}": [0x1111 * place] for place in (1, 2, 3, 4)}
    assert lanes("mov.b64 %rd1, {%rs1, %rs2, %rs3, %rs4};", "rd1", **parts) == [0x4444333322221111]
    assert lanes("mov.b32 %r1, {%rs1, 0x3F80};", "r1", rs1=[0x8001]) == [0x3F808001]


def test_a_register_is_split_into_its_parts_the_lowest_first():
    assert lanes("mov.b32 {%rs1, %rs2}, %r1;", "rs1 rs2", r1=[0x87651234]) == [[0x1234], [0x8765]]
    assert lanes("mov.b64 {%r1, %r2}, %rd1;", "r1 r2", rd1=[0xF123456789ABCDEF]) == [[0x89ABCDEF], [0xF1234567]]
    four = lanes("mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd1;", "rs1 rs2 rs3 rs4", rd1=[0x4444333322221111])
    assert four == [[0x1111], [0x2222], [0x3333], [0x4444]]


def test_a_part_may_be_dropped():
    assert lanes("mov.b32 {_, %rs2}, %r1;", "rs2", r1=[0x87651234]) == [0x8765]
    assert lanes("mov.b64 {%r1, _}, %rd1;", "r1", rd1=[0xF123456789ABCDEF]) == [0x89ABCDEF]


def test_parts_may_be_exchanged():
    assert lanes("mov.b64 {%r1, %r2}, %rd1; mov.b64 %rd1, {%r2, %r1};", "rd1", rd1=[0xAAAAAAAABBBBBBBB]) == [
        0xBBBBBBBBAAAAAAAA
    ]


def test_what_was_moved_keeps_its_value_when_the_source_changes():
    assert lanes("mov.b32 %r2, %r1; add.s32 %r1, %r1, 1;", "r2", r1=[5]) == [5]


def test_a_move_under_a_predicate_leaves_the_other_lanes():
    assert lanes("@%p1 mov.b32 %r1, 7;", "r1", p1=[1, 0], r1=[1, 2]) == [7, 2]
    assert lanes("@!%p1 mov.b32 %r1, 7;", "r1", p1=[1, 0], r1=[1, 2]) == [1, 7]
    assert lanes("@%p1 mov.b32 {%rs1, %rs2}, %r1;", "rs1 rs2", p1=[1, 0], r1=[0x50006, 0x50006], rs1=0, rs2=9) == [
        [6, 0],
        [5, 9],
    ]


def test_special_registers():
    assert lanes("mov.u32 %r1, %tid.x;", "r1", threads=64) == list(range(64))
    assert lanes("mov.u32 %r1, %ctaid.x;", "r1") == [0] * 32


def test_shared_memory_has_an_address():
    start, behind = lanes("mov.b32 %r1, global_smem; add.s32 %r2, %r1, 16;", "r1 r2")
    assert start[0] % 16 == 0 and behind[0] == start[0] + 16


# -- global memory -----------------------------------------------------------------------------------------------------

LITTLE = [0x11, 0x82, 0x33, 0xF4, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF, 0x10]


def loaded(form, registers, keep):
    """What a load of the first bytes of LITTLE gives, by what ``keep`` stores of it as 64 bits."""
    out = zeros(4, torch.int64)
    body = f"{form} {registers}, [%rd1];" + "".join(f"{one}" for one in keep)
    assert not run(body + "setp.eq.s32 %p1, %thread0, 0;" + STORES, a=ints(*LITTLE, dtype=torch.uint8), out=out)
    return [value % (1 << 64) for value in out.tolist()]


STORES = "".join(f"@%p1 st.global.b64 [%rd2+{8 * place}], %rd{10 + place};" for place in range(4))
FIRST = ["mov.b64 %rd11, 0;", "mov.b64 %rd12, 0;", "mov.b64 %rd13, 0;"]


@pytest.mark.parametrize(
    "form, register, widen, expected",
    [
        ("ld.global.b8", "rs1", "cvt.u64.u16", 0x11),
        ("ld.global.u8", "r1", "cvt.u64.u32", 0x11),
        ("ld.global.b16", "rs1", "cvt.u64.u16", 0x8211),
        ("ld.global.b16", "r1", "cvt.u64.u32", 0x8211),
        ("ld.global.b32", "r1", "cvt.u64.u32", 0xF4338211),
        ("ld.global.f32", "r1", "cvt.u64.u32", 0xF4338211),
        ("ld.global.u32", "rd10", None, 0xF4338211),
        ("ld.global.b64", "rd10", None, 0x88776655F4338211),
        ("ld.global.s16", "r1", "cvt.u64.u32", 0xFFFF8211),
        ("ld.global.s16", "rd10", None, 0xFFFFFFFFFFFF8211),
        ("ld.global.s32", "rd10", None, 0xFFFFFFFFF4338211),
    ],
)
def test_a_load_takes_bits_and_extends_them_to_its_register(form, register, widen, expected):
    keep = [f"{widen} %rd10, %{register};"] if widen else []
    assert loaded(form, f"%{register}", keep + FIRST)[0] == expected


@pytest.mark.parametrize("form, expected", [("s8", 0xFFFFFFF4), ("u8", 0xF4), ("b8", 0xF4)])
def test_a_byte_is_extended_by_its_type(form, expected):
    out = zeros(32)
    run(f"ld.global.{form} %r1, [%rd1+3]; mad.wide.s32 %rd3, %thread0, 4, %rd2; st.global.b32 [%rd3], %r1;",
        a=ints(*LITTLE, dtype=torch.uint8), out=out)  # fmt: skip
    assert out[0].item() % (1 << 32) == expected


def test_a_load_of_several_registers_has_the_first_at_the_lowest_address():
    two = ["cvt.u64.u32 %rd10, %r1;", "cvt.u64.u32 %rd11, %r2;", *FIRST[1:]]
    assert loaded("ld.global.v2.b32", "{%r1, %r2}", two)[:2] == [0xF4338211, 0x88776655]
    four = [f"cvt.u64.u32 %rd{10 + place}, %r{1 + place};" for place in range(4)]
    assert loaded("ld.global.v4.b32", "{%r1, %r2, %r3, %r4}", four) == [0xF4338211, 0x88776655, 0xCCBBAA99, 0x10FFEEDD]
    halves = [f"cvt.u64.u16 %rd{10 + place}, %rs{1 + place};" for place in range(4)]
    assert loaded("ld.global.v4.b16", "{%rs1, %rs2, %rs3, %rs4}", halves) == [0x8211, 0xF433, 0x6655, 0x8877]
    assert loaded("ld.global.v2.b64", "{%rd10, %rd11}", FIRST[1:])[:2] == [0x88776655F4338211, 0x10FFEEDDCCBBAA99]


def test_a_load_may_overwrite_its_address():
    out = zeros(32)
    body = "mov.b64 %rd3, %rd1; ld.global.b64 %rd3, [%rd3+8]; mad.wide.s32 %rd4, %thread0, 4, %rd2;"
    run(body + "cvt.u32.u64 %r1, %rd3; st.global.b32 [%rd4], %r1;", a=ints(1, 2, dtype=torch.int64), out=out)
    assert out.tolist() == [2] * 32


@pytest.mark.parametrize(
    "store, expected",
    [
        ("st.global.b8 [%rd1], %rs1;", [0x34, 0, 0, 0]),
        ("st.global.b8 [%rd1+1], %r1;", [0x7800, 0, 0, 0]),
        ("st.global.b16 [%rd1], %rs1;", [0x1234, 0, 0, 0]),
        ("st.global.b32 [%rd1+4], %r1;", [0, 0x12345678, 0, 0]),
        ("st.global.f32 [%rd1+4], 0f3F800000;", [0, 0x3F800000, 0, 0]),
        ("st.global.b64 [%rd1+8], %rd2;", [0, 0, 0x44332211, 0x08776655]),
        ("st.global.v2.b16 [%rd1+4], {%rs1, %rs2};", [0, 0x56781234, 0, 0]),
        ("st.global.v2.b32 [%rd1+8], {%r1, %r2};", [0, 0, 0x12345678, 7]),
        ("st.global.v4.b32 [%rd1], {%r1, %r2, %r2, %r1};", [0x12345678, 7, 7, 0x12345678]),
        ("add.s64 %rd3, %rd1, 8; st.global.b32 [%rd3+-4], 1;", [0, 1, 0, 0]),
    ],
)
def test_a_store_writes_its_bits_and_no_more(store, expected):
    given = "mov.b16 %rs1, 0x1234; mov.b16 %rs2, 0x5678; mov.b32 %r1, 0x12345678; mov.b32 %r2, 7;"
    given += "mov.b64 %rd2, 0x0877665544332211; setp.ne.s32 %p1, %thread0, 5; @%p1 ret;"
    out = zeros(4)
    assert not run(given + store, out=out)
    assert out.tolist() == expected


def test_a_load_under_a_predicate_leaves_the_other_lanes_and_does_not_access_their_addresses():
    out = zeros(32)
    body = """
        mov.b32 %r1, 99; mad.wide.s32 %rd3, %thread0, 4, %rd1; setp.lt.s32 %p1, %thread0, 2;
        @%p1 ld.global.b32 %r1, [%rd3];
        mad.wide.s32 %rd4, %thread0, 4, %rd2; st.global.b32 [%rd4], %r1;
    """
    assert not run(body, a=ints(5, 6), out=out)
    assert out.tolist() == [5, 6] + [99] * 30


def test_a_store_under_a_predicate_writes_in_its_lanes():
    out = zeros(32)
    body = "mad.wide.s32 %rd3, %thread0, 4, %rd1; setp.lt.s32 %p1, %thread0, 30; @!%p1 st.global.b32 [%rd3], 1;"
    assert not run(body, out=out)
    assert out.tolist() == [0] * 30 + [1, 1]


# -- shared memory -----------------------------------------------------------------------------------------------------


def through_shared(store, load, out="r3"):
    """What lane 1 loads of what it stores; each lane has 16 bytes of its own."""
    own = "shl.b32 %r1, %thread0, 4; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;"
    given = "mov.b16 %rs1, 0x8234; mov.b16 %rs2, 0x5678; mov.b32 %r5, 0x87654321; mov.b32 %r6, 0x11223344;"
    result = zeros(32, torch.int64)
    convert = {"rs": "cvt.u64.u16", "r": "cvt.u64.u32", "rd": "cvt.u64.u64"}[out.rstrip("0123456789")]
    keep = f"{convert} %rd9, %{out}; mad.wide.s32 %rd8, %thread0, 8, %rd1; st.global.b64 [%rd8], %rd9;"
    assert not run(own + given + store + load + keep, shared=512, result=result)
    return result[1].item() % (1 << 64)


@pytest.mark.parametrize(
    "store, load, out, expected",
    [
        ("st.shared.b32 [%r1], %r5;", "ld.shared.b32 %r3, [%r1];", "r3", 0x87654321),
        ("st.shared::cta.b32 [%r1+4], %r5;", "ld.shared::cta.u32 %r3, [%r1+4];", "r3", 0x87654321),
        ("st.shared.b32 [%r1], %r5;", "ld.shared.b8 %rs3, [%r1+3];", "rs3", 0x87),
        ("st.shared.b32 [%r1], %r5;", "ld.shared.s8 %r3, [%r1+3];", "r3", 0xFFFFFF87),
        ("st.shared.b32 [%r1], %r5;", "ld.shared.b16 %rs3, [%r1+2];", "rs3", 0x8765),
        ("st.shared.b16 [%r1], %rs1;", "ld.shared.b16 %rs3, [%r1];", "rs3", 0x8234),
        ("st.shared.b8 [%r1], %rs1;", "ld.shared.u8 %rs3, [%r1];", "rs3", 0x34),
        ("st.shared.v2.b16 [%r1], {%rs1, %rs2};", "ld.shared.b32 %r3, [%r1];", "r3", 0x56788234),
        ("st.shared.v2.b32 [%r1], {%r5, %r6};", "ld.shared.b64 %rd3, [%r1];", "rd3", 0x1122334487654321),
        ("st.shared.v4.b32 [%r1], {%r5, %r6, 7, 8};", "ld.shared.v2.b32 {%r3, %r4}, [%r1+8];", "r4", 8),
        (
            "st.shared.v4.b32 [%r1], {%r5, %r6, 7, 8};",
            "ld.shared.v4.b32 {%r9, %r8, %r3, %r4}, [%r1];",
            "r8",
            0x11223344,
        ),
        ("st.shared.f32 [%r1], 0fBF800000;", "ld.shared.f32 %r3, [%r1];", "r3", 0xBF800000),
    ],
)
def test_shared_memory_keeps_bits(store, load, out, expected):
    assert through_shared(store, load, out) == expected


def test_a_load_of_shared_memory_under_a_predicate_leaves_the_other_lanes():
    body = """
        mov.b32 %r1, 99; st.shared.b32 [%own0], %thread0; setp.lt.s32 %p1, %thread0, 2;
        @%p1 ld.shared.b32 %r1, [%own0];
        mad.wide.s32 %rd4, %thread0, 4, %rd1; st.global.b32 [%rd4], %r1;
    """
    out = zeros(32)
    assert not run(body, shared=128, out=out)
    assert out.tolist() == [0, 1] + [99] * 30


def test_the_programs_of_a_launch_have_their_own_shared_memory():
    body = """
        mul.lo.s32 %r1, %program0, 100; add.s32 %r1, %r1, %thread0; st.shared.b32 [%own0], %r1;
        ld.shared.b32 %r2, [%own0];
        shl.b32 %r3, %program0, 5; add.s32 %r3, %r3, %thread0; mad.wide.s32 %rd2, %r3, 4, %rd1; st.global.b32 [%rd2], %r2;
    """
    out = zeros(64)
    assert not run(body, shared=128, grid=2, out=out)
    assert out.tolist() == [*range(32), *range(100, 132)]
