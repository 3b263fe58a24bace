"""Targets, verdicts and the README's table, from results made up for the purpose."""

import pytest
import torch

from bench import readme, report, targets
from bench.entrants.names import FROZEN, GLORA, LORA, OFFICIAL, OURS
from bench.measurements.inference import CONTROL, MERGED, ORIGINAL
from bench.section import Comparison, Section
from bench.settings import Settings

ROUNDS = 9


def model_section(ours=1.0, lora=1.0, saved=0.5):
    phases = {"whole": {OURS: [ours] * ROUNDS, LORA: [lora] * ROUNDS, OFFICIAL: [1.3] * ROUNDS}}
    pairs = (Comparison(OURS, LORA), Comparison(OURS, OFFICIAL), Comparison(OURS, GLORA), Comparison(OURS, FROZEN))
    facts = {
        OURS: {"saved_bytes": saved * 2**20, "peak_bytes": 2**20},
        LORA: {"saved_bytes": 2**20, "peak_bytes": 2**21},
    }
    return Section("model", "vit_b step", "a step", phases=phases, comparisons=pairs, facts=facts)


def inference_section(merged, control):
    phases = {"whole": {ORIGINAL: [1.0] * ROUNDS, MERGED: merged, CONTROL: control}}
    pairs = (Comparison(MERGED, ORIGINAL), Comparison(CONTROL, ORIGINAL))
    return Section("latency", "b", "latency", phases=phases, comparisons=pairs)


def content(*sections, **changes):
    return {**report.results(list(sections), Settings(rounds=ROUNDS), 0, False), **changes}


def test_targets_are_judged_on_what_was_measured():
    rows = targets.judged([model_section(ours=1.04).to_dict()])
    found = {(row["quantity"], row["baseline"]): (round(row["found"], 3), row["met"]) for row in rows}
    assert found == {("time", LORA): (1.04, True), ("time", OFFICIAL): (0.8, True), ("saved_bytes", LORA): (0.5, True)}
    rows = targets.judged([model_section(ours=1.06, saved=0.95).to_dict()])
    assert {row["baseline"] for row in rows if not row["met"]} == {LORA}
    assert sum(not row["met"] for row in rows) == 2


def test_targets_are_of_fp32_on_a_cpu():
    half = report.results([model_section()], Settings(dtype=torch.bfloat16), 0, False)
    assert half["targets"] == []


@pytest.mark.parametrize(
    ("merged", "control", "verdict"),
    [
        ([0.98, 1.02] * 4 + [1.0], [1.0] * ROUNDS, True),  # holds 1
        ([1.02] * ROUNDS, [0.99, 1.03] * 4 + [1.0], True),  # as far off as two equal models are
        ([1.05] * ROUNDS, [0.99, 1.01] * 4 + [1.0], False),
    ],
)
def test_merged_is_as_fast_within_noise_or_not(merged, control, verdict):
    assert targets.merged_as_fast(inference_section(merged, control).to_dict()) is verdict


def test_the_table_says_where_ours_loses():
    table = readme._part(content(model_section(ours=1.2)))
    assert "| PEFT LoRA, ours on random paths | **1.20 (1.20 to 1.20)** |" in table
    assert "| the official formula, same random paths | 0.92 (0.92 to 0.92) |" in table
    assert "0.50 of PEFT LoRA's" in table


def test_a_run_that_failed_is_not_quoted():
    with pytest.raises(ValueError, match="without failures"):
        readme._part(content(model_section(), failures=1))


def test_results_are_read_back(tmp_path):
    made = content(model_section())
    files = report.write(made, tmp_path)
    assert report.load(tmp_path / report.JSON)["sections"] == made["sections"]
    assert all(file.is_file() for file in files)


def test_another_format_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="expected results of format 1"):
        report.load(tmp_path / "x.json")


def test_swin_adapts_every_linear_layer_that_has_a_bias():
    import timm

    from bench.measurements.model import linear_names
    from bench.shapes import SHAPE_SETS

    swin = SHAPE_SETS["swin_b"].model
    with torch.device("meta"):
        backbone = timm.create_model(swin.name)
    names = linear_names(backbone, swin.linears)
    assert "layers.1.downsample.reduction" not in names and "layers.3.blocks.1.mlp.fc2" in names
    with pytest.raises(ValueError, match="expected 99 linear layers"):
        linear_names(backbone, 99)


def test_readme_is_up_to_date():
    assert list(readme.RESULTS.glob("*/results.json"))
    assert not readme.write(check=True), "run python -m bench.readme"
