"""Which lanes execute what: labels, loops, predicates and ends."""

import pytest

from . import running
from .machine import machine
from .machine.faults import Fault
from .snippets import ints, lanes, run, zeros

LOOP = """
    mov.b32 %r1, 0;
$L__BB0_1:
    setp.ge.s32 %p1, %r1, %r2;
    @%p1 bra $L__BB0_2;
    add.s32 %r1, %r1, 1;
    add.s32 %r3, %r3, %r1;
    bra.uni $L__BB0_1;
$L__BB0_2:
    add.s32 %r4, %r3, 1000;
"""


def test_each_lane_goes_round_a_loop_as_often_as_it_says():
    assert lanes(LOOP, "r4", r2=list(range(32)), r3=0) == [1000 + n * (n + 1) // 2 for n in range(32)]
    assert lanes(LOOP, "r1", threads=64, r2=[5] * 32 + [0] * 32, r3=0) == [5] * 32 + [0] * 32


def test_lanes_of_a_warp_part_and_meet_again():
    body = """
        setp.lt.s32 %p1, %r1, 10;
        @%p1 bra $less;
        mov.b32 %r2, 1;
        bra $both;
    $less:
        mov.b32 %r2, 2;
    $both:
        shfl.sync.bfly.b32 %r3, %r2, 31, 31, -1;
    """
    assert lanes(body, "r2", r1=list(range(32))) == [2] * 10 + [1] * 22
    assert lanes(body, "r3", r1=list(range(32))) == [1] * 22 + [2] * 10


def test_a_jump_that_no_lane_takes_and_one_that_all_take():
    body = "mov.b32 %r2, 0; setp.eq.s32 %p1, %r1, 1; @%p1 bra $end; mov.b32 %r2, 5;\n$end:\n add.s32 %r2, %r2, 1;"
    assert lanes(body, "r2", r1=0)[0] == 6
    assert lanes(body, "r2", r1=1)[0] == 1


def test_a_negated_predicate_takes_the_other_lanes():
    assert lanes("mov.b32 %r1, 0; @!%p1 mov.b32 %r1, 1;", "r1", p1=[1, 0]) == [0, 1]
    body = "mov.b32 %r1, 0; @!%p1 bra $end; mov.b32 %r1, 1;\n$end:\n"
    assert lanes(body, "r1", p1=[1, 0]) == [1, 0]


def test_a_predicate_counts_when_the_instruction_is_executed():
    assert lanes("mov.b32 %r1, 0; not.pred %p1, %p1; @%p1 add.s32 %r1, %r1, 1;", "r1", p1=[1, 0]) == [0, 1]
    assert lanes("@%p1 not.pred %p1, %p1;", "p1", p1=[1, 0]) == [0, 0]


def test_lanes_that_returned_do_nothing_more():
    body = "setp.ge.s32 %p1, %thread0, 3; @%p1 ret; mad.wide.s32 %rd2, %thread0, 4, %rd1; st.global.b32 [%rd2], 1;"
    out = zeros(5)
    assert not run(body, out=out)
    assert out.tolist() == [1, 1, 1, 0, 0]


def test_a_jump_backwards_over_a_jump_forwards():
    """A loop with ``continue``: of 0 to n - 1, the sum of what is odd."""
    body = """
        mov.b32 %r1, -1;
    $next:
        add.s32 %r1, %r1, 1;
        setp.ge.s32 %p1, %r1, %r2;
        @%p1 bra $end;
        and.b32 %r4, %r1, 1;
        setp.eq.s32 %p2, %r4, 0;
        @%p2 bra $next;
        add.s32 %r3, %r3, %r1;
        bra $next;
    $end:
    """
    assert lanes(body, "r3", r2=[0, 1, 2, 4, 9], r3=0) == [0, 0, 1, 4, 16]


def test_a_label_that_nobody_jumps_to_changes_nothing():
    assert lanes("$tmp0:\n mov.b32 %r1, 4;\n$tmp1:\n add.s32 %r1, %r1, 1;", "r1")[0] == 5


def test_a_jump_to_no_place_is_a_fault():
    with pytest.raises(Fault, match=r"got none for \['\$nowhere'\]"):
        lanes("bra $nowhere;", "r1")


def test_a_barrier_that_some_threads_do_not_reach_is_a_fault():
    for skip in ("@%p1 bar.sync 0;", "@!%p1 bra $end; bar.sync 0;\n$end:\n", "@!%p1 ret; bar.sync 0;"):
        with pytest.raises(Fault, match=r"a barrier that some threads do not reach: @?.*bar.sync 0"):
            run(f"setp.lt.s32 %p1, %thread0, 32; {skip}", threads=64)


def test_a_barrier_that_a_whole_program_skips_is_none():
    body = "setp.eq.s32 %p1, %program0, 1; @%p1 bar.sync 0; mov.b32 %r1, 0; @!%p1 barrier.sync.aligned 0;"
    assert not run(body, threads=64, grid=2)


def test_an_endless_loop_ends_with_a_fault(monkeypatch):
    monkeypatch.setattr(machine, "LIMIT", 50)
    with pytest.raises(Fault, match="t: expected an end, got none after 50 blocks"):
        lanes("$again:\n mov.b32 %r1, 0; bra.uni $again;", "r1")
    assert lanes(LOOP, "r1", r2=10, r3=0)[0] == 10


def test_more_programs_than_are_executed_at_once(monkeypatch):
    """Each adds its number to a place of its own."""
    monkeypatch.setattr(running, "LANES", 96)
    out = ints(*[10] * 7)
    body = "setp.ne.s32 %p1, %thread0, 0; @%p1 ret; mad.wide.s32 %rd2, %program0, 4, %rd1; st.global.b32 [%rd2], %program0;"
    assert not run(body, grid=7, out=out)
    assert out.tolist() == list(range(7))
