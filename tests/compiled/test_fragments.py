"""``ldmatrix``, ``stmatrix`` and ``mma``, against the layouts of fragments in PTX's documentation."""

import struct

import pytest
import torch

from .machine.faults import Fault
from .snippets import lanes, noted, run, zeros

NEVER = "a read of shared memory that was never written"
READ_OF_WRITTEN = "a read of what another thread wrote, without a barrier"
WRITE_OF_WRITTEN = "a write to what another thread wrote, without a barrier"
WRITE_OF_READ = "a write to what another thread read, without a barrier"
BLOCK, WARP = "bar.sync 0;", "bar.warp.sync -1;"
# lane l has the address of row l; rows are 16 bytes, with 16 bytes between them
ROWS = "shl.b32 %r20, %thread0, 5; mov.b32 %r21, global_smem; add.s32 %r20, %r20, %r21;"
FILL = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8]; st.shared.v4.b32 [%r20], {%r1, %r2, %r3, %r4};"
SOURCE = "mad.wide.s32 %rd8, %thread0, 16, %rd1;"


def element(matrix, row, column):
    """What is unlike everything else."""
    return matrix * 0x1000 + row * 0x100 + column


def words(values):
    """As tensors hold them: numbers of 32 bits with a sign."""
    return torch.tensor([value - (1 << 32) if value >= 1 << 31 else value for value in values], dtype=torch.int32)


def unsigned(tensor):
    return [value % (1 << 32) for value in tensor.tolist()]


def expected_register(matrix, lane, transposed):
    """Lane 4 g + q holds of row g the elements 2 q and 2 q + 1, the first in the lower half; transposed, of column g."""
    g, q = lane // 4, lane % 4
    low, high = ((2 * q, g), (2 * q + 1, g)) if transposed else ((g, 2 * q), (g, 2 * q + 1))
    return element(matrix, *low) | element(matrix, *high) << 16


def rows_of_matrices():
    """By lane the 4 words of a row: lane 8 m + r has row r of matrix m."""
    found = []
    for lane in range(32):
        for column in range(0, 8, 2):
            pair = [element(lane // 8, lane % 8, column + part) for part in (0, 1)]
            found.append(pair[0] | pair[1] << 16)
    return words(found)


def names(count, first=10):
    return "{" + ", ".join(f"%r{first + place}" for place in range(count)) + "}"


def out_of(count, first=10):
    """Each register to a row of 32 of the second tensor."""
    stores = "".join(f"st.global.b32 [%rd9+{128 * place}], %r{first + place};" for place in range(count))
    return "mad.wide.s32 %rd9, %thread0, 4, %rd2;" + stores


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_matrices_are_loaded(count, transposed, space):
    out = zeros(32 * count)
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{transposed}.{space}.b16 {names(count)}, [%r20];"
    assert not run(ROWS + SOURCE + FILL + WARP + load + out_of(count), shared=1024, a=rows_of_matrices(), out=out)
    assert unsigned(out) == [
        expected_register(matrix, lane, bool(transposed)) for matrix in range(count) for lane in range(32)
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_are_stored(count, transposed):
    """Every lane stores what it would have loaded; the rows are read one word after the other."""
    registers = words([expected_register(m, lane, bool(transposed)) for m in range(count) for lane in range(32)])
    out = zeros(32 * count)
    loads = "".join(f"ld.global.b32 %r{10 + place}, [%rd9+{128 * place}];" for place in range(count))
    read = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r20]; mad.wide.s32 %rd8, %thread0, 16, %rd2;"
    store = "st.global.v4.b32 [%rd8], {%r1, %r2, %r3, %r4};"
    body = f"""
        {ROWS} mad.wide.s32 %rd9, %thread0, 4, %rd1; {loads}
        stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r20], {names(count)};
        {WARP} setp.ge.s32 %p1, %thread0, {8 * count}; @%p1 ret; {read} {store}
    """
    assert not run(body, shared=1024, a=registers, out=out)
    assert unsigned(out) == unsigned(rows_of_matrices())[: 32 * count]


def test_each_warp_has_matrices_of_its_own():
    """The second warp's addresses are those of the first, in the reverse order of the matrices."""
    out = zeros(64)
    body = f"""
        {ROWS} {SOURCE} setp.lt.s32 %p1, %thread0, 32; @%p1 ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd8];
        @%p1 st.shared.v4.b32 [%r20], {{%r1, %r2, %r3, %r4}}; {BLOCK}
        @!%p1 xor.b32 %r20, %r20, 0x300; @!%p1 add.s32 %r20, %r20, -1024;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [%r20]; {out_of(1)}
    """
    assert not run(body, threads=64, shared=1024, a=rows_of_matrices(), out=out)
    assert unsigned(out) == [expected_register(matrix, lane, False) for matrix in (0, 3) for lane in range(32)]


def test_a_part_of_a_warp_is_a_fault():
    load = "setp.lt.s32 %p1, %thread0, 8; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r20];"
    with pytest.raises(Fault, match="not all threads of a warp take part: @%p1 ldmatrix"):
        run(ROWS + load, shared=1024)


def test_addresses_of_lanes_without_a_row_do_not_count():
    body = "setp.ge.s32 %p1, %thread0, 8; @%p1 mov.b32 %r20, 0xffffffff;"
    assert noted(ROWS + f"stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {{%thread0}}; {WARP}" + body) == []
    store = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%thread0};"
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r20];"
    assert noted(ROWS + body + store + WARP + load) == []


STORE4 = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r20], {names(4, 1)};"
LOAD4 = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names(4)}, [%r20];"
OTHER = "sub.s32 %r20, %r20, %r21; xor.b32 %r20, %r20, 1024; add.s32 %r20, %r20, %r21;"  # rows of the other warp


