"""The text of a kernel: what is read from it, and that nothing in it is skipped."""

import pytest

from .instructions import decode
from .machine.faults import Fault, Hazards, UnknownInstructionError
from .machine.machine import Machine
from .machine.memory import Memory
from .machine.program import Program, operands_of
from .snippets import at_a_multiple_of_16, entry, ints, lanes, run, zeros

KERNEL = """
.version 8.8
.target sm_90a
	// .globl	fused_kernel            // -- Begin function fused_kernel
.extern .shared .align 16 .b8 global_smem[];
                                        // @fused_kernel
.visible .entry fused_kernel(
	.param .u64 .ptr .global .align 1 fused_kernel_param_0,
	.param .u32 fused_kernel_param_1,
	.param .f32 fused_kernel_param_2,
	.param .u64 .ptr .global .align 1 fused_kernel_param_3
)
.reqntid 256
{
	.reg .pred 	%p<41>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<400>;
	.reg .b64 	%rd<71>;
	.loc	1 37 0                          // fused.py:37:0
$L__func_begin0:
	.loc	1 37 31                         // fused.py:37:31
	ld.param.b64 	%rd1, [fused_kernel_param_0];
	ld.param.b32 	%r1, [fused_kernel_param_1];
	ld.param.b32 	%r2, [fused_kernel_param_2];
	.loc	1 38 17                         // fused.py:38:17
	// begin inline asm
	mov.u32 %r3, 0x0;
	@%p1 ld.global.b32 { %r3 }, [ %rd1 + 0 ];
	// end inline asm
	bra.uni 	$L__BB0_2;
$L__BB0_2:                              // %loop
	add.s32 	%r4, %r1, %r2;              // a comment; with an end of a statement
	ret;
$L__tmp1:
}
	.file	1 "fused.py"
"""


def test_a_kernel_of_triton():
    program = Program(KERNEL)
    assert program.name == "fused_kernel" and program.threads == 256
    assert program.parameters == [
        ("u64", "fused_kernel_param_0"),
        ("u32", "fused_kernel_param_1"),
        ("f32", "fused_kernel_param_2"),
        ("u64", "fused_kernel_param_3"),
    ]
    assert [program.bits(name) for name in ("%p40", "%rs1", "%r399", "%rd0")] == [1, 16, 32, 64]
    assert [".".join(found.opcode) for found in program.instructions] == [
        *("ld.param.b64", "ld.param.b32", "ld.param.b32", "mov.u32", "ld.global.b32", "bra.uni", "add.s32", "ret")
    ]


def test_an_instruction_says_where_it_comes_from():
    found = {".".join(one.opcode): one for one in Program(KERNEL).instructions}
    assert found["ld.param.b64"].shown == "ld.param.b64 %rd1, [fused_kernel_param_0] (fused.py:37:31)"
    assert found["add.s32"].shown == "add.s32 %r4, %r1, %r2 (fused.py:38:17)"
    load = found["ld.global.b32"]
    assert (load.predicate, load.negated, load.operands) == ("%p1", False, ("{ %r3 }", "[ %rd1 + 0 ]"))


def test_a_fault_names_the_line_of_the_source():
    body = "\n.loc 1 12 7 // kernel.py:12:7\n ld.global.b32 %r1, [%rd1+8];\n.loc 1 13 7 // kernel.py:13:7\n add.s32 %r1, %r1, 1;"
    with pytest.raises(Fault, match=r"of a: ld.global.b32 %r1, \[%rd1\+8\] \(kernel.py:12:7\)$"):
        run(body, a=zeros(2))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("%r1, %r2, 5", ["%r1", "%r2", "5"]),
        ("{%r1, %r2}, [%rd1+4]", ["{%r1, %r2}", "[%rd1+4]"]),
        ("{ %r1,%r2 } , {%r3}, %rd1", ["{ %r1,%r2 }", "{%r3}", "%rd1"]),
        ("[a, {b, c}], d", ["[a, {b, c}]", "d"]),
        ("0", ["0"]),
        ("", []),
    ],
)
def test_operands_are_split_outside_of_braces_and_brackets(text, expected):
    assert operands_of(text) == expected


