"""The ahead-of-time gate: rules on planted readings, readers on planted texts, and the command on the kernels below.

The command runs in a process of its own, without TRITON_INTERPRET, and takes its builds from ``shipped`` in this file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from glora_kernels import aot  # noqa: E402
from glora_kernels._aot import amd, compiling, nvidia, reading, report  # noqa: E402
from glora_kernels._aot.chains import chained_dots  # noqa: E402
from glora_kernels._aot.compiling import compiled  # noqa: E402
from glora_kernels._aot.covering import cover  # noqa: E402
from glora_kernels._aot.targets import SHARED_LIMITS, architecture_of, gpu_named, target_named  # noqa: E402
from glora_kernels._aot.verdict import failures  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ALL = aot.TARGETS


# Kernels to compile ---------------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(
    x, w, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, TWICE: tl.constexpr
):
    """y = x w^T. SCALE: an operand passes through registers in a loop that may not run. TWICE: two dots add up."""
    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    if not SCALE:
        tl.assume(K > 0)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        a = tl.load(x + rows * K + depth[None, :])
        b = tl.load(w + columns[None, :] * K + depth[:, None])
        if SCALE:
            a = (a.to(tl.float32) * 1.5).to(a.dtype)
        acc = tl.dot(a, b, acc)
        if TWICE:
            acc += tl.dot(a * 2, b)
    tl.store(y + rows * BN + columns[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def copy_kernel(x, y, BLOCK: tl.constexpr):
    """Loads everything before it stores anything."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.debug_barrier()
    tl.store(y + at, value)


@triton.jit
def refused_kernel(x, y, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "not a block that this kernel can do")


class Toy(NamedTuple):
    """The fields of a build, with defaults that suit the kernels here."""

    label: str
    kernel: str  # in this file
    constexprs: dict
    num_stages: int = 3
    matrix: bool = False
    plain_loop: bool = False
    num_warps: int = 4

    @property
    def function(self):
        if self.kernel == "aborting":  # the process that tries to compile it ends, as an assertion inside LLVM does
            os._exit(3)
        return globals()[self.kernel]

    @property
    def signature(self):
        return {"x": "*bf16", "y": "*bf16"} | ({"w": "*bf16", "K": "i32"} if self.kernel == "dot_kernel" else {})

    @property
    def divisible(self):
        return tuple(self.signature)  # in another order than the kernel's, as a set may be


def dot(label, bm, bn, bk, *, scale=False, twice=False, num_stages=3, plain_loop=False):
    blocks = {"BM": bm, "BN": bn, "BK": bk, "SCALE": scale, "TWICE": twice}
    return Toy(label, "dot_kernel", blocks, num_stages=num_stages, matrix=True, plain_loop=plain_loop)


def copy(label, block, *, matrix=False):
    return Toy(label, "copy_kernel", {"BLOCK": block}, matrix=matrix)


def shipped(architecture):
    """Good ones, and one for each thing that the gate must find; a process that ends comes first."""
    bad = {
        "sm_80": [
            Toy("aborting", "aborting", {}),
            Toy("refused", "refused_kernel", {"BLOCK": 16}),
            Toy("incomplete", "copy_kernel", {}),
            copy("pretending", 1024, matrix=True),
            copy("spilling", 65536),
            dot("greedy", 128, 128, 64, num_stages=7),
            dot("chained", 64, 64, 32, twice=True),
        ],
        "sm_90": [
            dot("serial", 64, 64, 64, scale=True, plain_loop=True),
            dot("serial but not meant to be plain", 64, 64, 64, scale=True),
        ],
        "sm_100": [dot("too wide", 256, 256, 32, scale=True, num_stages=2)],
        "gfx942": [copy("pretending", 1024, matrix=True), dot("spilling", 256, 256, 32, num_stages=2)],
    }
    return [*bad[architecture], dot("good dot", 64, 64, 32, plain_loop=True), copy("good copy", 1024)]


# The command on them --------------------------------------------------------------------------------------------------


def command(*arguments, cache, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "error::UserWarning"} | variables
    whole = [sys.executable, "-m", "glora_kernels.aot", "--builds", "tests.triton_host.test_aot", *arguments]
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def done(cache):
    return command("--jobs", "2", "--json", str(cache / "result.json"), cache=cache)


