"""Tables of a run."""

from __future__ import annotations

from collections.abc import Iterator

from .operators import OPERATORS, described

WAYS = ("wrong result", "hazard", "fault")


def killed(records: list[dict]) -> int:
    return sum(bool(record["how"]) for record in records)


def rendered(results: dict) -> str:
    """The part of docs/mutation.md that is generated."""
    return "\n".join(_paragraphs(results))


def _paragraphs(results: dict) -> Iterator[str]:
    records = results["mutants"]
    share = killed(records) / len(records)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"**{killed(records)} of {len(records)} mutants killed: {share:.1%}.** {results['date']}, {versions};"
    yield f"seed {results['seed']}, of {results['sites']} sites in {results['builds']} builds that {results['tests']}"
    yield "tests execute.\n"
    yield from _table(records, "operator", sorted(OPERATORS))
    yield ""
    yield from _table(records, "kernel", sorted({record["kernel"] for record in records}))
    yield ""
    yield from _table(records, "architecture", sorted({record["architecture"] for record in records}))
    yield "\nOperators:\n"
    yield from (f"- `{name}`: {described(name)}" for name in sorted(OPERATORS))
    yield "\nSurvivors:\n"
    for record in records:
        if not record["how"]:
            where = f"`{record['kernel']}`, {record['architecture']}, block {record['block']}"
            yield f"- {record['operator']} in {where}: `{record['statement']}`"


def _table(records: list[dict], key: str, names: list[str]) -> Iterator[str]:
    yield f"| {key} | mutants | {' | '.join(WAYS)} | survived |"
    yield "|---" * (len(WAYS) + 3) + "|"
    for name in names:
        if chosen := [record for record in records if record[key] == name]:
            yield _row(f"`{name}`", chosen)
    yield _row("all", records)


def _row(title: str, records: list[dict]) -> str:
    ways = [sum(record["how"] == way for record in records) for way in WAYS]
    return "| " + " | ".join(map(str, (title, len(records), *ways, len(records) - killed(records)))) + " |"
