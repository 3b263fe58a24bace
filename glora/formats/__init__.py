"""Adapter files: our own, those of LyCORIS, and those of the official code."""