def test_scopes_of_inline_assembly():
    assert lanes("{ mov.b32 %r1, 5; { add.s32 %r1, %r1, 1; } }", "r1")[0] == 6
    assert lanes("{\n .reg .b32 %t<3>;\n mov.b32 %t1, 5;\n add.s32 %r1, %t1, 1;\n }", "r1")[0] == 6
    assert lanes("{ mov.b32 {%rs1, %rs2}, 0x50006; }", "rs2")[0] == 5


def test_spaces_and_comments_change_nothing():
    assert lanes("\n\tmov.b32   \t%r1 ,  7 ; // mov.b32 %r1, 8;\n // mov.b32 %r1, 9;\n", "r1")[0] == 7


def parameters(body, *values):
    """%r1 at the end of a kernel with parameters of several kinds."""
    text = entry(body).replace("t()", "t(.param .u32 a, .param .f32 b, .param .u64 c, .param .b8 d)")
    machine = Machine(decode(text), [0], values, 0, Memory({}, Hazards()))
    machine.run()
    return int(machine.register("%r1")[0])


@pytest.mark.parametrize(
    "body, expected",
    [
        ("ld.param.u32 %r1, [a];", 0xFFFFFFFE),
        ("ld.param.b32 %r1, [ a ];", 0xFFFFFFFE),
        ("ld.param.f32 %r1, [b];", 0x3FC00000),
        ("ld.param.b32 %r1, [b];", 0x3FC00000),
        ("ld.param.u64 %rd1, [c]; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r1, %rd1;", 0x12345678),
        ("ld.param.s8 %rs1, [d]; cvt.u32.u16 %r1, %rs1;", 0x1),
        ("ld.param.b8 %rs1, [d]; cvt.u32.u16 %r1, %rs1;", 0x1),
    ],
)
def test_parameters_are_loaded_by_their_names(body, expected):
    assert parameters(body, -2, 1.5, 0x1234567800000000, 1) == expected


def test_as_many_values_as_parameters():
    with pytest.raises(Fault, match="t: expected 4 values, got 1"):
        parameters("", 5)


@pytest.mark.parametrize("form", ["[z]", "[a+4]", "a"])
def test_an_unknown_parameter_is_an_error(form):
    with pytest.raises(UnknownInstructionError, match="expected a parameter"):
        parameters(f"ld.param.u32 %r1, {form};", 0, 0.0, 0, 0)


def test_an_entry_without_a_number_of_threads_is_an_error():
    with pytest.raises(Fault, match=r"t: expected .reqntid with one number, got none"):
        decode(entry("").replace(".reqntid 32", ""))
    with pytest.raises(Fault, match=r"t: expected .reqntid"):
        decode(entry("").replace(".reqntid 32", ".reqntid 32, 2"))
    assert decode(entry("").replace(".reqntid 32", ".reqntid 64, 1, 1")).program.threads == 64


