"""Tables of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.mutants.report import table

from .operators import OPERATORS, described

WAYS = {way: way for way in ("wrong result", "hazard", "fault")}
SAME, REDUNDANT = "same bits", "redundant"


def killed(records: list[dict]) -> int:
    return sum(record["how"] in WAYS for record in records)


def counted(records: list[dict]) -> list[dict]:
    """Without the survivors that have changed no bit, or took away nothing."""
    return [record for record in records if record["how"] not in (SAME, REDUNDANT)]


def rendered(results: dict) -> str:
    """The part of docs/mutation.md that is generated."""
    return "\n".join(_paragraphs(results))


def _paragraphs(results: dict) -> Iterator[str]:
    drawn = results["mutants"]
    records = counted(drawn)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    share = f"{killed(records) / len(records):.1%}"
    yield f"**{killed(records)} of {len(records)} mutants killed: {share}** of those that change a bit or an order in"
    yield f"these tests, {killed(drawn) / len(drawn):.1%} of all {len(drawn)} that were drawn. {results['date']},"
    yield f"{versions}; seed {results['seed']}; {results['tests']} tests of the short tier execute {results['builds']}"
    yield "builds.\n"
    yield from table(records, "operator", sorted(OPERATORS), WAYS)
    yield ""
    yield from table(records, "kernel", sorted({record["kernel"] for record in records}), WAYS)
    yield ""
    yield from table(records, "architecture", sorted({record["architecture"] for record in records}), WAYS)
    yield "\nOperators, with the places where they apply, and those of them where a change can matter in some test:\n"
    for name in sorted(OPERATORS):
        sites, effective = (results[key].get(name, 0) for key in ("sites", "effective"))
        yield f"- `{name}`: {described(name)} ({sites:,}; {effective:,})"
    same = sum(record["how"] == SAME for record in drawn)
    yield f"\nSurvived and not counted: {same} that change no bit of what any launch writes, and those that take away"
    yield "nothing, by the text of the program:\n"
    reasons = Counter((record["operator"], record["what"]) for record in drawn if record["how"] == REDUNDANT)
    yield from (f"- {count} `{name}`: {why}" for (name, why), count in sorted(reasons.items()))
    yield "\nSurvivors:\n"
    for record in records:
        if not record["how"]:
            where = f"`{record['kernel']}`, {record['architecture']}, block {record['block']}"
            yield f"- `{record['operator']}` in {where}: `{record['statement']}`"
