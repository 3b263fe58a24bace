"""What all figures share: colours that colour-blind readers can tell apart, file names, and writing files.

Figures are made without pyplot, because its list of open figures and its backend are global.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_atomically

# Okabe and Ito's palette, then one of Tol's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#999999", "#000000", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI, _LONGEST_STEM = 150, 120
_LABEL_WIDTH, _TITLE_LETTERS_AN_INCH = 32, 12


class NotDrawn(NamedTuple):
    """Stands for a figure that cannot be drawn from its data."""

    reason: str


def new_figure(width: float, height: float) -> Any:
    """An empty figure; the size is in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def set_title(figure: Any, text: str) -> None:
    """Put a title above all panels, in as many lines as the figure's width needs."""
    width = int(_TITLE_LETTERS_AN_INCH * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in text.split("\n")), fontsize=11)


def legend_label(method: str) -> str:
    """A method's text in a legend, in lines short enough to leave room for the drawing."""
    return textwrap.fill(method, _LABEL_WIDTH)


def file_stem(*parts: object) -> str:
    """A file name without ending: the parts that are not None, unusual characters replaced, cut if long."""
    return re.sub(r"[^\w.-]+", "_", "-".join(str(part) for part in parts if part is not None))[:_LONGEST_STEM]


def distinct(stems: Iterable[str]) -> list[str]:
    """The names, with a number added to one that equals an earlier one if case is ignored, as some file systems do."""
    found: dict[str, str] = {}
    for stem in stems:
        numbered = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        name = next(name for name in numbered if name.casefold() not in found)
        found[name.casefold()] = name
    return list(found.values())


def save_figure(figure: Any, folder: Path, stem: str) -> list[Path]:
    """Write ``figure`` as PNG and as SVG, atomically; the same figure makes the same bytes."""
    import matplotlib

    files = []
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "glora"}):
            figure.savefig(content, format=kind, dpi=_DPI, metadata=metadata)
        files.append(folder / f"{stem}.{kind}")
        write_atomically(files[-1], partial(_write, content.getvalue()))
    return files


def write_text(file: Path, text: str) -> Path:
    write_atomically(file, partial(_write, text.encode()))
    return file


def _write(content: bytes, stream: Any) -> None:
    stream.write(content)


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on ``colour``."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def thousands(value: float, _position: object = None) -> str:
    """A number of parameters on an axis."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"
