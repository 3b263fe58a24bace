"""Measurements that are programs of their own, in miniature: they run, and their tables hold what they found."""

import json
from pathlib import Path

from bench import against_lora, loop_share, readme
from bench.settings import Settings
from bench.shapes import Layer


def test_against_lora(tmp_path):
    found = []
    for threads in (1, 2):
        found += against_lora.measure_layer(Layer("tiny", (12, 12), 16, 24), Settings(rounds=2, threads=threads))
    paths = [row["path"] for row in found if row["threads"] == 1 and row["way"] == against_lora.WITHOUT]
    assert paths == list(against_lora.PATHS)
    assert all(0 < row["lower"] <= row["median"] <= row["upper"] for row in found)
    counts = {"saved_bytes": 3 * 2**20, "peak_bytes": 2**20}
    memory = [{"ours": "a", "bytes": counts, "lora": counts, "parts": {"saved_bytes": 0.66, "peak_bytes": 0.7}}]
    where = {"device": "a CPU", "versions": dict.fromkeys(("torch", "timm", "peft"), "1"), "date": "2026-01-01T00"}
    where |= {"commit": "abc", "load_average": [0.1], "cores": 2}
    content = {"environment": where, "rounds": 2, "times": found, "memory": memory}
    assert f"{found[0]['median']:.3f}" in against_lora.table(content)
    assert readme.lora_table(tmp_path) == "*Not measured yet.*"
    (tmp_path / "against-lora").mkdir()
    (tmp_path / "against-lora/figures.json").write_text(json.dumps(content))
    lines = readme.lora_table(tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert "(equal work)" in rows[0] and len(rows) == len(against_lora.PATHS)
    assert f"{found[0]['median']:.2f}" in rows[0]
    assert "0.66 of LoRA's; peak of a step: 0.70" in lines[-1]


def test_loop_share(tmp_path: Path):
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    found = [
        loop_share.measure(loop_share.Case("small", loop_share.TINY, small, source, workers), batch_size=2, steps=2)
        for source, workers in ((loop_share.MEMORY, 0), (loop_share.FILES, 0), (loop_share.FILES, 1))
    ]
    for run in found:
        assert set(run["inside"]) == {"forward", "loss", "backward", "optimiser"}
        assert 0 < run["share_outside"] < 1
        assert run["outside_ms_per_step"] * 2e-3 + sum(run["inside"].values()) <= run["seconds"] * 1.001
        assert f"| {run['share_outside']:.1%} |" in loop_share.row(run)
