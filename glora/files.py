"""Writing files so that a reader sees the old one or the new one, never a part, however many write at once.

Each writer fills its own temporary, ``.<name>.<16 hex digits>.tmp`` beside the target, and renames it to the target.
A later writer removes the temporary of a killed one: it is not locked, and has not changed for a minute.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .arguments import PATH, require_type

_LONGEST = 200  # bytes of the target's name in the temporary's name, which may have 255
_STALE = 60.0  # seconds by the file system's own clock: they protect writers on machines that its locks do not reach


def write_atomically(file: str | os.PathLike, write: Callable[[BinaryIO], object], argument: str = "file") -> None:
    """Call ``write`` with a temporary file beside ``file``, flush it to disk, then rename it to ``file``.

    If it fails or is killed at any moment, the previous ``file`` stays as it was. If several write at once, in any
    number of processes, each file is whole and the last one finished stays. A link stays, and the file that it points
    to is replaced. The permissions of an existing file are kept; a new one has those of ``open``.

    Raises:
        ValueError: as :func:`require_file`.
    """
    target = require_file(argument, file)
    temporary = _temporary(target, "tmp")
    try:
        with open(temporary, "xb") as stream:
            _lock(stream.fileno())
            _keep_mode(target, temporary)
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    _remove_stale(target)


def write_text_atomically(file: str | os.PathLike, text: str) -> None:
    """As :func:`write_atomically`, for text, in UTF-8."""
    write_atomically(file, lambda stream: stream.write(text.encode()))


def write_folder_atomically(argument: str, folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold exactly ``files``; if killed at any moment, it leaves all of them or what was there before.

    The new folder is written beside the former one, which may hold only files of these names. The former one is renamed
    to ``.<name>.<16 hex digits>.old``, then the new one takes its place; between the two a reader finds no folder. If a
    run is killed there, the former folder stays whole, and the next call first puts it back. If several write at once,
    the last folder finished stays. (One call of Linux could exchange both and close the gap. It would not help a
    reader, who opens one file after the other.)

    Raises:
        ValueError: as :func:`require_new_folder`.
    """
    target = require_new_folder(argument, folder, files)
    with replacing_folder(target) as new:
        for name, content in files.items():
            write_atomically(new / name, partial(_write, content))
            _keep_mode(target / name, new / name)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A block that fills a new folder, which then takes the place of ``target`` as in :func:`write_folder_atomically`.

    Whatever ``target`` held is gone then: call :func:`require_new_folder` first if it may be somebody's.
    """
    new = _temporary(target, "tmp")
    try:
        with _new_folder(new):
            yield new
            _keep_mode(target, new)
            _swap(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync_folder(target.parent)
    _remove_stale(target)


def require_file(argument: str, file: str | os.PathLike) -> Path:
    """Where to write ``file``: the path that it names, or that its links lead to. Call it before any long work.

    Raises:
        TypeError: ``file`` is no path.
        ValueError: naming the argument, if its folder does not exist or cannot be written to, or something stands
            there that is no regular file (a folder, a device, a pipe).
    """
    require_type(argument, file, PATH, "the path of a file")
    require_folder(argument, file)
    target = Path(os.path.realpath(file))
    if target.is_dir():
        raise ValueError(f"{argument}: expected a file, got the folder {os.fspath(file)}; add the name of a file")
    if (os.path.exists(file) and not os.path.isfile(file)) or target.is_symlink():
        raise ValueError(
            f"{argument}: expected a regular file or a new name, got {os.fspath(file)}, which is a device, a pipe, a "
            "socket or a link to itself"
        )
    require_folder(argument, target)
    return target


def require_folder(argument: str, file: str | os.PathLike) -> None:
    """Raise ValueError, naming the argument, if the folder of ``file`` does not exist or cannot be written to."""
    folder = Path(file).parent
    if not folder.is_dir():
        raise ValueError(
            f"{argument}: expected an existing folder, got {folder}; make it first: mkdir -p {shlex.quote(str(folder))}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}: expected a folder that may be written to, got {folder}")


def make_folder(argument: str, folder: Path) -> None:
    """Make a folder, and those that it is in. Raises ValueError, naming the argument, if one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{argument}: expected a folder, or none there yet, got {folder}, which is a file or in one"
        ) from None


