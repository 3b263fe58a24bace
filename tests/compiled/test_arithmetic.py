"""Integers, floating point, comparisons and bits: results by their bits."""

import pytest

from .machine.faults import Fault
from .snippets import lanes

NAN, INFINITY = 0x7FC00000, 0x7F800000


def two(form, pairs, kind="r"):
    """Results of an instruction with two operands."""
    x, y = ([pair[place] for pair in pairs] for place in (0, 1))
    return lanes(f"{form} %{kind}3, %{kind}1, %{kind}2;", f"{kind}3", **{f"{kind}1": x, f"{kind}2": y})


def is_nan(bits):
    return bits & 0x7FFFFFFF > 0x7F800000


# -- integers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, x, y, expected",
    [
        ("add.s32", 0xFFFFFFFF, 2, 1),
        ("add.s32", 0x7FFFFFFF, 1, 0x80000000),
        ("sub.s32", 0, 1, 0xFFFFFFFF),
        ("add.u32", 0x80000000, 0x80000000, 0),
        ("min.s32", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("min.u32", 0xFFFFFFFF, 1, 1),
        ("max.s32", 0x80000000, 0x7FFFFFFF, 0x7FFFFFFF),
        ("max.u32", 0x80000000, 0x7FFFFFFF, 0x80000000),
        ("mul.lo.s32", 0xFFFFFFFF, 5, 0xFFFFFFFB),
        ("mul.lo.s32", 0x10000, 0x10000, 0),
        ("mul.lo.u32", 0x80000001, 2, 2),
        ("div.s32", 0xFFFFFFF9, 2, 0xFFFFFFFD),  # -7 / 2 = -3
        ("div.s32", 7, 0xFFFFFFFE, 0xFFFFFFFD),
        ("div.s32", 0xFFFFFFF9, 0xFFFFFFFE, 3),
        ("div.s32", 0xFFFFFFF8, 2, 0xFFFFFFFC),
        ("div.u32", 0xFFFFFFF9, 2, 0x7FFFFFFC),
        ("rem.s32", 0xFFFFFFF9, 2, 0xFFFFFFFF),  # the sign of the dividend
        ("rem.s32", 7, 0xFFFFFFFE, 1),
        ("rem.s32", 0xFFFFFFF9, 0xFFFFFFFE, 0xFFFFFFFF),
        ("rem.s32", 0xFFFFFFF8, 2, 0),
        ("rem.u32", 0xFFFFFFF9, 16, 9),
        ("and.b32", 0xF0F01234, 0x0FF0FFFF, 0x00F01234),
        ("or.b32", 0xF0F00000, 0x0FF00001, 0xFFF00001),
        ("xor.b32", 0xF0F00000, 0x0FF00001, 0xFF000001),
        ("shl.b32", 0x80000001, 4, 0x10),
        ("shl.b32", 1, 31, 0x80000000),
        ("shl.b32", 1, 32, 0),
        ("shl.b32", 1, 0xFFFFFFFF, 0),
        ("shr.u32", 0x80000000, 31, 1),
        ("shr.u32", 0xFFFFFFFF, 32, 0),
        ("shr.b32", 0x80000000, 4, 0x08000000),
        ("shr.s32", 0x80000000, 4, 0xF8000000),
        ("shr.s32", 0x80000000, 31, 0xFFFFFFFF),
        ("shr.s32", 0x80000000, 32, 0xFFFFFFFF),
        ("shr.s32", 0x80000000, 0x100, 0xFFFFFFFF),
        ("shr.s32", 0x7FFFFFFF, 64, 0),
    ],
)
def test_integers_of_32_bits(form, x, y, expected):
    assert two(form, [(x, y)]) == [expected]


