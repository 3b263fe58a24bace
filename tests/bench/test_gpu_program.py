"""The program for a GPU that is lent: its parts as data, how they are run, what is kept of them; without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as command
from bench.gpu import cache, landing, parts, running, tables, verdicts
from bench.gpu.parts import CALL, CALLS, GRACE, Part
from bench.gpu.running import FAILED, NOT_RUN, PASSED, TIME_UP, Outcome, Program

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 8  # files that come back from the machine
ALL = [pytest.param(call, part, id=f"{call}-{part.name}") for call in CALLS for stage in CALLS[call] for part in stage]


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_limits_add_up_to_less_than_a_call(call):
    assert sum(max(part.limit for part in stage) for stage in CALLS[call]) <= CALL - GRACE


@pytest.mark.parametrize("call", CALLS)
def test_few_files_come_back(call):
    names = {"parts.jsonl", "logs.txt"}
    for stage in CALLS[call]:
        for part in stage:
            names |= set(re.findall(r"\{out\}/(\S+)", " ".join(part.arguments)))
            names |= {part.kept[1]} if part.kept else set()
    assert len(names) <= LARGEST
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


def test_parts_have_names_of_their_own():
    for call in CALLS.values():
        names = [part.name for stage in call for part in stage]
        assert len(set(names)) == len(names)


def test_every_gpu_test_is_in_one_part():
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests/gpu").glob("test_*.py")}
    selected = []
    for stage in parts.FIRST:
        for part in stage:
            given = [argument for argument in part.arguments if argument.startswith(("tests/", "--ignore="))]
            ignored = {argument.removeprefix("--ignore=") for argument in given}
            taken = {argument for argument in given if not argument.startswith("--")}
            selected += [file for file in files if file not in ignored & files - taken and _is_in(file, taken)]
    assert sorted(selected) == sorted(files)


def _is_in(file, taken):
    return any(file == one or file.startswith(f"{one}/") for one in taken)


@pytest.mark.parametrize(("call", "part"), ALL)
def test_modules_and_files_exist(call, part):
    module = [] if part.module == "pytest" else [f"{part.module.replace('.', '/')}.py"]
    files = [argument.removeprefix("--ignore=") for argument in part.arguments if argument.endswith(".py")]
    assert module or files or "tests/gpu" in part.arguments
    assert all((ROOT / name).exists() for name in (*module, *files))


# Running --------------------------------------------------------------------------------------------------------------

MODULES = {
    "passes": "import sys; print('verdict: all is well'); open(sys.argv[1], 'w').write('figures')",
    "fails": "raise SystemExit(3)",
    "crashes": "import os; os.abort()",
    "hears": "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('verdict: cut short'); raise",
    "is_deaf": "import signal, time\nsignal.signal(2, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(60)",
    "leaves_one": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs stages of such modules: their outcomes by name, and the folder of results."""
    monkeypatch.setattr(running, "GRACE", 3.0)
    (tmp_path / "modules").mkdir()
    for name, text in MODULES.items():
        (tmp_path / "modules" / f"{name}.py").write_text(text)
    (tmp_path / "modules" / "runs.py").write_text(
        "import faulthandler, runpy, signal, sys; faulthandler.register(signal.SIGUSR1); sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    out = tmp_path / "out"
    out.mkdir()

    def start(*stages, seconds=60.0):
        environment = {"PYTHONPATH": str(tmp_path / "modules")}
        program = Program(out, tmp_path / "scratch", "runs", seconds, lambda line: None, environment)
        program.run(stages)
        return {outcome.part: outcome for outcome in program.outcomes}, out

    return start


def part(name, limit=30.0, **others):
    return Part(name, name, ("{scratch}/figures",), limit, kept=("figures", f"{name}.json"), **others)


def test_nothing_stops_another_part(run):
    found, out = run((part("fails"), part("passes"), part("crashes")), (part("leaves_one"),))
    assert {name: outcome.status for name, outcome in found.items()} == {
        "fails": FAILED,
        "passes": PASSED,
        "crashes": FAILED,
        "leaves_one": PASSED,
    }
    assert (found["fails"].exit, found["crashes"].exit) == (3, -6)
    assert found["passes"].told == ("all is well",)
    assert (out / "passes.json").read_text() == "figures"
    written = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert {one["part"]: one["status"] for one in written} == {name: one.status for name, one in found.items()}
    assert "==== crashes: failed" in (out / "logs.txt").read_text()


def test_time_is_up_for_one_that_hears_and_for_one_that_does_not(run):
    began = time.monotonic()
    found, out = run((part("hears", 6.0), part("is_deaf", 6.0), part("passes")))
    assert time.monotonic() - began < 25
    assert [found[name].status for name in ("hears", "is_deaf", "passes")] == [TIME_UP, TIME_UP, PASSED]
    assert found["hears"].told == ("cut short",)
    assert (out / "logs.txt").read_text().count("Current thread") == 2  # where they were
    assert found["is_deaf"].exit == -9
    assert "\non\n" in (out / "logs.txt").read_text()
    assert running.failed(list(found.values()))


def test_no_part_outlives_the_call(run):
    began = time.monotonic()
    found, _ = run((part("is_deaf"),), (part("passes"),), seconds=9.0)
    assert time.monotonic() - began < 12
    assert (found["is_deaf"].status, found["passes"].status) == (TIME_UP, NOT_RUN)


def test_without_its_program_a_part_is_not_run(run):
    found, out = run((part("passes", under=("no-such-sanitizer",)),))
    assert found["passes"].status == NOT_RUN
    assert "no-such-sanitizer" in (out / "logs.txt").read_text()


def test_processes_that_are_left_behind_end(run):
    before = _sleepers()
    run((part("leaves_one"),))
    assert _sleepers() <= before


def _sleepers():
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if "time.sleep(60)" in line and "ps -eo" not in line}


