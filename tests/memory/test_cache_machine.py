"""Any sequence of operations on a cache with two tiers: what it gives is right, and what it counts is what it holds."""

from __future__ import annotations

import attrs
import torch
from fake_device import FakeMover
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import longspan as ls
from longspan.memory.cache import PatternCache

KEYS = st.sampled_from([f"key {n}" for n in range(8)])
NUMBERS = st.integers(0, 200)


@attrs.frozen
class Blocks:
    rows: torch.Tensor
    number: int


class CacheMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(0, 8000), device_limit=st.integers(0, 4000))
    def start(self, limit, device_limit):
        self.mover = FakeMover()
        self.cache = PatternCache(limit, device_limit, mover_of=lambda _: self.mover)
        self.values: dict[str, int] = {}
        self.pins: dict[str, int] = {}
        self.given: list[tuple[Blocks, int]] = []
        self.gets = 0

    def right(self, key, found):
        """What is found is what was put last; what is pinned is found."""
        if found is None:
            assert not self.pins.get(key), "a pinned entry was dropped"
            self.values.pop(key, None)
            return
        number = self.values[key]
        if isinstance(found, Blocks):
            assert found.number == number and bool((found.rows == number).all())
            self.given.append((found, number))
        else:
            assert found == ("plain", number)

    @rule(key=KEYS, number=NUMBERS, count=st.integers(0, 300))
    def put_tensors(self, key, number, count):
        layout = Blocks(torch.full((count,), number), number)
        self.cache.put(key, layout)
        layout.rows.fill_(-1)  # it was copied
        self.values[key] = number

    @rule(key=KEYS, number=NUMBERS)
    def put_plain(self, key, number):
        self.cache.put(key, ("plain", number))
        self.values[key] = number

    @rule(key=KEYS)
    def get(self, key):
        self.gets += 1
        self.right(key, self.cache.get(key))

    @rule(keys=st.lists(KEYS, max_size=6))
    def get_batch(self, keys):
        self.gets += len(keys)
        for key, found in zip(keys, self.cache.get_batch(keys), strict=True):
            self.right(key, found)

    @rule(keys=st.lists(KEYS, max_size=6))
    def prefetch(self, keys):
        self.cache.prefetch(keys)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def scribble(self, data):
        found, _ = self.given.pop(data.draw(st.integers(0, len(self.given) - 1)))
        found.rows.fill_(-2)

    @rule(key=KEYS)
    def pin(self, key):
        try:
            self.cache.pin(key)
        except ls.ArgumentError:
            assert key not in self.cache
        else:
            self.pins[key] = self.pins.get(key, 0) + 1

    @rule(key=KEYS)
    def unpin(self, key):
        try:
            self.cache.unpin(key)
        except ls.ArgumentError:
            assert not self.pins.get(key)
        else:
            self.pins[key] -= 1

    @rule()
    def clear(self):
        self.cache.clear()
        self.values.clear()
        self.pins.clear()

    @rule()
    def fork(self):
        self.cache.forked()

    @rule(number=st.integers(0, 5))
    def time_goes_on(self, number):
        self.mover.run_until(self.mover.done + number)

    @invariant()
    def what_is_counted_is_what_is_held(self):
        entries = self.cache._entries.values()
        stats = self.cache.stats
        assert stats.host_bytes == sum(entry.host_bytes for entry in entries)
        assert stats.device_bytes == sum(entry.device_bytes for entry in entries)
        assert stats.hits + stats.misses == self.gets
        assert stats.hits == sum(one.hits for one in stats.patterns.values())
        assert stats.entries == len(self.cache.keys())
        assert stats.pinned == sum(count > 0 for count in self.pins.values())

    @invariant()
    def it_is_bounded(self):
        pinned = [entry for entry in self.cache._entries.values() if entry.pins]
        stats = self.cache.stats
        assert stats.host_bytes <= max(self.cache.limit, sum(entry.host_bytes for entry in pinned))
        # one entry may be up beyond the limit: what was asked for last, or what alone is larger
        loose = [entry.device_bytes for entry in self.cache._entries.values() if not entry.pins]
        pinned_bytes = sum(entry.device_bytes for entry in pinned)
        assert stats.device_bytes <= max(self.cache.device_limit, pinned_bytes) + sum(sorted(loose)[-6:])

    @invariant()
    def pinned_entries_are_there(self):
        assert all(key in self.cache for key, count in self.pins.items() if count)

    @invariant()
    def what_was_given_stays_what_it_was(self):
        assert all(bool((found.rows == number).all()) for found, number in self.given[-5:])

    @invariant()
    def nothing_gone_is_held_on_to(self):
        assert len(self.cache._queue) <= 2 * len(self.cache) + 65 + 8


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
