"""``cp.async``: what is copied when, and what reads too early."""

import pytest

from .snippets import ints, noted, run, zeros

EACH = "mad.wide.s32 %rd9, %thread0, 4, %rd1;"  # in %rd9: the thread's own number of the first tensor
COPY = EACH + "cp.async.ca.shared.global [%own0], [%rd9], 4;"
COMMIT, BLOCK, WARP = "cp.async.commit_group;", "bar.sync 0;", "bar.warp.sync -1;"
EARLY = "a read of a copy that was not waited for"
OVERWRITTEN = "a write to where a copy in flight lands"
LEFT = "copies that are never waited for"
READ_OF_WRITTEN = "a read of what another thread wrote, without a barrier"
WRITE_OF_WRITTEN = "a write to what another thread wrote, without a barrier"
WRITE_OF_READ = "a write to what another thread read, without a barrier"


def wait(allowed):
    return f"cp.async.wait_group {allowed};"


def kinds(body, **options):
    return noted(body, a=ints(*range(64)), **options)


@pytest.mark.parametrize("form, size, count", [("ca", 4, 1), ("ca", 8, 2), ("ca", 16, 4), ("cg", 16, 4)])
@pytest.mark.parametrize("there, kept", [("", True), (", %r9", True), (", 0", False)])
def test_bytes_are_copied_or_zero(form, size, count, there, kept):
    out = zeros(4)
    body = f"""
        setp.ne.s32 %p1, %thread0, 0; @%p1 ret; mov.b32 %r9, {size}; mov.b32 %r8, global_smem;
        st.shared.v4.b32 [%r8+16], {{9, 9, 9, 9}};
        cp.async.{form}.shared.global [%r8+16], [%rd1+16], {size}{there};
        {COMMIT} {wait(0)}
        ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r8+16];
        st.global.v4.b32 [%rd2], {{%r1, %r2, %r3, %r4}};
    """
    assert not run(body, shared=64, a=ints(*range(100, 112)), out=out)
    copied = [104 + place if kept else 0 for place in range(count)]
    assert out.tolist() == copied + [9] * (4 - count)


def test_bytes_that_are_not_read_may_lie_out_of_bounds():
    """As masks of Triton have it: the size is 0 in lanes that are out of bounds."""
    out = zeros(32)
    body = f"""
        setp.lt.s32 %p1, %thread0, 3; selp.b32 %r1, 4, 0, %p1; {EACH}
        cp.async.ca.shared.global [%own0], [%rd9], 4, %r1; {COMMIT} {wait(0)}
        ld.shared.b32 %r2, [%own0]; mad.wide.s32 %rd8, %thread0, 4, %rd2; st.global.b32 [%rd8], %r2;
    """
    assert not run(body, shared=128, a=ints(5, 6, 7), out=out)
    assert out.tolist() == [5, 6, 7] + [0] * 29


def test_a_copy_under_a_predicate_copies_in_its_lanes():
    out = zeros(32)
    body = f"""
        st.shared.b32 [%own0], 9; setp.lt.s32 %p1, %thread0, 3; {EACH}
        @%p1 cp.async.ca.shared.global [%own0], [%rd9], 4; {COMMIT} {wait(0)}
        ld.shared.b32 %r2, [%own0]; mad.wide.s32 %rd8, %thread0, 4, %rd2; st.global.b32 [%rd8], %r2;
    """
    assert not run(body, shared=128, a=ints(5, 6, 7), out=out)
    assert out.tolist() == [5, 6, 7] + [9] * 29


def test_what_is_read_too_early_is_nan():
    out = zeros(32)
    body = (
        COPY + COMMIT + "ld.shared.b32 %r2, [%own0]; mad.wide.s32 %rd8, %thread0, 4, %rd2; st.global.b32 [%rd8], %r2;"
    )
    run(body, shared=128, a=ints(*range(32)), out=out)
    assert out.tolist() == [-1] * 32


@pytest.mark.parametrize(
    "between, hazards",
    [
        ("", [EARLY, LEFT]),
        (COMMIT, [EARLY, LEFT]),
        (wait(0), [EARLY, LEFT]),  # of no group
        (BLOCK, [EARLY, LEFT]),
        (COMMIT + wait(1), [EARLY, LEFT]),
        (COMMIT + BLOCK, [EARLY, LEFT]),
        (COMMIT + wait(0), []),
        (COMMIT + COMMIT + wait(1), []),  # an empty group counts
        (COMMIT + COMMIT + wait(2), [EARLY, LEFT]),
        (COMMIT + COMMIT + COMMIT + wait(2), []),
        (COMMIT + wait(0) + COMMIT, []),
    ],
)
def test_a_thread_waits_for_the_group_of_its_own_copy(between, hazards):
    assert kinds(COPY + between + "ld.shared.b32 %r1, [%own0];") == hazards


