"""Ctrl-C and SIGTERM: one line that says what is saved, the exit status, and that the same command line goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

from glora.cli import main
from tests.glora.runs.test_runs import QUICK
from tests.glora.runs.test_runs import train_command as command_of_runs
from tests.glora.toys import exit_code, same_bits
from tests.miniature.images import write_datasets

CHANGES = (*QUICK, "training.epochs=8", "search.generations=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_datasets(folder, train=24, validation=16, test=20)
    return folder


def train_command(data, out, *more, seeds=("0",)):
    return command_of_runs(data, out, "--seeds", *seeds, *more, changes=CHANGES)


@pytest.fixture(scope="module")
def uncut(data, tmp_path_factory):
    study = tmp_path_factory.mktemp("uncut")
    assert main(train_command(data, study, "--json")) == 0
    assert main(["search", str(study), "--json"]) == 0
    return study / "svhn-seed0"


def _command(arguments, folder, place, times, number):
    """In a session of its own, as in a terminal, all processes of which get the signal at the given place."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was started with
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    module, _, owner = place[0].partition(":")
    owner = getattr(import_module(module), owner) if owner else import_module(module)
    original, calls = getattr(owner, place[1]), []

    def signalling(*given, **named):
        result = original(*given, **named)
        calls.append(place)
        if len(calls) == times:
            os.killpg(os.getpgrp(), number)
        return result

    setattr(owner, place[1], signalling)
    sys.exit(main(arguments))


def cut(arguments, folder, place, times=1, number=signal.SIGINT):
    """The exit status, what was printed, and the lines on stderr, after the signal at the ``times``-th call."""
    code = exit_code(_command, arguments, folder, place, times, number)
    return code, (folder / "out").read_text(), (folder / "err").read_text().splitlines()


MODEL = ("glora.runs.stages", "make_model")
SAVED = ("glora.training.state:TrainingState", "save")
WRITING = ("torch", "save")  # into a file that is renamed afterwards
SCORED = ("glora.evolution.journal:Journal", "append")


@pytest.mark.parametrize(
    ("place", "times", "saved"),
    [(MODEL, 1, None), (SAVED, 1, "step 3 of 24"), (SAVED, 3, "step 9 of 24"), (WRITING, 2, "step 3 of 24")],
    ids=["before", "first", "third", "writing"],
)
def test_training(data, uncut, tmp_path, capsys, place, times, saved):
    command, folder = train_command(data, tmp_path / "study"), tmp_path / "study" / "svhn-seed0"
    code, _, err = cut([*command, "--json"], tmp_path, place, times)
    held = f"saved: {folder / 'checkpoint.pt'}, {saved}; the same command line continues"
    nothing = "nothing is saved yet; the same command line starts again"
    assert (code, err[-1:]) == (130, [f"glora train: interrupted; {held if saved else nothing}"])
    assert not list(tmp_path.rglob("*.tmp"))
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith("svhn-seed0\nrun ")
    assert (f"train: continues from {folder / 'checkpoint.pt'}, {saved}\n" in err) is bool(saved)
    assert same_bits(load_file(folder / "supernet.safetensors"), load_file(uncut / "supernet.safetensors"))
    assert (folder / "log.csv").read_bytes() == (uncut / "log.csv").read_bytes()


def test_terminated_in_the_second_of_two_runs_with_progress_bars(data, tmp_path):
    study = tmp_path / "study"
    code, out, err = cut(train_command(data, study, seeds="01"), tmp_path, SAVED, 10, signal.SIGTERM)
    assert (code, out) == (143, "svhn-seed0\nsvhn-seed1\n")
    assert err[-1] == (
        f"glora train: terminated; saved: 1 of 2 runs; {study / 'svhn-seed1' / 'checkpoint.pt'}, step 6 of 24; "
        "the same command line continues"
    )
    assert "Traceback" not in "\n".join(err)


