"""Mutation check of the Triton kernels: break them in small ways, and see that the interpreter suite notices.

``python -m tests.mutants`` runs it; docs/mutation.md says what it does and what it found.
"""
