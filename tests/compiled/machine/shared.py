"""Shared memory of several CTAs, and who may access it when.

It is NaN until it is written. Two accesses to one place, at least one of them a write, need an order:

- a barrier of the CTA between them, or one of the warp if both are by threads of one warp, or one thread does both;
- before what ``cp.async`` writes is read, its thread waits for the group of the copy;
- before a matrix unit reads (``wgmma``), a ``fence.proxy.async`` follows the write, by the thread that wrote, or by
  any thread behind a barrier; and before it is overwritten, the warpgroup waits for the group of the product.

What is noted is exact to a *granule*, the smallest access of the program.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault, Hazards
from .numbers import UNSIGNED, Array

BASE = 1024  # of the addresses of shared memory: CUDA keeps what is below for itself on sm_90
_NOBODY = -1


class Shared:
    """The shared memory of ``ctas`` CTAs of ``threads`` threads.

    Attributes:
        proxies: whether matrix units read it.
        epoch: barriers that each CTA has passed.
        warp_epoch: those that each warp has passed, of either kind.
    """

    def __init__(self, ctas: int, threads: int, size: int, granule: int, proxies: bool, hazards: Hazards):
        self.size, self.granule, self.hazards, self.threads = size, granule, hazards, threads
        self.proxies = proxies
        self.pitch = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(ctas * self.pitch, 0xFF, np.uint8)
        self.granules = self.pitch // granule
        places = ctas * self.granules
        self.cta = np.repeat(np.arange(ctas), threads)
        self.thread = np.tile(np.arange(threads, dtype=np.int32), ctas)
        self.warp = np.arange(ctas * threads) // 32
        self.epoch = np.zeros(ctas, np.int32)
        self.warp_epoch = np.zeros(ctas * threads // 32, np.int32)
        self.writer = np.full(places, _NOBODY, np.int32)
        self.written = np.full(places, _NOBODY, np.int32)  # the CTA's epoch at the time
        self.written_warp = np.zeros(places, np.int32)  # that of the writer's warp
        self.reader = np.full(places, _NOBODY, np.int32)  # a thread; threads + warp for several; the largest for more
        self.read = np.full(places, _NOBODY, np.int32)
        self.read_warp = np.zeros(places, np.int32)
        self.landing = np.zeros(places, np.int16)  # copies in flight
        self.multiplied = np.zeros(places, np.int16)  # products in flight that read it
        self.unfenced = np.zeros(places, np.bool_)
        self.unfenced_writes: list[tuple[Array, Array]] = []  # places, threads
        self.many = threads + threads // 32

    # -- accesses ------------------------------------------------------------------------------------------------------

    def load(self, lanes: Array, addresses: Array, width: int, count: int, what: str) -> list[Array]:
        """``count`` values of ``width`` bytes for each of the lanes."""
        start = self.start(lanes, addresses, width * count, what)
        self.note_read(lanes, start, width * count, what)
        values, first = self.bytes.view(UNSIGNED[8 * width]), start // width
        return [values[first + number] for number in range(count)]

    def store(self, lanes: Array, addresses: Array, values: list[Array], width: int, what: str) -> None:
        start = self.start(lanes, addresses, width * len(values), what)
        self.note_write(lanes, start, width * len(values), what)
        self.put(start, values, width, what)

    def put(self, start: Array, values: list[Array], width: int, what: str) -> None:
        """Write, without a look at the order. Several threads may write one value to one place at once."""
        target, first = self.bytes.view(UNSIGNED[8 * width]), start // width
        for number, part in enumerate(values):
            target[first + number] = part
            if (target[first + number] != part).any():
                self.hazards.note("two threads write different values to one place at once", what)

    def start(self, lanes: Array, addresses: Array, width: int, what: str) -> Array:
        """The first byte that each lane accesses, counted over all CTAs."""
        offsets = addresses.astype(np.int64) - BASE
        if offsets.size and (offsets.min() < 0 or offsets.max() + width > self.size):
            raise Fault(f"access out of bounds of {self.size} bytes of shared memory: {what}")
        if (offsets & (width - 1)).any():
            raise Fault(f"misaligned access of {width} bytes to shared memory: {what}")
        return self.cta[lanes] * self.pitch + offsets

    def places(self, start: Array, width: int) -> Array:
        """The granules of an access, by lane and granule."""
        return (start // self.granule)[:, None] + np.arange(max(1, width // self.granule))

    def note_read(self, lanes: Array, start: Array, width: int, what: str, together: bool = False) -> None:
        """A read by the lanes; ``together``: by all threads of their warps, to which the lanes only say where."""
        places, who = self.places(start, width), self._who(lanes, together)
        self._require_written(places, what)
        if self._unordered(self.written, self.writer, self.written_warp, places, lanes, who):
            self.hazards.note("a read of what another thread wrote, without a barrier", what)
        self._record_readers(places, lanes, who)

    def note_write(self, lanes: Array, start: Array, width: int, what: str, together: bool = False) -> Array:
        places, who = self.places(start, width), self._who(lanes, together)
        if self.landing[places].any():
            self.hazards.note("a write to where a copy in flight lands", what)
        if self.multiplied[places].any():
            self.hazards.note("a write to what a product in flight reads", what)
        if self._unordered(self.written, self.writer, self.written_warp, places, lanes, who):
            self.hazards.note("a write to what another thread wrote, without a barrier", what)
        if self._unordered(self.read, self.reader, self.read_warp, places, lanes, who):
            self.hazards.note("a write to what another thread read, without a barrier", what)
        self._record_writers(places, lanes, who)
        return places

    def _require_written(self, places: Array, what: str) -> None:
        if self.landing[places].any():
            self.hazards.note("a read of a copy that was not waited for", what)
        if (self.written[places] == _NOBODY).any():
            self.hazards.note("a read of shared memory that was never written", what)

    # -- order ---------------------------------------------------------------------------------------------------------

    def _who(self, lanes: Array, together: bool) -> Array:
        """The code of whoever accesses, by lane: a thread, or ``threads`` + warp for several of one warp."""
        thread = self.thread[lanes][:, None]
        return self.threads + thread // 32 if together else thread

    def _unordered(self, when: Array, whose: Array, warp_when: Array, places: Array, lanes: Array, who: Array) -> bool:
        """Whether an earlier access to some place is without an order to this one."""
        fresh = when[places] == self.epoch[self.cta[lanes]][:, None]
        if not fresh.any():
            return False
        earlier = whose[places]
        by_warp = self._warp_of(earlier) == self._warp_of(who)
        by_warp &= warp_when[places] < self.warp_epoch[self.warp[lanes]][:, None]
        itself = (earlier == who) & (who < self.threads)
        return bool((fresh & ~itself & ~by_warp).any())

    def _warp_of(self, reader: Array) -> Array:
        """Of a reader's code; that of many warps is no warp."""
        return np.where(reader < self.threads, reader // 32, reader - self.threads)

    def _record_writers(self, places: Array, lanes: Array, who: Array) -> None:
        self.writer[places] = who
        self.written[places] = self.epoch[self.cta[lanes]][:, None]
        self.written_warp[places] = self.warp_epoch[self.warp[lanes]][:, None]
        if self.proxies:
            self.unfenced[places] = True
            self.unfenced_writes.append((places, lanes))

    def _record_readers(self, places: Array, lanes: Array, who: Array) -> None:
        epoch, now = self.epoch[self.cta[lanes]][:, None], self.warp_epoch[self.warp[lanes]][:, None]
        who = np.broadcast_to(who, places.shape)
        warp = self._warp_of(who)
        known = self.read[places] == epoch
        reader = who
        if known.any():
            before = self.reader[places]
            merged = np.where((self.read_warp[places] < now) | (before == who), who, self.threads + warp)
            merged = np.where(self._warp_of(before) == warp, merged, self.many)
            reader = np.where(known, merged, who)
        self.reader[places] = reader
        other = self.reader[places] != reader
        if other.any():
            self.reader[places[other]] = _NOBODY
            several = self.reader[places] == _NOBODY  # lanes that read this place
            by_warp = np.where(reader == self.many, self.many, self.threads + warp)
            self.reader[places[several]] = by_warp[several]
            self.reader[places[several & (self.reader[places] != by_warp)]] = self.many
        self.read[places] = epoch
        self.read_warp[places] = now

    def barrier(self, ctas: Array) -> None:
        """All threads of these CTAs have met."""
        self.epoch[ctas] += 1
        self.warp_epoch.reshape(self.epoch.size, -1)[ctas] += 1

    def warp_barrier(self, warps: Array) -> None:
        self.warp_epoch[warps] += 1

    def fence(self, lanes: Array | None) -> None:
        """``fence.proxy.async`` of the lanes; None: of all."""
        if lanes is None:
            self.unfenced[:] = False
            self.unfenced_writes = []
            return
        fenced, there = np.zeros(self.cta.size, np.bool_), np.zeros(self.epoch.size, np.bool_)
        fenced[lanes], there[self.cta[lanes]] = True, True
        left = []
        for places, writers in self.unfenced_writes:
            cta = self.cta[writers]
            done = fenced[writers][:, None] | (there[cta][:, None] & (self.written[places] < self.epoch[cta][:, None]))
            self.unfenced[places[done]] = False
            if not done.all():
                left.append((places, writers))
        self.unfenced_writes = left

    # -- copies in flight ----------------------------------------------------------------------------------------------

    def copy_begins(self, lanes: Array, start: Array, width: int, what: str) -> None:
        places = self.note_write(lanes, start, width, what)
        np.add.at(self.landing, places, 1)

    def copy_lands(self, lanes: Array, start: Array, values: list[Array], what: str) -> None:
        """Words of 32 bits."""
        self.put(start, values, 4, what)
        places = self.places(start, 4 * len(values))
        np.add.at(self.landing, places, -1)
        self._record_writers(places, lanes, self._who(lanes, False))

    # -- products in flight --------------------------------------------------------------------------------------------

    def product_reads(self, cta: Array, offsets: Array, width: int, what: str) -> tuple[Array, Array]:
        """Elements that warpgroups read, by their CTA: the values, and the places to be given to ``product_ends``."""
        if offsets.min() < 0 or offsets.max() + width > self.size:
            raise Fault(f"a matrix unit reads out of bounds of {self.size} bytes of shared memory: {what}")
        start = cta.reshape(-1, *[1] * (offsets.ndim - 1)) * self.pitch + offsets
        places = start // self.granule
        self._require_written(places, what)
        if (self.written[places] == self.epoch[places // self.granules]).any():
            self.hazards.note("a matrix unit reads what was written, without a barrier", what)
        if self.unfenced[places].any():
            self.hazards.note("a matrix unit reads what was written, without fence.proxy.async", what)
        places = np.unique(places)
        self.multiplied[places] += 1
        return self.bytes.view(UNSIGNED[8 * width])[start // width], places

    def product_ends(self, places: Array) -> None:
        """The warpgroup has waited: other threads still have to meet it before they overwrite what was read."""
        self.multiplied[places] -= 1
        self.read[places] = self.epoch[places // self.granules]
        self.reader[places] = self.many
