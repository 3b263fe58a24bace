"""Shared memory: bounds, what was never written, and the order of accesses by different threads."""

import pytest

from .machine.faults import Fault
from .snippets import noted, run, zeros

BLOCK, WARP = "bar.sync 0;", "bar.warp.sync -1;"
READ_OF_WRITTEN = "a read of what another thread wrote, without a barrier"
WRITE_OF_WRITTEN = "a write to what another thread wrote, without a barrier"
WRITE_OF_READ = "a write to what another thread read, without a barrier"
NEVER = "a read of shared memory that was never written"
DIFFERENT = "two threads write different values to one place at once"
STORE = "st.shared.b32 [%own0], %thread0;"
ONLY = "setp.eq.s32 %p{0}, %thread0, {0};"  # predicate n holds in thread n
THREADS = "".join(ONLY.format(thread) for thread in (1, 2, 32, 33))


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between, ordered", [("", ""), (WARP, "next"), (BLOCK, "next across")])
@pytest.mark.parametrize("other", ["next", "across"])
class TestTwoThreads:
    """``next`` is another thread of the warp, ``across`` one of another warp."""

    def check(self, body, other, ordered, hazard):
        assert noted(body, threads=64, shared=256) == ([] if other in ordered else [hazard])

    def test_a_read_after_a_write(self, between, ordered, other):
        body = f"{STORE} {between} ld.shared.b32 %r1, [%{other}0];"
        self.check(body, other, ordered, READ_OF_WRITTEN)

    def test_a_write_after_a_read(self, between, ordered, other):
        body = f"{STORE} {BLOCK} ld.shared.b32 %r1, [%{other}0]; {between} {STORE}"
        self.check(body, other, ordered, WRITE_OF_READ)

    def test_a_write_after_a_write(self, between, ordered, other):
        body = f"{STORE} {between} st.shared.b32 [%{other}0], %thread0;"
        self.check(body, other, ordered, WRITE_OF_WRITTEN)


def test_one_thread_needs_no_barrier():
    assert noted(f"{STORE} ld.shared.b32 %r1, [%own0]; {STORE} ld.shared.b32 %r1, [%own0];", threads=64) == []


def test_two_reads_need_no_order():
    body = f"{STORE} {BLOCK} ld.shared.b32 %r1, [%next0]; ld.shared.b32 %r1, [%across0]; ld.shared.b32 %r1, [%own0];"
    assert noted(body, threads=64) == []


@pytest.mark.parametrize("barrier", [WARP, BLOCK])
def test_a_barrier_before_both_accesses_orders_nothing(barrier):
    assert noted(f"{barrier} {STORE} ld.shared.b32 %r1, [%next0];") == [READ_OF_WRITTEN]
    assert noted(f"{STORE} ld.shared.b32 %r1, [%next0]; {barrier}") == [READ_OF_WRITTEN]


def test_a_barrier_of_one_warp_orders_that_warp():
    first = "setp.lt.s32 %p1, %thread0, 32; @%p1 bar.warp.sync 0xffffffff;"
    assert noted(f"{STORE} {first} ld.shared.b32 %r1, [%next0];", threads=64) == [READ_OF_WRITTEN]
    assert noted(f"{STORE} {first} @%p1 ld.shared.b32 %r1, [%next0];", threads=64) == []


def test_a_barrier_of_one_program_orders_that_program():
    body = f"{STORE} setp.eq.s32 %p1, %program0, 0; @%p1 bar.sync 0; {{}} ld.shared.b32 %r1, [%across0];"
    assert noted(body.format(""), threads=64, grid=2) == [READ_OF_WRITTEN]
    assert noted(body.format("@%p1"), threads=64, grid=2) == []


def test_programs_do_not_disturb_one_another():
    body = f"setp.eq.s32 %p1, %program0, 0; @%p1 {STORE} @%p1 bar.sync 0; @!%p1 {STORE}"
    assert noted(body, threads=64, grid=3) == []


def word_zero(*accesses):
    """Threads that access one word, one after the other."""
    return THREADS + "mov.b32 %r9, global_smem; setp.eq.s32 %p40, %thread0, 0;" + "".join(accesses)


def read(thread):
    return f"@%p{thread or 40} ld.shared.b32 %r1, [%r9];"


