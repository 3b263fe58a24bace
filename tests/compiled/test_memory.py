"""Global memory: what is in bounds, and what programs may not do to one another."""

import pytest
import torch

from . import running
from .machine.faults import Fault, Hazards
from .machine.memory import Memory
from .snippets import at_a_multiple_of_16, ints, noted, run, zeros

ONE = "setp.ne.s32 %p1, %thread0, 0; @%p1 ret;"  # one thread of each program goes on
EACH = "mad.wide.s32 %rd9, %thread0, 4, %rd1;"  # in %rd9: the thread's own number of the first tensor
READ_AND_WRITTEN = ["a read of what the same launch writes (a)"]
WRITTEN_AND_READ = ["a write to what the same launch reads (a)"]
WRITTEN_TWICE = ["two programs write one address (a)"]


@pytest.mark.parametrize(
    "access, message",
    [
        (
            "ld.global.b32 %r1, [%rd1+16];",
            r"access out of bounds, to byte 16 of 16 of a: ld.global.b32 %r1, \[%rd1\+16\]",
        ),
        ("st.global.b32 [%rd1+16], 1;", "to byte 16 of 16 of a: st.global.b32"),
        ("ld.global.b32 %r1, [%rd1+-4];", "to byte -4 of 16 of a"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];", "to byte 0 of 8 of b"),
        ("ld.global.b8 %rs1, [%rd2+8];", "to byte 8 of 8 of b"),
        ("ld.global.b64 %rd3, [%rd2+0];", None),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", None),
        ("mov.b64 %rd3, 0; ld.global.b32 %r1, [%rd3];", "to address 0x0 of no tensor"),
        ("add.s64 %rd3, %rd1, 0x100000000; ld.global.b32 %r1, [%rd3];", "to byte 4294967296 of 16 of a"),
        ("mov.b32 %r1, 0x40000000; mad.wide.s32 %rd3, %r1, 4, %rd1; ld.global.b32 %r1, [%rd3];", "byte 4294967296 of"),
        ("mov.b64 %rd3, 0x7fff00000000; ld.global.b32 %r1, [%rd3];", "to address 0x7fff00000000 of no tensor"),
        ("cp.async.ca.shared.global [global_smem], [%rd1+16], 4;", "to byte 16 of 16 of a: cp.async"),
        ("cp.async.cg.shared.global [global_smem], [%rd2], 16;", "to byte 0 of 8 of b"),
    ],
)
def test_an_access_out_of_bounds_is_a_fault(access, message):
    given = {"a": ints(1, 2, 3, 4), "b": ints(5, 6)}
    if message is None:
        assert not run(access, shared=64, **given)
    else:
        with pytest.raises(Fault, match=message):
            run(access, shared=64, **given)


def test_one_lane_out_of_bounds_is_enough():
    assert not run(EACH + "ld.global.b32 %r1, [%rd9];", a=zeros(32))
    with pytest.raises(Fault, match="to byte 124 of 124 of a"):
        run(EACH + "ld.global.b32 %r1, [%rd9];", a=zeros(31))


def test_an_address_and_a_negative_offset_of_32_bits_give_one_of_64():
    out = zeros(3)
    body = "add.s64 %rd2, %rd1, 8; mov.b32 %r1, -1; mad.wide.s32 %rd3, %r1, 4, %rd2; st.global.b32 [%rd3], 7;"
    assert not run(ONE + body, out=out)
    assert out.tolist() == [0, 7, 0]


def test_lanes_may_access_different_tensors():
    """The lower 16 access a, the others b."""
    a, b, out = ints(*range(16)), ints(*range(100, 116)), zeros(32)
    body = """
        setp.lt.s32 %p1, %thread0, 16; selp.b64 %rd4, %rd1, %rd2, %p1; and.b32 %r1, %thread0, 15;
        mad.wide.s32 %rd4, %r1, 4, %rd4; ld.global.b32 %r2, [%rd4];
        mad.wide.s32 %rd5, %thread0, 4, %rd3; st.global.b32 [%rd5], %r2;
    """
    assert not run(body, a=a, b=b, out=out)
    assert out.tolist() == [*range(16), *range(100, 116)]
    store = body.replace("ld.global.b32 %r2, [%rd4];", "mov.b32 %r2, 7; st.global.b32 [%rd4], %r2;")
    assert noted(store, grid=2, a=a, b=b, out=out) == [
        f"two programs write one address ({name})" for name in ("a", "b", "out")
    ]
    assert a.tolist() == b.tolist() == [7] * 16