def require_new_folder(argument: str, folder: str | os.PathLike, files: Iterable[str]) -> Path:
    """Where to write ``folder``; a former one that a killed writer has put aside is put back.

    Raises:
        TypeError: ``folder`` is no path.
        ValueError: there is no folder to put it in, or it holds other things than ``files``, which would be lost.
    """
    require_type(argument, folder, PATH, "the path of a folder")
    target = Path(folder).resolve()
    require_folder(argument, target)
    _put_back(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{argument}: expected a folder, got the file {target}")
    with contextlib.suppress(FileNotFoundError):  # between two renames of another writer
        others = sorted({file.name for file in target.iterdir()} - set(files))
        if others:
            raise ValueError(
                f"{argument}: expected a new folder, or one with nothing but {sorted(files)}; {target} holds {others}"
            )
    return target


def _write(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)


def _keep_mode(old: Path, new: Path) -> None:
    """Give ``new`` the permissions of ``old``; without an ``old`` it keeps those of ``open``."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copymode(old, new)


def _temporary(target: Path, ending: str) -> Path:
    return target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}.{ending}")


def _left_over(target: Path, ending: str) -> list[Path]:
    """Temporaries of ``target``: of living and killed writers, and of versions that had one name for all writers."""
    pattern = re.compile(rf"\.{re.escape(_stem(target))}(\.[0-9a-f]{{16}})?\.{ending}")
    try:
        return [target.with_name(name) for name in os.listdir(target.parent) if pattern.fullmatch(name)]
    except OSError:  # a folder that may be written to but not read
        return []


def _stem(target: Path) -> str:
    name = os.fsencode(target.name)
    return target.name if len(name) <= _LONGEST else hashlib.blake2b(name, digest_size=16).hexdigest()


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder that is locked for the ``with`` block."""
    folder.mkdir()
    with _opened(folder) as descriptor:
        if descriptor is not None:
            _lock(descriptor)
        yield


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; other writers may be doing the same."""
    while True:
        olds, old = _left_over(target, "old"), _temporary(target, "old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                _put_back(target)
                raise
            # another writer was faster: its folder is the former one now
        except BaseException:
            _put_back(target)
            raise
        else:
            for each in [*olds, old]:
                _discard(each)
            return


def _put_back(target: Path) -> None:
    """Undo the first of the two renames, where the second did not follow."""
    if not os.path.lexists(target):
        olds = _left_over(target, "old")
        for old in sorted(olds, key=_changed, reverse=True)[:1]:
            with contextlib.suppress(OSError):  # another writer was faster
                os.replace(old, target)


def _discard(old: Path) -> None:
    """Rename and then remove a former folder, so that nobody puts back a part of it."""
    doomed = old.with_name(f"{old.name.removesuffix('.old')}.tmp")
    with contextlib.suppress(OSError):
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove the temporaries of writers of ``target`` that were killed."""
    for left in _left_over(target, "tmp"):
        with _opened(left) as descriptor:
            now = _changed(target)  # by the same clock
            if descriptor is None or now - _changed(left) < _STALE or not _lock(descriptor):
                continue
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0


def _lock(descriptor: int) -> bool:
    """Take the lock that says that a temporary's writer lives; False if a process holds it or there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor of a file or folder; None if it does not exist or cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    with _opened(folder) as descriptor:
        if descriptor is not None:
            os.fsync(descriptor)


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of all tensors, in order."""
    value = 0
    for tensor in tensors:
        for part in parts(tensor):
            data = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            value = zlib.crc32(data.numpy().tobytes(), value)
    return value


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes of ``tensor``: itself, or what a quantised one is made of."""
    wrapper: Any = tensor
    if not hasattr(wrapper, "__tensor_flatten__"):  # the protocol of subclasses that are made of tensors
        yield tensor
        state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4-bit weights: scales and their meaning
        if state is not None:
            yield from state.as_dict(packed=True).values()
        return
    for name in wrapper.__tensor_flatten__()[0]:
        yield from parts(getattr(wrapper, name))
