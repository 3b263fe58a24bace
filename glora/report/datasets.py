"""The protocols' data sets by the names of their folders, in the paper's order."""

from __future__ import annotations

from collections.abc import Mapping

from ..protocols import OWN, DataSet, protocol


def data_sets(name: str) -> Mapping[str, DataSet]:
    """The data sets of one protocol. Raises ValueError for an unknown protocol."""
    return {about.name: about for about in protocol(name).table}


def title_of(protocol_name: str, name: str) -> str:
    """The name of a data set in tables; own data have the name of their folder or file."""
    return name if protocol_name in OWN else data_sets(protocol_name)[name].title


def group_of(group: str) -> list[str]:
    """The data sets of one of VTAB-1K's groups."""
    return [name for name, about in VTAB.items() if about.group == group]


VTAB, FEW_SHOT = data_sets("vtab1k"), data_sets("fewshot")
