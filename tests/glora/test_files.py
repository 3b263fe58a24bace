"""A file is the old one or the new one, whenever its writer dies."""

import contextlib
import fcntl
import itertools
import os
import random
import signal
import socket
import stat
from pathlib import Path

import pytest

from glora.files import replacing_folder, require_file, write_atomically, write_folder_atomically
from tests.glora.toys import at_once, exit_code, kill_while_writing
from tests.tiers import at

SIZE = 1 << 16
KILLS = at(20, 200)
WRITES = at(150, 1000)


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


def test_a_failing_rename_leaves_nothing_behind(file, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(file, b"new")
    assert not list(file.parent.iterdir())


# -- what stands at the path ---------------------------------------------------------------------------


def test_a_missing_folder_is_named_with_what_to_type(file):
    missing = file.parent / "not here" / "file"
    with pytest.raises(
        ValueError, match=r"^weights: expected an existing folder, got .*; make it first: mkdir -p '.*/not here'$"
    ):
        write_atomically(missing, lambda stream: pytest.fail("written"), "weights")


def test_a_folder_is_no_file(file):
    file.mkdir()
    with pytest.raises(ValueError, match=r"^file: expected a file, got the folder .*; add the name of a file"):
        write(file, b"new")
    assert list(file.parent.iterdir()) == [file]


def make_pipe(file):
    os.mkfifo(file)


def make_socket(file):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(file))


def link_to_device(file):
    file.symlink_to(os.devnull)


def link_to_itself(file):
    file.symlink_to(file)


@pytest.mark.parametrize("make", [make_pipe, make_socket, link_to_device, link_to_itself])
def test_what_is_no_regular_file_is_refused(file, make):
    make(file)
    before = os.lstat(file)
    with pytest.raises(ValueError, match=r"^file: expected a regular file or a new name, got .* a device, a pipe"):
        write(file, b"new")
    assert os.lstat(file) == before
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_is_protected_is_named(file, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"^file: expected a folder that may be written to, got "):
        write(file, b"new")