def write(thread):
    return f"@%p{thread or 40} st.shared.b32 [%r9], 1;"


@pytest.mark.parametrize(
    "accesses, hazards",
    [
        # of several readers of one warp none is forgotten
        ([read(1), read(2), write(2)], [WRITE_OF_READ]),
        ([read(2), read(1), write(2)], [WRITE_OF_READ]),
        ([read(1), read(2), read(1), write(1)], [WRITE_OF_READ]),
        ([read(1), read(1), write(1)], []),
        ([read(1), read(2), WARP, write(2)], []),
        ([read(1), WARP, read(2), write(2)], []),
        ([read(1), WARP, read(2), write(1)], [WRITE_OF_READ]),
        ([read(1), WARP, read(2), WARP, write(1)], []),
        # nor of several warps
        ([read(32), read(1), write(1)], [WRITE_OF_READ]),
        ([read(1), read(32), WARP, write(1)], [WRITE_OF_READ]),
        ([read(32), WARP, read(1), WARP, write(1)], [WRITE_OF_READ]),
        ([read(1), WARP, read(32), WARP, read(33), WARP, write(33)], [WRITE_OF_READ]),
        ([read(1), read(32), BLOCK, write(1)], []),
        ([read(1), read(32), BLOCK, read(33), WARP, write(32)], []),
        # at once
        (["ld.shared.b32 %r1, [%r9];", write(1)], [WRITE_OF_READ]),
        (["ld.shared.b32 %r1, [%r9];", WARP, write(1)], [WRITE_OF_READ]),
        (["ld.shared.b32 %r1, [%r9];", WARP, write(33)], [WRITE_OF_READ]),
        (["ld.shared.b32 %r1, [%r9];", BLOCK, write(33)], []),
        (["setp.lt.s32 %p3, %thread0, 32; @%p3 ld.shared.b32 %r1, [%r9];", write(1)], [WRITE_OF_READ]),
        (["setp.lt.s32 %p3, %thread0, 32; @%p3 ld.shared.b32 %r1, [%r9];", WARP, write(1)], []),
        (["setp.lt.s32 %p3, %thread0, 32; @%p3 ld.shared.b32 %r1, [%r9];", WARP, write(32)], [WRITE_OF_READ]),
        (["setp.lt.s32 %p3, %thread0, 2; @%p3 ld.shared.b32 %r1, [%r9];", write(1)], [WRITE_OF_READ]),
        # writers
        ([write(1), write(2)], [WRITE_OF_WRITTEN]),
        ([write(1), WARP, write(2), WARP, read(1)], []),
        ([write(1), WARP, write(2), read(1)], [READ_OF_WRITTEN]),
        ([write(1), WARP, write(32)], [WRITE_OF_WRITTEN]),
        ([write(1), read(1), WARP, read(2)], []),
    ],
)
def test_accesses_to_one_word(accesses, hazards):
    body = word_zero(write(0), BLOCK, *accesses)
    assert noted(body, threads=64) == hazards


def test_what_is_noted_is_exact_to_the_smallest_access():
    """Neighbours write the halves of a word."""
    body = "shl.b32 %r1, %thread0, 1; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2; mov.b16 %rs1, 1;"
    assert noted(body + "st.shared.b16 [%r1], %rs1; ld.shared.b16 %rs2, [%r1];") == []
    body += f"st.shared.b16 [%r1], %rs1; {BLOCK} ld.shared.b32 %r3, [%own0];"
    assert noted(body.replace("%own0", "%r2")) == []
    assert noted(body.replace(BLOCK, "").replace("%own0", "%r2")) == [READ_OF_WRITTEN]


def test_a_wide_read_of_narrow_writes_needs_a_barrier_for_each():
    body = f"{STORE} {{}} mov.b32 %r1, global_smem; ld.shared.v4.b32 {{{{%r2, %r3, %r4, %r5}}}}, [%r1];"
    assert noted("setp.eq.s32 %p1, %thread0, 0;" + body.format("").replace("ld.", "@%p1 ld.")) == [READ_OF_WRITTEN]
    assert noted(body.format(WARP)) == []


# -- values ------------------------------------------------------------------------------------------------------------


def test_a_read_of_what_nobody_wrote():
    assert noted("ld.shared.b32 %r1, [%own0];") == [NEVER]
    assert noted("st.shared.b32 [%own0+128], 1; ld.shared.b32 %r1, [%own0];") == [NEVER]


