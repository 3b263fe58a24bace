"""Figures and tables of the paper's protocols, from run folders.

>>> print(write_report("runs/vtab1k").text)
"""

from .runs import Run, load_runs
from .writing import ReportFiles, write_report

__all__ = ["ReportFiles", "Run", "load_runs", "write_report"]
