"""Mutation check of the Triton kernels: break them in small ways, and see that the interpreter suite notices.

``python -m tests.mutants``; what it does and what it found stands in docs/mutation.md.
"""
