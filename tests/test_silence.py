"""The judge of round trips finds each kind of outcome, so that a test that relies on it can fail."""

import copy
import warnings

import pytest
import torch
from torch import nn

import glora
from tests.glora.toys import adapted_mlp, mlp, points, trained_mlp
from tests.silence import (
    ERROR,
    LATE,
    REFUSED,
    SAME,
    SILENT,
    UNREADABLE,
    WARNED,
    Looking,
    Way,
    difference,
    judge,
    tensors_in,
)

X = points().tensors[0]


def verdict(folder, write, read, model=None):
    model = trained_mlp() if model is None else model
    return judge(Way(write, read), model, mlp, folder / "files", Looking({"input": X}))


def nothing(model, folder):
    return None


def test_the_same(tmp_path):
    kept = []
    got = verdict(tmp_path, lambda model, folder: kept.append(copy.deepcopy(model)), lambda fresh, folder: kept.pop())
    assert got.kind == SAME


def test_a_silent_difference(tmp_path):
    assert verdict(tmp_path, nothing, lambda fresh, folder: fresh()).kind == SILENT


def test_one_bit_is_a_difference(tmp_path):
    def read(fresh, folder):
        model = trained_mlp()
        with torch.no_grad():
            model.head.bias[0] = torch.nextafter(model.head.bias[0], torch.tensor(9.0))
        return model

    assert verdict(tmp_path, nothing, read).kind == SILENT


@pytest.mark.parametrize(
    ("text", "category", "kind"),
    [
        ("'head' is left out", UserWarning, WARNED),
        ("head.weight, head.bias: left out", UserWarning, WARNED),
        ("the paths are not in it", UserWarning, WARNED),
        ("something is left out", UserWarning, SILENT),
        ("ahead of it", UserWarning, SILENT),
        ("the head of something is left out", UserWarning, SILENT),
        ("head.weight", DeprecationWarning, SILENT),
    ],
)
def test_a_warning_counts_if_it_names_what_is_lost(tmp_path, text, category, kind):
    def write(model, folder):
        warnings.warn(text, category, stacklevel=2)

    assert verdict(tmp_path, write, lambda fresh, folder: fresh()).kind == kind


def test_a_refusal_of_ours(tmp_path):
    assert verdict(tmp_path, lambda m, f: glora.save_adapter(m, f / "a"), None, model=mlp()).kind == REFUSED


def test_a_refusal_that_leaves_a_file(tmp_path):
    def write(model, folder):
        (folder / "half").write_text("")
        glora.save_adapter(model, folder / "a")

    got = verdict(tmp_path, write, None, model=mlp())
    assert got.kind == ERROR and "half" in got.detail


def test_an_error_that_is_no_refusal(tmp_path):
    def write(model, folder):
        raise ValueError("model: looks like ours, but is not")

    assert verdict(tmp_path, write, None).kind == ERROR


def test_a_strict_reader_is_late(tmp_path):
    def read(fresh, folder):
        model = fresh()
        model.load_state_dict({})
        return model

    assert verdict(tmp_path, nothing, read).kind == LATE


def test_what_we_wrote_and_refuse_to_read(tmp_path):
    def read(fresh, folder):
        return glora.load_adapter(adapted_mlp(rank=1), folder / "a")

    assert verdict(tmp_path, lambda m, f: glora.save_adapter(m, f / "a"), read).kind == UNREADABLE


def test_writing_must_not_change_the_model(tmp_path):
    def write(model, folder):
        nn.init.zeros_(model.head.weight)

    assert verdict(tmp_path, write, lambda fresh, folder: trained_mlp()).kind == ERROR


def test_outputs_that_cannot_be_compared_differ():
    one = torch.ones(2)
    assert difference([one], [one]) == 0
    for other in ([], [one, one], [one.double()], [torch.ones(3)], [one * torch.nan]):
        assert difference([one], other) == float("inf")


def test_every_floating_tensor_is_looked_at():
    a, b = torch.ones(1), torch.ones(2)
    found = list(tensors_in({"logits": a, "more": [(b, 3, None)], "ids": torch.ones(2, dtype=torch.long)}))
    assert len(found) == 2 and found[0] is a and found[1] is b
