"""From one type to another: results by their bits."""

import pytest

from .snippets import lanes

PREFIX = {8: "rs", 16: "rs", 32: "r", 64: "rd"}


@pytest.mark.parametrize(
    "form, bits_to, bits_from, x, expected",
    [
        ("cvt.u64.u32", 64, 32, 0xFFFFFFFF, 0x00000000FFFFFFFF),
        ("cvt.s64.s32", 64, 32, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF),
        ("cvt.s64.s32", 64, 32, 0x7FFFFFFF, 0x000000007FFFFFFF),
        ("cvt.u64.s32", 64, 32, 0x80000000, 0xFFFFFFFF80000000),
        ("cvt.s64.u32", 64, 32, 0x80000000, 0x0000000080000000),
        ("cvt.u32.u64", 32, 64, 0x123456789, 0x23456789),
        ("cvt.s32.s64", 32, 64, 0xFFFFFFFF00000001, 1),
        ("cvt.u32.u16", 32, 16, 0xFFFF, 0x0000FFFF),
        ("cvt.s32.s16", 32, 16, 0xFFFF, 0xFFFFFFFF),
        ("cvt.u32.s16", 32, 16, 0x8000, 0xFFFF8000),
        ("cvt.u16.u32", 16, 32, 0x12345678, 0x5678),
        ("cvt.u16.u64", 16, 64, 0xFFFFFFFF0000ABCD, 0xABCD),
        ("cvt.u32.u8", 32, 8, 0x12F0, 0xF0),  # the lowest 8 bits of a wider register
        ("cvt.s32.s8", 32, 8, 0x12F0, 0xFFFFFFF0),
        ("cvt.s16.s8", 16, 8, 0x1280, 0xFF80),
        ("cvt.u16.u8", 16, 8, 0xFF80, 0x0080),
        ("cvt.s16.s32", 32, 32, 0x0001FFFE, 0xFFFFFFFE),  # to a wider register: with the sign
        ("cvt.u16.u32", 32, 32, 0x0001FFFE, 0x0000FFFE),
        ("cvt.s64.s8", 64, 8, 0x0080, 0xFFFFFFFFFFFFFF80),
    ],
)
def test_integers_are_extended_by_their_source_and_cut_off(form, bits_to, bits_from, x, expected):
    target, source = f"{PREFIX[bits_to]}2", f"{PREFIX[bits_from]}1"
    assert lanes(f"{form} %{target}, %{source};", target, **{source: [x]}) == [expected]


@pytest.mark.parametrize(
    "x, expected",
    [
        (0x3F808000, 0x3F80),  # ties, to even
        (0x3F818000, 0x3F82),
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0xBF818000, 0xBF82),
        (0x7F7F7FFF, 0x7F7F),
        (0x7F7F8000, 0x7F80),  # to infinity
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FFF),
        (0xFFFFFFFF, 0x7FFF),
        (0x7FC00000, 0x7FFF),
        (0x80000000, 0x8000),
        (0x00008000, 0x0000),
        (0x00018000, 0x0002),
        (0x007FFFFF, 0x0080),
    ],
)
def test_fp32_becomes_bf16(x, expected):
    assert lanes("cvt.rn.bf16.f32 %rs1, %r1;", "rs1", r1=[x]) == [expected]


@pytest.mark.parametrize(
    "x, expected",
    [
        (0x3F801000, 0x3C00),  # ties, to even
        (0x3F803000, 0x3C02),
        (0x3F801001, 0x3C01),
        (0xBF803000, 0xBC02),
        (0x477FEFFF, 0x7BFF),
        (0x477FF000, 0x7C00),  # 65520: to infinity
        (0xC7800000, 0xFC00),
        (0x7F800000, 0x7C00),
        (0x7F800001, 0x7FFF),
        (0xFFC00000, 0x7FFF),
        (0x33800000, 0x0001),  # the smallest: 2^-24
        (0x33000000, 0x0000),  # half of it: a tie
        (0x33000001, 0x0001),
        (0x33C00000, 0x0002),  # 1.5 of it: a tie
        (0x387FE000, 0x0400),  # a tie between the largest subnormal and the smallest normal number
        (0x80000000, 0x8000),
    ],
)
def test_fp32_becomes_f16(x, expected):
    assert lanes("cvt.rn.f16.f32 %rs1, %r1;", "rs1", r1=[x]) == [expected]


def test_the_first_of_two_becomes_the_upper_half():
    given = {"r1": [0x3F818000, 0x7FC00000], "r2": [0xC0000000, 0x80000000]}
    assert lanes("cvt.rn.bf16x2.f32 %r3, %r1, %r2;", "r3", **given) == [0x3F82C000, 0x7FFF8000]
    assert lanes("cvt.rn.f16x2.f32 %r3, %r1, %r2;", "r3", **given) == [0x3C0CC000, 0x7FFF8000]


@pytest.mark.parametrize(
    "x, expected",
    [
        (0x3F801000, 0x3F802000),  # ties, away from zero
        (0x3F803000, 0x3F804000),
        (0xBF801000, 0xBF802000),
        (0x3F800FFF, 0x3F800000),
        (0x3F801FFF, 0x3F802000),
        (0x7F7FFFFF, 0x7F800000),
        (0x7F800000, 0x7F800000),
        (0xFF800000, 0xFF800000),
        (0x7F800001, 0x7FFFFFFF),
        (0xFFFFFFFF, 0x7FFFFFFF),
        (0x00001000, 0x00002000),
        (0x80000000, 0x80000000),
    ],
)
def test_fp32_becomes_tf32(x, expected):
    assert lanes("cvt.rna.tf32.f32 %r2, %r1;", "r2", r1=[x]) == [expected]


def test_16_bits_become_fp32():
    bf16 = [0x3F80, 0xFF80, 0x0001, 0x8000]
    assert lanes("cvt.f32.bf16 %r1, %rs1;", "r1", rs1=bf16) == [0x3F800000, 0xFF800000, 0x00010000, 0x80000000]
    f16 = [0x3C00, 0xFC00, 0x0001, 0x8000, 0x7BFF, 0x03FF]
    expected = [0x3F800000, 0xFF800000, 0x33800000, 0x80000000, 0x477FE000, 0x387FC000]
    assert lanes("cvt.f32.f16 %r1, %rs1;", "r1", rs1=f16) == expected
    assert lanes("cvt.f32.f16 %r1, %rs1;", "r1", rs1=[0x7E00])[0] & 0x7FFFFFFF > 0x7F800000


@pytest.mark.parametrize(
    "form, x, expected",
    [
        ("s32", 0xFFFFFFFF, 0xBF800000),
        ("u32", 0xFFFFFFFF, 0x4F800000),
        ("s32", 0x80000000, 0xCF000000),
        ("u32", 0x80000000, 0x4F000000),
        ("s32", 0x01000001, 0x4B800000),  # ties, to even
        ("s32", 0x01000003, 0x4B800002),
        ("u32", 0xFFFFFF7F, 0x4F7FFFFF),
        ("u32", 0, 0),
    ],
)
def test_integers_become_fp32(form, x, expected):
    assert lanes(f"cvt.rn.f32.{form} %r2, %r1;", "r2", r1=[x]) == [expected]
