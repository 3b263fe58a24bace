"""Counters, against counts made by hand; and the profile of a small layer."""

import json

import numpy as np
import pytest
import torch

from tests.compiled import counting, profile
from tests.compiled.counting import Counters, Requests, class_of
from tests.compiled.driver import library
from tests.compiled.instructions import decode
from tests.compiled.machine.faults import Hazards
from tests.compiled.machine.machine import Machine
from tests.compiled.machine.memory import Memory
from tests.compiled.machine.program import Program
from tests.compiled.snippets import entry

WARP = np.arange(32)


@pytest.mark.parametrize(
    ("addresses", "width", "want"),
    [
        (4 * WARP, 4, (4, 4)),
        (0 * WARP, 4, (1, 1)),
        (32 * WARP, 4, (32, 4)),
        (4 * WARP + 16, 4, (5, 4)),  # begins in the middle of a sector
        (16 * WARP, 16, (16, 16)),
        (2 * WARP, 2, (2, 2)),
    ],
)
def test_sectors(addresses, width, want):
    found = counting.sectors(WARP, addresses.astype(np.uint64), width)
    assert (found.count, found.passes, found.fewest) == (1, *want)
    assert found.bytes == width * len(set(addresses.tolist()))


@pytest.mark.parametrize(
    ("lanes", "addresses", "width", "want"),
    [
        (WARP, 4 * WARP, 4, (1, 1)),
        (WARP, 0 * WARP, 4, (1, 1)),  # one word for all
        (WARP, 8 * WARP, 4, (2, 1)),
        (WARP, 128 * WARP, 4, (32, 1)),
        (WARP, 64 * WARP, 4, (16, 1)),
        (WARP, 2 * WARP, 2, (1, 1)),
        (WARP, 8 * WARP, 8, (2, 2)),
        (WARP, 16 * WARP, 16, (4, 4)),
        (WARP, 32 * WARP, 16, (8, 4)),  # in each pass, two threads to a bank
        (WARP[:8], 16 * WARP[:8], 16, (1, 1)),  # the rows of a matrix, side by side
        (WARP[:8], 256 * WARP[:8], 16, (8, 1)),
    ],
)
def test_waves(lanes, addresses, width, want):
    found = counting.waves(lanes, addresses.astype(np.uint32), width)
    assert (found.count, found.passes, found.fewest) == (1, *want)


def test_warps_are_counted_each():
    lanes = np.arange(64)
    assert counting.sectors(lanes, 4 * lanes.astype(np.uint64), 4) == Requests(2, 8, 8, 256)
    assert counting.waves(lanes, 4 * lanes.astype(np.uint32), 4) == Requests(2, 2, 2, 256)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("ld.global.b32 %r1, [%rd1];", "global"),
        ("ld.shared.b32 %r1, [%r2];", "shared"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];", "shared"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;", "copies"),
        ("cp.async.commit_group;", "order"),
        ("bar.sync 0;", "order"),
        ("wgmma.wait_group.sync.aligned 0;", "order"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;", "matrix"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", "matrix"),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", "float"),
        ("add.s32 %r1, %r2, %r3;", "integer"),
        ("cvt.rn.bf16.f32 %rs1, %r1;", "conversions"),
        ("mov.b32 %r1, %r2;", "moves"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "shuffles"),
        ("ret;", "jumps"),
    ],
)
def test_classes(instruction, want):
    assert class_of(next(Program(entry(instruction)).instructions)) == want


def test_a_loop_counts_as_often_as_it_runs():
    body = """
        mov.u32 %r1, 0;
    $loop:
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p1, %r1, 3;
        @%p1 bra $loop;
    """
    code = decode(entry(body, 64))
    counters = Counters(code.program)
    Machine(code, [0], [], 0, Memory({}, Hazards()), counters).run()
    assert counters.warps == {"moves": 2, "integer": 2 * 3 * 2, "jumps": 2 * 3 + 2}
    looped = profile.looped(code.program)
    assert [one.opcode[0] for one in code.program.instructions if one in looped] == ["add", "setp", "bra"]


@pytest.mark.skipif(library.fault() is not None, reason="no launches here")
def test_the_profile_of_a_layer(tmp_path, capsys):
    file = tmp_path / "profile.json"
    chosen = [
        "--architecture",
        "sm_90",
        "--strategy",
        "assemble",
        "--product",
        "hadamard",
        "--shape",
        "64",
        "48",
        "32",
        "--programs",
        "2",
    ]
    profile.main([*chosen, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["assemble", "token_pass", "contract", "finish"]
    assert all(row["all"] == sum(row[name] for name in counting.CLASSES) > 0 for row in rows)
    assert all(row["of fewest sectors"] >= 1 and row["kilobytes"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n| sm_90 assemble hadamard |") == 4


@pytest.mark.skipif(library.fault() is not None, reason="no launches here")
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_tiles_are_not_loaded_one_by_one(architecture, product):
    """Where the compiler knows no multiple of a program's first column, a thread asks for 2.3 bytes at a time here."""
    kinds, types = ("lora_8", "vector", "none", "none", "none"), {"dtype": torch.bfloat16, "terms_dtype": torch.float32}
    launches = profile.profiled(
        architecture, "assemble", kinds, (64, 64, 256), 2, product=product, storage_rank=8, **types
    )
    for one in launches:
        asked = profile.total(one.counters.to_global)
        assert one.kernel == "finish" or asked.bytes / asked.count / 32 > 4, one.kernel
    assert "assemble" in [one.kernel for one in launches]


def test_bad_options_of_the_profile(capsys):
    with pytest.raises(SystemExit):
        profile.main(["--programs", "0"])
    assert "expected at least 1" in capsys.readouterr().err
