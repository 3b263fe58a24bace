"""The mutation check's own parts: what it breaks, which mutants it draws, how it judges an outcome."""

import ast
import json

import pytest

from tests.mutants import report
from tests.mutants.choose import drawn
from tests.mutants.equivalent import EQUIVALENT, Equivalent
from tests.mutants.operators import OPERATORS
from tests.mutants.plugin import kind_of
from tests.mutants.runner import COMMON, Journal, Outcome, Suite
from tests.mutants.sites import KERNEL_FILES, ROOT, mutants, path_of, read_sources

KERNEL = '''
@triton.jit
def part(ptr, rows, stride_row, stride_column, row_mask, acc):
    """a + b and tl.trans(c) are words here."""
    return tl.load(ptr, mask=row_mask, other=0.0)


@triton.jit
def kernel(a_ptr, b_ptr, M, N, stride_m, stride_n):
    tl.assume(M > 0)
    %s
'''


@pytest.fixture(scope="module")
def found():
    return mutants(read_sources(), OPERATORS)


def broken(statement: str, operator: str) -> list[str]:
    """The statement as an operator changes it."""
    source = KERNEL % statement
    changed = [
        m.applied(source) for m in mutants({"a.py": source}, {operator: OPERATORS[operator]}) if m.function == "kernel"
    ]
    return [text.partition("tl.assume(M > 0)\n    ")[2].rstrip() for text in changed]


