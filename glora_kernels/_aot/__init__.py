"""The parts of the ahead-of-time gate (``glora_kernels/aot.py``): compile, read the result, judge it, report."""
