"""Compiled kernels, executed on the CPU. Where they are interpreted, nothing is collected."""

import os
from importlib.util import find_spec

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
LAUNCHING = ["test_counting.py", "test_launcher.py", "test_layers.py", "test_planted.py", "test_shipped.py"]
collect_ignore = [] if find_spec("triton") else LAUNCHING
