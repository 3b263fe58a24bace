"""Families of timm and Transformers through every way to save and load (tests/sweep.py): nothing is lost in silence."""

import json

import pytest

import tests.sweep
from tests.families import FAMILIES, Family
from tests.silence import ERROR, SAME
from tests.sweep import examine, main, quietly

transformers = pytest.importorskip("transformers")
# For what is special about them; the others are in the exhaustive tier.
COVER = (
    "timm/byobnet",  # batch norm, convolutions without bias
    "timm/deit",  # two heads
    "timm/fastvit",  # reparameterize_model
    "timm/levit",  # linear layers followed by batch norm, folded into them; two heads
    "timm/mobilenetv3, lcnet",  # a Linear of its own for the classifier
    "timm/nfnet",  # standardised convolutions
    "timm/swin_transformer_v2",  # reads the weight of qkv without calling it
    "timm/vision_transformer",
    "transformers/bert, masked",  # a tied bias
    "transformers/gpt2",  # Conv1D, a tied head
    "transformers/gpt_oss",  # experts as one parameter
    "transformers/llama, tied",  # no biases, a tied head
    "transformers/mamba",  # reads the weight of dt_proj
    "transformers/t5",
    "transformers/wav2vec2",  # weight norm
)


@pytest.fixture(scope="module", autouse=True)
def no_reports_of_transformers():
    with quietly():
        yield


def marked(family: Family):
    return pytest.param(family, id=family.title, marks=[] if family.title in COVER else pytest.mark.exhaustive)


def test_the_cover_is_of_families_that_there_are():
    assert set(COVER) <= {family.title for family in FAMILIES}
    assert len({family.title for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
def test_a_family_loses_nothing_without_a_word(family):
    record = examine(family)
    if record.note.startswith("not built"):
        pytest.skip(record.note)
    assert not record.failures, "\n".join(f"{step}: {verdict}" for step, verdict in record.failures.items())
    kinds = {verdict.kind for verdict in record.verdicts.values()}
    assert SAME in kinds or set(record.verdicts) == {"inject"}


def test_the_command_says_what_failed(monkeypatch, capsys, tmp_path):
    """A family that does not exist is listed, one that cannot be built is an error."""
    missing = Family("timm", "gone", "no_such_model", 32, {})
    broken = Family("timm", "broken", "test_vit", 32, {"img_size": "wide"})
    monkeypatch.setattr(tests.sweep, "FAMILIES", [missing, broken])
    assert main(["--only", "gone"]) == 0
    assert "not built: timm/gone" in capsys.readouterr().out
    assert main(["--json", str(tmp_path / "records.json")]) == 1
    assert "timm/broken: inject: ERROR" in capsys.readouterr().out
    gone, failed = json.loads((tmp_path / "records.json").read_text())
    assert gone["verdicts"] == {} and failed["verdicts"]["inject"]["kind"] == ERROR
    with pytest.raises(SystemExit):
        main(["--only", "no such name"])
