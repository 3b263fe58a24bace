"""``python -m tests.mutants``: break the kernels, run the interpreter suite on each, say what it did not notice."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tests.mutants import report
from tests.mutants.choose import drawn, equivalence
from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.operators import OPERATORS
from tests.mutants.runner import VERSIONS, CheckError, Journal, Outcome, Suite
from tests.mutants.sites import KERNEL_FILES, Mutant, mutants, read_sources
from tests.tiers import TIER

GOAL = 0.95
FOUND = Path(tempfile.gettempdir(), "glora-mutants.jsonl")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=120, help="mutants to run, equivalent and illegal ones not counted"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="suites to run at a time")
    parser.add_argument("--only", choices=KERNEL_FILES, metavar="FILE", help=f"of {', '.join(KERNEL_FILES)}")
    parser.add_argument("--id", action="append", help="run this mutant and no others; may be repeated")
    parser.add_argument("--limit", type=float, help="seconds for a mutant; default: by the tests it has to pass")
    parser.add_argument("--results", type=Path, default=FOUND, help=f"where to resume from; default {FOUND}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, for --render")
    parser.add_argument("--list", action="store_true", help="print the draw and run nothing")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the report of an earlier run as Markdown")
    parser.add_argument("--into", type=Path, metavar="DOC", help="with --render: put it between the marks of DOC")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.render:
        text = report.rendered(json.loads(options.render.read_text()))
        report.put_into(options.into, text) if options.into else print(text)
        return 0
    if options.list:
        sources = read_sources(only=options.only)
        for mutant in drawn(mutants(sources, OPERATORS), options.seed)[: options.count]:
            print(
                f"{mutant.id} {mutant.file}:{mutant.line} {mutant.operator}: {mutant.original} => {mutant.replacement}"
            )
        return 0
    try:
        results = check(options)
    except CheckError as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return 2
    report.show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if report.score(results["mutants"]) >= GOAL else 1


def check(options: argparse.Namespace) -> dict:
    """The results of the whole run, as ``--json`` writes them."""
    with tempfile.TemporaryDirectory(prefix="glora-mutants-") as scratch:
        suite = Suite(Path(scratch))
        sources = read_sources(suite.folder, options.only)
        journal = Journal(options.results, suite)
        record(suite, journal)
        found = mutants(sources, OPERATORS)
        order = [m for m in drawn(found, options.seed) if not options.id or m.id in options.id]
        done = list(run(suite, journal, order, options))
    return summary(options, suite, sources, found, order, done)


def record(suite: Suite, journal: Journal) -> None:
    """Run the suite on the unbroken code."""
    for file in tqdm(suite.files, unit="file", desc="unbroken"):
        if (tests := journal.tests(file)) is None:
            tests = suite.record(file)
            journal.keep_tests(file, tests)
        suite.tests.update(tests)


def run(suite: Suite, journal: Journal, order: list[Mutant], options) -> Iterator[tuple[Mutant, Outcome]]:
    """Run mutants in this order until ``count`` of them count; illegal ones are run but do not count."""
    waiting = iter([mutant for mutant in order if equivalence(mutant) is None])
    running: dict[Future[Outcome], Mutant] = {}
    counted = 0
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=options.count, unit="mutant") as bar:
        while True:
            for mutant in _next(waiting, min(options.count - counted, options.jobs) - len(running)):
                running[pool.submit(_outcome, suite, journal, mutant, options.limit)] = mutant
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                mutant, outcome = running.pop(future), future.result()
                if journal.outcome(mutant) is None:
                    journal.keep(mutant, outcome)
                counted += outcome.status != "illegal"
                bar.update(outcome.status != "illegal")
                if outcome.status == "survived":
                    bar.write(f"survived: {mutant.id} {mutant.file}:{mutant.line} {mutant.operator} {mutant.statement}")
                yield mutant, outcome


def _next(waiting: Iterator[Mutant], count: int) -> Iterable[Mutant]:
    return [mutant for _, mutant in zip(range(count), waiting)]


def _outcome(suite: Suite, journal: Journal, mutant: Mutant, limit: float | None) -> Outcome:
    known = journal.outcome(mutant)
    if known is None:
        return suite.run(mutant, limit)
    if known.killer in suite.tests:
        suite.credit(mutant, known.killer)
    return known


def summary(options, suite: Suite, sources: dict[str, str], found, order, done) -> dict:
    valid = [(mutant, outcome) for mutant, outcome in done if outcome.status != "illegal"]
    place = {mutant.id: index for index, mutant in enumerate(order)}
    last = max((place[mutant.id] for mutant, _ in done), default=-1)
    equal = [(mutant, equivalence(mutant)) for mutant in order[: last + 1]]
    used = {entry for entry in map(equivalence, found) if entry}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "tier": TIER,
        "seed": options.seed,
        "sites": len(found),
        "tests": len(suite.tests),
        "suite_seconds": suite.seconds(suite.tests),
        "illegal": len(done) - len(valid),
        "mutants": [_entry(m, sources) | asdict(o) for m, o in sorted(valid, key=lambda pair: place[pair[0].id])],
        "equivalent": [_entry(m, sources) | {"reason": entry.reason} for m, entry in equal if entry],
        "unused": [list(e) for e in EQUIVALENT if e not in used and options.only in (None, e.file)],
    }


def _entry(mutant: Mutant, sources: dict[str, str]) -> dict:
    names = ("file", "function", "operator", "statement", "original", "replacement")
    return {
        "id": mutant.id,
        **{name: getattr(mutant, name) for name in names},
        "diff": mutant.diff(sources[mutant.file]),
    }


if __name__ == "__main__":
    sys.exit(main())
