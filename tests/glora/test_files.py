"""A file is the old one or the new one, whenever its writer dies."""

import itertools
import os
import random
import signal
from pathlib import Path

import pytest

from glora.files import write_atomically, write_folder_atomically
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


# -- a whole folder ----------------------------------------------------------------------------------

NAMES = ("one", "two")


def write_folder(folder, number, names=NAMES):
    write_folder_atomically("folder", folder, {name: content(number) for name in names})


def folder_number(folder):
    """Both files are whole, and of one writing; returns its number."""
    assert sorted(file.name for file in folder.iterdir()) == sorted(NAMES)
    (number,) = {assert_whole(file) for file in folder.iterdir()}
    return number


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "folder"


def test_makes_a_folder_fills_an_empty_one_and_replaces_its_own(folder):
    write_folder(folder, 1)
    assert folder_number(folder) == 1
    write_folder(str(folder), 2)
    assert folder_number(folder) == 2
    (folder.parent / "empty").mkdir()
    write_folder(folder.parent / "empty", 3)
    assert folder_number(folder.parent / "empty") == 3
    assert sorted(folder.parent.iterdir()) == [folder.parent / "empty", folder]


def test_files_that_are_no_longer_written_go(folder):
    write_folder(folder, 1)
    write_folder_atomically("folder", folder, {"one": content(2), "three": b"", "two": content(2)})
    (folder / "three").unlink()
    assert folder_number(folder) == 2


def test_a_link_stays_a_link(folder):
    write_folder(folder, 1)
    link = folder.parent / "link"
    link.symlink_to(folder)
    write_folder(link, 2)
    assert link.is_symlink()
    assert folder_number(folder) == folder_number(link) == 2


def test_what_is_no_former_export_is_refused(folder):
    write_folder(folder, 1)
    (folder / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"folder: expected a new folder.* holds \['README.md'\]"):
        write_folder(folder, 2)
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(ValueError, match="folder: expected a folder, got the file"):
        write_folder(folder / "README.md", 2)
    with pytest.raises(ValueError, match="folder: expected an existing folder"):
        write_folder(folder / "missing" / "folder", 2)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", range(4))
def test_a_failing_rename_restores_the_folder(folder, monkeypatch, call, error):
    write_folder(folder, 1)
    rename, calls = os.replace, itertools.count()

    def failing(*arguments):
        if next(calls) == call:
            raise error
        rename(*arguments)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(type(error)):
        write_folder(folder, 2)
    assert folder_number(folder) == 1
    assert list(folder.parent.iterdir()) == [folder]


def write_folder_and_die_at_rename(folder, call, before):
    rename, calls = os.replace, itertools.count()

    def dying(*arguments):
        own = next(calls) == call
        if own and before:
            die()
        rename(*arguments)
        if own:
            die()

    os.replace = dying
    write_folder(folder, 1)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("call", range(4), ids=["one", "two", "old away", "new in place"])
def test_killed_at_a_rename(folder, call, before):
    """Renamed are both files of the new folder, then the old folder, then the new one."""
    write_folder(folder, 0)
    assert exit_code(write_folder_and_die_at_rename, folder, call, before) == -signal.SIGKILL
    between = (call, before) in ((2, False), (3, True))
    where = folder.with_name(".folder.old") if between else folder
    assert folder.exists() != between
    assert folder_number(where) == (1 if (call, before) == (3, False) else 0)
    with pytest.raises(ValueError, match="expected a new folder"):  # a refused call puts it back, too
        write_folder(folder, 2, names=NAMES[:1])
    assert folder_number(folder) in (0, 1)
    write_folder(folder, 2)
    assert folder_number(folder) == 2
    assert list(folder.parent.iterdir()) == [folder]
