"""The shim and the poisoned memory themselves: an upstream change, or a detector gone blind, shows here."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from tests.interpreter.shim import ALLOWED, install, untouched

BLOCK = 2**16
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
ELEMENTWISE = ["add", "subtract", "multiply", "negate", "scale", "compare", "equal", "absolute", "fused"]
FUNCTIONS = ["exponential", "root", "floor", "sum", "reduce", "scan", "atomic", "split", "join"]


@triton.jit
def cast_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + at, mask=at < count, other=0)
    tl.store(target_ptr + at, value.to(target_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def cast_toward_zero_kernel(source_ptr, target_ptr):
    tl.store(target_ptr, tl.load(source_ptr).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """c += a @ b^T, in two halves of K."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[:, None], tl.arange(0, K)[None, :]
    at = m * N + tl.arange(0, N)[None, :]
    acc = tl.load(c_ptr + at)
    for half in range(2):
        a = tl.load(a_ptr + m * 2 * K + half * K + k)
        b = tl.load(b_ptr + n * 2 * K + half * K + k)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee", out_dtype=WIDE)
    tl.store(c_ptr + at, acc)


@triton.jit
def outer_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    """A dot with an inner side of 1 and without an accumulator: the products themselves."""
    at = tl.arange(0, N)
    product = tl.dot(tl.load(a_ptr + at)[:, None], tl.load(b_ptr + at)[None, :], input_precision="ieee")
    tl.store(c_ptr + at[:, None] * N + at[None, :], product)


