"""One module for each group of ``pytest bench/``: what is measured, and how."""