@pytest.fixture(scope="module")
def result(done, cache):
    assert done.returncode == 1, done.stderr
    return json.loads((cache / "result.json").read_text())


@pytest.fixture(scope="module")
def rows(result):
    return {(row["target"], row["label"]): row for row in result["rows"]}


@pytest.mark.parametrize("label", ["good dot", "good copy"])
@pytest.mark.parametrize("target", ALL)
def test_good_kernels_pass(rows, target, label):
    row = rows[target, label]
    assert row["failures"] == []
    assert row["reading"]["registers"] > 0
    assert bool(row["reading"]["matrix"]) == (label == "good dot")
    assert row["reading"]["shared"] == 0 or label == "good dot"


def test_matrix_instructions_are_those_of_the_architecture(rows):
    found = {target: list(rows[target, "good dot"]["reading"]["matrix"]) for target in ALL}
    assert found == {"cuda:80": ["HMMA"], "cuda:90": ["HGMMA"], "cuda:100": ["UTCHMMA"], "hip:gfx942": ["v_mfma"]}


EXPECTED = [
    ("cuda:80", "aborting", ["compilation: expected to succeed, got the compiler ended its process"]),
    ("cuda:80", "refused", ["not a block that this kernel can do"]),
    ("cuda:80", "incomplete", ["compilation: expected to succeed, got ValueError: signature and constexprs: expected"]),
    ("cuda:80", "pretending", ["matrix instructions: expected some, got none"]),
    ("hip:gfx942", "pretending", ["matrix instructions: expected some, got none"]),
    ("cuda:80", "spilling", ["spill: expected none, got "]),
    ("hip:gfx942", "spilling", ["spill: expected none, got "]),
    ("cuda:80", "greedy", ["shared memory: expected at most 101376 bytes, got 196608"]),
    ("cuda:80", "chained", ["chained dots: expected an accumulator for each dot of a loop, got %"]),
    (
        "cuda:90",
        "serial",
        ["matrix instructions: expected overlap in a plain loop, got serialised due to non wgmma instructions"],
    ),
    (
        "cuda:100",
        "too wide",
        [
            "matrix instructions: expected some, got none",
            "tensor memory: expected at most 512 columns, got ",
            "trap: expected none, got 1",
        ],
    ),
]


@pytest.mark.parametrize(("target", "label", "parts"), EXPECTED, ids=[f"{t} {label}" for t, label, _ in EXPECTED])
def test_bad_kernels_fail_for_their_reason_alone(rows, done, target, label, parts):
    found = rows[target, label]["failures"]
    assert len(found) == len(parts)
    assert all(part in line for part, line in zip(parts, found)), found
    assert all(f"FAILED {target} {label}: {line}" in done.stdout.splitlines() for line in found)


def test_spills_are_told_by_kind(rows):
    assert set(rows["cuda:80", "spilling"]["reading"]["spills"]) == {"STL", "LDL"}
    assert set(rows["hip:gfx942", "spilling"]["reading"]["spills"]) <= {"vgpr", "sgpr"}


def test_serialised_instructions_are_told_but_allowed_where_no_plain_loop_is_meant(rows):
    row = rows["cuda:90", "serial but not meant to be plain"]
    assert row["failures"] == [] and "wgmma" in row["reading"]["serialised"]


def test_output_is_whole(done, result, rows):
    builds = [(target, toy.label) for target in ALL for toy in shipped(architecture_of(gpu_named(target)))]
    failed = len(EXPECTED)
    assert list(rows) == builds, "another order, or a row that is missing"
    assert result["triton"] == triton.__version__ and result["date"].endswith("+00:00")
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(builds) + sum(len(parts) for *_, parts in EXPECTED) + 1
    assert lines[-1].endswith(f"{len(builds)} builds for 4 targets, Triton {triton.__version__}: "
                              f"{len(builds) - failed} pass, {failed} fail")  # fmt: skip


# The command on planted readings --------------------------------------------------------------------------------------

GOOD = reading.Reading(
    registers=100,
    stack=0,
    spills={},
    shared=1024,
    tensor_memory=0,
    matrix={"HMMA": 8},
    traps=0,
    serialised=None,
    chained=[],
)