@pytest.mark.parametrize(
    "body, hazards",
    [
        (LOAD4, [NEVER]),
        (STORE4 + LOAD4, [READ_OF_WRITTEN]),
        (STORE4 + WARP + LOAD4, []),
        (STORE4 + WARP + OTHER + LOAD4, [READ_OF_WRITTEN]),
        (STORE4 + BLOCK + OTHER + LOAD4, []),
        (STORE4 + STORE4, [WRITE_OF_WRITTEN]),
        (STORE4 + WARP + STORE4, []),
        (STORE4 + WARP + LOAD4 + STORE4, [WRITE_OF_READ]),
        (STORE4 + WARP + LOAD4 + WARP + STORE4, []),
        (STORE4 + WARP + LOAD4 + OTHER + BLOCK + STORE4, []),
        (STORE4 + BLOCK + OTHER + LOAD4 + OTHER + STORE4, [WRITE_OF_READ]),
        (STORE4 + BLOCK + OTHER + LOAD4 + OTHER + WARP + STORE4, [WRITE_OF_READ]),
        ("st.shared.v4.b32 [%r20], {1, 1, 1, 1};" + LOAD4, [READ_OF_WRITTEN]),
        (STORE4 + "ld.shared.b32 %r9, [%r20];", [READ_OF_WRITTEN]),
        (STORE4 + WARP + LOAD4 + "st.shared.b32 [%r20], 1;", [WRITE_OF_READ]),
        (STORE4 + WARP + LOAD4 + WARP + "st.shared.b32 [%r20], 1;", []),
    ],
)
def test_all_threads_of_a_warp_access_each_row(body, hazards):
    rows = ROWS.replace("add.s32 %r20", "mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0; mov.b32 %r4, 0; add.s32 %r20")
    assert noted(rows + body, threads=64, shared=2048) == hazards


# -- products ----------------------------------------------------------------------------------------------------------


def bits(kind, value):
    """Of a small whole number."""
    single = struct.unpack("<I", struct.pack("<f", value))[0]
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    return single >> 16 if kind == "bf16" else single


def packed(kind, first, second):
    return bits(kind, first) | bits(kind, second) << 16


def a_value(row, column):
    return (3 * row + 7 * column) % 11 - 5


def b_value(row, column):
    return (5 * row + 2 * column) % 13 - 6


def c_value(row, column):
    return 100 * row + column


def product_of(depth):
    """By row and column."""
    return {
        (row, column): c_value(row, column) + sum(a_value(row, k) * b_value(k, column) for k in range(depth))
        for row in range(16)
        for column in range(8)
    }


def fragments(kind):
    """The registers of A, B and C, by lane, as the documentation of m16n8k16 and of m16n8k8 for tf32 has them."""
    a, b, c = [[] for _ in range(4)], [[] for _ in range(2)], [[] for _ in range(4)]
    for lane in range(32):
        g, q = lane // 4, lane % 4
        if kind == "tf32":
            for register, (row, column) in enumerate([(g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4)]):
                a[register].append(bits(kind, a_value(row, column)))
            for register, row in enumerate([q, q + 4]):
                b[register].append(bits(kind, b_value(row, g)))
        else:
            places = [(g, 2 * q), (g + 8, 2 * q), (g, 2 * q + 8), (g + 8, 2 * q + 8)]
            for register, (row, column) in enumerate(places):
                a[register].append(packed(kind, a_value(row, column), a_value(row, column + 1)))
            for register, row in enumerate([2 * q, 2 * q + 8]):
                b[register].append(packed(kind, b_value(row, g), b_value(row + 1, g)))
        for register, (row, column) in enumerate([(g, 2 * q), (g, 2 * q + 1), (g + 8, 2 * q), (g + 8, 2 * q + 1)]):
            c[register].append(bits("f32", c_value(row, column)))
    return a, b, c


def multiply(kind, depth, a, b, c, target=20):
    given = {f"r{10 + place}": values for place, values in enumerate([*a, *b, *c])}
    form = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    operands = f"{names(4, target)}, {names(4)}, {names(2, 14)}, {names(4, 16)}"
    return lanes(f"{form} {operands};", " ".join(f"r{target + place}" for place in range(4)), **given)


@pytest.mark.parametrize("target", [20, 16], ids=["elsewhere", "in place"])
@pytest.mark.parametrize("kind, depth", [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_a_product_of_a_warp(kind, depth, target):
    found = multiply(kind, depth, *fragments(kind), target=target)
    product = product_of(depth)
    for lane in range(32):
        g, q = lane // 4, lane % 4
        places = [(g, 2 * q), (g, 2 * q + 1), (g + 8, 2 * q), (g + 8, 2 * q + 1)]
        assert [found[register][lane] for register in range(4)] == [bits("f32", product[place]) for place in places]


def test_of_tf32_the_lowest_bits_are_not_read():
    a, b, c = fragments("tf32")
    low = [[value | 0x1FFF for value in values] for values in a]
    assert multiply("tf32", 8, low, b, c) == multiply("tf32", 8, a, b, c)


def test_a_sum_keeps_what_fp32_holds():
    """1 + 2^-20 is no bf16: the sum is one of fp32."""
    one, none = [0x3F803F80] * 32, [0] * 32
    tiny = [[0x35800000] * 32] * 4
    found = multiply("bf16", 16, [one] + [none] * 3, [one, none], tiny)
    assert found[0] == [0x41000001] * 32  # 8 + 2^-20
    assert found[2] == [0x35800000] * 32  # the rows from 8 on
