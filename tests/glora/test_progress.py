"""Progress: a bar on a terminal, lines elsewhere."""

import io
import re
import sys

import pytest
from tqdm.auto import tqdm

from glora import progress
from glora.progress import Lines, progress_bar, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """Call it in the test itself: pytest puts its own streams there after the fixtures."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def lines(capsys):
    """What was printed, without times and rates."""
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    return [re.sub(r"\[[^,]*, [^,]*?/s", "[", line) for line in err.splitlines()]


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress_bar(total=3, desc="train", unit="step") as bar:
        bar.update(3)
        say("a line")
    assert type(bar) is tqdm
    assert "train: 100%" in terminal.getvalue() and "a line\n" in terminal.getvalue()


def test_a_notebook_has_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "tqdm_notebook", tqdm)
    assert type(progress_bar(total=3, desc="train", unit="step")) is tqdm


def test_a_line_for_each_twentieth(capsys):
    with progress_bar(total=300, desc="train", unit="step") as bar:
        for step in range(300):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    printed = lines(capsys)
    assert printed[0] == "train:   0% 0/300 []"
    assert printed[1:] == [f"train: {5 * i:3}% {15 * i}/300 [, loss {15 * i - 1}]" for i in range(1, 21)]


def test_few_steps_have_a_line_each_and_large_ones_skip(capsys):
    assert list(progress_bar("abc", desc="test", unit="batch")) == ["a", "b", "c"]
    assert lines(capsys) == [f"test: {share}% {i}/3 []" for i, share in enumerate(("  0", " 33", " 67", "100"))]
    with progress_bar(total=100, desc="adapt", unit="step") as bar:
        bar.update(52)
        bar.update(2)
        bar.update(bar.total - bar.n)
    assert lines(capsys) == [f"adapt: {share}% {share.strip()}/100 []" for share in ("  0", " 52", "100")]


def test_the_last_line_says_where_it_ended(capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar(total=100, initial=40, desc="train", unit="step") as bar:
        bar.update(2)
        raise KeyboardInterrupt
    bar.close()
    assert lines(capsys) == ["train:  40% 40/100 []", "train:  42% 42/100 []"]


@pytest.mark.parametrize(("total", "first"), [(0, "train:   0% 0/0 []"), (4, "train: 100% 4/4 []")])
def test_nothing_to_do_is_one_line(total, first, capsys):
    progress_bar(total=total, initial=total, desc="train", unit="step").close()
    assert lines(capsys) == [first]


def test_an_unknown_length_has_the_first_line_and_the_last(capsys):
    assert list(progress_bar(iter(range(50)), desc="test", unit="batch")) == list(range(50))
    assert [line.split(" [")[0] for line in lines(capsys)] == ["test: 0", "test: 50"]


@pytest.mark.parametrize("make_stream", [Terminal, io.StringIO])
def test_what_is_not_shown_prints_nothing(make_stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", make_stream())
    assert list(progress_bar(range(3), desc="test", unit="batch", shown=False)) == [0, 1, 2]
    with progress_bar(total=3, desc="test", unit="batch", shown=False) as bar:
        bar.update(bar.total - bar.n)
        bar.set_postfix_str("best")
    assert sys.stderr.getvalue() == ""


def test_lines_between_are_lines(capsys):
    with progress_bar(total=2, desc="search", unit="path") as bar:
        assert isinstance(bar, Lines)
        bar.update()
        say("search: about 1 min")
    assert lines(capsys) == ["search:   0% 0/2 []", "search:  50% 1/2 []", "search: about 1 min"]


class OnlyWritten:
    """What a program may put in the place of standard error."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_stream_that_can_only_be_written_to_has_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", OnlyWritten())
    assert list(progress_bar(range(2), desc="test", unit="batch")) == [0, 1]
    say("a line")
    assert [line.split(" [")[0] for line in sys.stderr.text.splitlines()] == [
        "test:   0% 0/2",
        "test:  50% 1/2",
        "test: 100% 2/2",
        "a line",
    ]


def test_without_standard_error_nothing_is_shown(monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None)
        assert list(progress_bar(range(2), desc="test", unit="batch")) == [0, 1]
        with progress_bar(total=2, desc="test", unit="batch") as bar:
            bar.update()
            bar.set_postfix_str("best", refresh=False)
        say("a line")
    assert capsys.readouterr() == ("", "")