def planted(monkeypatch, *arguments, found=GOOD):
    """The status of the command if every kernel reads like this one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "measured", lambda jobs, workers: [found] * len(jobs))
    return aot.main(["--builds", __name__, *arguments])


def test_status_is_0_if_all_pass(monkeypatch, capsys):
    assert planted(monkeypatch, "--targets", "cuda:90") == 0
    assert "4 pass, 0 fail" in capsys.readouterr().out


def test_status_is_1_if_one_fails(monkeypatch, capsys):
    assert planted(monkeypatch, "--targets", "cuda:90", found=GOOD._replace(serialised="something")) == 1
    assert "2 pass, 2 fail" in capsys.readouterr().out


def test_only_takes_labels_with_the_text(monkeypatch, capsys):
    assert planted(monkeypatch, "--only", "good d") == 0
    out = capsys.readouterr().out
    assert "4 builds for 4 targets" in out and "copy" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "cuda:42"], "targets: expected some of cuda:80, "),
        (["--only", "nothing like it"], "which leaves no build"),
        (["--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["--targets", "cuda:90", "--cover", "cuda:80"], "covered: expected some of the targets cuda:90, got cuda:80"),
    ],
)
def test_status_is_2_if_nothing_can_be_tried(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        planted(monkeypatch, *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_interpreter_mode_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected unset"):
        aot.gate(builds=__name__)
    with pytest.raises(SystemExit) as stop:
        aot.main(["--builds", __name__])
    assert stop.value.code == 2 and "TRITON_INTERPRET" in capsys.readouterr().err


def test_table_is_aligned():
    rows = [
        report.Row("cuda:80", "a", GOOD._replace(spills={"STL": 4, "LDL": 5}), ["bad"]),
        report.Row("hip:gfx942", "much longer", None, ["no kernel"]),
    ]
    assert report.table(rows).splitlines() == [
        "target      label        regs  stack  spills  shared  matrix  verdict",
        "cuda:80     a             100      0       9    1024  8 HMMA  FAILED",
        "hip:gfx942  much longer     -      -       -       -  -       FAILED",
    ]


class Asked:
    """As much of a kernel as the compiler's front end is asked for."""

    arg_names = ("x_ptr", "y_ptr", "rows", "stride", "far", "scale", "absent_ptr", "BLOCK")

    def warmup(self, *values, **options):
        return values, options


ASKED = SimpleNamespace(
    function=Asked(),
    signature={"scale": "fp32", "far": "i64", "x_ptr": "*bf16", "y_ptr": "*fp32", "rows": "i32", "stride": "i32"},
    divisible={"x_ptr", "stride"},
    constexprs={"BLOCK": 64, "absent_ptr": None},
    num_warps=8,
    num_stages=4,
)


@pytest.fixture
def no_driver(monkeypatch):
    """What Triton takes this process for is left as it was."""
    found = []
    monkeypatch.setattr(compiling.driver, "set_active", found.append)
    return found


def test_a_build_is_asked_for_as_it_says(no_driver):
    values, options = compiled(ASKED, gpu_named("hip:gfx942"))
    x, y, rows, stride, far, scale, absent, block = values
    assert (x.dtype, x.data_ptr() % 16, y.dtype, y.data_ptr() % 16) == (torch.bfloat16, 0, torch.float32, 1)
    assert rows % 16 and rows != 1 and stride % 16 == 0 and stride < 2**31 <= far and far % 16
    assert (type(scale), absent, block) == (float, None, 64)
    assert options == {"grid": (1,), "num_warps": 8, "num_stages": 4, "enable_fp_fusion": True}
    target = no_driver[0].get_current_target()
    assert (target.backend, target.arch, target.warp_size) == ("hip", "gfx942", 64)


def test_every_argument_is_said_once_and_divisible_ones_are_arguments(no_driver):
    twice = SimpleNamespace(**vars(ASKED) | {"constexprs": {"BLOCK": 64, "absent_ptr": None, "rows": 1}})
    with pytest.raises(ValueError, match="signature and constexprs: expected each of"):
        compiled(twice, gpu_named("cuda:90"))
    unknown = SimpleNamespace(**vars(ASKED) | {"divisible": {"x_ptr", "no argument"}})
    with pytest.raises(ValueError, match=r"divisible: expected names in signature, got \['no argument'\]"):
        compiled(unknown, gpu_named("cuda:90"))
    assert not no_driver


