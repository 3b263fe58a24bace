"""The tables of ``finish`` on emulated streams: work is done when something waits for its stream, no earlier."""

from array import array
from collections import deque
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

import glora
from bench.stubbed import fault, stubbed
from glora.config import make_path
from glora_kernels._triton import TritonBackend, plan
from glora_kernels._triton import run as running
from glora_kernels._triton.device import pretended
from glora_kernels._triton.launch import recorded
from glora_kernels.ops import prepared
from tests.helpers import make_call

GPU = torch.device("cuda", 0)
ROWS = array("q", range(1, 20)).tobytes()
REFUSED = "run the same step once before the capture, forward and backward"
needs_stub = pytest.mark.skipif(fault() is not None, reason=str(fault()))


class Stream(deque):
    """Functions that nobody has waited for."""

    def __init__(self, device=None, priority=0):
        super().__init__()

    def synchronize(self):
        while self:
            self.popleft()()


class Streams:
    """What is asked of ``torch.cuda``, for one device whose memory is the CPU's.

    Attributes:
        current: the stream on which copies are queued.
        capturing: the stream that is captured: its work is never done, and none is waited for.
    """

    def __init__(self):
        self.current, self.capturing = Stream(), None

    @contextmanager
    def entered(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self):
        with self.entered(Stream()):
            self.capturing = self.current
            try:
                yield
            finally:
                self.capturing = None

    def copied(self, host, non_blocking=False):
        """A tensor in the place of one on the device, filled when its stream gets there."""
        assert non_blocking or self.capturing is not self.current, "operation not permitted when stream is capturing"
        made = torch.full_like(host, -1)
        self.current.append(lambda: made.copy_(host))
        if not non_blocking:
            self.current.synchronize()
        return made

    def read(self, table):
        """What a kernel on another stream finds in the table."""
        found, other = [], Stream()
        other.append(lambda: found.extend(table.tolist()))
        other.synchronize()
        return found


@pytest.fixture
def streams(monkeypatch):
    streams, tensor, to = Streams(), torch.tensor, torch.Tensor.to

    def made(numbers, *, dtype, device=None):
        host = tensor(numbers, dtype=dtype)
        return streams.copied(host) if device == GPU else host

    def moved(host, *arguments, non_blocking=False, **options):
        return streams.copied(host, non_blocking) if GPU in arguments else to(host, *arguments, **options)

    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda host: host)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", streams.entered)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: streams.current is streams.capturing)
    monkeypatch.setattr(running, "_tables", {})
    running._copying.cache_clear()
    yield streams
    running._copying.cache_clear()


# -- one table ---------------------------------------------------------------------------------------------------------


def test_a_kernel_on_another_stream_reads_the_table(streams):
    assert streams.read(running.table(ROWS, GPU)) == list(range(1, 20))


def test_work_that_is_queued_is_not_waited_for(streams):
    streams.current.append(lambda: pytest.fail("waited for"))
    running.table(ROWS, GPU)


@pytest.mark.parametrize("waits", [False, True])
def test_the_emulation_sees_what_was_wrong(streams, monkeypatch, waits):
    """Copies on the current stream: one that nobody waits for, and one that waits for all that is queued there."""

    def on_current_stream(rows, device):
        host = torch.tensor(memoryview(rows).cast("q").tolist(), dtype=torch.int64)
        return host.to(device) if waits else host.pin_memory().to(device, non_blocking=True)

    done = []
    streams.current.append(lambda: done.append(True))
    monkeypatch.setattr(running, "_on_device", on_current_stream)
    table = running.table(ROWS, GPU)
    assert (streams.read(table) == list(range(1, 20))) is waits and done == [True] * waits


def test_a_capture_refuses_a_new_table_and_takes_a_known_one(streams):
    with streams.capture(), pytest.raises(RuntimeError, match=REFUSED):
        running.table(ROWS, GPU)
    assert not running._tables
    known = running.table(ROWS, GPU)
    with streams.capture():
        assert running.table(ROWS, GPU) is known
        assert streams.read(known) == list(range(1, 20))


def test_a_capture_of_another_stream_refuses_nothing(streams):
    with streams.capture(), streams.entered(Stream()):
        assert streams.read(running.table(ROWS, GPU)) == list(range(1, 20))


def test_of_two_threads_that_make_a_table_both_get_the_one_that_is_kept(streams, monkeypatch):
    make, other = running._on_device, []

    def overtaken(*arguments):
        monkeypatch.setattr(running, "_on_device", make)
        other.append(running.table(ROWS, GPU))
        return make(*arguments)

    monkeypatch.setattr(running, "_on_device", overtaken)
    assert running.table(ROWS, GPU) is other[0]


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(streams, monkeypatch):
    """Plans on other devices have their tables on the GPU."""
    table = running.table
    monkeypatch.setattr(running, "table", lambda rows, device: table(rows, GPU))
    monkeypatch.setattr(plan, "_plan", plan._plan.__wrapped__)
    return streams


@needs_stub
def test_a_plan_that_a_capture_refused_is_made_afterwards(on_gpu):
    with stubbed(), patch.object(prepared, "_runs", {}):
        layer = glora.GLoRALinear(64, 96, rank=8)
        layer.path = make_path("lora_8", "lora_8", "lora_8", "vector", "vector")

        def step():
            with recorded() as launched:
                y = layer(torch.zeros(16, 64, requires_grad=True))
                launched.clear()
                y.backward(torch.ones(16, 96))
            return [one.kernel.fn.__name__ for one in launched]

        with on_gpu.capture():
            for _ in range(2):
                with pytest.raises(RuntimeError, match=REFUSED):
                    step()
        first = step()
        assert "finish_kernel" in first
        with on_gpu.capture():
            assert step() == first


def test_nothing_is_launched_before_a_capture_is_refused(on_gpu):
    """Nor is V formed, which a backward pass forms first where the forward pass has not kept it."""
    call = make_call(
        ("lora_3", "lora_3", "vector", "vector", "vector"), (128, 96, 64), product="matmul", dtype=torch.float32
    )
    x, weight, bias, terms = (part.to("meta") if isinstance(part, torch.Tensor) else part for part in call)
    storages = [storage.to("meta") for storage in terms.storages]
    arguments = (torch.empty(128, 96, device="meta"), x, weight, bias, storages, None, None, None, None)
    with pretended("sm_90"), torch.no_grad():
        planned = TritonBackend("fused").plan(weight, bias, terms.map(lambda t: t.to("meta")), frozenset("ABCDE"), True)
        with recorded() as launched:
            with on_gpu.capture(), pytest.raises(RuntimeError, match=REFUSED):
                planned.backward(*arguments)
            assert not launched
            planned.backward(*arguments)
    assert launched[0].kernel.fn.__name__ == "assemble_kernel" and len(launched) > 2