@pytest.mark.parametrize(
    "form, x, y, expected",
    [
        ("add.s64", 0xFFFFFFFF, 1, 0x100000000),
        ("add.s64", 0xFFFFFFFFFFFFFFFF, 2, 1),
        ("sub.s64", 0, 1, 0xFFFFFFFFFFFFFFFF),
        ("min.s64", 0x8000000000000000, 1, 0x8000000000000000),
        ("max.u64", 0x8000000000000000, 1, 0x8000000000000000),
        ("mul.lo.s64", 0xFFFFFFFFFFFFFFFF, 3, 0xFFFFFFFFFFFFFFFD),
        ("mul.lo.u64", 0x100000001, 0x100000001, 0x200000001),
        ("div.s64", 0xFFFFFFFFFFFFFFF9, 2, 0xFFFFFFFFFFFFFFFD),
        ("div.u64", 0xFFFFFFFFFFFFFFFF, 2, 0x7FFFFFFFFFFFFFFF),
        ("rem.s64", 0xFFFFFFFFFFFFFFF9, 4, 0xFFFFFFFFFFFFFFFD),
        ("and.b64", 0xFF00000000000001, 0x8100000000000003, 0x8100000000000001),
        ("or.b64", 0x8000000000000000, 1, 0x8000000000000001),
        ("xor.b64", 0xFFFFFFFFFFFFFFFF, 1, 0xFFFFFFFFFFFFFFFE),
    ],
)
def test_integers_of_64_bits(form, x, y, expected):
    assert two(form, [(x, y)], "rd") == [expected]


@pytest.mark.parametrize(
    "form, x, y, expected",
    [
        ("add.s16", 0xFFFF, 2, 1),
        ("sub.s16", 0, 1, 0xFFFF),
        ("min.s16", 0x8000, 1, 0x8000),
        ("max.u16", 0x8000, 1, 0x8000),
        ("div.s16", 0xFFF9, 2, 0xFFFD),
        ("rem.s16", 0xFFF9, 2, 0xFFFF),
        ("and.b16", 0xF0F0, 0x8FFF, 0x80F0),
        ("or.b16", 0xF000, 1, 0xF001),
        ("xor.b16", 0xFFFF, 1, 0xFFFE),
    ],
)
def test_integers_of_16_bits(form, x, y, expected):
    assert two(form, [(x, y)], "rs") == [expected]


@pytest.mark.parametrize(
    "form, x, amount, expected",
    [
        ("shl.b64", 1, 63, 0x8000000000000000),
        ("shl.b64", 1, 64, 0),
        ("shr.u64", 0x8000000000000000, 63, 1),
        ("shr.u64", 0x8000000000000000, 64, 0),
        ("shr.s64", 0x8000000000000000, 1, 0xC000000000000000),
        ("shr.s64", 0x8000000000000000, 200, 0xFFFFFFFFFFFFFFFF),
        ("shl.b64", 0x123456789, 32, 0x2345678900000000),
    ],
)
def test_shifts_of_64_bits_have_an_amount_of_32(form, x, amount, expected):
    assert lanes(f"{form} %rd2, %rd1, %r1;", "rd2", rd1=[x], r1=[amount]) == [expected]


@pytest.mark.parametrize(
    "form, x, amount, expected",
    [
        ("shl.b16", 0x8001, 1, 2),
        ("shl.b16", 1, 16, 0),
        ("shr.u16", 0x8000, 15, 1),
        ("shr.u16", 0x8000, 0x10001, 0),
        ("shr.s16", 0x8000, 3, 0xF000),
        ("shr.s16", 0x8000, 16, 0xFFFF),
    ],
)
def test_shifts_of_16_bits_do_not_wrap_their_amount(form, x, amount, expected):
    assert lanes(f"{form} %rs2, %rs1, %r1;", "rs2", rs1=[x], r1=[amount]) == [expected]


@pytest.mark.parametrize(
    "form, x, expected",
    [
        ("neg.s32", 1, 0xFFFFFFFF),
        ("neg.s32", 0x80000000, 0x80000000),
        ("abs.s32", 0xFFFFFFFB, 5),
        ("abs.s32", 0x7FFFFFFF, 0x7FFFFFFF),
        ("not.b32", 0x0F0F0F0F, 0xF0F0F0F0),
    ],
)
def test_integers_of_one_operand(form, x, expected):
    assert lanes(f"{form} %r2, %r1;", "r2", r1=[x]) == [expected]


def test_integers_of_one_operand_in_other_widths():
    assert lanes("neg.s64 %rd2, %rd1;", "rd2", rd1=[1]) == [0xFFFFFFFFFFFFFFFF]
    assert lanes("abs.s16 %rs2, %rs1;", "rs2", rs1=[0xFFFE]) == [2]
    assert lanes("not.b16 %rs2, %rs1;", "rs2", rs1=[0x00FF]) == [0xFF00]
    assert lanes("not.b64 %rd2, %rd1;", "rd2", rd1=[0]) == [0xFFFFFFFFFFFFFFFF]