def test_an_interrupt_that_ends_as_another_error_is_an_interrupt(monkeypatch, capsys):
    """As of a collective that another process has left."""

    def find_runs(_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("connection closed") from None

    monkeypatch.setattr("glora.runs.find_runs", find_runs)
    assert main(["search", "somewhere"]) == 143
    assert capsys.readouterr().err == "glora search: terminated; the same command line starts again\n"


@pytest.fixture
def trained(uncut, tmp_path):
    """A run to be searched, and one that is."""
    shutil.copytree(uncut, tmp_path / "study" / "a")
    shutil.copytree(uncut, tmp_path / "study" / "b")
    for name in ("search.jsonl", "search.json", "adapter.safetensors"):
        (tmp_path / "study" / "a" / name).unlink()
    return tmp_path / "study"


def winner(folder):
    found = json.loads((folder / "search.json").read_text())
    return {key: found[key] for key in ("best", "history", "settings", "metric", "limit")}


def test_searching(uncut, trained, tmp_path, capsys):
    command, journal = ["search", str(trained)], trained / "a" / "search.jsonl"
    code, _, err = cut([*command, "--json"], tmp_path, SCORED, 5)
    held = f"saved: 1 of 2 runs; {journal}, 5 evaluations"
    assert (code, err) == (130, [f"glora search: interrupted; {held}; the same command line continues"])
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"svhn-seed0\ncontinues from {journal}, 5 evaluations\nsvhn-seed0\nrun ")
    assert winner(trained / "a") == winner(uncut)
    assert same_bits(load_file(trained / "a/adapter.safetensors"), load_file(uncut / "adapter.safetensors"))


@pytest.mark.parametrize("times", [0, 5])
def test_searching_again(uncut, trained, tmp_path, times):
    """The very same line would put aside what was just found."""
    shutil.copytree(trained / "b", trained / "a", dirs_exist_ok=True)
    command = ["search", str(trained), "--json"]
    code, _, err = cut([*command, "--again"], tmp_path, SCORED if times else MODEL, max(times, 1))
    held = (
        f"saved: {trained / 'a' / 'search.jsonl'}, 5 evaluations; without --again, the same command line continues; "
        f"then --again for {trained / 'b'}"
    )
    kept = "earlier searches are where they were; the same command line starts again"
    assert (code, err) == (130, [f"glora search: interrupted; {held if times else kept}"])
    found = (trained / "a" / "search.jsonl").read_bytes()
    assert main(command) == 0
    assert (trained / "a" / "search.jsonl").read_bytes().startswith(found)
    assert winner(trained / "a") == winner(uncut)


REFIT = ("--set", "refit.steps=20")


@pytest.fixture
def searched(uncut, tmp_path):
    """Two runs to be refitted."""
    for name in "ab":
        shutil.copytree(uncut, tmp_path / "study" / name)
    return tmp_path / "study"


def test_refitting(searched, tmp_path, capsys):
    """In the second of two runs; with --again, the very same line would put aside what has begun."""
    command, begun = ["refit", str(searched), *REFIT], searched / "b" / "refit" / "checkpoint.pt"
    code, _, err = cut([*command, "--json"], tmp_path, SAVED, 10 + 3)
    held = f"saved: 1 of 2 runs; {begun}, step 6 of 20"
    assert (code, err[-1]) == (130, f"glora refit: interrupted; {held}; the same command line continues")
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith("svhn-seed0\nsvhn-seed0\nrun ")
    assert f"train: continues from {begun}, step 6 of 20\n" in err
    one, other = (searched / name / "refit" for name in "ab")  # of the same run
    assert same_bits(*(load_file(each / "adapter.safetensors") for each in (one, other)))
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()

    code, _, err = cut([*command, "--json", "--again"], tmp_path, SAVED, 2)
    held = f"saved: {one / 'checkpoint.pt'}, step 4 of 20; without --again, the same command line continues"
    assert (code, err[-1]) == (130, f"glora refit: interrupted; {held}; then --again for {searched / 'b'}")
    code, _, err = cut([*command, "--json", "--again"], tmp_path, ("glora.runs.stages", "open_splits"))
    kept = "earlier refits are where they were; the same command line starts again"
    assert (code, err[-1]) == (130, f"glora refit: interrupted; {kept}")