# The plugin -----------------------------------------------------------------------------------------------------------

TESTS = """
import pytest, time, torch

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_hangs(): time.sleep(60)
@pytest.mark.skip
def test_skipped(): pass
def test_loses_the_gpu(monkeypatch):
    torch.cuda.is_initialized = lambda: True
    def lost(): raise RuntimeError("illegal memory access")
    torch.cuda.synchronize = lost
@pytest.mark.parametrize("number", range(8))
def test_more(number): pass
"""


def run_tests(folder, *options):
    """Runs the tests of a folder under the plugin: what it wrote, line by line, and the process."""
    plugin = ["-q", "-p", "bench.gpu.plugin", "-p", "no:cacheprovider", "--tests-log", str(folder / "log")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", *plugin, *options, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()], done


def test_results_are_written_as_they_come_and_hide_no_others(tmp_path):
    (tmp_path / "test_one.py").write_text(TESTS)
    (selected, *lines), done = run_tests(tmp_path, "-n", "2", "--test-seconds", "3")
    outcomes = {line["test"].partition("::")[2]: line["outcome"] for line in lines}
    assert selected == {"selected": 13}
    assert {name: outcomes.pop(name) for name in list(outcomes) if "more" not in name} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_hangs": "failed",
        "test_skipped": "skipped",
        "test_loses_the_gpu": "failed",
    }
    assert list(outcomes.values()) == ["passed"] * 8
    (tmp_path / "log").rename(tmp_path / "tests.jsonl")
    assert "tests: 13 selected: 3 failed, 9 passed, 1 skipped; 0 not run" in verdicts.summary([], tmp_path)
    assert "illegal memory access" in done.stderr + done.stdout
    assert done.returncode == 1


def test_a_part_whose_tests_are_all_skipped_fails(tmp_path):
    (tmp_path / "test_one.py").write_text("import pytest\n@pytest.mark.skip\ndef test_skipped(): pass\n")
    lines, done = run_tests(tmp_path)
    assert lines[0] == {"selected": 1} and done.returncode == 1


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_cache_is_carried_to_another_folder(tmp_path):
    build = tmp_path / "here/KEY"
    build.mkdir(parents=True)
    for name in ("fused_kernel.cubin", "fused_kernel.json", "fused_kernel.ptx", "fused_kernel.ttir"):
        (build / name).write_text(name)
    paths = {path.name: str(path) for path in build.iterdir()}
    (build / "__grp__fused_kernel.json").write_text(json.dumps({"child_paths": paths}))
    assert "1 builds" in cache.packed(tmp_path / "here", tmp_path / "carried/triton.tar.xz")
    assert "1 builds" in cache.unpacked(tmp_path / "carried/triton.tar.xz", tmp_path / "there")
    there = tmp_path / "there/KEY"
    group = json.loads((there / "__grp__fused_kernel.json").read_text())["child_paths"]
    assert group == {name: str(there / name) for name in ("fused_kernel.cubin", "fused_kernel.json")}
    assert all(Path(path).read_text() == name for name, path in group.items())


@pytest.mark.parametrize("content", [None, b"", b"\xfd7zXZ\x00 cut off"], ids=["none", "empty", "cut"])
def test_without_a_carried_cache_it_says_so(tmp_path, content):
    if content is not None:
        (tmp_path / "triton.tar.xz").write_bytes(content)
    assert "builds are compiled here" in cache.unpacked(tmp_path / "triton.tar.xz", tmp_path / "there")