def test_an_address_of_no_tensor_is_0():
    assert Memory({"a": zeros(4)}, Hazards()).address(5) == 0


def test_an_empty_tensor_cannot_be_accessed():
    with pytest.raises(Fault, match="of no tensor"):
        run("ld.global.b32 %r1, [%rd1];", a=zeros(0), b=zeros(4))


@pytest.mark.parametrize(
    "access, message",
    [
        ("ld.global.b32 %r1, [%rd1+20];", None),  # rows of 6 in rows of 8
        ("ld.global.b32 %r1, [%rd1+24];", "access to memory between the elements of a: ld.global.b32"),
        ("st.global.b32 [%rd1+28], 1;", "between the elements of a: st.global.b32"),
        ("ld.global.b32 %r1, [%rd1+32];", None),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+16];", "between the elements of a"),
        ("ld.global.b32 %r1, [%rd1+116];", None),
        ("ld.global.b32 %r1, [%rd1+120];", "to byte 120 of 120 of a"),
    ],
)
def test_a_gap_between_the_rows_of_a_view_is_out_of_bounds(access, message):
    storage = zeros(4 * 8 + 4)
    view = storage[(-storage.data_ptr() // 4) % 4 :][:32].view(4, 8)[:, :6]  # at a multiple of 16 bytes
    if message is None:
        assert not run(ONE + access, a=view)
    else:
        with pytest.raises(Fault, match=message):
            run(ONE + access, a=view)


def test_every_other_element_and_a_transposed_matrix():
    body = ONE + "ld.global.b16 %rs1, [%rd1+{}];"
    assert not run(body.format(4), a=zeros(8, torch.bfloat16)[::2])
    with pytest.raises(Fault, match="between the elements"):
        run(body.format(2), a=zeros(8, torch.bfloat16)[::2])
    assert not run(body.format(62), a=zeros(32, torch.bfloat16).view(4, 8).t())
    assert not run(body.format(6), a=zeros(4, torch.bfloat16)[:, None].expand(4, 8))


@pytest.mark.parametrize(
    "access, width",
    [
        ("ld.global.b32 %r1, [%rd1+2];", 4),
        ("ld.global.b16 %rs1, [%rd1+1];", 2),
        ("ld.global.b64 %rd3, [%rd1+4];", 8),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd1+4];", 8),
        ("st.global.v4.b32 [%rd1+8], {%r1, %r1, %r1, %r1};", 16),
        ("cp.async.cg.shared.global [global_smem], [%rd1+8], 16;", 16),
    ],
)
def test_a_misaligned_access_is_a_fault(access, width):
    with pytest.raises(Fault, match=f"misaligned access of {width} bytes to global memory: "):
        run("mov.b32 %r1, 0;" + ONE + access, shared=64, a=zeros(64, torch.int64))


def test_a_view_that_begins_anywhere_keeps_its_alignment():
    """Elements of 16 bits, accessed as 32: from the second one on a multiple of 4 bytes is in the middle of two."""
    storage = at_a_multiple_of_16(16, torch.int16)
    storage.copy_(torch.arange(16))
    out = zeros(1)
    body = ONE + "ld.global.b32 %r1, [%rd1+2]; st.global.b32 [%rd2], %r1;"
    assert not run(body, a=storage[1:], out=out)
    assert out.item() == 0x00030002
    with pytest.raises(Fault, match="misaligned"):
        run(body, a=storage[2:], out=out)
    assert not run(ONE + "st.global.v2.b32 [%rd1+14], {%r1, %r1};", a=storage[1:])
    assert storage.tolist() == [*range(8), -1, -1, -1, -1, *range(12, 16)]


@pytest.mark.parametrize("width, lanes", [(4, 16), (8, 8)])
def test_tensors_that_overlap_are_one_memory(width, lanes):
    storage = at_a_multiple_of_16(16, torch.int32)
    storage.copy_(torch.arange(16))
    first, second, out = storage[1:6], storage[4:], zeros(2)
    body = ONE + "ld.global.v2.b32 {%r1, %r2}, [%rd2]; st.global.v2.b32 [%rd3], {%r1, %r2};"
    assert not run(body, first=first, second=second, out=out)
    assert out.tolist() == [4, 5]
    with pytest.raises(Fault, match="of first/second"):
        run(ONE + "ld.global.b32 %r1, [%rd2+48];", first=first, second=second)
    assert noted(ONE + "st.global.b32 [%rd1+12], 1; ld.global.b32 %r1, [%rd2];", first=first, second=second) == [
        "a read of what the same launch writes (first/second)"
    ]


# -- the order of programs ---------------------------------------------------------------------------------------------


def test_two_programs_may_not_write_one_address():
    assert noted(ONE + "st.global.b32 [%rd1], 1;", grid=2, a=zeros(1)) == WRITTEN_TWICE
    assert noted(ONE + "mad.wide.s32 %rd2, %program0, 4, %rd1; st.global.b32 [%rd2], 1;", grid=2, a=zeros(2)) == []


def test_one_program_may_write_an_address_twice():
    assert noted(ONE + "st.global.b32 [%rd1], 1; st.global.b32 [%rd1], 2;", a=zeros(1)) == []


def test_programs_that_are_executed_one_after_the_other_may_not_either(monkeypatch):
    monkeypatch.setattr(running, "LANES", 32)
    assert noted(ONE + "st.global.b32 [%rd1], 1;", grid=2, a=zeros(1)) == WRITTEN_TWICE
    assert noted(ONE + "ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd1], 1;", grid=2, a=zeros(1)) == sorted(
        READ_AND_WRITTEN + WRITTEN_AND_READ + WRITTEN_TWICE
    )


def test_ranges_that_overlap_in_a_part():
    body = ONE + "mad.wide.s32 %rd2, %program0, {}, %rd1; st.global.v2.b32 [%rd2], {{1, 1}};"
    assert noted(body.format(8), grid=2, a=zeros(4, torch.int64).view(torch.int32)) == []
    body = """
        setp.eq.s32 %p2, %program0, 0; @%p2 bra $first;
        st.global.b32 [%rd1+4], 1; ret;
    $first:
        st.global.v2.b32 [%rd1], {1, 1};
    """
    assert noted(ONE + body, grid=2, a=zeros(2, torch.int64).view(torch.int32)) == WRITTEN_TWICE


@pytest.mark.parametrize("grid", [1, 2])
def test_what_a_launch_writes_it_may_not_read(grid):
    """Not even in the same program: another thread may have written."""
    own = ONE + "mad.wide.s32 %rd2, %program0, 4, %rd1;"
    assert noted(own + "st.global.b32 [%rd2], 1; ld.global.b32 %r1, [%rd2];", grid=grid, a=zeros(2)) == READ_AND_WRITTEN
    assert noted(own + "ld.global.b32 %r1, [%rd2]; st.global.b32 [%rd2], 1;", grid=grid, a=zeros(2)) == WRITTEN_AND_READ
    assert noted(own + "ld.global.b32 %r1, [%rd2]; st.global.b32 [%rd2+8], 1;", grid=grid, a=zeros(4)) == []


def test_a_copy_reads_too():
    body = """
        st.global.b32 [%rd1], 1;
        cp.async.ca.shared.global [global_smem], [%rd1], 4; cp.async.commit_group; cp.async.wait_group 0;
    """
    assert noted(ONE + body, a=zeros(1)) == READ_AND_WRITTEN


def test_a_hazard_names_the_instruction():
    hazards = run(ONE + "st.global.b32 [%rd1], 1;", grid=2, a=zeros(1))
    assert dict(hazards) == {"two programs write one address (a): st.global.b32 [%rd1], 1": 1}
