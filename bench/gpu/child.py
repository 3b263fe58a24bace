"""The first module of every part: ``python -m bench.gpu.child MODULE ...`` runs another as ``python -m MODULE ...``.

It counts the builds that Triton is asked for, and how many of them it had to compile, and leaves both in the file that
``GLORA_BUILD_LOG`` names. After SIGUSR1 the process writes where all its threads are.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable


def main() -> None:
    count_builds()
    faulthandler.register(signal.SIGUSR1)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def count_builds() -> Callable[[], None]:
    """Count the builds of this process; the function that is returned, and the process's end, write the counts down."""
    from triton import knobs

    file = os.environ.get("GLORA_BUILD_LOG")
    counts = {"asked": 0, "compiled": 0}

    def listen(*, cache_hit: bool, **_: object) -> None:
        counts["asked"] += 1
        counts["compiled"] += not cache_hit

    def write() -> None:
        if file is not None and counts["asked"]:
            with open(file, "a") as log:
                log.write(json.dumps(counts) + "\n")
            counts.update(asked=0, compiled=0)

    knobs.compilation.listener = listen
    atexit.register(write)
    return write


if __name__ == "__main__":
    main()
