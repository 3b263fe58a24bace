"""A file is the old one or the new one, whenever its writer dies."""

import itertools
import os
import random
import signal
from pathlib import Path

import pytest

from glora.files import write_atomically
from tests.glora.toys import exit_code, kill_while_writing

SIZE = 1 << 16
KILLS = 20


def content(number):
    return f"{number:08d}".encode() * (SIZE // 8)


def write(file, data):
    write_atomically(file, lambda stream: stream.write(data))


def assert_whole(file):
    """Not a mixture of two contents, nor a part of one; returns its number."""
    data = file.read_bytes()
    assert data == content(int(data[:8]))
    return int(data[:8])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


def test_makes_a_file(file):
    write(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(file.parent.iterdir()) == [file]


def test_replaces_a_file(file):
    write(file, b"old and longer")
    write(file, b"new")
    assert file.read_bytes() == b"new"


def test_takes_text_as_path(file):
    write(str(file), b"new")
    assert file.read_bytes() == b"new"


def test_takes_a_path_without_a_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    write("file", b"new")
    assert file.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError(), KeyboardInterrupt()], ids=repr)
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(file, error):
    write(file, b"old")

    def fail(stream):
        stream.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_a_failing_first_writer_leaves_nothing(file):
    with pytest.raises(ZeroDivisionError):
        write_atomically(file, lambda stream: 1 / 0)
    assert not list(file.parent.iterdir())


def test_a_failing_rename_leaves_nothing_behind(file):
    (file / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write(file, b"new")
    assert list(file.parent.iterdir()) == [file]


def test_a_missing_folder_is_an_error(file):
    with pytest.raises(FileNotFoundError):
        write(file.parent / "missing" / "file", b"new")


# -- killed ----------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die_half_way(file):
    def half(stream):
        stream.write(content(1)[: SIZE // 2])
        stream.flush()
        die()

    write_atomically(file, half)


def write_and_die_in(name, file):
    setattr(os, name, lambda *arguments: die())
    write(file, content(1))


def write_and_die_after_renaming(file):
    rename = os.replace

    def renamed(*arguments):
        rename(*arguments)
        die()

    os.replace = renamed
    write(file, content(1))


@pytest.mark.parametrize(
    ("function", "arguments", "number"),
    [
        (write_and_die_half_way, (), 0),
        (write_and_die_in, ("fsync",), 0),
        (write_and_die_in, ("replace",), 0),
        (write_and_die_after_renaming, (), 1),
    ],
    ids=["half-written", "before-flushing", "before-renaming", "after-renaming"],
)
def test_killed_at_a_chosen_moment(file, function, arguments, number):
    write(file, content(0))
    assert exit_code(function, *arguments, file) == -signal.SIGKILL
    assert assert_whole(file) == number
    write(file, content(2))  # and what it left is no obstacle
    assert assert_whole(file) == 2
    assert list(file.parent.iterdir()) == [file]


def write_for_ever(file: Path):
    for number in itertools.count(assert_whole(file) + 1):
        write(file, content(number))


def test_killed_at_random_moments(file):
    write(file, content(0))
    moments, numbers = random.Random(0), [0]
    for _ in range(KILLS):
        after = moments.uniform(0, 0.03)
        assert kill_while_writing(file, after, write_for_ever, file) == -signal.SIGKILL
        numbers.append(assert_whole(file))
    assert numbers == sorted(numbers)
    assert numbers[-1] > KILLS
