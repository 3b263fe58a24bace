"""What the comparison of the tiers' coverage counts as lost, and when it fails."""

import json

import pytest

from tests.coverage_loss import losses, main


def report(**files):
    """The part of coverage's JSON that is read: the lines that ran, and how many lines there are."""
    entries = {
        name: {"executed_lines": lines, "summary": {"num_statements": count}} for name, (lines, count) in files.items()
    }
    return {"files": entries, "totals": {"percent_covered": 97.0}}


def test_lines_of_the_exhaustive_tier_alone_are_lost():
    short = report(a=([1, 2], 4), b=([1, 9], 10))
    exhaustive = report(a=([1, 2, 3], 4), b=([1], 10), c=([5, 6], 2))
    assert losses(short, exhaustive) == [("c", [5, 6], 100.0), ("a", [3], 25.0)]


@pytest.mark.parametrize(("lines", "status"), [(100, 0), (99, 0), (98, 1)])
def test_more_than_a_point_of_a_file_fails(lines, status, tmp_path, capsys):
    files = []
    for name, count in (("short", lines), ("exhaustive", 100)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(report(a=(list(range(count)), 100))))
    assert main([str(file) for file in files]) == status
    assert ("| `a` |" in capsys.readouterr().out) == (lines < 100)