@pytest.mark.parametrize("other, barrier", [("next", WARP), ("next", BLOCK), ("across", BLOCK)])
def test_another_thread_reads_behind_a_wait_and_a_barrier(other, barrier):
    read = f"ld.shared.b32 %r1, [%{other}0];"
    assert kinds(COPY + COMMIT + wait(0) + barrier + read, threads=64) == []
    assert kinds(COPY + COMMIT + wait(0) + read, threads=64) == [READ_OF_WRITTEN]
    assert kinds(COPY + COMMIT + barrier + wait(0) + read, threads=64) == [READ_OF_WRITTEN]
    assert kinds(COPY + COMMIT + barrier + read + wait(0), threads=64) == [EARLY]


def test_a_barrier_of_the_warp_is_not_enough_for_another_warp():
    body = COPY + COMMIT + wait(0) + WARP + "ld.shared.b32 %r1, [%across0];"
    assert kinds(body, threads=64) == [READ_OF_WRITTEN]


def test_a_wait_by_some_threads_is_for_their_copies():
    """Warp 0 waits, then all meet; the copies of warp 1 are read by warp 0."""
    body = f"setp.lt.s32 %p1, %thread0, 32; {COPY} {COMMIT} {{}} cp.async.wait_group 0; {BLOCK}"
    read = "ld.shared.b32 %r1, [%across0];"
    assert kinds(body.format("@%p1") + "@%p1 " + read, threads=64) == [EARLY, LEFT]
    assert kinds(body.format("@%p1") + "@!%p1 " + read + wait(0), threads=64) == []
    assert kinds(body.format("") + read, threads=64) == []


def test_groups_are_counted_by_thread():
    """Warp 0 commits an empty group more, so that of its last group may be in flight what of warp 1 may not."""
    body = f"setp.lt.s32 %p1, %thread0, 32; {COPY} {COMMIT} @%p1 {COMMIT} {wait(1)}"
    read = "ld.shared.b32 %r1, [%own0];"
    assert kinds(body + "@%p1 " + read + wait(0), threads=64) == []
    assert kinds(body + "@!%p1 " + read + wait(0), threads=64) == [EARLY]


def test_a_pipeline_of_two_stages():
    """Of three copies to two places; the wait leaves the last group in flight."""
    place = "add.s32 %r10, %own0, 128;"
    second = "cp.async.ca.shared.global [%r10], [%rd9], 4;"
    body = place + COPY + COMMIT + second + COMMIT + wait(1) + "ld.shared.b32 %r1, [%own0];"
    assert kinds(body + wait(0)) == []
    assert kinds(body + "ld.shared.b32 %r1, [%r10];" + wait(0)) == [EARLY]
    assert kinds(body + COPY + COMMIT + wait(1) + "ld.shared.b32 %r1, [%r10];" + wait(0)) == []


@pytest.mark.parametrize(
    "body, hazards",
    [
        (COPY + COMMIT + "st.shared.b32 [%own0], 1;" + wait(0), [OVERWRITTEN]),
        (COPY + COMMIT + wait(0) + "st.shared.b32 [%own0], 1;", []),
        (COPY + COMMIT + COPY + COMMIT + wait(0), [OVERWRITTEN]),
        (COPY + COMMIT + wait(0) + COPY + COMMIT + wait(0), []),
        (COPY + COMMIT + wait(0) + "st.shared.b32 [%next0], 1;", [WRITE_OF_WRITTEN]),
        (COPY + COMMIT + wait(0) + WARP + "st.shared.b32 [%next0], 1;", []),
        ("st.shared.b32 [%next0], 1;" + COPY + COMMIT + wait(0), [WRITE_OF_WRITTEN]),
        ("st.shared.b32 [%next0], 1;" + WARP + COPY + COMMIT + wait(0), []),
        ("st.shared.b32 [%next0], 1; ld.shared.b32 %r1, [%next0];" + WARP + COPY + COMMIT + wait(0), []),
    ],
)
def test_what_a_copy_overwrites_and_what_overwrites_it(body, hazards):
    assert kinds(body) == hazards


def test_a_copy_overwrites_what_another_thread_read():
    before = "st.shared.b32 [%own0], 1;" + BLOCK + "ld.shared.b32 %r1, [%across0];"
    assert kinds(before + COPY + COMMIT + wait(0), threads=64) == [WRITE_OF_READ]
    assert kinds(before + BLOCK + COPY + COMMIT + wait(0), threads=64) == []


def test_copies_that_are_never_waited_for():
    assert kinds(COPY + COMMIT) == kinds(COPY) == kinds(COPY + COMMIT + wait(1)) == [LEFT]
    assert kinds(COPY + COMMIT + COPY.replace("%own0", "%own0+128") + wait(0)) == [LEFT]
    assert kinds(COPY + COMMIT + wait(0)) == []


def test_several_copies_of_a_group_land_together():
    body = COPY + COPY.replace("%own0", "%own0+128") + COMMIT + wait(0)
    assert kinds(body + "ld.shared.b32 %r1, [%own0]; ld.shared.b32 %r1, [%own0+128];") == []
