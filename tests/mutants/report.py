"""Tables of a run: for the screen, and for docs/mutation.md from the file that ``--json`` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.mutants.operators import OPERATORS, describe
from tests.mutants.sites import KERNEL_FILES

WAYS = {"wrong": "wrong result", "detector": "detector", "crash": "crash", "timeout": "timeout"}
MARKS = "<!-- {}: begin -->", "<!-- {}: end -->"


def score(records: list[dict]) -> float:
    """The share of mutants that were killed."""
    return sum(record["status"] == "killed" for record in records) / max(len(records), 1)


def table(records: list[dict], key: str, names: list[str], ways: Mapping[str, str] = WAYS) -> Iterator[str]:
    """A table in Markdown, with one row for each name that has mutants.

    Args:
        ways: how a mutant may have been killed, with titles; one that was not has none of these.
    """
    yield f"| {key} | mutants | {' | '.join(ways.values())} | survived |"
    yield "|---" * (len(ways) + 3) + "|"
    for name in names:
        if chosen := [record for record in records if record[key] == name]:
            yield _row(f"`{name}`", chosen, ways)
    yield _row("all", records, ways)


def _row(title: str, records: list[dict], ways: Mapping[str, str]) -> str:
    counts = [sum(record["how"] == way for record in records) for way in ways]
    return "| " + " | ".join(map(str, (title, len(records), *counts, len(records) - sum(counts)))) + " |"


def rendered(results: dict) -> str:
    """The part of docs/mutation.md that is generated."""
    return "\n".join(_paragraphs(results))


def _paragraphs(results: dict) -> Iterator[str]:
    records = results["mutants"]
    killed = sum(record["status"] == "killed" for record in records)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"**{killed} of {len(records)} mutants killed: {score(records):.1%}.** {results['date']}, {versions};"
    yield f"seed {results['seed']}, of {results['sites']} sites in {len(KERNEL_FILES)} files;"
    yield f"{results['tests']} tests of the {results['tier']} tier, which take {results['suite_seconds']:.0f} s."
    yield "Drawn beside them and not counted:"
    yield f"{results['illegal']} that are no legal kernels, {len(results['equivalent'])} that are equivalent.\n"
    yield from table(records, "file", list(KERNEL_FILES))
    yield ""
    yield from table(records, "operator", sorted(OPERATORS))
    yield "\nOperators:\n"
    yield from (f"- `{name}`: {describe(name)}" for name in sorted(OPERATORS))
    yield "\nSurvivors:" + ("\n" if killed < len(records) else " none.")
    for record in records:
        if record["status"] == "survived":
            yield f"- `{record['id']}` {record['operator']} in `{record['function']}` of `{record['file']}`\n"
            yield _fenced(record["diff"])
    yield "\nDrawn and equivalent, with the reason:\n"
    yield from (f"- {_change(entry)}: {entry['reason']}" for entry in results["equivalent"])


def _change(entry: dict) -> str:
    place = f"`{entry['file']}` `{entry['function']}`, {entry['operator']}"
    return f"{place}, `{entry['original']}` → `{entry['replacement']}` in `{entry['statement']}`"


def _fenced(text: str) -> str:
    return "\n".join(f"  {line}" for line in ("```diff", *text.splitlines(), "```", ""))


def put_into(document: Path, text: str, name: str = "rendered") -> None:
    """Replace the part of a document between the marks of that name."""
    begin, end = (mark.format(name) for mark in MARKS)
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document}: expected {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def show(results: dict, write: Callable[[str], None] = print) -> None:
    """The tables, survivors and reviewed list, as ``--render`` writes them, and the needless entries of the list."""
    write(rendered(results))
    for entry in results["unused"]:
        write(f"no longer needed in equivalent.py: {entry}")
    write(f"score {score(results['mutants']):.1%}")