def test_merging(trained, tmp_path):
    (trained / "a").rename(tmp_path / "a")
    code, _, err = cut(["merge", str(trained), "--json"], tmp_path, ("glora.runs.stages", "merge"))
    line = "glora merge: interrupted; done: 0 of 1 winners; the same command line continues"
    assert (code, err) == (130, [line])
    assert not list((trained / "b").glob("merge*"))


def test_other_commands_start_again(tmp_path):
    code, _, err = cut(["doctor"], tmp_path, ("glora.doctor", "version"))
    assert (code, err) == (130, ["glora doctor: interrupted; the same command line starts again"])


def test_a_signal_that_is_ignored_stays_ignored(data, uncut, tmp_path):
    """As under nohup; and afterwards the handlers are those of before."""

    def ignored():
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return main(["doctor", "--json"]), signal.getsignal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert ignored() == (0, signal.SIG_IGN)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# -- the quickstart ------------------------------------------------------------------------------------

QUICK = ["--seeds", "1", "--shots", "1", "--steps", "2", "--pretraining-steps", "4", "--workers", "1"]


def without_seconds(data):
    if isinstance(data, dict):
        return {key: without_seconds(value) for key, value in data.items() if "seconds" not in key}
    return [without_seconds(value) for value in data] if isinstance(data, list) else data


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        pytest.param(("glora.training.loop", "take_step"), False, marks=pytest.mark.exhaustive),
        pytest.param(SAVED, True, marks=pytest.mark.exhaustive),
        (("glora.quickstart.study", "_drain"), True),
    ],
    ids=["pre-training", "pre-trained", "adapting"],
)
def test_quickstart(tmp_path, place, saved):
    """What is adapted starts again, to the same figures; no worker speaks."""
    command = ["quickstart", *QUICK, "--out", str(tmp_path / "run")]
    code, _, err = cut([*command, "--json"], tmp_path, place)
    file = tmp_path / "run" / "backbone-seed0.pt"
    held = f"saved: the pre-training, {file}, step 4 of 4; the same command line continues"
    nothing = "nothing is saved yet; the same command line starts again"
    assert (code, err) == (130, [f"glora quickstart: interrupted; {held if saved else nothing}"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ([file.name] if saved else [])


@pytest.mark.exhaustive
def test_quickstart_continues_to_the_same_figures(tmp_path, capsys):
    one, other = (["quickstart", *QUICK, "--out", str(tmp_path / name)] for name in ("one", "other"))
    assert cut([*one, "--json"], tmp_path, SAVED)[0] == 130
    assert main(one) == 0
    out, err = capsys.readouterr()
    assert out.startswith("pre-training\n")
    assert f"train: continues from {tmp_path / 'one' / 'backbone-seed0.pt'}, step 4 of 4\n" in err
    assert main(other) == 0
    studies = [json.loads((tmp_path / name / "quickstart.json").read_text()) for name in ("one", "other")]
    assert without_seconds(studies[0]) == without_seconds(studies[1])


# -- processes of their own ----------------------------------------------------------------------------


def interrupted_once_begun(launch, number=signal.SIGINT):
    """A session of its own that gets the signal when the name of its run is printed."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or a process would inherit that it is ignored
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(launch, start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout.readline() == "svhn-seed0\n"
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, err


LINE = r"glora train: interrupted; (nothing is saved yet; the same .* starts again|saved: .*; the same .* continues)"


def test_python_m_glora(data, tmp_path):
    code, err = interrupted_once_begun([sys.executable, "-m", "glora", *train_command(data, tmp_path / "study")])
    assert code == 130 and re.match(LINE, err.splitlines()[-1]) and "Traceback" not in err


@pytest.mark.exhaustive
def test_of_several_ranks_one_speaks(data, uncut, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glora"]
    _, err = interrupted_once_begun([*launch, *train_command(data, tmp_path / "study")])
    assert len(re.findall(LINE, err)) == 1
