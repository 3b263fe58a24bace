"""The mutants themselves: what each operator does, when a change can matter, and which are redundant."""

import json
from pathlib import Path

import pytest

from tests.compiled.instructions import code_of, decode
from tests.compiled.machine.faults import Hazards
from tests.compiled.machine.machine import Machine
from tests.compiled.machine.memory import Memory
from tests.compiled.machine.program import Program
from tests.compiled.mutants import effects, redundant, report
from tests.compiled.mutants.operators import OPERATORS, Site, broken, sites
from tests.compiled.snippets import entry

ROOT = Path(__file__).parents[2]
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;"


def changed(body, operator):
    """The instructions after the operator's only change, but for the last one, ``ret``."""
    text = entry(body)
    (site,) = [site for site in sites(Program(text)) if site.operator == operator]
    return [instruction_text(one) for one in broken(text, site).instructions][:-1]


def instruction_text(one):
    sign = f"@{'!' if one.negated else ''}{one.predicate} " if one.predicate else ""
    return f"{sign}{one.form} {', '.join(one.operands)}".strip()


@pytest.mark.parametrize(
    ("operator", "body", "want"),
    [
        ("barrier_dropped", "bar.sync 0;", []),
        ("copy_wait_dropped", "cp.async.wait_group 2;", []),
        ("wait_for_one_less", "cp.async.wait_group 2;", ["cp.async.wait_group 3"]),
        ("copy_commit_dropped", "cp.async.commit_group;", []),
        ("product_wait_dropped", "wgmma.wait_group.sync.aligned 0;", []),
        ("product_commit_dropped", "wgmma.commit_group.sync.aligned;", []),
        ("product_fence_dropped", "wgmma.fence.sync.aligned;", []),
        ("proxy_fence_dropped", "fence.proxy.async.shared::cta;", []),
        ("store_dropped", "st.shared.b32 [%r1], %r2;", []),
        ("load_unmasked", "@%p1 ld.global.b32 %r1, [%rd1];", ["ld.global.b32 %r1, [%rd1]"]),
        ("store_unmasked", "@!%p1 st.global.b32 [%rd1], %r1;", ["st.global.b32 [%rd1], %r1"]),
        ("branch_unconditional", "$L:\n@%p1 bra $L;", ["bra $L"]),
        (
            "copy_unmasked",
            "cp.async.cg.shared.global [%r1], [%rd1], 16, %r2;",
            ["cp.async.cg.shared.global [%r1], [%rd1], 16"],
        ),
        (
            "stores_exchanged",
            "st.shared.b32 [%r1], %r2; st.shared.b32 [%r3+4], %r4;",
            ["st.shared.b32 [%r1], %r4", "st.shared.b32 [%r3+4], %r2"],
        ),
        ("address_moved", "ld.shared.v2.b32 {%r1, %r2}, [%r5+16];", ["ld.shared.v2.b32 {%r1, %r2}, [%r5+24]"]),
        ("address_moved", "st.global.b16 [%rd1], %rs1;", ["st.global.b16 [%rd1+2], %rs1"]),
    ],
)
def test_operators(operator, body, want):
    assert changed(body, operator) == want


def test_every_operator_says_what_it_does():
    assert all(report.described(name) for name in OPERATORS)


@pytest.mark.parametrize(
    ("operator", "body", "can_matter"),
    [
        ("barrier_dropped", "bar.sync 0;", True),
        ("barrier_dropped", "setp.eq.u32 %p1, 1, 2;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nmov.u32 %r1, 1;", True),
        ("barrier_dropped", "setp.eq.u32 %p1, 1, 1;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nmov.u32 %r1, 1;", False),
        ("branch_unconditional", "setp.eq.u32 %p1, 1, 1;\n@%p1 bra $L;\nmov.u32 %r1, 1;\n$L:\nmov.u32 %r1, 2;", False),
        ("branch_unconditional", "setp.eq.u32 %p1, 1, 2;\n@%p1 bra $L;\nmov.u32 %r1, 1;\n$L:\nmov.u32 %r1, 2;", True),
        ("copy_wait_dropped", "cp.async.wait_group 0;", False),
    ],
)
def test_effects(operator, body, can_matter):
    code, seen = decode(entry(body)), set()
    Machine(effects.probed(code, seen), [0], [], 64, Memory({}, Hazards())).run()
    assert (operator in {site.operator for site in seen}) == can_matter


@pytest.mark.parametrize(
    ("operator", "body", "redundant_there"),
    [
        ("proxy_fence_dropped", f"fence.proxy.async; bar.sync 0; {PRODUCT}", [False]),
        ("proxy_fence_dropped", f"fence.proxy.async; bar.sync 0; fence.proxy.async; {PRODUCT}", [True, False]),
        ("product_fence_dropped", f"wgmma.fence.sync.aligned; {PRODUCT}", [False]),
        (
            "product_fence_dropped",
            f"wgmma.fence.sync.aligned; mov.b32 %f1, %f5; wgmma.fence.sync.aligned; {PRODUCT}",
            [False, True],
        ),
        (
            "product_fence_dropped",
            f"wgmma.fence.sync.aligned; add.f32 %f1, %f5, %f6; wgmma.fence.sync.aligned; {PRODUCT}",
            [False, False],
        ),
        ("copy_commit_dropped", "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 0;", [True, False]),
        ("copy_commit_dropped", "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;", [False, False]),
        (
            "copy_commit_dropped",
            "cp.async.commit_group; cp.async.wait_group 0; cp.async.commit_group; cp.async.wait_group 0;",
            [False, False],
        ),
        (  # the jump leads back to a product
            "proxy_fence_dropped",
            f"$L:\nbar.sync 0; {PRODUCT} fence.proxy.async; @%p1 bra $L; fence.proxy.async; {PRODUCT}",
            [False, False],
        ),
        ("product_wait_dropped", "wgmma.wait_group.sync.aligned 0; wgmma.wait_group.sync.aligned 0;", [False, False]),
        (
            "product_commit_dropped",
            f"{PRODUCT} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "
            "wgmma.wait_group.sync.aligned 0;",
            [False],
        ),
        (
            "product_commit_dropped",
            f"{PRODUCT} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "
            "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
            [True, False],
        ),
        (
            "product_wait_dropped",
            f"{PRODUCT} wgmma.wait_group.sync.aligned 0; wgmma.wait_group.sync.aligned 0;",
            [True, False],
        ),
        (
            "product_wait_dropped",
            f"{PRODUCT} wgmma.wait_group.sync.aligned 0; mov.b32 %f7, %f1; wgmma.wait_group.sync.aligned 0;",
            [False, False],
        ),
    ],
)
def test_redundant(operator, body, redundant_there):
    program = Program(entry(body))
    found = [redundant.reason(program, site) is not None for site in sites(program) if site.operator == operator]
    assert found == redundant_there


def test_a_site_where_the_operator_does_not_apply():
    with pytest.raises(AssertionError, match="does not apply"):
        broken(entry("bar.sync 0;"), Site("store_dropped", 0, 0))


def test_broken_programs_are_decoded():
    assert code_of(broken(entry("bar.sync 0;"), Site("barrier_dropped", 0, 0))).blocks[0] != []


def test_the_document_says_what_the_last_run_found():
    results = json.loads((Path(__file__).with_name("mutants") / "results.json").read_text())
    assert report.rendered(results) in (ROOT / "docs" / "mutation.md").read_text()
