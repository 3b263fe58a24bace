"""Figures and tables of the paper's protocols, from run folders.

>>> print(write_report("runs/vtab1k").text)
"""

from .loading import load_runs
from .runs import Run
from .writing import ReportFiles, write_report

__all__ = ["ReportFiles", "Run", "load_runs", "write_report"]