@pytest.mark.parametrize("form, expected", [("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])])
def test_predicates_are_combined(form, expected):
    assert lanes(f"{form}.pred %p3, %p1, %p2;", "p3", p1=[0, 0, 1, 1], p2=[0, 1, 0, 1]) == expected


def test_a_predicate_is_inverted():
    assert lanes("not.pred %p2, %p1;", "p2", p1=[0, 1]) == [1, 0]


@pytest.mark.parametrize(
    "form, x, y, expected",
    [
        ("mul.wide.s32", 0xFFFFFFFF, 4, 0xFFFFFFFFFFFFFFFC),
        ("mul.wide.s32", 0x80000000, 0x80000000, 0x4000000000000000),
        ("mul.wide.u32", 0xFFFFFFFF, 4, 0x3FFFFFFFC),
        ("mul.wide.u32", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE00000001),
    ],
)
def test_a_wide_product_has_64_bits_and_the_sign_of_its_type(form, x, y, expected):
    assert lanes(f"{form} %rd1, %r1, %r2;", "rd1", r1=[x], r2=[y]) == [expected]


@pytest.mark.parametrize(
    "form, x, y, addend, expected",
    [
        ("mad.wide.s32", 0xFFFFFFFF, 4, 0x100000000, 0xFFFFFFFC),
        ("mad.wide.s32", 0x40000000, 4, 0x100000000, 0x200000000),
        ("mad.wide.u32", 0xFFFFFFFF, 4, 4, 0x400000000),
        ("mad.wide.u32", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFE00000000),
    ],
)
def test_a_wide_product_takes_an_addend_of_64_bits(form, x, y, addend, expected):
    assert lanes(f"{form} %rd2, %r1, %r2, %rd1;", "rd2", r1=[x], r2=[y], rd1=[addend]) == [expected]


def test_a_low_product_with_an_addend_wraps():
    assert lanes("mad.lo.s32 %r4, %r1, %r2, %r3;", "r4", r1=[0x80000000], r2=[2], r3=[5]) == [5]
    assert lanes("mad.lo.s32 %r4, %r1, %r2, -3;", "r4", r1=[0xFFFFFFFF], r2=[2]) == [0xFFFFFFFB]
    assert lanes("mad.lo.s64 %rd4, %rd1, %rd2, 1;", "rd4", rd1=[1 << 33], rd2=[3]) == [0x600000001]


@pytest.mark.parametrize("form", ["div.s32", "div.u32", "rem.s32", "rem.u32"])
def test_division_by_zero_is_a_fault_in_lanes_that_divide(form):
    with pytest.raises(Fault, match=rf"division by zero: {form} %r3, %r1, %r2"):
        two(form, [(5, 1), (5, 0)])
    predicated = f"setp.ne.s32 %p1, %r2, 0; mov.b32 %r3, 77; @%p1 {form} %r3, %r1, %r2;"
    assert lanes(predicated, "r3", r1=[6, 6], r2=[7, 0])[1] == 77


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, x, position, length, expected",
    [
        ("bfe.u32", 0x12345678, 8, 8, 0x56),
        ("bfe.u32", 0xFFFFFFFF, 0, 32, 0xFFFFFFFF),
        ("bfe.u32", 0xFFFFFFFF, 4, 0, 0),
        ("bfe.u32", 0xFFFFFFFF, 28, 8, 0xF),
        ("bfe.u32", 0xFFFFFFFF, 32, 4, 0),
        ("bfe.u32", 0xFFFFFFFF, 255, 255, 0),
        ("bfe.u32", 0x12345678, 0x108, 0x108, 0x56),  # of position and length, 8 bits count
        ("bfe.u32", 0x12345678, 0, 255, 0x12345678),
        ("bfe.s32", 0x12345678, 8, 8, 0x56),
        ("bfe.s32", 0x12348678, 8, 8, 0xFFFFFF86),
        ("bfe.s32", 0x00000004, 2, 1, 0xFFFFFFFF),
        ("bfe.s32", 0xFFFFFFFF, 4, 0, 0),
        ("bfe.s32", 0x80000000, 28, 8, 0xFFFFFFF8),
        ("bfe.s32", 0x70000000, 28, 8, 7),
        ("bfe.s32", 0x80000000, 40, 4, 0xFFFFFFFF),
        ("bfe.s32", 0x7FFFFFFF, 40, 4, 0),
        ("bfe.s32", 0x80000000, 0, 32, 0x80000000),
        ("bfe.s32", 0x80000000, 31, 1, 0xFFFFFFFF),
        ("bfe.s32", 0x80000001, 0, 255, 0x80000001),
        ("bfe.s32", 0x80000000, 40, 0, 0),
    ],
)
def test_a_field_of_bits(form, x, position, length, expected):
    given = {"r1": [x], "r2": [position], "r3": [length]}
    assert lanes(f"{form} %r4, %r1, %r2, %r3;", "r4", **given) == [expected]
    if position < 256:  # as constants may be
        assert lanes(f"{form} %r4, %r1, {position}, {length};", "r4", r1=[x]) == [expected]


@pytest.mark.parametrize(
    "x, position, length, expected",
    [
        (0x123456789ABCDEF0, 8, 16, 0xBCDE),
        (0x123456789ABCDEF0, 1, 31, 0x4D5E6F78),
        (0xFFFFFFFFFFFFFFFF, 0, 64, 0xFFFFFFFFFFFFFFFF),
        (0xFFFFFFFFFFFFFFFF, 60, 8, 0xF),
        (0xFFFFFFFFFFFFFFFF, 4, 0, 0),
        (0xFFFFFFFFFFFFFFFF, 64, 4, 0),
        (0xFFFFFFFFFFFFFFFF, 255, 255, 0),
        (0x123456789ABCDEF0, 0, 255, 0x123456789ABCDEF0),
    ],
)
def test_a_field_of_64_bits(x, position, length, expected):
    assert lanes(f"bfe.u64 %rd4, %rd1, {position}, {length};", "rd4", rd1=[x]) == [expected]


@pytest.mark.parametrize(
    "selector, expected",
    [
        (0x3210, 0x8F112233),
        (0x7654, 0xA4B5C677),
        (0x0123, 0x3322118F),
        (0x5410, 0xC6772233),
        (0x7632, 0xA4B58F11),
        (0x3340, 0x8F8F7733),
        (0xB210, 0xFF112233),  # the sign of byte 3
        (0x8888, 0x00000000),
        (0xFEDC, 0xFFFFFF00),
        (0xFFFF3210, 0x8F112233),  # of the selector, 16 bits count
    ],
)
def test_bytes_are_permuted(selector, expected):
    assert lanes("prmt.b32 %r4, %r1, %r2, %r3;", "r4", r1=[0x8F112233], r2=[0xA4B5C677], r3=[selector]) == [expected]
    assert lanes(f"prmt.b32 %r4, %r1, %r2, {selector:#x};", "r4", r1=[0x8F112233], r2=[0xA4B5C677]) == [expected]


# -- floating point of 32 bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, x, y, expected",
    [
        ("add.f32", 0x3F800000, 0x33800000, 0x3F800000),  # 1 + 2^-24: a tie, to even
        ("add.f32", 0x3F800001, 0x33800000, 0x3F800002),
        ("add.rn.f32", 0x3F800000, 0x33800001, 0x3F800001),
        ("add.f32", 0x80000000, 0x00000000, 0x00000000),
        ("add.f32", 0x80000000, 0x80000000, 0x80000000),
        ("add.f32", 0x00000001, 0x00000001, 0x00000002),  # subnormal numbers are kept
        ("add.f32", 0x7F7FFFFF, 0x7F7FFFFF, 0x7F800000),
        ("sub.f32", 0x3F800000, 0x40000000, 0xBF800000),
        ("sub.f32", 0x3F800000, 0x3F800000, 0x00000000),
        ("mul.f32", 0xBFC00000, 0x40000000, 0xC0400000),
        ("mul.f32", 0x00800000, 0x3F000000, 0x00400000),
        ("mul.rn.f32", 0x3F800001, 0x3F800001, 0x3F800002),
        ("mul.f32", 0x80000000, 0x3F800000, 0x80000000),
        ("div.full.f32", 0x3F800000, 0x40400000, 0x3EAAAAAB),
        ("div.rn.f32", 0xBF800000, 0x00000000, 0xFF800000),
        ("max.f32", 0x3F800000, 0xC0000000, 0x3F800000),
        ("min.f32", 0x3F800000, 0xC0000000, 0xC0000000),
        ("max.f32", NAN, 0xC0000000, 0xC0000000),
        ("max.f32", 0xC0000000, NAN, 0xC0000000),
        ("min.f32", NAN, 0x40000000, 0x40000000),
        ("min.f32", 0x40000000, 0xFFC00001, 0x40000000),
        ("max.f32", 0x80000000, 0x00000000, 0x00000000),
        ("max.f32", 0x00000000, 0x80000000, 0x00000000),
        ("max.f32", 0x80000000, 0x80000000, 0x80000000),
        ("min.f32", 0x80000000, 0x00000000, 0x80000000),
        ("min.f32", 0x00000000, 0x80000000, 0x80000000),
        ("min.f32", 0x00000000, 0x00000000, 0x00000000),
        ("max.f32", 0xFFFFFFFF, 0xFFC00000, 0x7FFFFFFF),  # of two NaN: PTX's own
        ("min.f32", 0xFFFFFFFF, 0xFFC00000, 0x7FFFFFFF),
        ("max.f32", 0xFF800000, 0x00000001, 0x00000001),
    ],
)
def test_floating_point_of_32_bits(form, x, y, expected):
    assert two(form, [(x, y)]) == [expected]


@pytest.mark.parametrize(
    "form, x, y",
    [
        ("add.f32", INFINITY, 0xFF800000),
        ("sub.f32", INFINITY, INFINITY),
        ("mul.f32", INFINITY, 0),
        ("div.full.f32", 0, 0),
        ("add.f32", NAN, 0x3F800000),
        ("mul.f32", 0x3F800000, NAN),
    ],
)
def test_what_is_no_number_is_nan(form, x, y):
    assert is_nan(two(form, [(x, y)])[0])


@pytest.mark.parametrize(
    "form, x, expected",
    [
        ("neg.f32", 0x00000000, 0x80000000),
        ("neg.f32", 0xBF800000, 0x3F800000),
        ("abs.f32", 0xFF800000, 0x7F800000),
        ("abs.f32", 0x80000000, 0x00000000),
        ("abs.f32", 0x3F800000, 0x3F800000),
    ],
)
def test_the_sign_of_a_number(form, x, expected):
    assert lanes(f"{form} %r2, %r1;", "r2", r1=[x]) == [expected]


@pytest.mark.parametrize(
    "x, y, z, expected",
    [
        (0x40000000, 0x40400000, 0x3F800000, 0x40E00000),  # 2 * 3 + 1
        # what a rounded product loses: 2^-46
        (0x3F800001, 0x3F800001, 0xBF800002, 0x28800000),
        (0x3F800001, 0x3F7FFFFE, 0xBF800000, 0xA8800000),
        # ties
        (0x33800000, 0x3F800000, 0x3F800000, 0x3F800000),
        (0x33800000, 0x3F800000, 0x3F800001, 0x3F800002),
        # ties as a double, but above (below) them by 2^-70
        (0x33801001, 0x3F7FE002, 0x3F800000, 0x3F800001),
        (0x33800001, 0x3F7FFFFE, 0x3F800001, 0x3F800001),
        (0xB3801001, 0x3F7FE002, 0xBF800000, 0xBF800001),
        (0xB3800001, 0x3F7FFFFE, 0xBF800001, 0xBF800001),
        # subnormal results
        (0x00800000, 0x3F000000, 0x00000000, 0x00400000),
        (0x1F800000, 0x1F800000, 0x00000001, 0x00200001),
        (0x00000001, 0x3F000000, 0x00000000, 0x00000000),  # half of the smallest: a tie
        (0x00000001, 0x3F000001, 0x00000000, 0x00000001),
        (0x00000001, 0x3F000000, 0x00000001, 0x00000002),  # 1.5 times the smallest: a tie
        (0x00000001, 0x3EFFFFFF, 0x00000001, 0x00000001),
        (0x1A001001, 0x19FFE002, 0x00400000, 0x00400001),  # above a tie
        (0x1A000001, 0x19FFFFFE, 0x00400001, 0x00400001),  # below a tie
        (0x80000001, 0x00000001, 0x00000000, 0x80000000),  # the sign is that of the exact result
        (0x80000001, 0x00000001, 0x80000000, 0x80000000),
        # the largest
        (0x7F7FFFFF, 0x3F800000, 0x73000000, 0x7F800000),  # and half a unit: a tie, to infinity
        (0x7F7FFFFF, 0x3F800000, 0x72FFFFFF, 0x7F7FFFFF),
        (0x7F7FFFFF, 0x40000000, 0xFF7FFFFF, 0x7F7FFFFF),  # no overflow on the way
        (0x7F800000, 0x3F800000, 0x3F800000, 0x7F800000),
        (0x3F800000, 0x00000000, 0x80000000, 0x00000000),
        (0x3F800000, 0x80000000, 0x80000000, 0x80000000),
    ],
)
def test_a_product_and_a_sum_are_rounded_once(x, y, z, expected):
    assert lanes("fma.rn.f32 %r4, %r1, %r2, %r3;", "r4", r1=[x], r2=[y], r3=[z]) == [expected]


def test_a_product_of_infinity_and_zero_and_a_sum_of_infinities_are_nan():
    given = {"r1": [INFINITY, INFINITY, NAN], "r2": [0, 0x3F800000, 0], "r3": [0, 0xFF800000, 0]}
    assert all(map(is_nan, lanes("fma.rn.f32 %r4, %r1, %r2, %r3;", "r4", **given)))


# -- floating point of 16 bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, x, y, expected",
    [
        ("add.bf16", 0x3F80, 0x3B80, 0x3F80),  # 1 + 2^-8: a tie
        ("add.rn.bf16", 0x3F81, 0x3B80, 0x3F82),
        ("add.bf16", 0x3F80, 0x3B81, 0x3F81),
        ("sub.bf16", 0x3F80, 0x3B00, 0x3F80),  # 1 - 2^-9: a tie
        ("sub.bf16", 0x3F80, 0x3B01, 0x3F7F),
        ("sub.bf16", 0x3F80, 0x3F80, 0x0000),
        ("mul.bf16", 0x3F81, 0x3F81, 0x3F82),
        ("mul.bf16", 0xBFC0, 0x4000, 0xC040),
        ("mul.bf16", 0x7F7F, 0x4000, 0x7F80),
        ("mul.bf16", 0x0080, 0x3F00, 0x0040),
        ("mul.bf16", 0x7F80, 0x0000, 0x7FFF),
        ("add.bf16", 0x7F80, 0xFF80, 0x7FFF),
        ("add.bf16", 0xFFC0, 0x3F80, 0x7FFF),
        ("add.bf16", 0x3F80, 0x2F81, 0x3F80),  # a small number changes nothing
        ("add.bf16", 0x4B80, 0x3F80, 0x4B80),
        ("add.f16", 0x3C00, 0x1000, 0x3C00),  # 1 + 2^-11: a tie
        ("add.f16", 0x3C01, 0x1000, 0x3C02),
        ("add.rn.f16", 0x3C00, 0x1001, 0x3C01),
        ("sub.f16", 0x0001, 0x0002, 0x8001),
        ("mul.f16", 0x3C01, 0x3C01, 0x3C02),
        ("mul.f16", 0x7BFF, 0x4000, 0x7C00),
        ("mul.f16", 0x0001, 0x3800, 0x0000),
        ("mul.f16", 0x0003, 0x3800, 0x0002),
        ("mul.f16", 0x7C00, 0x0000, 0x7FFF),
    ],
)
def test_floating_point_of_16_bits(form, x, y, expected):
    assert two(form, [(x, y)], "rs") == [expected]