@pytest.mark.parametrize("exists", [True, False], ids=["link", "dangling"])
def test_a_link_is_written_through(file, exists):
    (file.parent / "elsewhere").mkdir()
    target = file.parent / "elsewhere" / "target"
    if exists:
        target.write_bytes(b"old")
    file.symlink_to(Path("elsewhere") / "target")
    write(file, b"new")
    assert file.is_symlink()
    assert file.read_bytes() == target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_a_link_into_no_folder_is_refused(file):
    file.symlink_to(file.parent / "missing" / "target")
    with pytest.raises(ValueError, match=r"^file: expected an existing folder, got .*missing"):
        write(file, b"new")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_permissions_are_kept(file, mode):
    write(file, b"old")
    file.chmod(mode)
    write(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_permissions_of_open(file, mask):
    before = os.umask(mask)
    try:
        write(file, b"new")
        write_folder(file.parent / "folder", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((file.parent / "folder").stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "[x](y)*.pt"], ids=["255", "254 bytes", "pattern"])
def test_any_name_that_a_file_may_have(file, name):
    write(file.parent / name, b"new")
    write_folder(file.parent / "folder" if len(name) > 200 else file.parent / f"{name}-", 1)
    assert (file.parent / name).read_bytes() == b"new"
    assert len(list(file.parent.iterdir())) == 2


# -- many writers --------------------------------------------------------------------------------------


def write_many(file, first):
    for number in range(first, first + 2 * WRITES, 2):
        write(file, content(number))


def read_many(file):
    for _ in range(2 * WRITES):
        assert_whole(file)


def test_two_writers_and_a_reader(file):
    """One temporary for both: of 200 writes 68 failed, and 139 of 7,283 reads were torn."""
    write(file, content(0))
    at_once((write_many, file, 1), (write_many, file, 2), (read_many, file))
    assert assert_whole(file) in (2 * WRITES - 1, 2 * WRITES)
    assert list(file.parent.iterdir()) == [file]


def write_many_folders(folder, first):
    for number in range(first, first + WRITES, 2):
        write_folder(folder, number)


def read_many_folders(folder):
    """Files are whole; between two renames there may be no folder."""
    for _ in range(WRITES):
        for name in NAMES:
            with contextlib.suppress(FileNotFoundError):
                assert_whole(folder / name)


def test_two_writers_of_a_folder_and_a_reader(folder):
    write_folder(folder, 0)
    at_once((write_many_folders, folder, 1), (write_many_folders, folder, 2), (read_many_folders, folder))
    assert folder_number(folder) > WRITES - 2
    assert list(folder.parent.iterdir()) == [folder]


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
    assert len(left(file)) == 1 - number
    write(file, content(2))  # and what it left is no obstacle
    assert len(left(file)) == 1 - number  # not yet known to be left
    age(file)
    write(file, content(2))
    assert assert_whole(file) == 2
    assert list(file.parent.iterdir()) == [file]


def left(path):
    return [each for each in path.parent.iterdir() if each != path]


def age(path):
    """As if what was left had been so for long."""
    for each in left(path):
        os.utime(each, (0, 0))


def test_what_a_living_writer_holds_is_not_removed(file):
    def write_within(stream):
        stream.write(content(1))
        age(file)
        write(file, content(2))

    write_atomically(file, write_within)
    assert assert_whole(file) == 1
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", [".file.tmp", ".file.0123456789abcdef.tmp"])
def test_only_own_left_overs_are_removed(file, name):
    others = [".file.0123456789abcdef.tmp2", ".file.tmp.0123456789abcdef", ".other.0123456789abcdef.tmp", "file.tmp"]
    for each in [name, *others]:
        (file.parent / each).touch()
    age(file)
    write(file, b"new")
    assert sorted(each.name for each in left(file)) == sorted(others)


def test_without_locks_nothing_is_removed(file, monkeypatch):
    def no_locks(*arguments):
        raise OSError("no locks available")

    (file.parent / ".file.0123456789abcdef.tmp").touch()
    age(file)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(file, b"new")
    assert len(left(file)) == 1


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
    age(file)
    write(file, content(0))
    assert not left(file)


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
    assert folder.exists() != between
    where = next(folder.parent.glob(".folder.*.old")) if between else folder
    assert folder_number(where) == (1 if (call, before) == (3, False) else 0)
    with pytest.raises(ValueError, match="expected a new folder"):  # a refused call puts it back, too
        write_folder(folder, 2, names=NAMES[:1])
    assert folder_number(folder) in (0, 1)
    age(folder)
    write_folder(folder, 2)
    assert folder_number(folder) == 2
    assert list(folder.parent.iterdir()) == [folder]


def write_folders_for_ever(folder):
    for number in itertools.count(1):
        write_folder(folder, number)


def test_a_folder_is_whole_after_kills_at_random_moments(folder):
    write_folder(folder, 0)
    moments = random.Random(0)
    for _ in range(at(10, 200)):
        after = moments.uniform(0, 0.03)
        assert kill_while_writing(folder, after, write_folders_for_ever, folder) == -signal.SIGKILL
        with pytest.raises(ValueError, match="expected a new folder"):  # puts back what was put aside
            write_folder(folder, 2, names=NAMES[:1])
        folder_number(folder)
    age(folder)
    write_folder(folder, 0)
    assert not left(folder)


def test_a_folder_that_an_earlier_version_put_aside_is_put_back(folder):
    write_folder(folder, 1)
    folder.rename(folder.with_name(".folder.old"))
    with pytest.raises(ValueError, match="expected a new folder"):
        write_folder(folder, 2, names=NAMES[:1])
    assert folder_number(folder) == 1


def test_a_folder_keeps_its_permissions(folder):
    write_folder(folder, 1)
    folder.chmod(0o750)
    (folder / "one").chmod(0o600)
    write_folder(folder, 2)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((folder / "one").stat().st_mode) == 0o600


def test_where_a_file_will_be_written_is_known_before(file):
    assert require_file("file", file) == file
    assert not file.exists()


def test_a_folder_that_is_filled_in_a_block_takes_the_place_of_the_former_or_leaves_it(tmp_path):
    """As a merged model of texts does, in place of that of another winner."""
    target = tmp_path / "merged"
    for content in ("one", "other"):
        with replacing_folder(target) as new:
            (new / "config.json").write_text(content)
            (new / content).mkdir()
        assert (target / "config.json").read_text() == content
        assert sorted(file.name for file in target.iterdir()) == ["config.json", content]
    with pytest.raises(InterruptedError), replacing_folder(target) as new:
        (new / "config.json").write_text("half")
        raise InterruptedError
    assert (target / "config.json").read_text() == "other"
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]
