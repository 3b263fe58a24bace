"""The tables of figures in README.md and docs/, generated from the committed results.

python -m bench.readme            # write them
python -m bench.readme --check    # exit with 1 if one is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from glora.files import write_text_atomically

from .against_lora import EQUAL, PACKAGES
from .entrants.names import ASSEMBLED, FROZEN, GLORA, HIRA, LORA, LYCORIS_BYPASS, OFFICIAL, OURS, OURS_MATMUL
from .figures import FIGURES, versions
from .gpu import tables
from .measurements.inference import MERGED, ORIGINAL
from .measurements.layer import ALL_LOW_RANK, RANDOM
from .report import describe, load
from .targets import SAVED, merged_as_fast
from .timing import WHOLE

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
Pair = tuple[str, str]


class Row(NamedTuple):
    """What is compared, in a layer and in the whole model; of :data:`ROWS` those of equal work come first."""

    label: str
    layer: Pair | None
    model: Pair | None


ROWS = (
    Row("the official formula, same random paths", (OURS + RANDOM, OFFICIAL + RANDOM), (OURS, OFFICIAL)),
    Row("W_eff assembled in plain PyTorch, same paths", (OURS + RANDOM, ASSEMBLED + RANDOM), (OURS, ASSEMBLED)),
    Row("PEFT GLoRA, both all low rank", (ALL_LOW_RANK, GLORA), None),
    Row("PEFT HiRA, ours with A low rank", ("ours, A low rank, B none", HIRA), None),
    Row(
        "LyCORIS GLoRA in bypass mode, ours with the matmul product",
        (OURS_MATMUL, LYCORIS_BYPASS),
        (OURS_MATMUL, LYCORIS_BYPASS),
    ),
    Row("PEFT GLoRA (all low rank), ours on random paths", (OURS + RANDOM, GLORA), (OURS, GLORA)),
    Row("PEFT LoRA, ours with A vector, B low rank", ("ours, A vector, B low rank", LORA), None),
    Row("PEFT LoRA, ours on random paths", (OURS + RANDOM, LORA), (OURS, LORA)),
    Row("the frozen layer", (OURS + RANDOM, FROZEN), (OURS, FROZEN)),
)
MEMORY = (("PEFT LoRA", LORA), ("PEFT GLoRA", GLORA), ("the official formula", OFFICIAL))


def generate(folder: Path = RESULTS) -> str:
    """A table for each committed run. A run that was cut short shows what it had measured completely.

    Raises:
        ValueError: a run has failures, so its figures may not be quoted.
    """
    parts = [_part(load(file)) for file in sorted(folder.glob("*/results.json"))]
    return "\n\n".join(parts)


def _part(content: dict[str, Any]) -> str:
    if content["failures"]:
        raise ValueError("results: expected those of a run without failures")
    sections = [section for section in content["sections"] if section["group"] in ("layer", "model")]
    lines = [
        f"*{describe(content)}; medians of {content['rounds']} interleaved rounds; **bold**: ours is slower.*",
        "",
        "| time of ours / time of | "
        + " | ".join(section["title"].replace(", random paths", "") for section in sections)
        + " |",
        "|---" * (len(sections) + 1) + "|",
    ]
    for row in ROWS:
        cells = [_cell(section, row.layer if section["group"] == "layer" else row.model) for section in sections]
        if any(cells):
            lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_sentences(content["sections"])])


def _cell(section: dict[str, Any], pair: Pair | None) -> str:
    """The median and its interval."""
    for row in section["ratios"]:
        if row["phase"] == WHOLE and (row["candidate"], row["baseline"]) == pair:
            return _ratio(row)
    return ""


def _sentences(sections: list[dict[str, Any]]) -> list[str]:
    lines = []
    for section in sections:
        facts = section["facts"]
        if section["group"] == "model" and OURS in facts:
            mine = facts[OURS][SAVED]
            shares = [f"{mine / facts[who][SAVED]:.2f} of {label}'s" for label, who in MEMORY if who in facts]
            lines.append(f"- Kept for backward in the {section['title']}: {mine / 2**20:.0f} MiB, {', '.join(shares)}.")
    for section in sections:
        if section["group"] == "latency":
            row = next(r for r in section["ratios"] if (r["candidate"], r["baseline"]) == (MERGED, ORIGINAL))
            interval = f"{row['median']:.3f} ({row['lower']:.3f} to {row['upper']:.3f})"
            noise = "" if merged_as_fast(section) else ", **not within noise**"
            lines.append(f"- Merged over original, {section['title']}: {interval}{noise}.")
    return lines


def lora_table(folder: Path = RESULTS) -> str:
    """Ours over PEFT LoRA on a CPU, from :mod:`bench.against_lora`: equal work first, then what LoRA cannot express."""
    file = folder / "against-lora" / FIGURES
    if not file.exists():
        return "*Not measured yet.*"
    content = json.loads(file.read_text())
    columns = list(dict.fromkeys((row["threads"], row["way"]) for row in content["times"]))
    cells = {(row["path"], row["what"], row["threads"], row["way"]): _ratio(row) for row in content["times"]}
    names = sorted(dict.fromkeys((path, what) for path, what, *_ in cells), key=lambda name: name[0] != EQUAL)
    where = content["environment"]
    lines = [
        f"*{where['device']}, float32, CPU time at one thread, wall time at two; {versions(where, PACKAGES)}; "
        f"{where['date'][:10]}, commit {where['commit']}; medians of {content['rounds']} interleaved rounds; "
        "**bold**: ours is slower.*",
        "",
        "| time of ours / time of PEFT LoRA | "
        + " | ".join(f"{n} thread{'s' if n > 1 else ''}, {way}" for n, way in columns)
        + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for path, what in names:
        row = (cells.get((path, what, *column), "") for column in columns)
        lines.append(f"| {path}{' (equal work)' if path == EQUAL else ''}: {what} | " + " | ".join(row) + " |")
    kept = content["memory"][0]["parts"]
    saved, peak = kept["saved_bytes"], kept["peak_bytes"]
    lines += [
        "",
        f"- Kept for backward, mean over random paths of rank 4: {saved:.2f} of LoRA's; peak of a step: {peak:.2f}.",
    ]
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    """A median and its interval."""
    text = f"{row['median']:.2f} ({row['lower']:.2f} to {row['upper']:.2f})"
    return f"**{text}**" if row["median"] > 1 else text


PLACES: dict[tuple[Path, str], Callable[[Path], str]] = {  # files, and the names in their markers
    (README, "bench"): generate,
    (README, "lora"): lora_table,
    (README, "gpu"): tables.speeds,
    (ROOT / "docs/kernels.md", "gpu builds"): tables.builds,
    (ROOT / "docs/strategies.md", "gpu predictions"): tables.predictions,
}


def with_table(text: str, name: str, table: str) -> str:
    """``text`` with the part between the markers of this name replaced."""
    begin, end = f"<!-- {name}: begin, written by python -m bench.readme -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def write(check: bool = False) -> bool:
    """Write all tables, or only see; whether any was out of date."""
    texts = {file: file.read_text() for file, _ in PLACES}
    wanted = dict(texts)
    for (file, name), table in PLACES.items():
        wanted[file] = with_table(wanted[file], name, table(RESULTS))
    for file, text in wanted.items():
        if text != texts[file] and not check:
            write_text_atomically(file, text)
    return wanted != texts


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit("usage: python -m bench.readme [--check]")
    check = bool(sys.argv[1:])
    return int(write(check) and check)


if __name__ == "__main__":
    sys.exit(main())
