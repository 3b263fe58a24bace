"""What reaches the driver of the GPU, below Triton's own launcher, against what the schedules ask for.

The check reads the schedule of every pass, which says kernel, tile, grid and arguments by name. Of each launch it then
asks that everything has arrived: in order, of the right type and with the right value, whether as an argument or as a
constant of the build; and that the build was promised nothing that is not so.
"""

import ctypes
import itertools
import math
import subprocess
import sys
from array import array
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

import glora
from glora_kernels import Terms, Vector, dispatch, glora_linear, glora_merge, use_backend
from glora_kernels._aot.compiling import AbsentGPU
from glora_kernels._aot.targets import gpu_named
from glora_kernels._triton import launch as launching
from glora_kernels._triton import plan
from glora_kernels._triton import run as running
from glora_kernels._triton.builds import POINTERS
from glora_kernels._triton.kernels import KERNELS
from glora_kernels.ops import prepared
from glora_kernels.planning.prediction import STRATEGIES
from glora_kernels.planning.settings import Tile, forced_tiles
from glora_kernels.planning.steps import Amount, Launch
from tests.compiled.driver import library
from tests.compiled.driver.device import STREAM, absent_gpu
from tests.helpers import make_call, results
from tests.tiers import at, pairs

pytestmark = pytest.mark.skipif(library.fault() is not None, reason=str(library.fault()))

ARCHITECTURES = ("sm_80", "sm_90")
SCRATCH = (0, 0)  # global scratch memory and that of Triton's profiler, which no kernel of ours has
WARP = 32
DIVISIBLE = ["tt.divisibility", 16]


# -- the check ---------------------------------------------------------------------------------------------------------


class WrongLaunchError(Exception):
    """A launch is not what was asked for."""


def require(condition, *told):
    if not condition:
        raise WrongLaunchError(*told)


