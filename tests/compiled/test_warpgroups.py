"""``wgmma``: layouts of descriptors and fragments as PTX's documentation has them, and what has to be waited for."""

import struct

import pytest
import torch

from .machine.faults import Fault, UnknownInstructionError
from .snippets import at_a_multiple_of_16, ints, noted, run, zeros

BLOCK = "bar.sync 0;"
FENCE = "fence.proxy.async.shared::cta;"
ARRIVE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # the code in a descriptor
SECOND = 8192  # where B begins
SIZE = 16384


def wait(allowed):
    return f"wgmma.wait_group.sync.aligned {allowed};"


def bits(kind, value):
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    single = struct.unpack("<I", struct.pack("<f", value))[0]
    return single >> 16 if kind == "bf16" else single


def a_value(row, k):
    return (3 * row + 7 * k) % 11 - 5


def b_value(column, k):
    return (5 * column + 2 * k) % 13 - 6


def swizzled(address, swizzle):
    """Bits 4 to 6 become their XOR with bits 7 to 9; 4 and 5 with 7 and 8; 4 with 7."""
    if swizzle == 128:
        return address ^ (address >> 7 & 7) << 4
    if swizzle == 64:
        return address ^ (address >> 7 & 3) << 4
    if swizzle == 32:
        return address ^ (address >> 7 & 1) << 4
    return address


def along_k(row, byte, swizzle, leading, stride):
    """K-major: groups of 8 rows, ``stride`` apart; without swizzle in cores of 16 bytes, ``leading`` apart."""
    if swizzle == 0:
        return row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
    return row // 8 * stride + row % 8 * swizzle + byte


def along_rows(row, k, swizzle, leading, stride):
    """MN-major, 16 bits: groups of 8 k, ``stride`` apart; lines of the swizzle's length, ``leading`` apart."""
    per_line = swizzle // 2
    return row // per_line * leading + k // 8 * stride + k % 8 * swizzle + row % per_line * 2


def put(image, origin, value, kind, rows, depth, swizzle, across, leading, stride):
    """A matrix into the bytes of shared memory, which begins at a multiple of 1024."""
    width = 4 if kind == "tf32" else 2
    for row in range(rows):
        for k in range(depth):
            if across:
                address = origin + along_rows(row, k, swizzle, leading, stride)
            else:
                address = origin + along_k(row, k * width, swizzle, leading, stride)
            address = swizzled(address, swizzle)
            image[address : address + width] = bits(kind, value(row, k)).to_bytes(width, "little")


def descriptor(number, origin, swizzle, leading, stride, more=0):
    """In %rd<number>: the start in bits 0 to 13, strides from 16 and from 32 on, in units of 16 bytes."""
    rest = leading // 16 << 16 | stride // 16 << 32 | SWIZZLES[swizzle] << 62 | more
    return f"""
        add.s32 %r50, %r998, {origin}; bfe.u32 %r50, %r50, 4, 14; cvt.u64.u32 %rd{number}, %r50;
        or.b64 %rd{number}, %rd{number}, {rest:#x};
    """


def names(count, first):
    return "{" + ", ".join(f"%r{first + place}" for place in range(count)) + "}"


def form(kind, columns):
    depth = 8 if kind == "tf32" else 16
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"


def results(instruction, prepared, image, columns, **tensors):
    """By thread of a warpgroup and register; accumulators are thread + 1000 register at first."""
    count = columns // 2
    fill = "".join(
        f"ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd9+{at}]; st.shared.v4.b32 [%r40+{at}], {{%r1, %r2, %r3, %r4}};"
        for at in range(0, SIZE, 2048)
    )
    start = "".join(
        f"add.s32 %r41, %thread0, {1000 * place}; cvt.rn.f32.s32 %r{100 + place}, %r41;" for place in range(count)
    )
    keep = "".join(f"st.global.b32 [%rd9+{512 * place}], %r{100 + place};" for place in range(count))
    body = f"""
        shl.b32 %r40, %thread0, 4; add.s32 %r40, %r40, %r998; mad.wide.s32 %rd9, %thread0, 16, %rd1; {fill}
        {start} {prepared} {FENCE} {BLOCK} {ARRIVE} {instruction} {COMMIT} {wait(0)}
        mad.wide.s32 %rd9, %thread0, 4, %rd2; {keep}
    """
    out = zeros(128 * count, torch.float32)
    given = torch.frombuffer(image, dtype=torch.uint8)
    assert not run(body, threads=128, shared=SIZE, image=given, out=out, **tensors)
    return out.view(count, 128).t().tolist()


