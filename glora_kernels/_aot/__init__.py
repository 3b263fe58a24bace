"""The parts of the ahead-of-time gate (``glora_kernels/aot.py``): compile, read what came out, judge it, tell."""
