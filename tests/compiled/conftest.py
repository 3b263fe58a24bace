"""Compiled kernels, executed on the CPU. Where kernels are interpreted nothing is compiled, and nothing is collected."""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