FORMS = """
    add.sat.s32 %r1, %r2, %r3
    add.cc.s32 %r1, %r2, %r3
    add.ftz.f32 %r1, %r2, %r3
    add.rz.f32 %r1, %r2, %r3
    add.f64 %rd1, %rd2, %rd3
    add.f32x2 %rd1, %rd2, %rd3
    max.NaN.f32 %r1, %r2, %r3
    mul.hi.s32 %r1, %r2, %r3
    mul.wide.s16 %r1, %rs2, %rs3
    mad.hi.s32 %r1, %r2, %r3, %r4
    fma.rz.f32 %r1, %r2, %r3, %r4
    fma.rn.relu.bf16 %rs1, %rs2, %rs3, %rs4
    fma.rn.f64 %rd1, %rd2, %rd3, %rd4
    div.approx.f32 %r1, %r2, %r3
    bfe.s64 %rd1, %rd2, %r3, %r4
    bfi.b32 %r1, %r2, %r3, %r4, %r5
    prmt.b32.f4e %r1, %r2, %r3, %r4
    shf.l.wrap.b32 %r1, %r2, %r3, %r4
    lop3.b32 %r1, %r2, %r3, %r4, 0x80
    setp.lt.and.s32 %p1, %r1, %r2, %p2
    setp.lt.s32 %p1|%p2, %r1, %r2
    setp.lo.u32 %p1, %r1, %r2
    setp.lt.ftz.f32 %p1, %r1, %r2
    setp.eq.bf16 %p1, %rs1, %rs2
    selp.f64 %rd1, %rd2, %rd3, %p1
    cvt.rzi.s32.f32 %r1, %r2
    cvt.rn.satfinite.bf16.f32 %rs1, %r1
    cvt.rz.bf16.f32 %rs1, %r1
    cvt.sat.s16.s32 %rs1, %r1
    cvt.rna.satfinite.tf32.f32 %r1, %r2
    mov.f64 %rd1, %rd2
    mov.u32 %r1, %ctaid.y
    mov.u32 %r1, %undeclared1
    mov.u32 %r1, name
    ld.volatile.global.b32 %r1, [%rd1]
    ld.relaxed.gpu.global.b32 %r1, [%rd1]
    ld.global.nc.b32 %r1, [%rd1]
    ld.global.L1::evict_first.b32 %r1, [%rd1]
    ld.b32 %r1, [%rd1]
    ld.local.b32 %r1, [%rd1]
    ld.global.v2.b32 %r1, [%rd1]
    ld.global.v4.b32 {%r1, %r2}, [%rd1]
    ld.global.b32 %r1, %rd1
    ld.global.b32 %r1, [%rd1-4]
    ld.shared::cluster.b32 %r1, [%r2]
    st.volatile.shared.b32 [%r1], %r2
    st.global.wb.b32 [%rd1], %r1
    st.shared.v2.b32 [%r1], {%r2, %r3, %r4}
    atom.global.add.f32 %r1, [%rd1], %r2
    atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r2
    red.global.add.f32 [%rd1], %r1
    shfl.sync.bfly.b32 %r1, %r2, 1, 31, 0xffff
    shfl.sync.bfly.b32 %r1, %r2, 1, 0x1c1f, -1
    shfl.sync.up.b32 %r1, %r2, 1, 31, -1
    shfl.sync.down.b32 %r1, %r2, 1, 0, -1
    shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1
    redux.sync.add.s32 %r1, %r2, 0xff
    redux.sync.min.f32 %r1, %r2, -1
    vote.sync.ballot.b32 %r1, %p1, -1
    elect.sync _|%p1, -1
    bar.sync 1
    bar.sync 0, 64
    bar.arrive 0, 64
    bar.red.popc.u32 %r1, 0, %p1
    bar.warp.sync 0xff
    bar.warp.sync %r1
    membar.gl
    fence.acq_rel.gpu
    fence.proxy.async.global
    exit
    trap
    call foo
    cp.async.ca.shared.global [%r1], [%rd1], 12
    cp.async.cg.shared.global [%r1], [%rd1], 8
    cp.async.ca.shared.global.L2::128B [%r1], [%rd1], 16
    cp.async.ca.shared.global [%r1], [%rd1], 16, %r2, %rd2
    cp.async.wait_all
    cp.async.bulk.commit_group
    cp.async.mbarrier.arrive.shared.b64 [%r1]
    mbarrier.init.shared.b64 [%r1], 1
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2, %r3, %r4}, [%r5]
    ldmatrix.sync.aligned.m8n8.x4.b16 {%r1, %r2, %r3, %r4}, [%r5]
    ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r5]
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r2}
    mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7}, {%r1, %r2, %r3, %r4}
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7, %r8}, {%r9, %r10}, {%r1, %r2, %r3, %r4}
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r9, %r10}, {%r1, %r2, %r3, %r4}
    mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7}, {%r1, %r2, %r3, %r4}
    mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r5, %r6, %r7, %r8}, {%r9, %r10}, {%r1, %r2}
    wgmma.wait_group.sync.aligned
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, -1, 1, 0, 0
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, -1, 0, 0
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.f16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1, 0, 0
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1, 0, 0
    wgmma.mma_async.sync.aligned.m64n8k8.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1, 0, 0
    wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1, 0, 0
    wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %rd1, %rd2, 1, 1, 1, 0, 0
    wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, %r5, 0, 1, 1, 1, 0, 0
    tcgen05.wait::ld.sync.aligned
"""


@pytest.mark.parametrize("form", [line.strip() for line in FORMS.strip().splitlines()])
def test_a_form_without_a_rule_is_an_error_that_names_it(form):
    with pytest.raises(UnknownInstructionError) as raised:
        decode(entry(f"\n.loc 1 5 9 // kernel.py:5:9\n @%p1 {form};"))
    assert f"@%p1 {form} (kernel.py:5:9)" in str(raised.value)


