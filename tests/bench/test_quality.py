"""bench/quality.py, small: rates by the row that is compared, paired figures by hand, and no draw that chose a rate."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bench import quality, quality_variants
from glora import SearchSettings
from glora.quickstart.digits import DIGITS

TINY = replace(
    DIGITS, steps=2, refit_steps=1, random_paths=1, search=SearchSettings(2, 1, 1, 1, generations=1), batch_size=8
)


@pytest.fixture
def study(tmp_path):
    return quality.Study(TINY, tmp_path)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return DIGITS.make_backbone()


def write(study, part, *lines):
    with open(study.folder / f"{part}.jsonl", "a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def line(row, test, task="inverted", seed=1, method="lora", lr=0.01, **more):
    common = {"task": task, "seed": seed, "method": method, "lr": lr, "row": row, "test": test}
    return {**common, "parameters": 100, "seconds": 2.0, **more}


def test_every_part_from_rates_to_tables(study, backbone):
    methods = ["linear", "lora", "glora"]
    both = ["inverted", "rotated90"]
    quality.tune(study, quality.draws_of(study, backbone, ["inverted"], [1], fresh=False), methods)
    quality.compare(study, quality.draws_of(study, backbone, both, [2, 3]), methods)
    quality.trace(study, quality.draws_of(study, backbone, ["inverted"], [2]))
    before = [study.lines(part) for part in quality.PARTS]
    # what is there is not measured again
    quality.compare(study, quality.draws_of(study, backbone, both, [2, 3]), methods)
    assert [study.lines(part) for part in quality.PARTS] == before
    assert len(before[0]) == len(quality.RATES) * (1 + 2 + 3) and len(before[1]) == 4 * (1 + 2 + 3)
    text = quality.write_tables(study)
    assert "| LoRA r3 (train+val) |" in text and "| GLoRA, searched and refit (train+val) |" in text
    assert all(f"| LoRA r{rank} |" in text for rank in quality.RANKS)
    assert (study.folder / "curve.png").stat().st_size > 1000
    for drawn in before[2]:
        if drawn["method"] == "glora":
            assert drawn["parameters"] <= 4096 * int(drawn["row"].split("LoRA r")[1].split("'")[0])


def test_a_draw_that_chose_a_rate_is_refused(study, backbone):
    write(study, "rates", line("linear probe", 0.5, method="linear", seed=7))
    for part, *methods in ((quality.compare, ["linear"]), (quality.trace,)):
        with pytest.raises(ValueError, match=r"seeds: expected others than those that rates were chosen on, got \[7\]"):
            part(study, quality.draws_of(study, backbone, ["inverted"], [6, 7]), *methods)


def test_the_rate_is_that_of_the_row_that_is_compared(study):
    for lr, alone, both in ((0.01, 0.9, 0.5), (0.02, 0.1, 0.6)):
        write(study, "rates", line("LoRA r3", alone, lr=lr), line("LoRA r3 (train+val)", both, lr=lr))
        write(study, "rates", line("BitFit", alone, lr=lr, method="bitfit"))
    rates = study.rates()
    assert (rates["lora"], rates["bitfit"], rates["full"]) == (0.02, 0.01, TINY.rates["full"])


def test_what_is_held_out_is_of_the_training_samples(backbone):
    conditions = quality.conditions_of(TINY, backbone, "inverted", 0)
    held = quality.held_out(conditions)
    train, test = held.data.train.tensors, held.data.test.tensors
    assert train[1].bincount().tolist() == [12] * 10 and test[1].bincount().tolist() == [4] * 10
    whole = {image.numpy().tobytes() for image in conditions.data.train.tensors[0]}
    assert {image.numpy().tobytes() for image in torch.cat([train[0], test[0]])} == whole
    assert held.data.validation is conditions.data.validation


def test_intervals_by_hand():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 11.0, ("b", 1): 13.0}  # within each task 1 around its mean
    assert quality.interval(values) == pytest.approx(4.30 * math.sqrt(4 / 2 / 4))
    assert quality.interval({("a", 0): 1.0, ("a", 1): 3.0}) == pytest.approx(12.71 * math.sqrt(2 / 2))
    assert math.isnan(quality.interval({("a", 0): 1.0, ("b", 0): 3.0}))


def test_differences_are_paired(study):
    for seed, lora, glora in ((2, 0.5, 0.6), (3, 0.9, 0.8), (4, 0.7, 0.9)):
        write(study, "rows", line("LoRA r3 (train+val)", lora, seed=seed))
        write(study, "rows", line("other", glora, seed=seed, method="glora"))
    write(study, "rows", line("other", 0.1, seed=9, method="glora"))  # without LoRA: not among the differences
    spread = 4.30 * math.sqrt((3.333**2 + 16.667**2 + 13.333**2) / 2 / 3)
    row = quality.table(study).splitlines()[3]
    assert row.startswith("| other | 0.01 | 100 | 60.0 |") and f"| +6.7 ± {spread:.1f} | 2/3 |" in row


def test_variants(tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(quality_variants, "REFIT", (1e-2, 1))
    conditions = quality.conditions_of(TINY, backbone, "inverted", 2)
    study = quality.Study(TINY, tmp_path)
    key = {"task": "inverted", "seed": 2}
    study.measure(
        "variants", {**key, "variant": quality_variants.BASE}, lambda: quality.METHODS["lora"].rows(conditions, 0.02)
    )
    for name, variant in quality_variants.VARIANTS.items():
        rows = quality_variants.rows_of(variant, conditions)
        study.measure("variants", {**key, "variant": name}, lambda rows=rows: rows)
        assert [row.method for row in rows] == ["random", "searched", "searched and refit"]
    text = quality_variants.table(study)
    assert all(f"| {name} | 1 |" in text for name in quality_variants.VARIANTS)
    assert quality_variants.training.sampler_for is quality_variants.sampler_for