@triton.jit
def movement_kernel(source_ptr, target_ptr, N: tl.constexpr):
    """Twelve rows of N columns: what may be done to bf16 without computing."""
    column = tl.arange(0, N)
    row = tl.load(source_ptr + column)
    square = tl.broadcast_to(row[None, :], (4, N))
    index = tl.arange(0, 4)[:, None]
    turned = tl.reshape(tl.trans(square), (4, N))
    chosen = tl.where((index == 0) | (column < N // 2)[None, :], square, 1.5)
    tl.store(target_ptr + index * N + column, square)
    tl.store(target_ptr + (4 + index) * N + column, turned)
    tl.store(target_ptr + (8 + index) * N + column, chosen)
    tl.store(target_ptr + 12 * N + column, row, mask=column < 3)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def arithmetic_kernel(source_ptr, target_ptr, N: tl.constexpr, WIDE: tl.constexpr, OPERATION: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(source_ptr + at).to(WIDE)
    if OPERATION == "add":
        x = x + x
    elif OPERATION == "subtract":
        x = x - x
    elif OPERATION == "multiply":
        x = x * x
    elif OPERATION == "negate":
        x = -x
    elif OPERATION == "compare":
        x = x < x
    elif OPERATION == "equal":
        x = x == x
    elif OPERATION == "scale":
        x = x * 2.0
    elif OPERATION == "absolute":
        x = tl.abs(x)
    elif OPERATION == "exponential":
        x = tl.exp(x)
    elif OPERATION == "root":
        x = tl.sqrt(x)
    elif OPERATION == "fused":
        x = tl.fma(x, x, x)
    elif OPERATION == "floor":
        x = tl.floor(x)
    elif OPERATION == "sum":
        x = tl.sum(x, 0)
    elif OPERATION == "reduce":
        x = tl.reduce(x, 0, add)
    elif OPERATION == "scan":
        x = tl.associative_scan(x, 0, add)
    elif OPERATION == "atomic":
        tl.atomic_add(target_ptr + at, x)
    elif OPERATION == "split":
        x, _ = tl.split(tl.reshape(x, (N // 2, 2)))
    elif OPERATION == "join":
        x = tl.join(x, x)


@triton.jit
def promoted_kernel(source_ptr, other_ptr, ratio_ptr, mixed_ptr, N: tl.constexpr):
    """What Triton computes in fp32 of its own accord."""
    at = tl.arange(0, N)
    x, other = tl.load(source_ptr + at), tl.load(other_ptr + at)
    tl.store(ratio_ptr + at, x / other)
    tl.store(mixed_ptr + at, x + other.to(tl.float32))


@triton.jit
def strided_kernel(source_ptr, target_ptr, stride, N: tl.constexpr, OFFSETS: tl.constexpr):
    rows, columns = tl.arange(0, 4), tl.arange(0, N)
    value = tl.load(source_ptr + rows.to(OFFSETS)[:, None] * stride + columns[None, :], mask=rows[:, None] < 3)
    tl.store(target_ptr + rows[:, None] * N + columns[None, :], value)


@triton.jit
def sum_kernel(target_ptr, a, b):
    tl.store(target_ptr, a + b)


@triton.jit
def half_written_kernel(target_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target_ptr + at, at.to(target_ptr.dtype.element_ty), mask=at < count // 2)


@triton.jit
def runtime_range_kernel(target_ptr, first, last):
    total = 0
    for i in range(first, last):
        total += i
    tl.store(target_ptr, total)


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty_like(source, dtype=dtype)
    cast_kernel[(triton.cdiv(source.numel(), BLOCK),)](source, result, source.numel(), BLOCK)
    return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def around_every_bf16() -> torch.Tensor:
    """fp32: every bf16, the ties between them, and the neighbours of both."""
    high = torch.arange(2**16)[:, None] << 16
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (high | low).flatten().to(torch.int32).view(torch.float32)


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """NaN is NaN, whatever its bits."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(bits(found)[number], bits(wanted)[number])


def rounded_to_bf16(values: np.ndarray) -> torch.Tensor:
    """The nearest bf16 of fp64, ties to even, looked up in the list of all of them."""
    magnitudes = bits_to_float64(np.arange(0x7F80))
    table = np.append(magnitudes, 2.0**128)  # where infinity would be
    size = np.minimum(np.abs(values), table[-1])
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    from_below, from_above = size - table[above - 1], table[above] - size
    up = (from_above < from_below) | ((from_above == from_below) & (above % 2 == 0))
    found = np.where(up, above, above - 1) | (np.signbit(values).astype(np.int64) << 15)
    return torch.from_numpy(found.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def bits_to_float64(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def randn(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64).to(dtype)


def test_bf16_widens_exactly():
    found = cast(every_half(torch.bfloat16), torch.float32)
    assert torch.equal(bits(found), torch.arange(-(2**15), 2**15).to(torch.int32) << 16)
    assert_same_bits(cast(every_half(torch.bfloat16), torch.float64), found.double())


def test_bf16_to_other_types():
    values = every_half(torch.bfloat16)
    assert_same_bits(cast(values, torch.float16), values.to(torch.float16))
    small = values[values.abs() < 2**31]
    assert torch.equal(cast(small, torch.int32), small.to(torch.int32))


def test_fp32_to_bf16():
    values = around_every_bf16()
    assert values.numel() > 300_000
    assert_same_bits(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_the_table_of_bf16_agrees_with_torch():
    values = around_every_bf16()
    values = values[~values.isnan()]
    assert_same_bits(rounded_to_bf16(values.double().numpy()), values.to(torch.bfloat16))


def test_fp64_to_bf16_rounds_once():
    """Values beside every tie, nearer than fp32 can tell."""
    near = around_every_bf16().double()
    near = near[~near.isnan()]
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    values = torch.cat([torch.nextafter(near, -infinity), near, torch.nextafter(near, infinity), near * 2.0**-60])
    assert_same_bits(cast(values, torch.bfloat16), rounded_to_bf16(values.numpy()))
    twice = values.float().to(torch.bfloat16)
    assert (bits(twice) != bits(cast(values, torch.bfloat16))).any(), "no case tells one rounding from two"
    assert cast(torch.tensor([torch.nan]).double(), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_to_bf16(dtype):
    limits = torch.iinfo(dtype)
    values = torch.randint(max(limits.min, -(2**53)), min(limits.max, 2**53), (10_000,)).to(dtype)
    if dtype.itemsize >= 4:
        values = torch.cat([values, values // 2**17, torch.arange(2**20, 2**20 + 2**15).to(dtype)])
    assert_same_bits(cast(values, torch.bfloat16), rounded_to_bf16(values.double().numpy()))


def test_fp16_to_bf16():
    values = every_half(torch.float16)
    assert_same_bits(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_fp32_to_fp16_and_back():
    values = torch.cat([every_half(torch.float16).float(), around_every_bf16()])
    assert_same_bits(cast(values, torch.float16), values.to(torch.float16))
    assert_same_bits(cast(every_half(torch.float16), torch.float32), every_half(torch.float16).float())


def test_other_roundings_raise():
    with pytest.raises(InterpreterError, match="bf16"):
        cast_toward_zero_kernel[(1,)](torch.ones(1), torch.empty(1, dtype=torch.bfloat16))


def test_bf16_is_stored_as_loaded():
    values = every_half(torch.bfloat16)
    assert torch.equal(bits(cast(values, torch.bfloat16)), bits(values))


def test_movement_keeps_bits():
    row = every_half(torch.bfloat16)[:: 2**10].contiguous()
    found = torch.empty(13, row.numel(), dtype=torch.bfloat16)
    movement_kernel[(1,)](row, found, row.numel())
    square = bits(row).expand(4, -1)
    assert torch.equal(bits(found[:4]), square)
    assert torch.equal(bits(found[4:8]), square.t().reshape(4, -1))
    middle = row.numel() // 2
    assert torch.equal(bits(found[8:12])[:, :middle], square[:, :middle])
    assert torch.equal(bits(found[8])[middle:], square[0, middle:])
    assert (found[9:12, middle:] == 1.5).all()
    assert torch.equal(bits(found[12, :3]), square[0, :3]) and found[12, 3:].isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_dots(dtype):
    """fp32 accumulation (fp64 for fp64): the error is that of the sum alone, and 2K exact products enter it."""
    m, n, k = 32, 16, 64
    a, b = randn(m, 2 * k, dtype=dtype), randn(n, 2 * k, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = randn(m, n, dtype=wide)
    exact, size = (f(found).double() + f(a).double() @ f(b).double().t() for f in (lambda t: t, torch.abs))
    dot_kernel[(1,)](a, b, found, m, n, k, TYPES[wide])
    assert ((found - exact).abs() <= 4 * torch.finfo(wide).eps * size).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_dots_of_integers_are_exact(dtype):
    m, n, k = 16, 32, 16
    a, b, found = (torch.randint(-8, 9, size).double() for size in ((m, 2 * k), (n, 2 * k), (m, n)))
    exact = found + a @ b.t()
    found = found.to(torch.float64 if dtype == torch.float64 else torch.float32)
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), found, m, n, k, TYPES[found.dtype])
    assert torch.equal(found.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_in_dots_are_those_of_fp32(dtype):
    """Exact for half types, but where bf16 leaves the range of fp32; NaN and infinity included."""
    n = 256
    a, b = (every_half(dtype if dtype.itemsize == 2 else torch.bfloat16)[torch.randperm(2**16)[:n]] for _ in range(2))
    found = torch.empty(n, n)
    outer_kernel[(1,)](a.to(dtype), b.to(dtype), found, n)
    wanted = torch.outer(a.double(), b.double()).float()
    assert wanted.isnan().any() and not wanted.isnan().all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_products_in_dots_of_fp64_are_those_of_fp64():
    n = 64
    a, b, found = (randn(*size, dtype=torch.float64) for size in ((n,), (n,), (n, n)))
    outer_kernel[(1,)](a, b, found, n)
    assert torch.equal(found, torch.outer(a, b))


@pytest.mark.parametrize("operation", ELEMENTWISE + FUNCTIONS)
def test_arithmetic_on_bf16_raises(operation):
    x, target = torch.ones(16, dtype=torch.bfloat16), torch.zeros(32)
    with pytest.raises(InterpreterError, match="bf16"):
        arithmetic_kernel[(1,)](x, target.to(torch.bfloat16), 16, tl.bfloat16, operation)
    arithmetic_kernel[(1,)](x, target, 16, tl.float32, operation)


def test_every_operation_that_is_allowed_exists():
    assert {name for name in ALLOWED if not hasattr(InterpreterBuilder, name)} == set()


def test_what_triton_promotes_is_computed_in_fp32():
    n = 64
    x, other = randn(n, dtype=torch.bfloat16), randn(n, dtype=torch.bfloat16)
    ratio, mixed = torch.empty(2, n)
    promoted_kernel[(1,)](x, other, ratio, mixed, n)
    assert torch.equal(ratio, x.float() / other.float())
    assert torch.equal(mixed, x.float() + other.float())


def test_int32_offsets_that_overflow_are_detected():
    """2**31 elements lie before the rows as well: a detector gone blind reads them, rather than ending the process."""
    n, stride = 16, 2**30
    rows = untouched(2**32 + 64, torch.int8).as_strided((3, n), (stride, 1), 2**31)
    rows.copy_(torch.arange(3 * n).reshape(3, n))
    found = torch.empty(4, n, dtype=torch.int8)
    strided_kernel[(1,)](rows, found, stride, n, tl.int64)
    assert torch.equal(found[:3], rows)
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        strided_kernel[(1,)](rows, found, stride, n, tl.int32)


@pytest.mark.parametrize(("a", "b"), [(2**31 - 1, 1), (-(2**31), -1)])
def test_int32_sums_that_overflow_are_detected(a, b):
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation add"):
        sum_kernel[(1,)](torch.empty(1, dtype=torch.int64), a, b)


def test_int32_sums_that_fit_pass():
    found = torch.empty(1, dtype=torch.int64)
    sum_kernel[(1,)](found, 2**31 - 2, 1)
    assert found.item() == 2**31 - 1


ALLOCATIONS = {
    "empty": lambda like: torch.empty(like.shape, dtype=like.dtype),
    "empty_like": torch.empty_like,
    "new_empty": lambda like: like.new_empty(like.shape),
    "empty_strided": lambda like: torch.empty_strided(like.shape, (1,), dtype=like.dtype),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
@pytest.mark.parametrize("dtype", [*TYPES, torch.int8, torch.int32, torch.int64])
def test_what_a_kernel_leaves_unwritten_shows(allocate, dtype):
    found = allocate(torch.zeros(32, dtype=dtype))
    half_written_kernel[(1,)](found, 32, 32)
    assert torch.equal(found[:16], torch.arange(16).to(dtype))
    rest = found[16:]
    assert (rest.isnan() if dtype.is_floating_point else rest == torch.iinfo(dtype).max).all()


def test_untouched_memory_is_not_poisoned():
    before = resident_bytes()
    large = untouched(2**31, torch.int8)
    assert resident_bytes() - before < large.numel() // 2
    assert torch.empty(4).isnan().all()


def test_a_range_up_to_an_argument():
    found = torch.empty(1, dtype=torch.int32)
    runtime_range_kernel[(1,)](found, 3, 7)
    assert found.item() == 3 + 4 + 5 + 6


def test_overflow_and_nan_are_results_not_warnings():
    assert cast(torch.tensor([1e30, -1e30, torch.nan]), torch.float16).isfinite().sum() == 0


def test_install_patches_once():
    before = dict(vars(InterpreterBuilder))
    install()
    assert dict(vars(InterpreterBuilder)) == before
