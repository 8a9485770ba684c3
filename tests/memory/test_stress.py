"""Cache and arena in many threads at once, every returned buffer poisoned: a few seconds of `longspan bench stress`."""

from __future__ import annotations

import random
import threading
import time
from collections import deque

import attrs
import pytest
import torch
from fake_device import FakeOffloader

from longspan.errors import ArgumentError
from longspan.memory.cache import PatternCache
from longspan.tools.bench.stress import stress


@pytest.mark.parametrize("threads", [16])
def test_many_threads_for_a_while(threads):
    found = stress(4.0, threads)
    assert found["failures"] == [] and found["stuck"] == 0
    assert found["calls"] >= threads and found["leased_at_the_end"] == 0
    assert found["cache"]["hits"] and found["cache"]["evictions"]


@pytest.mark.slow
def test_many_threads_for_a_minute():
    found = stress(60.0, 16)
    assert found["failures"] == [] and found["stuck"] == 0 and found["leased_at_the_end"] == 0
    assert found["resident_growth_in_the_second_half"] < 0.05


@attrs.frozen
class Held:
    tensor: torch.Tensor


CPU = torch.device("cpu")


class LockedOffloader(FakeOffloader):
    """The stand-in for a device, used by threads: a transfer is garbage until somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.lock = threading.RLock()

    def _start(self, copy):
        with self.lock:
            return super()._start(copy)

    def run_until(self, number):
        with self.lock:
            super().run_until(number)


def on_a_device(seconds, threads):
    """Puts, gets, prefetches, plans' copies and pins that are held meanwhile; room for some keys on device and host."""
    offloader, failures, counts = LockedOffloader(), [], [0] * threads
    cache = PatternCache(60_000, 20_000, offloader_for=lambda _: offloader)
    end = time.monotonic() + seconds

    def value(key):
        return Held(torch.full((50 + 13 * (key % 20),), key, dtype=torch.int64))

    def check(key, found):
        if found is not None:
            assert torch.equal(found.tensor, value(key).tensor), f"key {key} is another's, or not there yet"

    def work(number):
        draw, pinned, held = random.Random(number), None, deque(maxlen=3)
        try:
            while time.monotonic() < end and not failures:
                keys = [draw.randrange(200) for _ in range(3)]
                step = draw.randrange(5)
                if step == 0:
                    cache.put(keys[0], value(keys[0]))
                elif step == 1:
                    check(keys[0], cache.get(keys[0]))
                elif step == 2:  # as plans: what they hold stays, whatever else is moved meanwhile
                    layout = cache.get(("plan", keys[1])) or ("layout", keys[1])
                    cache.put(("plan", keys[1]), layout)
                    copy = cache.device_copy(("plan", keys[1]), layout, "index", [value(keys[1])], CPU)
                    if copy is not None:
                        copy.wait()
                        held.append((keys[1], copy))
                    for key, copy in held:
                        check(key, copy.value[0])
                elif step == 3:
                    cache.prefetch(keys)
                elif pinned is None:
                    pinned = 1000 + number  # its own: it must outlive what the others push out
                    cache.put(pinned, value(pinned))
                    try:
                        cache.pin(pinned)
                    except ArgumentError:  # another thread's put pushed it out in between
                        pinned = None
                else:
                    found = cache.get(pinned)
                    assert found is not None, "a pinned entry was dropped"
                    check(pinned, found)
                    cache.unpin(pinned)
                    pinned = None
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            failures.append(f"thread {number}, step {counts[number]}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds + 60)
    assert offloader.number > threads, "nothing was moved between device and host"
    return failures, sum(worker.is_alive() for worker in workers), sum(counts), cache.stats


def test_many_threads_on_a_device():
    failures, stuck, calls, stats = on_a_device(3.0, 16)
    assert failures == [] and stuck == 0 and calls > 1000
    assert stats.evictions and stats.hits


@pytest.mark.slow
def test_many_threads_on_a_device_for_a_minute():
    failures, stuck, _, _ = on_a_device(60.0, 16)
    assert failures == [] and stuck == 0
