"""The first module of every part: ``python -m bench.gpu.child MODULE ...`` runs another as ``python -m MODULE ...``.

It counts the builds of our kernels that Triton is asked for, and how many of them it has to compile. That and the names
of the builds it leaves in the file that ``GLORA_BUILD_LOG`` names. After SIGUSR1 the process writes where its threads
are, as it does before it is interrupted for taking too long.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .builds import is_ours, name_of_source


def main() -> None:
    count_builds()
    faulthandler.register(signal.SIGUSR1)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def count_builds() -> Callable[[], None]:
    """Count the builds of this process; the function that is returned, and the process's end, write the counts down."""
    from triton import knobs

    file = os.environ.get("GLORA_BUILD_LOG")
    seen: list[tuple[str, bool]] = []  # names, and whether it was compiled

    def listen(*, src: Any, metadata: Mapping[str, Any], cache_hit: bool, **_: object) -> None:
        if is_ours(src):
            seen.append((name_of_source(src, metadata), not cache_hit))

    def write() -> None:
        if file is not None and seen:
            names = sorted({name for name, _ in seen})
            with open(file, "a") as log:
                log.write(
                    json.dumps({"asked": len(seen), "compiled": sum(new for _, new in seen), "names": names}) + "\n"
                )
            seen.clear()

    knobs.compilation.listener = listen
    atexit.register(write)
    return write


if __name__ == "__main__":
    main()