# Covers ---------------------------------------------------------------------------------------------------------------


def test_a_cover_shows_all_there_is_with_few():
    shown = [{1, 2}, {2, 3}, {1, 2, 3}, {4}, {1}, {4, 1}]
    assert cover(shown) == [2, 3]
    assert cover([]) == cover([set()]) == []


def test_covered_targets_keep_every_trait(monkeypatch, capsys):
    """Of four builds of a kernel two have both blocks, both types and both numbers of warps between them."""
    many = [copy(f"{block} {warps}", block)._replace(num_warps=warps) for block in (16, 32) for warps in (4, 8)]
    monkeypatch.setattr(sys.modules[__name__], "shipped", lambda architecture: [*many, dot("alone", 64, 64, 32)])
    assert planted(monkeypatch, "--targets", "cuda:90", "cuda:80", "--cover", "cuda:80") == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [row[0] for row in rows] == ["cuda:90"] * 5 + ["cuda:80"] * 3
    kept = [tuple(row[1:]) for row in rows[5:]]
    assert kept[-1][0] == "alone"
    assert [set(values) for values in zip(*kept[:2])] == [{"16", "32"}, {"4", "8"}]


# Rules ----------------------------------------------------------------------------------------------------------------

LOOP = dot("loop", 64, 64, 32, plain_loop=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 16}, "spill: expected none, got 16 bytes of stack"),
        ({"spills": {"STL": 4, "LDL": 5}}, "spill: expected none, got 0 bytes of stack, 4 STL, 5 LDL"),
        ({"matrix": {}}, "matrix instructions: expected some, got none"),
        (
            {"serialised": "its mood"},
            "matrix instructions: expected overlap in a plain loop, got serialised due to its mood",
        ),
        ({"shared": 232_449}, "shared memory: expected at most 232448 bytes, got 232449"),
        ({"tensor_memory": 513}, "tensor memory: expected at most 512 columns, got 513"),
        ({"traps": 1}, "trap: expected none, got 1"),
        ({"chained": ["%2 onto %1"]}, "chained dots: expected an accumulator for each dot of a loop, got %2 onto %1"),
    ],
    ids=str,
)
def test_every_rule_alone(changes, message):
    assert failures(LOOP, target_named("cuda:90"), GOOD._replace(**changes)) == [message]


@pytest.mark.parametrize("name", SHARED_LIMITS)
def test_a_kernel_may_take_all_there_is(name):
    target = target_named(name)
    full = GOOD._replace(shared=target.shared_limit, tensor_memory=512)
    assert failures(LOOP, target, full) == []
    assert len(failures(LOOP, target, full._replace(shared=target.shared_limit + 1))) == 1


def test_what_a_build_does_not_mean_is_not_asked():
    assert failures(copy("copy", 16), target_named("cuda:90"), GOOD._replace(matrix={}, serialised="its mood")) == []


# Readers --------------------------------------------------------------------------------------------------------------


def test_opcodes():
    sass = """
.L_x_1:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;
        /*0020*/              @UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*12340*/                  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;
        /*12350*/             @!PT LDL.LU R3, [R1] ;
        /*12360*/                  FFMA R1, R2, R3, R4 ;
"""
    assert nvidia.opcodes(sass) == {"LDC": 1, "STL": 1, "UTCHMMA": 1, "HGMMA": 1, "LDL": 1, "FFMA": 1}


def test_resources_are_the_most_of_any_function():
    dump = " Function f:\n  REG:80 STACK:0 SHARED:0\n Function g:\n  REG:32 STACK:24 SHARED:0\n"
    assert nvidia.resources(dump) == (80, 24)


@pytest.mark.parametrize("reader", [nvidia.resources, nvidia.opcodes, lambda text: amd.resource(text, "vgpr_count")])
def test_a_text_of_another_form_is_no_good_news(reader):
    with pytest.raises(RuntimeError, match="expected"):
        reader("nothing to see")