@pytest.mark.parametrize(
    "kind, x, y, z, expected",
    [
        ("bf16", 0x4000, 0x4040, 0x3F80, 0x40E0),
        ("bf16", 0x3F81, 0x3F81, 0xBF82, 0x3880),  # what a rounded product loses: 2^-14
        ("bf16", 0x3F80, 0x3B80, 0x3F80, 0x3F80),
        ("bf16", 0x3B81, 0x3F7F, 0x3F80, 0x3F81),
        # 15 * 19 = 285 and 7 * 41 = 287 are ties; plus or minus 2^-20 they are no ties, but would be in fp32
        ("bf16", 0x4170, 0x4198, 0x0000, 0x438E),
        ("bf16", 0x4170, 0x4198, 0x3580, 0x438F),
        ("bf16", 0x40E0, 0x4224, 0x0000, 0x4390),
        ("bf16", 0x40E0, 0x4224, 0xB580, 0x438F),
        # plus or minus 2^-60, which a double would not hold
        ("bf16", 0x4170, 0x4198, 0x2180, 0x438F),
        ("bf16", 0x40E0, 0x4224, 0xA180, 0x438F),
        ("bf16", 0x7180, 0x4D80, 0xFF00, 0x7F00),  # 2^128 - 2^127: no overflow on the way
        ("bf16", 0x0080, 0x0080, 0x0000, 0x0000),
        ("bf16", 0x0080, 0x8080, 0x0000, 0x8000),  # the sign is that of the exact result
        ("bf16", 0x0080, 0x0080, 0x0001, 0x0001),
        ("bf16", 0x1F80, 0x1F80, 0x0000, 0x0020),
        ("bf16", 0x7F80, 0x0000, 0x3F80, 0x7FFF),
        ("bf16", 0x7F80, 0x3F80, 0xFF80, 0x7FFF),
        ("f16", 0x4000, 0x4200, 0x3C00, 0x4700),
        ("f16", 0x3C01, 0x3C01, 0xBC02, 0x0010),  # 2^-20
        # 1025.5 is a tie; below it by 2^-21 it is none, but would be in fp32
        ("f16", 0x3800, 0x3C00, 0x6401, 0x6402),
        ("f16", 0x3801, 0x3BFE, 0x6401, 0x6401),
        ("f16", 0x7BFF, 0x4000, 0xFBFF, 0x7BFF),
    ],
)
def test_a_product_and_a_sum_of_16_bits_are_rounded_once(kind, x, y, z, expected):
    given = {"rs1": [x], "rs2": [y], "rs3": [z]}
    assert lanes(f"fma.rn.{kind} %rs4, %rs1, %rs2, %rs3;", "rs4", **given) == [expected]