def test_a_part_that_nobody_wrote():
    body = "shl.b32 %r1, %thread0, 3; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;"
    assert noted(body + "st.shared.b32 [%r1], 1; ld.shared.v2.b32 {%r3, %r4}, [%r1];") == [NEVER]
    assert noted(body + "st.shared.v2.b32 [%r1], {1, 1}; ld.shared.v2.b32 {%r3, %r4}, [%r1];") == []


def test_lanes_that_do_not_write():
    assert noted(f"setp.lt.s32 %p1, %thread0, 31; @%p1 {STORE} ld.shared.b32 %r1, [%own0];") == [NEVER]
    assert noted(f"setp.lt.s32 %p1, %thread0, 31; @%p1 {STORE} @%p1 ld.shared.b32 %r1, [%own0];") == []


def test_what_another_program_wrote_does_not_count():
    assert noted(f"setp.eq.s32 %p1, %program0, 0; @%p1 {STORE} ld.shared.b32 %r1, [%own0];", grid=2) == [NEVER]


def test_memory_is_nan_until_it_is_written():
    out = zeros(32)
    body = "ld.shared.b32 %r1, [%own0]; mad.wide.s32 %rd2, %thread0, 4, %rd1; st.global.b32 [%rd2], %r1;"
    assert [hazard.split(": ")[0] for hazard in run(body, shared=128, out=out)] == [NEVER]
    assert out.tolist() == [-1] * 32


def test_threads_that_write_one_place_at_once():
    address = "mov.b32 %r1, global_smem;"
    assert noted(address + "st.shared.b32 [%r1], %thread0;") == [DIFFERENT]
    assert noted(address + "st.shared.b32 [%r1], 5;", threads=64) == []
    assert noted(address + "st.shared.v2.b32 [%r1], {5, %thread0};") == [DIFFERENT]
    one = address + "setp.eq.s32 %p1, %thread0, 3; @%p1 st.shared.b32 [%r1], %thread0;"
    assert noted(one) == []


def test_after_equal_values_the_others_still_need_a_barrier():
    body = "mov.b32 %r1, global_smem; st.shared.b32 [%r1], 5; {} ld.shared.b32 %r2, [%r1];"
    assert noted(body.format("")) == [READ_OF_WRITTEN]
    assert noted(body.format(WARP)) == []
    assert noted(body.format(WARP), threads=64) == [READ_OF_WRITTEN]
    assert noted(body.format(BLOCK), threads=64) == []


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access",
    [
        "st.shared.b32 [%own0], 1;",
        "ld.shared.b32 %r1, [%own0];",
        "st.shared.b32 [%own0+-124], 1;",
        "st.shared.v2.b32 [global_smem+120], {1, 1};",
        "ld.shared.b8 %rs1, [global_smem+124];",
        "ld.shared.b8 %rs1, [global_smem+-1];",
        "cp.async.ca.shared.global [%own0], [%rd1], 4;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [global_smem+112];",
    ],
)
def test_an_access_out_of_bounds_is_a_fault(access):
    """Of 124 bytes; the memory behind them is another program's."""
    with pytest.raises(Fault, match=r"access out of bounds of 124 bytes of shared memory: (st|ld|cp)"):
        run(access, shared=124, grid=2, a=zeros(4))


def test_the_last_bytes_are_in_bounds():
    assert noted("setp.lt.s32 %p1, %thread0, 31; @%p1 st.shared.b32 [%own0], 1;", shared=124) == []


@pytest.mark.parametrize(
    "access, width",
    [
        ("st.shared.b32 [%own0+2], 1;", 4),
        ("ld.shared.b16 %rs1, [%own0+1];", 2),
        ("st.shared.v2.b32 [%own0], {1, 1};", 8),
        ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [global_smem+8];", 16),
        ("cp.async.cg.shared.global [global_smem+8], [%rd1], 16;", 16),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%own0];", 16),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%own0], {%r1};", 16),
    ],
)
def test_a_misaligned_access_is_a_fault(access, width):
    with pytest.raises(Fault, match=f"misaligned access of {width} bytes to shared memory: "):
        run(access, shared=1024, a=zeros(8).view(-1, 4))