def test_traps_are_instructions():
    assert nvidia.traps("\ttrap;\n\t@%p1 trap;\n// no trap;\n\t.loc trap\n") == 2
    assert amd.traps("\ts_trap 2\n; s_trap 2\n\ts_trapdoor 2\n") == 1


def test_serialisation_is_told_with_its_reason():
    line = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    assert nvidia.serialisation("Used 1\n" + line + "bad luck in the function 'f' in line 6\nmore") == "bad luck"
    assert nvidia.serialisation(line + "bad luck\nmore") == "bad luck"
    assert nvidia.serialisation("ptxas info    : Used 90 registers\n") is None


AMDGCN = """
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	; v_mfma_ in a comment
	s_endpgm
  - .agpr_count:     16
    .private_segment_fixed_size: 132
    .sgpr_spill_count: 2
    .vgpr_count:     64
    .vgpr_spill_count: 7
"""


class Metadata(NamedTuple):
    shared: int


class Kernel(NamedTuple):
    """As much of a compiled kernel as a reader looks at."""

    asm: dict
    hash: str = "1"
    metadata: Metadata = Metadata(512)


def test_amd_reading(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = reading.read(Kernel({"amdgcn": AMDGCN, "ttir": ""}))
    assert found == reading.Reading(64, 132, {"vgpr": 7, "sgpr": 2}, 512, 0, {"v_mfma": 1}, 0, None, [])


def test_the_same_code_is_read_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    read = []
    monkeypatch.setattr(reading, "_read_amd", lambda kernel: read.append(kernel) or GOOD)
    first, other = Kernel({"amdgcn": "1", "ttir": ""}), Kernel({"amdgcn": "2", "ttir": ""})
    assert [reading.read(kernel) for kernel in (first, first, other, first, other)] == [GOOD] * 5
    assert read == [first, other]


# Chained dots ---------------------------------------------------------------------------------------------------------


def ttir(*lines):
    return "\n".join(lines)


def product(result, accumulator):
    return f"  %{result} = tt.dot %a, %b, %{accumulator}, inputPrecision = tf32 : tensor<16x16xbf16> loc(#loc1)"


FOR = "%acc:2 = scf.for %k = %c0 to %K step %c32 iter_args(%p = %z, %q = %z) -> (f32, f32) : i32 {"
WHILE = "%acc = scf.while (%p = %z) : (f32) -> f32 {"
END = "} {tt.num_stages = 3 : i32} loc(#loc2)"
IF, ELSE = "scf.if %c {", "} else {"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((FOR, product(1, "p"), product(2, 1), END), ["%2 onto %1"]),
        ((FOR, product("acc_1", "p"), IF, product("acc_2", "acc_1"), "}", END), ["%acc_2 onto %acc_1"]),
        ((FOR, IF, product(1, "p"), ELSE, product(2, 1), "}", END), ["%2 onto %1"]),
        ((WHILE, "} do {", product(1, "p"), product(2, 1), "}"), ["%2 onto %1"]),
        ((FOR, product(1, "p"), product(2, 1), product(3, 2), END), ["%2 onto %1", "%3 onto %2"]),
        (
            (FOR, product(1, "p"), '  %4 = tt.load %x loc("}":1:2)', product(2, 1), END),
            ["%2 onto %1"],
        ),  # a path, no end
        ((FOR, product(1, "p"), product(2, "q"), END), []),  # an accumulator each
        ((FOR, product(1, "p"), "  %2 = tt.dot %1, %b, %q : f32", END), []),  # an operand, not an accumulator
        ((product(1, "z"), product(2, 1)), []),  # no loop
        ((product(1, "z"), FOR, product(2, 1), END), []),  # from outside
        ((FOR, product(1, "p"), FOR, product(2, 1), END, END), []),  # another loop's
        ((FOR, product(1, "p"), END, FOR, "  %1 = arith.constant 0", product(2, 1), END), []),  # a name used again
        ((FOR, product(1, "p"), END, product(2, "acc#0")), []),  # after the loop
        ((FOR, product(1, "p"), "  %1:2 = tt.split %3", product(2, 1), END), []),
    ],
)
def test_chained_dots(lines, found):
    assert chained_dots(ttir(*lines)) == found