def test_two_numbers_of_16_bits_in_a_register():
    given = {"r1": [0x3F814000], "r2": [0x3F814040], "r3": [0xBF823F80]}
    assert lanes("fma.rn.bf16x2 %r4, %r1, %r2, %r3;", "r4", **given) == [0x388040E0]
    assert lanes("mul.bf16x2 %r4, %r1, %r2;", "r4", r1=[0x3F81BFC0], r2=[0x3F814000]) == [0x3F82C040]
    assert lanes("add.rn.f16x2 %r4, %r1, %r2;", "r4", r1=[0x3C013C00], r2=[0x10001001]) == [0x3C023C01]
    assert lanes("sub.bf16x2 %r4, %r1, %r2;", "r4", r1=[0x3F804000], r2=[0x3F803F80]) == [0x00003F80]
    assert lanes("neg.bf16x2 %r4, %r1;", "r4", r1=[0x3F80BF80]) == [0xBF803F80]
    assert lanes("abs.f16x2 %r4, %r1;", "r4", r1=[0xBC003C00]) == [0x3C003C00]


def test_the_sign_of_16_bits():
    assert lanes("abs.bf16 %rs2, %rs1;", "rs2", rs1=[0xBF80, 0x8000, 0xFF80, 0x3F80]) == [0x3F80, 0, 0x7F80, 0x3F80]
    assert lanes("neg.f16 %rs2, %rs1;", "rs2", rs1=[0x0000, 0xBC00]) == [0x8000, 0x3C00]