CHANGES = {
    "mask_dropped": ("tl.load(a_ptr, mask=m < M)", ["tl.load(a_ptr, mask=(m < M) | True)"]),
    "conjunct_dropped": ("m = (a < M) & (b < N)", ["m = (a < M)", "m = (b < N)"]),
    "condition_shortened": ("x = A and B == C", ["x = (B == C)", "x = (A)"]),
    "boundary_moved": ("m = (a) < (M)", ["m = (a) <= (M)"]),
    "equality_negated": ("x = part == 0 and KIND == ROW", ["x = part != 0 and KIND == ROW"]),
    "strides_swapped": ("o = r[:, None] * stride_m + c * stride_n", ["o = r[:, None] * stride_n + c * stride_m"]),
    "accumulator_not_carried": ("a += b", ["pass", "a = b"]),
    "term_dropped": ("x = a * b - (c + d)", ["x = (a * b)", "x = a * b - (c)", "x = a * b - (d)"]),
    "one_dropped": ("x = (1.0 + a) * (b - 1)", ["x = (a) * (b - 1)", "x = (1.0 + a) * (b)"]),
    "factor_dropped": ("x = (a + b) * c", ["x = (a + b)", "x = c"]),
    "sign_flipped": ("x = 1.0 + (a)", ["x = 1.0 - (a)"]),
    "cast_dropped": ("x = (a + b).to(WIDE)", ["x = (a + b)"]),
    "index_narrowed": ("x = a.to(tl.int64) + b.to(WIDE)", ["x = a.to(tl.int32) + b.to(WIDE)"]),
    "transpose_dropped": ("x = tl.dot(tl.trans(a), b)", ["x = tl.dot(a, b)"]),
    "axis_changed": ("x = tl.sum(a, 1)", ["x = tl.sum(a, 0)"]),
    "broadcast_changed": ("x = a[:, None] * b[0]", ["x = a[None, :] * b[0]"]),
    "default_changed": ("x = tl.load(a_ptr, mask=m, other=0.0)", ["x = tl.load(a_ptr, mask=m, other=1.0)"]),
    "division_changed": ("x = tl.cdiv(M, N + 1) // b", ["x = tl.cdiv(M, N + 1) % b", "x = M // (N + 1) // b"]),
    "loop_shortened": ("for k in range(0, M): f()", ["for k in range(0 + 1, M): f()", "for k in range(0, M - 1): f()"]),
    "bound_dropped": ("x = min(M, (a + 1) * b)", ["x = M", "x = ((a + 1) * b)"]),
    "branches_swapped": ("x = tl.where(lost, a, b - c)", ["x = tl.where(lost, b - c, a)"]),
    "operand_mistaken": ("x = b_ptr + N + block", ["x = a_ptr + N + block", "x = b_ptr + M + block"]),
    "absolute_dropped": ("x = tl.abs(a - b)", ["x = (a - b)"]),
    "number_off_by_one": ("for i in range(0, M, 16): f()", ["for i in range(0, M, 17): f()"]),
    "start_changed": ("x = tl.zeros([M, N], dtype=WIDE)", ["x = tl.full([M, N], 1.0, WIDE)"]),
    "addend_dropped": ("x = tl.fma(a, b + 1.0, c)", ["x = a * (b + 1.0)"]),
    "store_dropped": ("tl.store(a_ptr, x)", ["pass"]),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_change_what_they_say(operator):
    statement, expected = CHANGES[operator]
    assert sorted(broken(statement, operator)) == sorted(expected)


def test_integers_in_sums_move_by_one():
    assert broken("tl.load(a_ptr + 3)", "number_off_by_one") == ["tl.load(a_ptr + 4)"]


def test_arguments_are_known_by_the_parameters_of_the_kernels_own_functions():
    call = "x = part(a_ptr, r, stride_m, stride_n, m, acc)"
    assert broken(call, "strides_swapped") == ["x = part(a_ptr, r, stride_n, stride_m, m, acc)"]
    assert broken(call, "mask_dropped") == ["x = part(a_ptr, r, stride_m, stride_n, (m) | True, acc)"]
    assert broken(call, "accumulator_not_carried") == ["x = part(a_ptr, r, stride_m, stride_n, m, tl.zeros_like(acc))"]
    assert broken(call.replace("part", "other"), "strides_swapped") == []


def test_accumulators_of_dots_are_dropped():
    assert broken("x = tl.dot(a, (b), x, input_precision=P)", "accumulator_not_carried") == [
        "x = tl.dot(a, b, input_precision=P)"
    ]


def test_hints_docstrings_and_annotations_are_left_alone():
    operators = {"boundary_moved": OPERATORS["boundary_moved"], "term_dropped": OPERATORS["term_dropped"]}
    assert not mutants({"a.py": KERNEL % "x: tl.constexpr = A"}, operators)


def test_what_launches_a_kernel_is_left_alone():
    assert not mutants({"a.py": "def launcher(M, N):\n    return M + N * 2\n"}, OPERATORS)


def test_mutants_of_the_kernels_are_distinct_valid_and_many(found):
    sources = read_sources()
    assert len({m.id for m in found}) == len({(m.file, m.applied(sources[m.file])) for m in found}) == len(found)
    assert {m.file for m in found} == set(KERNEL_FILES)
    assert {m.operator for m in found} == set(OPERATORS)
    for mutant in found[::20]:
        ast.parse(mutant.applied(sources[mutant.file]))


def test_the_draw_covers_every_file_and_every_operator(found):
    first = drawn(found, seed=0)[:100]
    for name, names, least in (("file", KERNEL_FILES, 10), ("operator", OPERATORS, 3)):
        assert all(sum(getattr(m, name) == value for m in first) >= least for value in names), name
    assert [m.id for m in first] == [m.id for m in drawn(found[::-1], seed=0)[:100]]
    assert {m.id for m in first} != {m.id for m in drawn(found, seed=1)[:100]}


def test_a_mutant_outlives_edits_around_it(found):
    sources = read_sources()
    moved = {name: f"# A line more.\n{text}" for name, text in sources.items()}
    assert [m.id for m in mutants(moved, OPERATORS)] == [m.id for m in found]


def test_equivalent_mutants_have_reasons_and_are_no_larger_part(found):
    assert all(len(entry.reason) > 20 for entry in EQUIVALENT)
    assert sum(any(entry.covers(m) for entry in EQUIVALENT) for m in found) < len(found) / 5


def test_an_entry_covers_the_mutants_of_its_statement():
    mutant = next(m for m in mutants({"a.py": KERNEL % "x = a + b"}, OPERATORS) if m.replacement == "a")
    entry = Equivalent("a.py", "kernel", mutant.operator, "x = a + b", "a", "because")
    assert entry.covers(mutant)
    assert not entry._replace(replacement="b").covers(mutant)
    assert not entry._replace(statement="x = a - b").covers(mutant)
    assert entry._replace(statement="", replacement="").covers(mutant)


class InterpreterError(Exception):
    """Named as Triton's error for a failure inside a kernel."""


def test_failures_are_told_apart():
    def caused(error, cause):
        error.__cause__ = cause
        return error

    assert kind_of(AssertionError("error over u*S")) == "wrong"
    assert kind_of(caused(InterpreterError("shape"), ValueError("shape"))) == "illegal"
    assert kind_of(caused(InterpreterError("x"), AssertionError("Assume failed"))) == "detector"
    assert kind_of(caused(InterpreterError("x"), TypeError("bf16 in create_fadd: kernels load"))) == "detector"
    assert (
        kind_of(caused(InterpreterError("x"), AssertionError("int32 overflow detected for operation mul")))
        == "detector"
    )


@pytest.fixture
def suite(tmp_path):
    """A tiny repository with two test files."""
    root = tmp_path / "root"
    (root / "glora_kernels" / "_triton" / "kernels").mkdir(parents=True)
    (root / "tests" / "interpreter").mkdir(parents=True)
    for name in KERNEL_FILES:
        (root / path_of(name)).write_text((ROOT / path_of(name)).read_text())
    names = (*COMMON, "tests/interpreter/test_a.py", "tests/interpreter/test_b.py")
    for name in names:
        (root / name).write_text("")
    return Suite(tmp_path, root)


def test_outcomes_are_kept_while_what_they_depend_on_is_the_same(tmp_path, suite, found):
    killed = Outcome("killed", "wrong", "tests/interpreter/test_a.py::test_x", "AssertionError", 3, 1.0)
    survived = Outcome("survived", tests=3)
    journal = Journal(tmp_path / "found.jsonl", suite)
    journal.keep(found[0], killed)
    journal.keep(found[1], survived)

    def known():
        again = Journal(tmp_path / "found.jsonl", suite)
        return again.outcome(found[0]), again.outcome(found[1])

    assert known() == (killed, survived)
    (suite.folder / "tests/interpreter/test_b.py").write_text("# Another test file: may notice survivors.")
    assert known() == (killed, None)
    (suite.folder / "tests/interpreter/test_a.py").write_text("# The file of the test that noticed.")
    assert known() == (None, None)


def test_tests_that_run_the_function_come_proven_then_quick(suite, found):
    functions = ["tile.py:span"]
    suite.tests = {
        name: {"seconds": s, "functions": functions} for name, s in (("slow", 9.0), ("quick", 0.1), ("proven", 5.0))
    }
    suite.tests["elsewhere"] = {"seconds": 0.1, "functions": ["finish.py:solve"]}
    mutant = next(m for m in found if m.function == "span")
    suite.credit(mutant, "proven")
    assert suite.covering("tile.py", "span") == ["proven", "quick", "slow"]


RESULTS = {
    "date": "2026-01-01", "versions": {"torch": "2"}, "tier": "short", "seed": 0, "sites": 9, "tests": 3,
    "suite_seconds": 4.0,
    "illegal": 1,
    "mutants": [
        {"id": "a", "file": "tile.py", "function": "span", "operator": "term_dropped", "status": "killed",
         "how": "wrong"},
        {"id": "b", "file": "tile.py", "function": "span", "operator": "cast_dropped", "status": "survived",
         "how": "", "diff": "-x\n+y"},
    ],
    "equivalent": [], "unused": [],
}  # fmt: skip


def test_the_report_counts_and_goes_into_the_document(tmp_path):
    text = report.rendered(RESULTS)
    assert "1 of 2 mutants killed: 50.0%" in text
    assert "| `tile.py` | 2 | 1 | 0 | 0 | 0 | 1 |" in text
    document = tmp_path / "doc.md"
    begin, end = (mark.format("rendered") for mark in report.MARKS)
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.put_into(document, text)
    assert document.read_text() == f"before\n{begin}\n{text}\n{end}\nafter\n"


def test_the_document_says_what_the_last_run_found():
    results = ROOT / "tests" / "mutants" / "results.json"
    document = (ROOT / "docs" / "mutation.md").read_text()
    if results.exists():
        assert report.rendered(json.loads(results.read_text())) in document
    assert all(mark.format("rendered") in document for mark in report.MARKS)