def expected(kind, columns, accumulated):
    """Warp w has rows 16 w to 16 w + 15: register 4 n + 2 h + c of lane 4 g + q has row g + 8 h, column 8 n + 2 q + c."""
    depth = 8 if kind == "tf32" else 16
    found = []
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        registers = []
        for register in range(columns // 2):
            row = 16 * warp + g + (8 if register % 4 >= 2 else 0)
            column = 8 * (register // 4) + 2 * q + register % 2
            total = sum(a_value(row, k) * b_value(column, k) for k in range(depth))
            registers.append(total + (thread + 1000 * register if accumulated else 0))
        found.append(registers)
    return found


def nan_image():
    return bytearray(b"\xff" * SIZE)


def layouts():
    """Strides that are not the tightest ones, so that each is seen to count."""
    for swizzle in (0, 128, 64, 32):
        for kind in ("bf16", "f16", "tf32"):
            yield pytest.param(kind, swizzle, False, id=f"{kind}-{swizzle}-K")
        if swizzle:
            yield pytest.param("bf16", swizzle, True, id=f"bf16-{swizzle}-MN")
    yield pytest.param("f16", 64, True, id="f16-64-MN")


@pytest.mark.parametrize("kind, swizzle, across", [*layouts()])
def test_both_matrices_lie_in_memory(kind, swizzle, across):
    depth = 8 if kind == "tf32" else 16
    image = nan_image()
    for origin, value, rows in ((0, a_value, 64), (SECOND, b_value, 16)):
        leading, stride = strides(swizzle, across)
        put(image, origin, value, kind, rows, depth, swizzle, across, leading, stride)
    flags = f"1, 1{'' if kind == 'tf32' else f', {int(across)}, {int(across)}'}"
    prepared = descriptor(20, 0, swizzle, leading, stride) + descriptor(21, SECOND, swizzle, leading, stride)
    instruction = f"{form(kind, 16)} {names(8, 100)}, %rd20, %rd21, 0, {flags};"
    assert results(instruction, prepared, image, 16) == expected(kind, 16, False)


def strides(swizzle, across):
    """Leading and stride; K-major layouts with a swizzle have no leading one."""
    if swizzle == 0:
        return 128, 512
    if not across:
        return 0, 8 * swizzle
    return 2048 if swizzle == 32 else 4096, 1024


@pytest.mark.parametrize("columns", [8, 16, 64])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("in_registers", [False, True])
def test_as_many_columns_as_the_form_says(columns, accumulated, in_registers):
    image = nan_image()
    put(image, 0, a_value, "bf16", 64, 16, 128, False, 0, 1024)
    put(image, SECOND, b_value, "bf16", columns, 16, 128, False, 0, 1024)
    prepared = descriptor(20, 0, 128, 0, 1024) + descriptor(21, SECOND, 128, 0, 1024)
    prepared += f"setp.ge.s32 %p1, %thread0, {0 if accumulated else 128};"
    tensors, a, flags = {}, "%rd20", "1, 1, 0, 0"
    if in_registers:
        tensors["fragments"], a, flags = fragments("bf16"), names(4, 60), "1, 1, 0"
        prepared += LOAD_FRAGMENTS
    instruction = f"{form('bf16', columns)} {names(columns // 2, 100)}, {a}, %rd21, %p1, {flags};"
    assert results(instruction, prepared, image, columns, **tensors) == expected("bf16", columns, accumulated)


LOAD_FRAGMENTS = "mad.wide.s32 %rd8, %thread0, 16, %rd3; ld.global.v4.b32 {%r60, %r61, %r62, %r63}, [%rd8];"


def fragments(kind):
    """By thread the 4 registers of A: rows g and g + 8 of its warp's 16, then the same of the second half of k."""
    found = []
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        for half in (0, 1):
            for row in (16 * warp + g, 16 * warp + g + 8):
                if kind == "tf32":
                    found.append(bits(kind, a_value(row, q + 4 * half)))
                else:
                    low, high = (bits(kind, a_value(row, 2 * q + 8 * half + part)) for part in (0, 1))
                    found.append(low | high << 16)
    return ints(*[value - (1 << 32) if value >= 1 << 31 else value for value in found])


@pytest.mark.parametrize("kind", ["f16", "tf32"])
def test_a_in_registers_of_other_kinds(kind):
    depth = 8 if kind == "tf32" else 16
    image = nan_image()
    put(image, SECOND, b_value, kind, 8, depth, 32, False, 0, 256)
    flags = "1, 1" if kind == "tf32" else "1, 1, 0"
    instruction = f"{form(kind, 8)} {names(4, 100)}, {names(4, 60)}, %rd21, 1, {flags};"
    prepared = descriptor(21, SECOND, 32, 0, 256) + LOAD_FRAGMENTS
    found = results(instruction, prepared, image, 8, fragments=fragments(kind))
    assert found == expected(kind, 8, True)


def test_one_matrix_along_k_and_one_along_its_rows():
    image = nan_image()
    put(image, 0, a_value, "bf16", 64, 16, 64, False, 0, 512)
    put(image, SECOND, b_value, "bf16", 64, 16, 64, True, 2048, 1024)
    prepared = descriptor(20, 0, 64, 0, 512) + descriptor(21, SECOND, 64, 2048, 1024)
    instruction = f"{form('bf16', 64)} {names(32, 100)}, %rd20, %rd21, 0, 1, 1, 0, 1;"
    assert results(instruction, prepared, image, 64) == expected("bf16", 64, False)


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_descriptor_may_begin_in_the_middle_of_a_line(part):
    """The next 16 of 64 columns of k: the start is 32 bytes further, the swizzle is that of the whole line."""
    image = nan_image()
    shifted = lambda value: lambda row, k: value(row, k - 16 * part) if k // 16 == part else 99  # noqa: E731
    put(image, 0, shifted(a_value), "bf16", 64, 64, 128, False, 0, 1024)
    put(image, SECOND, shifted(b_value), "bf16", 16, 64, 128, False, 0, 1024)
    prepared = descriptor(20, 32 * part, 128, 0, 1024) + descriptor(21, SECOND + 32 * part, 128, 0, 1024)
    instruction = f"{form('bf16', 16)} {names(8, 100)}, %rd20, %rd21, 0, 1, 1, 0, 0;"
    assert results(instruction, prepared, image, 16) == expected("bf16", 16, False)


def test_products_add_up_in_their_order():
    image = nan_image()
    put(image, 0, a_value, "bf16", 64, 16, 32, False, 0, 256)
    put(image, SECOND, b_value, "bf16", 8, 16, 32, False, 0, 256)
    prepared = descriptor(20, 0, 32, 0, 256) + descriptor(21, SECOND, 32, 0, 256)
    found = results(product(keep=0) + product(keep=1) + COMMIT + product(keep=1), prepared, image, 8)
    assert found == [[3 * value for value in registers] for registers in expected("bf16", 8, False)]


# -- hazards -----------------------------------------------------------------------------------------------------------

NO_BARRIER = "a matrix unit reads what was written, without a barrier"
NO_PROXY = "a matrix unit reads what was written, without fence.proxy.async"
NO_ARRIVAL = "a product without wgmma.fence behind the last access of a register"
LEFT = "products that are never waited for"
OVERWRITTEN = "a write to what a product in flight reads"
WRITE_OF_READ = "a write to what another thread read, without a barrier"
EARLY_COPY = "a read of a copy that was not waited for"
NEVER = "a read of shared memory that was never written"
IN_FLIGHT = "a {} of a register of a product in flight"

# A: 64 x 16 without swizzle in the first 2048 bytes; B: 8 x 16 in the next 256
ADDRESSES = "shl.b32 %r40, %thread0, 4; add.s32 %r40, %r40, %r998;"
SETUP = ADDRESSES + descriptor(20, 0, 0, 128, 256) + descriptor(21, 2048, 0, 128, 256)
SETUP += "setp.lt.s32 %p1, %thread0, 64; mov.b32 %r60, 0; mov.b32 %r61, 0; mov.b32 %r62, 0; mov.b32 %r63, 0;"
FILL = "st.shared.v4.b32 [%r40], {0, 0, 0, 0}; st.shared.v4.b32 [%r40+2048], {0, 0, 0, 0};"


def product(first=100, a="%rd20", keep=0):
    flags = "1, 1, 0" if a.startswith("{") else "1, 1, 0, 0"
    return f"{form('bf16', 8)} {names(4, first)}, {a}, %rd21, {keep}, {flags};"


PRODUCT, FRAGMENT = product(), product(a=names(4, 60))
READY = FILL + FENCE + BLOCK + ARRIVE
READY_TWO = READY.replace("st.shared.v4.b32 [%r40+2048], {0, 0, 0, 0};", "")  # for two warpgroups
READ = "add.f32 %r1, %r100, %r100;"


def kinds(*parts, threads=128, shared=4096, **options):
    return noted(SETUP + "".join(parts), threads=threads, shared=shared, **options)


def test_a_product_with_all_that_it_needs():
    assert kinds(READY, PRODUCT, COMMIT, wait(0), READ) == []
    assert kinds(READY, FRAGMENT, COMMIT, wait(0), READ) == []
    assert kinds(READY_TWO, PRODUCT, COMMIT, wait(0), READ, threads=256, grid=2) == []


DONE = PRODUCT + COMMIT + wait(0)
SOME = "@%p1 fence.proxy.async.shared::cta;"  # by the first two warps


@pytest.mark.parametrize(
    "before, hazards",
    [
        (FILL + FENCE + BLOCK, []),
        (FILL + "fence.proxy.async;" + BLOCK, []),
        (FILL + FENCE, [NO_BARRIER]),
        (FILL + BLOCK, [NO_PROXY]),
        (FILL, [NO_BARRIER, NO_PROXY]),
        (FILL + FENCE + "bar.warp.sync -1;", [NO_BARRIER]),
        (FENCE + FILL + BLOCK, [NO_PROXY]),
        (FILL + BLOCK + FENCE, []),
        (FILL + SOME + BLOCK, [NO_PROXY]),
        (FILL + BLOCK + SOME + BLOCK, []),  # by another thread, behind a barrier
        (FILL + FENCE + BLOCK + FILL + BLOCK, [NO_PROXY]),
        (FILL + FENCE + BLOCK + FILL + FENCE + BLOCK, []),
        ("", [NEVER]),
        ("@%p1 " + FILL.replace("; st", "; @%p1 st") + FENCE + BLOCK, [NEVER]),
    ],
)
def test_what_was_written_needs_a_fence_and_a_barrier(before, hazards):
    assert kinds(before, ARRIVE, DONE) == hazards


COPY = "mov.b64 %rd9, %rd1;" + "".join(f"cp.async.cg.shared.global [%r40+{at}], [%rd9], 16;" for at in (0, 2048))
COPIED = "cp.async.commit_group;"
WAITED = "cp.async.wait_group 0;"


@pytest.mark.parametrize(
    "before, behind, hazards",
    [
        (COPY + COPIED + WAITED + FENCE + BLOCK, "", []),
        (COPY + COPIED + WAITED + BLOCK + FENCE, "", []),
        (COPY + COPIED + WAITED + BLOCK, "", [NO_PROXY]),
        (COPY + COPIED + FENCE + WAITED + BLOCK, "", [NO_PROXY]),  # before it has landed
        (COPY + COPIED + WAITED + FENCE, "", [NO_BARRIER]),
        (COPY + COPIED + BLOCK + WAITED + FENCE, "", [NO_BARRIER]),
        (COPY + COPIED + FENCE + BLOCK, WAITED, [EARLY_COPY]),
        (COPY + COPIED + "cp.async.wait_group 1;" + FENCE + BLOCK, WAITED, [EARLY_COPY]),
    ],
)
def test_what_was_copied_needs_a_wait_too(before, behind, hazards):
    found = kinds(before, ARRIVE, DONE, behind, a=at_a_multiple_of_16(4))
    assert [kind for kind in found if kind != OVERWRITTEN] == hazards


@pytest.mark.parametrize(
    "access, how",
    [
        (READ, "read"),
        ("st.global.b32 [%rd1], %r103;", "read"),
        ("mov.b32 %r1, %r101;", "read"),
        ("cvt.rn.bf16x2.f32 %r1, %r100, %r101;", "read"),
        ("mov.b32 %r100, 0;", "move"),
        ("add.f32 %r102, %r1, %r1;", "write"),
    ],
)
def test_an_accumulator_is_not_accessed_before_the_wait(access, how):
    options = {"a": zeros(1)}
    early = [IN_FLIGHT.format(how)]
    assert kinds(READY, "mov.b32 %r1, 0;", PRODUCT, access, COMMIT, wait(0), **options) == early
    assert kinds(READY, "mov.b32 %r1, 0;", PRODUCT, COMMIT, access, wait(0), **options) == early
    assert kinds(READY, "mov.b32 %r1, 0;", PRODUCT, COMMIT, wait(1), access, wait(0), **options) == early
    assert kinds(READY, "mov.b32 %r1, 0;", PRODUCT, COMMIT, wait(0), access, **options) == []


def test_a_register_of_a_is_not_accessed_before_the_wait():
    write = "add.s32 %r60, %thread0, 1;"
    assert kinds(READY, FRAGMENT, COMMIT, write, wait(0)) == [IN_FLIGHT.format("write")]
    assert kinds(READY, FRAGMENT, COMMIT, wait(0), write) == []


def test_other_registers_are_free():
    assert kinds(READY, PRODUCT, COMMIT, "add.s32 %r60, %thread0, 1; add.f32 %r200, %r1, %r1;", wait(0)) == []


@pytest.mark.parametrize(
    "behind, hazards",
    [
        (COMMIT + FILL + wait(0), [OVERWRITTEN]),
        (FILL + COMMIT + wait(0), [OVERWRITTEN]),
        (COMMIT + BLOCK + FILL + wait(0), [OVERWRITTEN]),
        (COMMIT + wait(1) + BLOCK + FILL + wait(0), [OVERWRITTEN]),
        (COMMIT + wait(0) + FILL, [WRITE_OF_READ]),
        (COMMIT + BLOCK + wait(0) + FILL, [WRITE_OF_READ]),
        (COMMIT + wait(0) + "bar.warp.sync -1;" + FILL, [WRITE_OF_READ]),
        (COMMIT + wait(0) + BLOCK + FILL, []),
        (COMMIT + "@!%p1 st.shared.b32 [%r40+2048], 1;" + wait(0), []),  # memory that it does not read
        (COMMIT + wait(0) + COPY + COPIED + WAITED, [WRITE_OF_READ]),
        (COMMIT + COPY + COPIED + wait(0) + WAITED, [OVERWRITTEN]),
        (COMMIT + wait(0) + BLOCK + COPY + COPIED + WAITED, []),
    ],
)
def test_memory_that_a_product_reads_is_not_overwritten(behind, hazards):
    assert kinds(READY, PRODUCT, behind, a=at_a_multiple_of_16(4)) == hazards


def test_who_read_memory_itself_still_waits_for_the_others_of_a_product():
    read, write = "ld.shared.b32 %r1, [%r40];", "st.shared.b32 [%r40], 1;"
    assert kinds(READY, read, DONE, write) == [WRITE_OF_READ]
    assert kinds(READY, read, DONE, BLOCK, write) == []


def test_a_product_does_not_disturb_a_read():
    assert kinds(READY, PRODUCT, COMMIT, "ld.shared.b32 %r1, [%r40];", wait(0)) == []


@pytest.mark.parametrize(
    "before, hazards",
    [
        (FILL + FENCE + BLOCK, [NO_ARRIVAL]),
        (FILL + FENCE + BLOCK + ARRIVE + "add.f32 %r100, %r1, %r1;", [NO_ARRIVAL]),
        (FILL + FENCE + BLOCK + ARRIVE + READ, [NO_ARRIVAL]),
        (FILL + FENCE + BLOCK + "add.f32 %r100, %r1, %r1;" + ARRIVE, []),
        (FILL + FENCE + BLOCK + ARRIVE + "add.f32 %r104, %r1, %r1;", []),
        (FILL + FENCE + BLOCK + ARRIVE + DONE, []),  # of products in a row the first is enough
        (FILL + FENCE + BLOCK + ARRIVE + DONE + READ, [NO_ARRIVAL]),
        (FILL + FENCE + BLOCK + ARRIVE + DONE + READ + ARRIVE, []),
        (FILL + FENCE + BLOCK + ARRIVE + "mov.b32 %r100, 0;", []),  # a constant has no other access to wait for
        (FILL + FENCE + BLOCK + ARRIVE + "@%p1 add.f32 %r100, %r1, %r1;", [NO_ARRIVAL]),
    ],
)
def test_a_product_needs_a_fence_behind_the_last_access_of_its_registers(before, hazards):
    assert kinds(before, DONE) == hazards


def test_a_fragment_of_a_needs_a_fence_too():
    write = "add.s32 %r62, %thread0, 1;"
    assert kinds(FILL, FENCE, BLOCK, write, ARRIVE, FRAGMENT, COMMIT, wait(0)) == []
    assert kinds(READY, write, FRAGMENT, COMMIT, wait(0)) == [NO_ARRIVAL]


def test_a_move_gives_a_fenced_value_another_name():
    """%r200 becomes a register of the second product by a move from the first one's."""
    second = product(200, keep=1) + COMMIT + wait(0)
    moves = "".join(f"mov.b32 %r{200 + place}, %r{100 + place};" for place in range(4))
    assert kinds(READY, PRODUCT, COMMIT, wait(0), moves, second) == []
    assert kinds(READY, PRODUCT, COMMIT, wait(0), READ, moves, second) == [NO_ARRIVAL]
    assert kinds(READY, PRODUCT, COMMIT, moves, wait(0), second) == [IN_FLIGHT.format("move")]


@pytest.mark.parametrize("behind", ["", COMMIT, COMMIT + wait(1), wait(0)])
def test_products_that_are_never_waited_for(behind):
    assert kinds(READY, PRODUCT, behind) == [LEFT]


def test_a_wait_leaves_the_last_groups_in_flight():
    two = PRODUCT + COMMIT + product(200) + COMMIT
    second = "add.f32 %r1, %r200, %r200;"
    early = [IN_FLIGHT.format("read")]
    assert kinds(READY, two, wait(1), READ, wait(0)) == []
    assert kinds(READY, two, wait(1), second, wait(0)) == early
    assert kinds(READY, two, wait(2), READ, wait(0)) == early
    assert kinds(READY, two, wait(0), READ, second) == []
    assert kinds(READY, two, COMMIT, wait(1), READ, second) == []  # an empty group counts
    assert kinds(READY, two, wait(1)) == [LEFT]


def test_the_memory_of_the_groups_in_flight_is_not_free():
    two = PRODUCT + COMMIT + product(200) + COMMIT
    assert kinds(READY, two, wait(1), BLOCK, FILL, wait(0)) == [OVERWRITTEN]
    assert kinds(READY, two, wait(0), BLOCK, FILL) == []


OTHER_GROUP = "setp.lt.s32 %p2, %thread0, 128;"  # holds in the first warpgroup


def test_warpgroups_wait_on_their_own():
    """The second one reads its accumulators without a wait of its own."""
    body = OTHER_GROUP + READY_TWO + PRODUCT + COMMIT + "@%p2 " + wait(0)
    assert kinds(body, "@%p2 " + READ, wait(0), threads=256) == []
    assert kinds(body, "@!%p2 " + READ, wait(0), threads=256) == [IN_FLIGHT.format("read")]


def test_a_product_of_one_warpgroup_leaves_the_registers_of_the_other():
    body = OTHER_GROUP + "mov.b32 %r100, 7; mov.b32 %r101, 7; mov.b32 %r102, 7; mov.b32 %r103, 7;" + READY_TWO
    body += "@!%p2 " + PRODUCT + COMMIT + wait(0) + "mad.wide.s32 %rd9, %thread0, 4, %rd1; st.global.b32 [%rd9], %r100;"
    out = zeros(256)
    assert not run(SETUP + body, threads=256, shared=4096, out=out)
    assert out.tolist() == [7] * 128 + [0] * 128


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", [PRODUCT, ARRIVE, COMMIT, wait(0)])
def test_a_part_of_a_warpgroup_is_a_fault(instruction):
    with pytest.raises(Fault, match="not all threads of a warpgroup take part: @%p1 wgmma"):
        kinds(READY, PRODUCT, COMMIT, "@%p1 " + instruction)


def test_a_descriptor_that_differs_between_threads_is_a_fault():
    with pytest.raises(Fault, match="descriptors that differ within a warpgroup: wgmma"):
        kinds(READY, "@%p1 add.s64 %rd21, %rd21, 16;", DONE)


def test_a_matrix_out_of_bounds_is_a_fault():
    for offset in (120, -200):
        with pytest.raises(Fault, match="a matrix unit reads out of bounds of 4096 bytes of shared memory: wgmma"):
            kinds(READY, f"add.s64 %rd21, %rd21, {offset};", DONE)


def test_warpgroups_with_different_swizzles_are_an_error():
    with pytest.raises(UnknownInstructionError, match="wgmma"):
        kinds(OTHER_GROUP, READY_TWO, "@%p2 xor.b64 %rd21, %rd21, 0x4000000000000000;", DONE, threads=256)
