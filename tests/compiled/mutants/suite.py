"""The tests of layers as functions, the builds that each of them executes, and what they say of a broken build."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from tqdm import tqdm

from .. import layers
from ..instructions import code_of
from ..machine import machine
from ..machine.faults import Fault
from ..machine.machine import Code
from ..machine.program import Program
from ..running import decoded, execute
from .effects import probed
from .operators import ORDERS, Site, broken

FILE = Path(__file__).parents[1] / "test_layers.py"
BLOCKS = 5_000  # that one execution may take: a broken branch may never end


class Build:
    """A compiled kernel.

    Attributes:
        tests: those that execute it, the quickest first.
        probed: the program with probes; ``effective`` are the sites whose change can matter in some test.
    """

    def __init__(self, ptx: str):
        self.ptx = ptx
        self.tests: list[Test] = []
        self.effective: set[Site] = set()
        self.probed = probed(decoded(ptx), self.effective)

    @cached_property
    def program(self) -> Program:
        return Program(self.ptx)

    @property
    def kernel(self) -> str:
        return self.program.name.removesuffix("_kernel")

    @property
    def architecture(self) -> str:
        return next(line.split()[1] for line in self.ptx.splitlines() if line.startswith(".target"))[:5]


class Test(NamedTuple):
    name: str
    run: Callable[[], None]


class Mutant(NamedTuple):
    build: int  # its number
    site: Site


class Outcome(NamedTuple):
    """What the tests say of a mutant.

    Attributes:
        how: ``wrong result``, ``hazard`` or ``fault``; ``same bits`` if no launch writes other bits than the unbroken
            one, and the change is none of order; else empty.
        what: was said by the test.
    """

    how: str
    what: str
    test: str


class Suite:
    """All tests of layers of the tier, and the builds that they execute."""

    def __init__(self):
        builds: dict[str, Build] = {}
        taken = []
        for test in tqdm(_collected(), unit="test", desc="unbroken"):
            executed: dict[str, Build] = {}

            def observed(ptx: str, executed: dict[str, Build] = executed) -> Code:
                if ptx not in builds:
                    builds[ptx] = Build(ptx)
                executed[ptx] = builds[ptx]
                return builds[ptx].probed

            began = time.perf_counter()
            with _instead(observed):
                test.run()
            taken.append((time.perf_counter() - began, test))
            for build in executed.values():
                build.tests.append(test)
        seconds = {test.name: spent for spent, test in taken}
        for build in builds.values():
            build.tests.sort(key=lambda test: seconds[test.name])
        self.builds, self.tests = list(builds.values()), len(taken)

    def outcome(self, mutant: Mutant) -> Outcome:
        """What the tests say that execute the build, up to the first that fails."""
        build = self.builds[mutant.build]
        code = code_of(broken(build.ptx, mutant.site))

        def instead(ptx: str) -> Code:
            return code if ptx == build.ptx else decoded(ptx)

        for test in build.tests:
            with _instead(instead):
                try:
                    test.run()
                except Fault as error:
                    return Outcome("fault", str(error), test.name)
                except layers.HazardError as error:
                    return Outcome("hazard", str(error), test.name)
                except AssertionError as error:
                    return Outcome("wrong result", str(error), test.name)
                except ValueError as error:  # merging refuses weights that are not finite
                    if "finite" not in str(error):
                        raise
                    return Outcome("wrong result", str(error), test.name)
        if mutant.site.operator in ORDERS:
            return Outcome("", "", "")
        same = all(_written(test, instead) == _written(test, decoded) for test in build.tests)
        return Outcome("same bits" if same else "", "", "")


def _written(test: Test, code: Callable[[str], Code]) -> list[bytes]:
    """Digests of the tensors after each launch of a test."""
    found: list[bytes] = []

    def executed(*arguments: Any, **options: Any) -> Any:
        hazards = execute(*arguments, **options)
        tensors = arguments[4]
        content = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
        found.append(blake2b(b"".join(content)).digest())
        return hazards

    with _instead(code), patch.object(layers, "execute", executed):
        test.run()
    return found


@contextmanager
def _instead(code: Callable) -> Iterator[None]:
    with patch.object(layers, "decoded", code), patch.object(machine, "LIMIT", BLOCKS):
        yield


def _collected() -> list[Test]:
    """The tests with their cases, as pytest finds them for the tier."""
    found: list[pytest.Function] = []

    class Collector:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(session.items)

    with redirect_stdout(io.StringIO()):
        status = pytest.main(["--collect-only", "-q", str(FILE)], plugins=[Collector()])
    assert status == pytest.ExitCode.OK and found, f"{FILE.name}: expected tests, got none ({status})"
    return [Test(item.name, partial(item.function, **item.callspec.params)) for item in found]
