"""``python -m tests.compiled.mutants``: break compiled kernels, and say what the tests of layers do not notice."""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import random
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from tests.mutants.choose import in_turns
from tests.mutants.report import put_into

from . import report
from .operators import OPERATORS, sites
from .redundant import reason
from .suite import Mutant, Outcome, Suite

GOAL = 0.95
_suite: list[Suite] = []  # the one that forked processes inherit


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compiled.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=240, help="mutants to run")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", choices=sorted(OPERATORS), metavar="OPERATOR", help=", ".join(sorted(OPERATORS)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, for --render")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the report of an earlier run as Markdown")
    parser.add_argument("--into", type=Path, metavar="DOC", help="with --render: put it between the marks of DOC")
    options = parser.parse_args()
    if options.render:
        text = report.rendered(json.loads(options.render.read_text()))
        put_into(options.into, text, "compiled") if options.into else print(text)
        return 0
    torch.set_num_threads(1)
    results = run(options)
    records = report.counted(results["mutants"])
    for record in records:
        if not record["how"]:
            print("survived:", *(record[name] for name in ("operator", "kernel", "architecture", "block", "statement")))
    print(f"{report.killed(records)} of {len(records)} mutants killed")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if report.killed(records) >= GOAL * len(records) else 1


def run(options: argparse.Namespace) -> dict:
    suite = Suite()
    _suite.append(suite)
    names = [options.only] if options.only else sorted(OPERATORS)
    found = [Mutant(n, site) for n, build in enumerate(suite.builds) for site in sites(build.program)]
    effective = [mutant for mutant in found if mutant.site in suite.builds[mutant.build].effective]
    order = drawn(suite, [mutant for mutant in effective if mutant.site.operator in names], options.seed)
    taken = order[: options.count]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        outcomes = list(tqdm(pool.imap(_outcome, taken), total=len(taken), unit="mutant"))
    for place, (mutant, outcome) in enumerate(zip(taken, outcomes)):
        why = None if outcome.how else reason(suite.builds[mutant.build].program, mutant.site)
        if why is not None:
            outcomes[place] = Outcome(report.REDUNDANT, why, "")
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy")},
        "seed": options.seed,
        "sites": Counter(mutant.site.operator for mutant in found),
        "effective": Counter(mutant.site.operator for mutant in effective),
        "builds": len(suite.builds),
        "tests": suite.tests,
        "mutants": [entry(suite, mutant, outcome) for mutant, outcome in zip(taken, outcomes)],
    }


def _outcome(mutant: Mutant) -> Outcome:
    return _suite[0].outcome(mutant)


def drawn(suite: Suite, mutants: list[Mutant], seed: int) -> list[Mutant]:
    """All mutants in a drawn order: operators take turns, each with the kernel and architecture that had the fewest."""
    random.Random(seed).shuffle(mutants)
    kinds = [(build.kernel, build.architecture) for build in suite.builds]
    return in_turns(mutants, lambda mutant: mutant.site.operator, lambda mutant: kinds[mutant.build])


def entry(suite: Suite, mutant: Mutant, outcome: Outcome) -> dict:
    build, (operator, block, place) = suite.builds[mutant.build], mutant.site
    instruction = build.program.blocks[block][place]
    return {
        "operator": operator,
        "kernel": build.kernel,
        "architecture": build.architecture,
        "build": mutant.build,
        "block": block,
        "statement": instruction.shown,
        **outcome._replace(what=outcome.what[:200])._asdict(),
    }


if __name__ == "__main__":
    sys.exit(main())
