"""Compiles and reads builds in other processes: an exception or an abort of the compiler does not stop the rest.

A build is passed on as (module, target, place), since kernels and the compiler's exceptions cannot be pickled.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from .compiling import compiled
from .reading import Reading, read
from .targets import target_named

if TYPE_CHECKING:
    from .._triton.builds import Build

_LONGEST_ERROR = 300  # characters; some errors contain the whole assembly


class BuildJob(NamedTuple):
    module: str  # its shipped(target) lists the builds
    target: str
    place: int  # in that list
    label: str  # the label of that build: it must be the same in every process


@cache
def builds_of(module: str, target: str) -> list[Build]:
    """What ``module.shipped`` lists for the target."""
    return list(importlib.import_module(module).shipped(target))


def measured(jobs: Sequence[BuildJob], workers: int) -> Iterator[Reading | str]:
    """For every job, in order: what its kernel shows, or one line that says why there is no kernel."""
    processes = _Processes(workers)
    try:
        with ThreadPoolExecutor(workers) as threads:
            yield from threads.map(processes.run, jobs)
    finally:
        processes.close()


def measure(job: BuildJob) -> Reading | str:
    """One job, in this process."""
    build = builds_of(job.module, job.target)[job.place]
    assert build.label == job.label, f"{job.module}.shipped: another order in another process"
    try:
        with redirect_stdout(io.StringIO()):  # Triton prints there what the assembler refuses
            return read(compiled(build, target_named(job.target)))
    except Exception as error:  # the compiler's own, of any type
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ..."


class _Processes:
    """Pools of one process each: if a process ends, the one job in it is the cause."""

    def __init__(self, count: int) -> None:
        self._idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(count):
            self._idle.put(_process())

    def run(self, job: BuildJob) -> Reading | str:
        process = self._idle.get()
        try:
            return process.submit(measure, job).result()
        except BrokenProcessPool:
            process.shutdown()
            process = _process()
            return "the compiler ended its process"
        finally:
            self._idle.put(process)

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get().shutdown()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
