"""The two calls as data: which parts there are, which run together, and how long each may take."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

CALL = 235.0  # seconds that a call takes at most, from its very start
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


def _tests(name: str, limit: float, *selected: str) -> Part:
    """Tests, whose failures are told of in the log of tests."""
    spread = ("-n", str(PROCESSES), "--dist", "worksteal", "--tests-log", "{out}/tests.jsonl", "--test-seconds", "60")
    rehearsed = ("-n", "2", "--test-seconds", "600")
    # One thread for each, of torch's and of Inductor's, which otherwise has processes of its own.
    environment = {"GLORA_TESTS": "exhaustive", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Part(name, "pytest", (*PYTEST, "--tb=short", *spread, *selected), limit, rehearsed, environment=environment)


def _sanitizer(tool: str, limit: float) -> Part:
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation, whose end is watched
    return Part(tool, "bench.gpu.six_layers", (), limit, under=under, environment=environment)


def _bench(name: str, limit: float, file: str, *options: str) -> Part:
    """Measurements of ``pytest bench/``."""
    measured = (*PYTEST, f"bench/{file}", "--device", "cuda", "--dtype", "bfloat16", "--no-pictures", *options)
    kept = "results.json", f"{name.replace(' ', '_')}.json"
    rehearsed = ("--shapes", "tiny", "--rounds", "2")
    return Part(name, "pytest", (*measured, "--results", "{scratch}"), limit, rehearsed, kept=kept)


def _steps(name: str, limit: float, shapes: str, *options: str) -> Part:
    return _bench(name, limit, "test_model.py", "-k", "test_training_step_mode", "--shapes", shapes, *options)


MACHINE = Part("machine", "bench.gpu.machine", ("--out", "{out}/machine.json"), 25)
EXTENSION = "tests/gpu/test_extension.py"
LAYERS, MODELS = ("vit_b", "llama7b"), ("vit_b", "vit_b_small")  # shape sets
TUNED = ("fused", "token_pass", "contract")

FIRST: tuple[Stage, ...] = (
    (MACHINE,),
    (
        _tests("tests", 75, "tests/gpu", f"--ignore={EXTENSION}"),
        Part("extension", "bench.gpu.extension", (), 75),
        _sanitizer("memcheck", 75),
        _sanitizer("racecheck", 75),
    ),
    (_tests("extension tests", 35, EXTENSION),),
    (Part("kernels", "bench.gpu.ops", ("--out", "{out}/kernels.json"), 40, ("--shapes", "tiny")),),
    (_bench("layers", 55, "test_layer.py", "--shapes", ",".join(LAYERS), "--rounds", "5", "-k", "not compiled"),),
)
SECOND: tuple[Stage, ...] = (
    (MACHINE,),
    (_steps("steps", 45, ",".join(MODELS), "--modes", "eager,graphs", "--rounds", "15"),),
    (_bench("inference", 30, "test_inference.py", "--shapes", "vit_b", "--rounds", "15"),),
    (
        Part(
            "tiles",
            "glora_kernels.tune",
            ("--kernels", *TUNED, "--seconds", "30", "--out", "{out}/settings.json", "--log", "{out}/tiles.jsonl"),
            45,
            ("--seconds", "20", "--shapes", "64x48"),
        ),
    ),
    # Inductor compiles three models: last, with what time is left. Nothing else waits for it.
    (_steps("compiled steps", 85, "vit_b", "--modes", "compiled", "--rounds", "7", "--preparing", "45"),),
)
CALLS: dict[str, tuple[Stage, ...]] = {"1": FIRST, "2": SECOND}
