"""``python -m tests.rehearsal MODULE ...``: as ``python -m bench.gpu.child MODULE ...``, where there is no GPU."""

import sys

from bench.gpu import child
from bench.gpu.rehearsal import HANG, WRONG, fault

from . import absent

WITHOUT_LAUNCHES = ("bench.gpu.machine", "bench.gpu.extension")

if __name__ == "__main__":
    module = sys.argv[1]
    if fault() == WRONG and module == "bench.gpu.machine":
        child.main()  # a machine without a GPU
    absent.enter()
    if fault() == HANG and module in WITHOUT_LAUNCHES:
        absent.hang()
    if module == "pytest":
        sys.argv += ["-p", "tests.rehearsal.plugin"]  # for the processes that it starts
    child.main()