# -- comparisons -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, expected",
    [  # of -1 and 1, 1 and -1, 1 and 1
        ("eq.s32", [0, 0, 1]),
        ("ne.s32", [1, 1, 0]),
        ("lt.s32", [1, 0, 0]),
        ("le.s32", [1, 0, 1]),
        ("gt.s32", [0, 1, 0]),
        ("ge.s32", [0, 1, 1]),
        ("lt.u32", [0, 1, 0]),
        ("le.u32", [0, 1, 1]),
        ("gt.u32", [1, 0, 0]),
        ("ge.u32", [1, 0, 1]),
        ("eq.b32", [0, 0, 1]),
        ("ne.b32", [1, 1, 0]),
    ],
)
def test_comparisons_of_integers(form, expected):
    minus, one = 0xFFFFFFFF, 1
    given = {"r1": [minus, one, one], "r2": [one, minus, one]}
    assert lanes(f"setp.{form} %p1, %r1, %r2;", "p1", **given) == expected


def test_comparisons_of_integers_of_other_widths():
    wide = {"rd1": [0x8000000000000000, 1 << 40], "rd2": [1, 1]}
    assert lanes("setp.lt.s64 %p1, %rd1, %rd2;", "p1", **wide) == [1, 0]
    assert lanes("setp.lt.u64 %p1, %rd1, %rd2;", "p1", **wide) == [0, 0]
    narrow = {"rs1": [0x8000, 0xFFFF], "rs2": [1, 0xFFFF]}
    assert lanes("setp.lt.s16 %p1, %rs1, %rs2;", "p1", **narrow) == [1, 0]
    assert lanes("setp.gt.u16 %p1, %rs1, %rs2;", "p1", **narrow) == [1, 0]
    assert lanes("setp.eq.b16 %p1, %rs1, -1;", "p1", rs1=[0xFFFF, 0]) == [1, 0]


