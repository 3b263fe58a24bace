"""Matrix products of one loop body that add to each other: some Tritons miscompile them on Blackwell (triton#10821)."""

from __future__ import annotations

import re

_QUOTED = re.compile(r'"[^"]*"')
_RESULT = re.compile(r"\s*(%[\w$.-]+)(?::\d+)? = ")
_DOT = re.compile(r"\s*(%[\w$.-]+) = tt\.dot [^,]+, [^,]+, (%[\w$.#-]+)")
_LOOP = re.compile(r"\bscf\.(for|while)\b")


def chained_dots(ttir: str) -> list[str]:
    """Every dot whose accumulator is another dot of the same loop body, as ``"%b onto %a"``.

    The loop of a line is the innermost one around it, found by counting braces; the two halves of an
    ``scf.while`` count as one body. Values are followed in order, since a name may be used again.
    """
    found = []
    loops: list[tuple[int, int]] = []  # around this line: (depth of the body, which loop)
    dots: dict[str, int] = {}  # a dot's result -> its loop
    depth = 0
    for number, line in enumerate(ttir.splitlines()):
        line = _QUOTED.sub("", line)
        loop = loops[-1][1] if loops else None
        dot, result = _DOT.match(line), _RESULT.match(line)
        if dot and loop is not None and dots.get(dot[2]) == loop:
            found.append(f"{dot[1]} onto {dot[2]}")
        if result:
            dots.pop(result[1], None)
        if dot and loop is not None:
            dots[dot[1]] = loop
        depth += line.count("{") - line.count("}")
        while loops and depth < loops[-1][0]:
            loops.pop()
        if _LOOP.search(line):
            loops.append((depth, number))
    return found
