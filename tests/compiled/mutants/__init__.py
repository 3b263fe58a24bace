"""Mutants of compiled kernels: what the tests of layers see of one instruction that is missing or wrong."""