@pytest.mark.parametrize(
    "form, expected",
    [  # of 1 and 2, 2 and 1, 1 and 1, -0 and 0, NaN and 1, 1 and NaN, NaN and NaN
        ("eq", [0, 0, 1, 1, 0, 0, 0]),
        ("ne", [1, 1, 0, 0, 0, 0, 0]),
        ("lt", [1, 0, 0, 0, 0, 0, 0]),
        ("le", [1, 0, 1, 1, 0, 0, 0]),
        ("gt", [0, 1, 0, 0, 0, 0, 0]),
        ("ge", [0, 1, 1, 1, 0, 0, 0]),
        ("equ", [0, 0, 1, 1, 1, 1, 1]),
        ("neu", [1, 1, 0, 0, 1, 1, 1]),
        ("ltu", [1, 0, 0, 0, 1, 1, 1]),
        ("leu", [1, 0, 1, 1, 1, 1, 1]),
        ("gtu", [0, 1, 0, 0, 1, 1, 1]),
        ("geu", [0, 1, 1, 1, 1, 1, 1]),
        ("num", [1, 1, 1, 1, 0, 0, 0]),
        ("nan", [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_comparisons_of_floating_point(form, expected):
    one, two, nan = 0x3F800000, 0x40000000, 0xFFC00001
    given = {"r1": [one, two, one, 0x80000000, nan, one, nan], "r2": [two, one, one, 0, one, nan, nan]}
    assert lanes(f"setp.{form}.f32 %p1, %r1, %r2;", "p1", **given) == expected


@pytest.mark.parametrize("kind, register", [("b16", "rs"), ("b32", "r"), ("f32", "r"), ("u32", "r"), ("b64", "rd")])
def test_a_predicate_selects(kind, register):
    body = f"selp.{kind} %{register}3, %{register}1, %{register}2, %p1;"
    given = {f"{register}1": [0x7F81, 0x7F82], f"{register}2": [0xFF83, 0xFF84]}
    assert lanes(body, f"{register}3", p1=[1, 0], **given) == [0x7F81, 0xFF84]


def test_constants_are_selected():
    assert lanes("selp.b32 %r1, -1, 0f3F800000, %p1;", "r1", p1=[1, 0]) == [0xFFFFFFFF, 0x3F800000]
    assert lanes("selp.b64 %rd1, -1, 0, %p1;", "rd1", p1=[1, 0]) == [0xFFFFFFFFFFFFFFFF, 0]


def test_a_constant_may_be_a_number_of_floating_point():
    assert lanes("add.f32 %r2, %r1, 0fBF800000;", "r2", r1=[0x40000000]) == [0x3F800000]