# Verdicts, and what is committed --------------------------------------------------------------------------------------


def machine(rehearsal=False, **changes):
    versions = {"torch": "2.11.0", "triton": "3.6.0", "lycoris-lora": None}
    return {
        "rehearsal": rehearsal,
        "date": "2026-12-01T10:00:00+00:00",
        "commit": None,
        "device": "NVIDIA H200",
        "architecture": "sm_90",
        "versions": versions,
        "nvidia_smi": {"driver_version": "580.1"},
        **changes,
    }


def layer_row(shape, forward, predicted=1.0):
    ratio = {"median": forward, "candidate_seconds": 2.0}
    phases = {phase: dict.fromkeys(("assemble", "fused", "as dispatched"), ratio) for phase in ("forward", "whole")}
    seconds = {
        who: {"forward": predicted, "whole": predicted * factor} for who, factor in (("assemble", 2), ("fused", 1))
    }
    return {"shape": shape, "path": "A lora, B lora", "over_frozen": phases, "predicted_seconds": seconds}


CEILINGS = {"half": 7.654e14, "single": 5.21e13, "bandwidth": 4.321e12, "cache_bandwidth": 6e12, "overhead": 1.234e-6}


@pytest.fixture
def out(tmp_path):
    """What a first call leaves, all made up."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "machine.json").write_text(json.dumps(machine()))
    outcome = Outcome("tests", PASSED, 60.0, 0, 75.0, ("all is well",), 3, 1, ("no such build",))
    (out / "parts.jsonl").write_text(json.dumps(outcome._asdict()) + "\n")
    tests = [{"selected": 2}, {"test": "a.py::t[1]", "outcome": "passed"}, {"test": "a.py::t[2]", "outcome": "failed"}]
    (out / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tests))
    rows = [layer_row("ViT-B bs 64 fc1", 1.05), layer_row("ViT-B bs 64 fc2", 1.07), layer_row("LLaMA-7B 8192", 1.25)]
    (out / "kernels.json").write_text(json.dumps({"ceilings": CEILINGS, "layers": rows, "kernels": []}))
    times = {"ours": [0.10, 0.11, 0.12], "ours, one graph": [0.05] * 3, "PEFT LoRA": [0.1] * 3, "PEFT GLoRA": [0.2] * 3}
    steps = {"group": "step modes", "name": "vit_b step modes", "title": "a step", "phases": {"whole": times}}
    steps |= {"units": {"images": 64}, "facts": {"ours": {"peak_bytes": 3 << 30}}, "refused": {"frozen": "wrong"}}
    (out / "steps.json").write_text(json.dumps({"sections": [steps]}))
    return out


def test_verdicts_name_the_worst_shape_and_the_fastest_way(out):
    found = {one.what: (round(one.found, 3), one.met) for one in verdicts.judged(out)}
    assert found == {
        "forward over one dense product, ViT-B bs 64 fc2, A lora, B lora": (1.07, False),
        "forward over one dense product, LLaMA-7B 8192, A lora, B lora": (1.25, False),
        "step over PEFT LoRA's, vit_b step modes: ours, one graph over PEFT LoRA": (0.5, True),
        "step over PEFT GLoRA's, vit_b step modes: ours, one graph over PEFT GLoRA": (0.25, True),
    }


def test_a_file_that_was_cut_off_has_no_verdicts(out):
    (out / "kernels.json").write_text((out / "kernels.json").read_text()[:100])
    assert [one.what.partition(",")[0] for one in verdicts.judged(out)] == [
        "step over PEFT LoRA's",
        "step over PEFT GLoRA's",
    ]


def test_the_summary_ends_with_what_failed(out):
    outcomes = [Outcome("tests", FAILED, 3.0, 1, 75.0, ("as told",), 5, 2), Outcome("kernels", PASSED, 1.0, 0, 40.0)]
    lines = verdicts.summary(outcomes, out).splitlines()
    assert lines[-4:] == [
        "FAILED a.py::t[2]",
        "tests: 2 selected: 1 failed, 1 passed; 0 not run",
        "builds: 5 asked for, 2 compiled here",
        "parts: 1 passed, 1 failed: tests",
    ]
    assert "    as told" in lines and any(line.startswith("MISSED  1.250 (at most 1.06)") for line in lines)


def test_landing(out, tmp_path, monkeypatch):
    monkeypatch.setattr(landing, "environment", lambda device: {"commit": "abc"})
    folder = landing.landed([out], tmp_path / "results")
    assert folder.name == "gpu-sm_90"
    assert json.loads((folder / "machine.json").read_text())["commit"] == "abc"
    tests = json.loads((folder / "tests.json").read_text())
    assert (tests["selected"], [line["test"] for line in tests["not_passed"]]) == (2, ["a.py::t[2]"])
    speeds = tables.speeds(tmp_path / "results")
    assert "NVIDIA H200, driver 580.1; torch 2.11.0, triton 3.6.0; 2026-12-01, commit abc" in speeds
    assert "| ours | 582 | 3.00 GiB |" in speeds and "| frozen | *refused* | |" in speeds
    assert "| ViT-B bs 64 fc1, A lora, B lora | 2.00 | 1.00 | 2.00 | 2.00 | fused | assemble |" in tables.predictions(
        tmp_path / "results"
    )
    assert "| all | 283 | 0 |" in tables.builds(tmp_path / "results")

    second = tmp_path / "second"
    second.mkdir()
    (second / "machine.json").write_text(json.dumps(machine()))
    (second / "parts.jsonl").write_text(json.dumps(Outcome("tiles", PASSED, 6.0, 0)._asdict()) + "\n")
    landing.landed([second], tmp_path / "results")  # what the first call has left stays
    assert [part["part"] for part in json.loads((folder / "parts.json").read_text())["parts"]] == ["tests", "tiles"]
    assert (folder / "kernels.json").exists()


def test_ceilings_are_put_into_the_figures_of_machines(out, tmp_path):
    folder = landing.landed([out], tmp_path / "results")
    text = landing.with_ceilings(landing.MACHINES.read_text(), folder)
    module: dict = {"__name__": "machines"}
    sys.modules["machines"] = type(sys)("machines")
    exec(text, module)
    found, before = module["MACHINES"], landing.MACHINES.read_text()
    assert (found["sm_90"].half, found["sm_90"].single, found["sm_90"].bandwidth) == (765e12, 52.1e12, 4.32e12)
    assert (found["sm_90"].overhead, found["sm_90"].assembled) == (1.23e-6, 0.8)
    assert text.count("[M] NVIDIA H200, 2026-12-01") == 6
    assert text.partition('"sm_90"')[0] == before.partition('"sm_90"')[0]
    assert text.partition('"sm_100"')[2] == before.partition('"sm_100"')[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rehearsal": True}, "expected results of a GPU, got those of a rehearsal"),
        ({"architecture": "sm_100"}, "expected results of one kind of GPU"),
    ],
)
def test_what_is_not_landed(out, tmp_path, changes, message):
    other = tmp_path / "other"
    other.mkdir()
    (other / "machine.json").write_text(json.dumps(machine(**changes)))
    (other / "parts.jsonl").write_text("")
    with pytest.raises(ValueError, match=message):
        landing.landed([out, other], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_without_a_run_the_tables_say_so(tmp_path):
    assert {make(tmp_path) for make in (tables.speeds, tables.builds, tables.predictions)} == {tables.NOT_YET}


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3", "out"], "invalid choice: '3'"),
        (["1", "out", "--only", "nothing"], "--only: expected all or some of machine, tests, .*, got nothing"),
        (["1", "out", "--hang", "tests"], "expected --rehearse with them"),
        (["1", "."], "OUTDIR: expected an empty folder or none"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def rehearse(call, out, *arguments):
    run = [str(ROOT / "bench/gpu.sh"), "--rehearse", call, str(out), *arguments]
    run += ["--triton-cache", os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton/cache"))]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    return {one["part"]: one for one in found}, done


def test_without_a_gpu_nothing_passes(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = [str(ROOT / "bench/gpu.sh"), "1", str(tmp_path / "out"), "--only", "machine"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no GPU here" in done.stdout


def test_a_rehearsal_sees_what_is_planted(tmp_path):
    """Of the parts that take no time; ``bench/gpu.sh --rehearse 1 OUTDIR --wrong all`` plants in all."""
    asked = ("--only", "memcheck", "racecheck", "--wrong", "racecheck", "--limits", "4")
    found, done = rehearse("1", tmp_path / "wrong", *asked)
    assert {name: one["status"] for name, one in found.items()} == {"memcheck": PASSED, "racecheck": FAILED}
    assert found["racecheck"]["told"] == ["6 calls, 6 wrong"]
    assert found["memcheck"]["asked"] >= 20
    assert done.returncode == 1 and done.stdout.splitlines()[-1].endswith("1 passed, 1 failed: racecheck")

    found, done = rehearse("1", tmp_path / "hangs", "--only", "machine", "--hang", "machine", "--limits", "0.2")
    assert found["machine"]["status"] == TIME_UP and done.returncode == 1