class Check:
    """Told of every launch, it compares it with the next launch of the schedule that is being run.

    Attributes:
        stream, device: those on which launches have to be.
        launched: the names of the kernels, in order.
        addresses: all that were passed.
    """

    def __init__(self):
        self.stream, self.device = STREAM, None
        self.launched, self.addresses = [], set()
        self._schedules = {}  # by the identity of a pass; the pass is kept, so that no other gets it
        self._asked, self._slots, self._amounts = deque(), None, ()

    @contextmanager
    def watching(self):
        """Learn the schedules of all passes that are made inside, and when they are run."""
        make, size, run = running.Pass.__init__, running.SizedPass.__init__, running.SizedPass.run

        def made(found, schedule, device):
            make(found, schedule, device)
            self._schedules[id(found)] = found, schedule, 0

        def sized(found, of, tokens):
            size(found, of, tokens)
            self._schedules[id(found)] = found, self._schedules[id(of)][1], tokens

        def ran(found, slots):
            if self._slots is not None:  # again, with the device of the tensors as the current one
                return run(found, slots)
            _, schedule, tokens = self._schedules[id(found)]
            blocks = -(-tokens // schedule.token_block) if schedule.token_block else 0
            self._amounts, self._names = (tokens, blocks), (*schedule.operands, *schedule.made)
            self._asked, self._slots = deque(step for step in schedule.steps if isinstance(step, Launch)), slots
            try:
                run(found, slots)
                require(not self._asked, "never launched", [step.kernel for step in self._asked])
            finally:
                self._slots = None

        with (
            patch.object(running.Pass, "__init__", made),
            patch.object(running.SizedPass, "__init__", sized),
            patch.object(running.SizedPass, "run", ran),
        ):
            yield

    def __call__(self, launch):
        require(self._asked, "launched, but not asked for", launch.kernel.name)
        step = self._asked.popleft()
        source, metadata, tile = launch.kernel.src, launch.kernel.metadata, step.tile
        require(source.fn is KERNELS[step.kernel], "kernel", launch.kernel.name, step.kernel)
        programs = step.programs * (-(-self._amounts[0] // step.token_block) if step.token_block else 1)
        require(launch.grid == (programs, 1, 1), "grid", launch.grid, programs)
        require(launch.block == (WARP * tile.warps, 1, 1), "block", launch.block, tile)
        require(metadata.num_stages == tile.stages, "stages", metadata.num_stages, tile)
        require((launch.shared, launch.attributes) == (metadata.shared, 0), launch.shared, launch.attributes)
        require((launch.stream, launch.device) == (self.stream, self.device), launch.stream, launch.device)
        self._compare(step, source, launch.values)
        self.launched.append(step.kernel)

    def _compare(self, step, source, values):
        require(list(step.arguments) == source.fn.arg_names, "names", list(step.arguments))
        constants = {place: value for (place,), value in source.constants.items()}
        passed = [place for place in range(len(step.arguments)) if place not in constants]
        require(len(values) == len(passed) + len(SCRATCH), "how many", len(values), len(passed))
        require(values[len(passed) :] == SCRATCH, "scratch memory", values[len(passed) :])
        arrived = dict(zip(passed, values))
        for place, (name, value) in enumerate(step.arguments.items()):
            where, asked = (step.kernel, name), self._number(name, value)
            if place in constants:
                got = constants[place]
                require(type(got) is type(asked) and got == asked, *where, "constant", got, asked)
                continue
            got, kind = arrived[place], source.signature[name]
            if name == "table_ptr":
                rows = array("q", itertools.chain.from_iterable(value)).tobytes()
                require(kind == "*i64" and ctypes.string_at(got, len(rows)) == rows, *where, "rows")
            elif isinstance(asked, torch.Tensor):
                require((kind, got) == (POINTERS[asked.dtype], asked.data_ptr()), *where, kind, got, asked.data_ptr())
            elif isinstance(asked, float):
                require((kind, got) == ("fp32", ctypes.c_float(asked).value), *where, kind, got, asked)
            else:
                require((kind, got) == ("i32" if asked < 2**31 else "i64", asked), *where, kind, got, asked)
            promises = source.attrs.get((place,), [])
            require(not promises or (promises == [DIVISIBLE] and got % 16 == 0), *where, promises, got)
            if name.endswith("_ptr"):
                require(promises or got % 16, *where, "is aligned, and could be read faster")
                self.addresses.add(got)

    def _number(self, name, value):
        """What a value of the schedule stands for in this call."""
        if isinstance(value, Amount):
            return value.of(*self._amounts)
        if isinstance(value, torch.dtype):
            return getattr(tl, str(value).removeprefix("torch."))
        if name.endswith("_ptr") and isinstance(value, str):
            return self._slots[self._names.index(value)]
        return value


@contextmanager
def checked(architecture="sm_90", strategy=None):
    """Inside, every launch is checked."""
    check = Check()
    with check.watching(), absent_gpu(architecture, check, strategy):
        yield check


# -- all kernels and kinds of layers -----------------------------------------------------------------------------------

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZE = (40, 96, 64)  # M, N, K


class Case(NamedTuple):
    strategy: str
    product: str
    A: str
    B: str
    C: str
    D: str
    E: str
    dtypes: tuple[torch.dtype, torch.dtype]  # of x, W0 and b0; of the storages
    bias: bool


MIXED, LOW = (BF16, FP32), ("lora_3", "lora_1", "lora_1", "vector", "constant")
FEW = {
    "sm_80": [
        Case("assemble", "hadamard", "vector", "lora_3", "vector", "constant", "vector", (FP32, FP32), True),
        Case("fused", "matmul", "lora_1", "lora_3", "lora_1", "none", "none", (FP16, FP16), False),
    ],
    "sm_90": [
        Case("fused", "hadamard", *LOW, MIXED, True),
        Case("assemble", "matmul", "lora_3", "vector", "none", "vector", "none", (BF16, BF16), True),
    ],
}
WEIGHT = ("lora_3", "vector", "constant", "none")
PARTS = (STRATEGIES, ("hadamard", "matmul"), WEIGHT, WEIGHT, ("lora_1", "vector", "none"))
PARTS += (("vector", "constant", "none"),) * 2 + ((MIXED, (BF16, BF16), (FP16, FP16), (FP32, FP32)), (True, False))
ALL = [Case(*parts) for parts in itertools.product(*PARTS)]


def named(case):
    return "-".join(map(str, case)).replace("torch.", "").replace(" ", "")


def operands(case, size=SIZE, move=lambda name, tensor: tensor):
    """x, W0, b0 and the terms; ``move`` may put each of them elsewhere."""
    dtype, terms_dtype = case.dtypes
    x, weight, bias, terms = make_call(case[2:7], size, bias=case.bias, product=case.product, dtype=dtype)

    def moved(name, tensor):
        return move(name, tensor.detach()).requires_grad_(tensor.requires_grad)

    terms = terms.map(lambda t: moved("terms", t.detach().to(terms_dtype).requires_grad_()))
    return moved("x", x), moved("weight", weight), bias if bias is None else moved("bias", bias), terms


def train(case, call):
    x, weight, _, _ = call
    with use_backend("triton", strategy=case.strategy):
        results(glora_linear, *call, torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_launched_as_asked(architecture):
    with checked(architecture) as check:
        for case in FEW[architecture]:
            train(case, operands(case))
    assert set(check.launched) == set(KERNELS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [ALL[place] for place in pairs(ALL)], ids=named)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_launches_of_other_layers_are_as_asked(architecture, case):
    with checked(architecture) as check:
        train(case, operands(case))
    assert check.launched


def test_a_layer_and_a_merge_are_launched_as_asked():
    """By the public functions, where no backend was chosen."""
    x = torch.zeros(16, 64, requires_grad=True)
    with checked() as check:
        layer = glora.GLoRALinear(64, 96, rank=8)
        for _ in range(2):  # the second time it is prepared
            layer(x).sum().backward()
        once = check.launched[: len(check.launched) // 2]
        assert once and check.launched == 2 * once
        assert {layer.weight.data_ptr(), layer.bias.data_ptr()} <= check.addresses
        with patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros):  # a merge asks for finite values
            merged, _ = glora_merge(layer.weight.detach(), None, Terms(A=Vector(torch.ones(96, 1))))
    assert check.launched[2 * len(once) :] == ["assemble"] and merged.data_ptr() in check.addresses


def test_other_tiles_have_other_builds():
    """Where the tiles differ in warps or stages alone, too."""
    with checked() as check, torch.no_grad(), use_backend("triton", strategy="fused"):
        for warps, stages in (4, 2), (8, 2), (4, 3), (4, 2):
            with forced_tiles({"fused": Tile(32, 32, 32, warps, stages)}):
                glora_linear(*operands(FEW["sm_90"][0]))
    assert check.launched == ["fused"] * 4


# -- tensors that lie anywhere -----------------------------------------------------------------------------------------

(FUSED, ASSEMBLE), TRAINED = FEW["sm_90"], (*FEW["sm_90"], *FEW["sm_80"])


def begin(elements, names=("x", "weight", "bias", "terms")):
    """Operands that begin so many elements into their memory."""

    def move(name, tensor):
        at = elements if name in names else 0
        memory = torch.zeros(tensor.numel() + at, dtype=tensor.dtype)
        return memory[at:].view(tensor.shape).copy_(tensor)

    return move


def wide_rows(name, tensor):
    """Rows of matrices that are longer than what is read of them."""
    if name == "terms" or tensor.dim() != 2:
        return tensor
    return torch.zeros(tensor.shape[0], tensor.shape[1] + 16, dtype=tensor.dtype)[:, : tensor.shape[1]].copy_(tensor)


def transposed(name, tensor):
    return tensor.t().contiguous().t() if name == "x" else tensor


def addresses_of(call):
    x, weight, bias, terms = call
    return {tensor.data_ptr() for tensor in (x, weight, *terms.storages, *([] if bias is None else [bias]))}


@pytest.mark.parametrize("case", at([FUSED], TRAINED), ids=named)
def test_tensors_may_begin_anywhere(case):
    """A build for tensors that are aligned serves no others; both are found again."""
    with checked() as check:
        builds = []
        for elements in (0, 1, 8, 4, 1, 0):
            call = operands(case, move=begin(elements))
            check.addresses.clear()
            train(case, call)
            assert len(addresses_of(call) & check.addresses) > 4
            builds.append(len(launching._compiled))
    aligned, other = builds[:2]
    assert aligned < other  # 4 elements of 4 bytes are aligned, and of 2 are not: a mixture
    assert builds[1] == builds[2] and builds[3:] == [builds[3]] * 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("elements", [1, 4, 8])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "terms"])
@pytest.mark.parametrize("case", TRAINED, ids=named)
def test_one_tensor_may_begin_anywhere(case, name, elements):
    with checked() as check:
        train(case, operands(case))
        train(case, operands(case, move=begin(elements, (name,))))
    assert check.launched


@pytest.mark.parametrize("move", [wide_rows, transposed])
@pytest.mark.parametrize("case", at([FUSED], TRAINED), ids=named)
def test_tensors_may_have_any_strides(case, move):
    with checked() as check:
        train(case, operands(case))
        call = operands(case, move=move)
        assert not call[0].is_contiguous()
        train(case, call)
        x, weight, _, _ = call
        read = x if case.strategy == "fused" else weight
        assert read.data_ptr() in check.addresses


@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_numbers_may_need_64_bits(grad):
    """Tokens without memory: each is the same row. Builds for 32 bits are taken for 32 bits alone, and the others."""
    case, row = FUSED, torch.ones(1, SIZE[1], dtype=FUSED.dtypes[0])
    with checked() as check, use_backend("triton", strategy="fused"), little_memory():
        x, weight, bias, terms = operands(case)
        for tokens in (2**31 + 5, 2**31 - 5, 2**31 + 5, 2**31 - 5):
            wide = x.detach()[:1].expand(tokens, -1).requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                y = glora_linear(wide, weight, bias, terms)
            if grad:
                torch.autograd.grad(y, (wide, *terms.storages), row.expand(tokens, -1))
    assert len(check.launched) == (20 if grad else 4)


@contextmanager
def little_memory():
    """What is allocated takes no memory, if it is large."""
    new_empty = torch.Tensor.new_empty

    def small(like, shape, dtype=None):
        if math.prod(shape) < 2**20:
            return new_empty(like, shape, dtype=dtype)
        return torch.empty(1, dtype=dtype or like.dtype).expand(shape)

    with patch.object(torch.Tensor, "new_empty", small):
        yield


# -- streams and devices -----------------------------------------------------------------------------------------------


@contextmanager
def made_layer(**options):
    with checked(**options) as check:
        layer, x = glora.GLoRALinear(64, 96, rank=8), torch.zeros(16, 64, requires_grad=True)

        def step():
            layer(x).sum().backward()

        step()
        yield check, step


def test_launches_go_to_the_stream_that_is_current(monkeypatch):
    with made_layer() as (check, step), monkeypatch.context() as patched:
        for stream in (0x7770, 0, STREAM):
            check.stream = stream
            patched.setattr(triton.runtime.driver.active, "get_current_stream", lambda _, stream=stream: stream)
            step()


@pytest.mark.parametrize("direct", [True, False])
def test_launches_run_on_the_device_of_the_tensors(direct):
    """Another device is current. It is again afterwards."""
    with made_layer() as (check, step), patch.object(launching, "direct", direct), torch.cuda.device(1):
        before = len(check.launched)
        step()
        assert len(check.launched) > before
        assert torch.cuda.current_device() == 1


# -- the public way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", at([FUSED], TRAINED), ids=named)
def test_the_public_way_launches_the_same(case):
    with checked() as check:
        train(case, operands(case))
        directly = list(check.launched)
        with patch.object(launching, "direct", False):
            train(case, operands(case))
            train(case, operands(case, move=begin(1)))
    assert check.launched == 3 * directly


# -- errors that are planted: the check sees them ----------------------------------------------------------------------


@contextmanager
def disturbed(kernel, disturb):
    """Every launch of the kernel has its arguments changed, as by an error of ours."""
    size = launching.SizedLaunch.__init__

    def sized(found, bound, tokens, blocks):
        size(found, bound, tokens, blocks)
        if bound.kernel is KERNELS[kernel]:
            disturb(found, {name: 9 + place for place, name in enumerate(bound.kernel.arg_names)})

    with patch.object(launching.SizedLaunch, "__init__", sized):
        yield


def add(name, amount):
    def disturb(found, places):
        found.arguments[places[name]] += amount

    return disturb


def exchange(one, other):
    def disturb(found, places):
        arguments, (i, j) = found.arguments, (places[one], places[other])
        arguments[i], arguments[j] = arguments[j], arguments[i]
        found.pointers = tuple((i + j - place if place in (i, j) else place, slot) for place, slot in found.pointers)

    return disturb


def larger_grid(found, _):
    found.arguments[0] += 1


@pytest.mark.parametrize(
    "kernel, disturb, told",
    [
        ("fused", add("M", 1), "'fused', 'M'"),
        ("fused", add("OUT", 16), "'fused', 'OUT'"),
        ("fused", add("stride_wo", 16), "'fused', 'stride_wo'"),
        ("token_pass", add("at_db", 16), "'token_pass', 'at_db'"),
        ("finish", add("jobs", 1), "'finish', 'jobs'"),
        ("contract", add("slices", 1), "'contract', 'slices'"),
        ("fused", exchange("rank_a", "rank_b"), "'fused', 'rank_a'"),
        ("fused", exchange("x_ptr", "w_ptr"), "'fused', 'x_ptr'"),
        ("fused", exchange("a_ptr", "b_ptr"), "'fused', 'a_ptr'"),
        ("contract", larger_grid, "'grid'"),
    ],
)
def test_a_wrong_launch_is_noticed(kernel, disturb, told):
    with checked(), disturbed(kernel, disturb), pytest.raises(WrongLaunchError) as error:
        train(FUSED, operands(FUSED))
    assert told in str(error.value)


def test_alignment_left_out_of_the_key_is_noticed():
    with checked(), patch.object(launching, "ALIGNMENT", 1), patch.object(running, "ALIGNMENT", 1):
        train(FUSED, operands(FUSED))
        with pytest.raises(WrongLaunchError, match="divisibility"):
            train(FUSED, operands(FUSED, move=begin(1)))


def test_a_launch_that_is_left_out_is_noticed():
    def kept(schedule):
        return tuple(step for step in schedule.steps if getattr(step, "kernel", None) != "contract")

    make = running.Pass.__init__

    def made(found, schedule, device):
        make(found, schedule._replace(steps=kept(schedule)), device)

    # Below the check, which then sees the whole schedule.
    with patch.object(running.Pass, "__init__", made), checked(), pytest.raises(WrongLaunchError, match="contract"):
        train(FUSED, operands(FUSED))


def test_the_wrong_stream_is_noticed():
    with made_layer() as (check, step), pytest.raises(WrongLaunchError):
        check.stream = STREAM + 1
        step()


def test_the_wrong_device_is_noticed():
    unnoticed = patch.object(torch.cuda, "current_device", lambda: None)
    with made_layer() as (_, step), torch.cuda.device(1), unnoticed, pytest.raises(WrongLaunchError):
        step()


# -- the absent GPU itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("v"), TypeError("t"), AttributeError("a"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_raised_at_a_launch_is_seen_by_the_caller(error, place):
    """Once: the next call is a call like any other."""
    count = itertools.count()

    def on_launch(_):
        if next(count) == place:
            raise error

    def step():
        layer(torch.zeros(16, 64, requires_grad=True)).sum().backward()

    with absent_gpu("sm_90", on_launch):
        layer = glora.GLoRALinear(64, 96, rank=8)
        with pytest.raises(type(error)) as seen:
            step()
        step()
        assert launching.direct
    assert seen.value is error


def state():
    patched = torch.cuda.current_device, torch.cuda.device, dispatch.automatic, dispatch.triton_unfit
    caches = launching._compiled, plan._plan, plan._pass_without_tokens, prepared._runs
    driver = triton.runtime.driver
    return (*patched, *caches, launching.direct, driver._active, triton.compiler.CompiledKernel._init_handles)


def test_nothing_is_left_and_architectures_may_be_nested():
    """Also where the gate has compiled for another GPU in this process."""
    case = FUSED

    def architecture_of(launch):
        return launch.kernel.metadata.target.arch

    seen, before = [], state()
    outer, inner = (lambda launch, n=n: seen.append((n, architecture_of(launch))) for n in (80, 90))
    with patch.object(triton.runtime.driver, "_active", AbsentGPU(gpu_named("cuda:100"))):
        with pytest.raises(ZeroDivisionError), absent_gpu("sm_90", inner):
            train(case, operands(case))
            with absent_gpu("sm_80", outer):
                train(case, operands(case))
            train(case, operands(case))
            raise ZeroDivisionError
        assert isinstance(triton.runtime.driver.active, AbsentGPU)
    assert state() == before
    assert [first for first, _ in itertools.groupby(seen)] == [(90, 90), (80, 80), (90, 90)]
    x, _, _, _ = call = operands(case)
    assert glora_linear(*call).isfinite().all() and x.device.type == "cpu"


def test_nobody_else_finds_a_gpu():
    """Nor is warned of an old driver, whoever asks first."""
    code = f"""
import ctypes
ctypes.CDLL({str(library.compiled())!r}, mode=ctypes.RTLD_GLOBAL)
import torch
assert not torch.cuda.is_available()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "BUILD", tmp_path)
    compile_it = library.compiled.__wrapped__
    made = compile_it()
    when = made.stat().st_mtime_ns
    assert compile_it() == made and made.stat().st_mtime_ns == when
    assert [file.name for file in made.parent.iterdir()] == [library.NAME]
