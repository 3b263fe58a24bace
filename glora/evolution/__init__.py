"""The evolutionary search: its settings, the loop, new candidates, their scores, and the journal on disk."""

from .loop import check_search, evolve, search
from .result import SearchResult
from .selection import Candidate
from .settings import SearchSettings

__all__ = ["Candidate", "SearchResult", "SearchSettings", "check_search", "evolve", "search"]
