"""Compiles builds in other processes: an exception or an abort of the compiler does not stop the rest."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from triton import knobs
from triton.backends.compiler import GPUTarget

from .compiling import compiled
from .reading import Reading, read

if TYPE_CHECKING:
    from .._triton.builds import Build

T = TypeVar("T")
_LONGEST_ERROR = 300  # characters; some errors contain the whole assembly


class Job(NamedTuple):
    build: Build
    gpu: GPUTarget


def measured(jobs: Sequence[Job], workers: int, seconds: float | None = None) -> Iterator[Reading | str]:
    """For every job, in order: what its kernel shows, or one line that says why there is no kernel.

    Args:
        seconds: for one job; a process that takes longer is ended. None waits for ever.
    """
    return _done(measure, jobs, workers, seconds)


def stored(jobs: Sequence[Job], workers: int) -> Iterator[bool | str]:
    """For every job, in order: whether its kernel was in Triton's cache before, or why there is no kernel."""
    return _done(store, jobs, workers)


def measure(job: Job) -> Reading:
    return read(compiled(*job))


def store(job: Job) -> bool:
    """Have the kernel in Triton's cache; whether it was there before."""
    hits: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        compiled(*job)
    return all(hits)


def workers(asked: int | None) -> int:
    """How many processes to take: as many as are asked for, or one for each CPU.

    Raises:
        ValueError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"jobs: expected at least 1, got {asked}")
    return asked or os.cpu_count() or 1


def _done(
    work: Callable[[Job], T], jobs: Sequence[Job], workers: int, seconds: float | None = None
) -> Iterator[T | str]:
    processes = _Processes(workers, seconds)
    try:
        with ThreadPoolExecutor(workers) as threads:
            yield from threads.map(partial(processes.run, work), jobs)
    finally:
        processes.close()


def attempt(work: Callable[[Job], T], job: Job) -> T | str:
    """The work on one job, in this process; or one line that says why it failed."""
    try:
        with redirect_stdout(io.StringIO()):  # Triton prints there what the assembler refuses
            return work(job)
    except Exception as error:  # the compiler's own, of any type
        return line_of(error)


def line_of(error: Exception) -> str:
    """An error in one line that is not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ..."


class _Processes:
    """Pools of one process each: if a process ends, the one job in it is the cause."""

    def __init__(self, count: int, seconds: float | None) -> None:
        self._seconds = seconds
        self._idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(count):
            self._idle.put(_process())

    def run(self, work: Callable[[Job], T], job: Job) -> T | str:
        process, reason = self._idle.get(), "the compiler ended its process"
        try:
            number = process.submit(_number).result()  # it has started, which takes seconds
            result = process.submit(attempt, work, job)
            if not wait([result], self._seconds).done:
                reason = f"the compiler took more than {self._seconds:g} s"
                os.kill(number, signal.SIGKILL)
            return result.result()
        except BrokenProcessPool:
            process.shutdown()
            process = _process()
            return reason
        finally:
            self._idle.put(process)

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get().shutdown()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _number() -> int:
    return os.getpid()  # by a function of this module: the process has loaded it then
