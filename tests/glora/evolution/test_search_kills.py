"""Searches that are killed, again and again and anywhere, and journals that are torn at any byte."""

import json
import random
import signal
import time

import pytest

from glora import SearchSettings, SearchSpace, evolve
from tests.glora.evolution.test_evolution import LAYERS, SPACE, additive
from tests.glora.evolution.test_halving import RUNGS, SAMPLES, of_part
from tests.glora.toys import kill_while_writing
from tests.tiers import at

VARIANTS = {
    "paper": {},
    "front": {"objective": "front"},
    "halving": {"halving": RUNGS},
    "front-halving": {"objective": "front", "halving": RUNGS},
}
KILLS = at(40, 200)


def score(paths, start, stop):
    return of_part(paths, start, stop) - (stop - start) * additive(paths) / 2


def searched(variant, journal=None, evaluate=score, space=SPACE, **sizes):
    settings = SearchSettings(
        **{"population": 20, "top": 5, "crossover": 10, "mutation": 10, "generations": 8, **sizes}
    )
    settings = SearchSettings(**{**vars(settings), **VARIANTS[variant]})
    options = {"samples": SAMPLES, "settings": settings, "journal": journal, "limit": 150, "progress": False}
    return evolve(LAYERS, space, evaluate, **options)


def search_slowly(variant, journal):
    def slow(*arguments):
        time.sleep(5e-4)
        return score(*arguments)

    searched(variant, journal, slow)


def torn(content, gen):
    """Part of what was written last is lost, as if the kill had come within the write."""
    header = content.index(b"\n") + 1
    return content[: max(header, len(content) - gen.randrange(400))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments_it_finds_the_same(variant, tmp_path):
    """SIGKILL, a quarter of KILLS for each variant; after every other one the last write is torn too."""
    gen, journal, kills = random.Random(variant), tmp_path / "journal.jsonl", 0
    expected = searched(variant)
    while kills < KILLS // len(VARIANTS):
        code = kill_while_writing(journal, gen.uniform(0, 0.04), search_slowly, variant, journal)
        if code == 0:  # it had come to its end; another one begins
            journal.unlink()
            continue
        assert code == -signal.SIGKILL
        kills += 1
        content = journal.read_bytes()
        if kills % 2:
            journal.write_bytes(torn(content, gen))
        if kills % 10 == 0:  # what there is leads to the same end
            copy = tmp_path / "copy.jsonl"
            copy.write_bytes(content)
            resumed = searched(variant, copy)
            assert resumed.evaluated == expected.evaluated - max(content.count(b"\n") - 1, 0)
            assert_same(resumed, expected)
    assert_same(searched(variant, journal), expected)


def assert_same(found, expected):
    assert found.best == expected.best
    assert found.history == expected.history
    assert found.front == expected.front
    assert found.cost == expected.cost


def sizes_to_tear_at(content):
    """Of the last line every byte (some, in the short tier); of the others those around a line's end, and some."""
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    around = {end + i for end in ends for i in (-2, -1, 0, 1, 2)}
    return sorted(
        {*range(ends[-2], len(content) + 1, at(7, 1)), *range(0, len(content), 40), *around}
        & {*range(len(content) + 1)}
    )


@pytest.mark.parametrize("variant", ["paper", "front-halving"])
def test_torn_at_any_byte_it_finds_the_same(variant, tmp_path):
    sizes = {"space": SearchSpace((2,), C=("none",)), "population": 3, "crossover": 1, "mutation": 1, "generations": 1}
    journal = tmp_path / "journal.jsonl"
    expected = searched(variant, journal, **sizes)
    content = journal.read_bytes()
    evaluations = {}
    for size in sizes_to_tear_at(content):
        journal.write_bytes(content[:size])
        found = searched(variant, journal, **sizes)
        assert_same(found, expected)
        evaluations[size] = found.evaluated
        lines = [json.loads(line)[:4] for line in journal.read_bytes().splitlines()[1:]]
        assert sorted(lines) == sorted(json.loads(line)[:4] for line in content.splitlines()[1:])
    complete = [content[:size].count(b"\n") - 1 for size in evaluations]
    assert list(evaluations.values()) == [expected.evaluated - max(0, lines) for lines in complete]


@pytest.mark.parametrize("size", [1, 30, -2])
def test_a_part_of_the_first_line_of_another_search_is_not_overwritten(size, tmp_path):
    journal = tmp_path / "journal.jsonl"
    searched("paper", journal)
    part = journal.read_bytes().splitlines()[0][:size].replace(b"{", b"[")
    journal.write_bytes(part)
    with pytest.raises(ValueError, match="expected a search journal"):
        searched("front", journal)
    assert journal.read_bytes() == part
