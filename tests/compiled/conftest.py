"""Compiled kernels, executed on the CPU. Where they are interpreted, nothing is collected."""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
