"""Triton's own driver and launcher on a machine without a GPU: every launch is handed to a Python function."""
