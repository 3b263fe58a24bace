"""The two calls as data: which parts there are, which run together, and how long each may take."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

CALL = 240.0  # seconds that a call takes at most
GRACE = 5.0  # seconds that a part has to end after an interrupt
PROCESSES = 14  # that test at a time


class Part(NamedTuple):
    """One Python module in a process of its own.

    Attributes:
        module: what ``python -m`` runs.
        arguments: ``{out}`` is the folder of results, ``{scratch}`` one for what nobody reads later.
        limit: seconds; then the part is interrupted, and killed :data:`GRACE` seconds later.
        rehearsed: arguments that a rehearsal adds, to be done soon. Of an option that is given twice, the last counts.
        under: a program, with its arguments, that runs the part; without it on this machine the part fails.
        environment: variables that the part gets.
        kept: a file in the part's scratch folder that is copied into the folder of results, and its name there.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    limit: float
    rehearsed: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    environment: Mapping[str, str] = MappingProxyType({})
    kept: tuple[str, str] | None = None


Stage = tuple[Part, ...]  # parts that run at the same time
PYTEST = ("-q", "-p", "bench.gpu.plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default")


def _tests(name: str, limit: float, processes: int, *selected: str) -> Part:
    """Tests, whose failures are told of in the log of tests."""
    spread = ("-n", str(processes), "--dist", "worksteal", "--tests-log", "{out}/tests.jsonl", "--test-seconds", "40")
    rehearsed = ("-n", "2", "--test-seconds", "600")
    environment = {"GLORA_TESTS": "exhaustive", "OMP_NUM_THREADS": "1"}
    return Part(name, "pytest", (*PYTEST, "--tb=line", *spread, *selected), limit, rehearsed, environment=environment)


def _sanitizer(tool: str, limit: float) -> Part:
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation, whose end is watched
    return Part(tool, "bench.gpu.six_layers", (), limit, under=under, environment=environment)


def _bench(name: str, limit: float, file: str, *options: str, kept: bool = True) -> Part:
    """Measurements of ``pytest bench/``."""
    measured = (*PYTEST, f"bench/{file}", "--device", "cuda", "--dtype", "bfloat16", "--results", "{scratch}", *options)
    results = ("results.json", f"{name.replace(' ', '_')}.json") if kept else None
    return Part(name, "pytest", measured, limit, ("--shapes", "tiny", "--rounds", "2"), kept=results)


def _steps(name: str, limit: float, shapes: str, *options: str, kept: bool = True) -> Part:
    asked = ("-k", "test_training_step_mode", "--shapes", shapes)
    return _bench(name, limit, "test_model.py", *asked, *options, kept=kept)


def _compiling(shapes: str, limit: float) -> Part:
    """Fills Inductor's cache before anything is timed."""
    return _steps(f"compile {shapes}", limit, shapes, *COMPILED, "--rounds", "1", kept=False)


MACHINE = Part("machine", "bench.gpu.machine", ("--out", "{out}/machine.json"), 20)
EXTENSION = "tests/gpu/test_extension.py"
LAYERS, MODELS = ("vit_b", "llama7b"), ("vit_b", "vit_b_small")  # shape sets
COMPILED = ("--modes", "compiled")
TUNED = ("fused", "token_pass", "contract")

FIRST: tuple[Stage, ...] = (
    (MACHINE,),
    (
        _tests("tests", 75, PROCESSES, "tests/gpu", f"--ignore={EXTENSION}"),
        Part("extension", "bench.gpu.extension", (), 75),
        _sanitizer("memcheck", 75),
        _sanitizer("racecheck", 75),
    ),
    (_tests("extension tests", 40, PROCESSES, EXTENSION),),
    (Part("kernels", "bench.gpu.ops", ("--out", "{out}/kernels.json"), 35, ("--shapes", "tiny")),),
    (_bench("layers", 55, "test_layer.py", "--shapes", ",".join(LAYERS), "-k", "not compiled"),),
)
SECOND: tuple[Stage, ...] = (
    (MACHINE,),
    tuple(_compiling(name, 45) for name in MODELS),
    (_steps("steps", 40, ",".join(MODELS), "--modes", "eager,graphs", "--rounds", "15"),),
    (_bench("inference", 25, "test_inference.py", "--shapes", "vit_b", "--rounds", "15"),),
    # Last of the steps, since tracing takes long: the figures above are there by then.
    (_steps("compiled steps", 40, ",".join(MODELS), *COMPILED, "--rounds", "15"),),
    (
        Part(
            "tiles",
            "glora_kernels.tune",
            ("--kernels", *TUNED, "--seconds", "42", "--out", "{out}/settings.json", "--log", "{out}/tiles.jsonl"),
            50,
            ("--seconds", "20", "--shapes", "64x48"),
        ),
    ),
)
CALLS: dict[str, tuple[Stage, ...]] = {"1": FIRST, "2": SECOND}