def test_a_statement_that_is_no_instruction_is_an_error():
    for statement in ("%r1 = 5", "@%p1", "@p add.s32 %r1, %r1, 1", "$L: mov.b32 %r1, 0", ".local .b8 a[4]"):
        with pytest.raises(Fault, match="expected an instruction, got"):
            decode(entry(f"{statement};"))


def test_a_statement_over_two_lines_is_an_error():
    with pytest.raises(Fault):
        decode(entry("add.s32 %r1,\n %r2, %r3;"))


def test_a_copy_of_a_part_of_its_bytes_is_an_error():
    body = "mov.b32 %r1, {}; cp.async.ca.shared.global [%own0], [%rd1], 8, %r1;"
    for part in (1, 4, 7, 16):
        with pytest.raises(UnknownInstructionError, match=r"cp\.async\.ca\.shared\.global"):
            run(
                "shl.b32 %own0, %thread0, 3; add.s32 %own0, %own0, %r998;" + body.format(part),
                shared=256,
                a=ints(1, 2, 3, 4),
            )


@pytest.mark.parametrize(
    "bits, flags",
    [
        (1 << 62 | 1 << 49, "1, 1, 0, 0"),  # a base offset
        (1 << 62 | 4 << 49, "1, 1, 0, 0"),
        (0, "1, 1, 1, 0"),  # MN-major without a swizzle
        (0, "1, 1, 0, 1"),
    ],
)
def test_a_descriptor_of_another_form_is_an_error(bits, flags):
    form = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    body = f"""
        shl.b32 %r40, %thread0, 4; add.s32 %r40, %r40, %r998; st.shared.v4.b32 [%r40], {{0, 0, 0, 0}};
        mov.b64 %rd1, {bits | 64}; {form} {{%r1, %r2, %r3, %r4}}, %rd1, %rd1, 0, {flags};
    """
    with pytest.raises(UnknownInstructionError, match=form):
        run(body, threads=128, shared=2048)


def test_hazards_are_counted_by_kind_and_instruction():
    hazards = Hazards()
    for _ in range(2):
        hazards.note("a read", "ld %r1")
    hazards.note("a read", "ld %r2")
    assert dict(hazards) == {"a read: ld %r1": 2, "a read: ld %r2": 1}


def test_those_who_watch_see_blocks_and_accesses():
    """By lane: what counts accesses is called once for each instruction, with the lanes that take part."""
    seen = []

    class Watch:
        def visited(self, block, warps):
            seen.append(("visited", block, warps))

        def global_access(self, lanes, addresses, width, instruction):
            seen.append(("global", lanes.tolist(), len(addresses), width))

        def shared_access(self, lanes, addresses, width, instruction):
            seen.append(("shared", lanes.tolist(), addresses.tolist()[0] - addresses.tolist()[-1], width))

    body = """
        ld.param.b64 %rd1, [a]; mov.u32 %r9, %tid.x; setp.lt.s32 %p1, %r9, 2; shl.b32 %r1, %r9, 4; mov.b32 %r2, global_smem;
        add.s32 %r1, %r1, %r2;
        @%p1 st.shared.v4.b32 [%r1], {1, 1, 1, 1};
        @%p1 ld.shared.b32 %r3, [%r1];
        @%p1 st.global.b32 [%rd1], %r3;
        ld.global.v2.b32 {%r3, %r4}, [%rd1];
        @%p1 cp.async.ca.shared.global [%r1+64], [%rd1], 4;
        setp.lt.s32 %p2, %r9, 32; @%p2 bra $end;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1+-256], {%r3};
    $end:
    """
    a = at_a_multiple_of_16(2)
    code = decode(entry(body, 64, ["a"]))
    memory = Memory({"a": a}, Hazards())
    Machine(code, [0], [memory.address(a.data_ptr())], 1024, memory, Watch()).run()
    assert seen == [
        ("visited", 0, 2),
        ("shared", [0, 1], -16, 16),
        ("shared", [0, 1], -16, 4),
        ("global", [0, 1], 2, 4),
        ("global", list(range(64)), 64, 8),
        ("shared", [0, 1], -16, 4),
        ("global", [0, 1], 2, 4),
        ("visited", 1, 1),
        ("shared", list(range(32, 40)), -112, 16),
        ("visited", 2, 2),
    ]
