"""Any sequence of operations on a cache of a device: what it gives is right, and what it counts is what it holds."""

from __future__ import annotations

import gc

import attrs
import torch
from fake_device import FakeOffloader
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import longspan as ls
from longspan.memory.cache import PatternCache
from longspan.memory.cached_layout import CachedLayout, DeviceCopy

KEYS = st.sampled_from([f"key {n}" for n in range(8)])
NUMBERS = st.integers(0, 200)


@attrs.frozen
class Blocks:
    rows: torch.Tensor
    number: int


class CacheMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(0, 8000), device_limit=st.integers(0, 4000))
    def start(self, limit, device_limit):
        self.offloader = FakeOffloader()
        self.cache = PatternCache(limit, device_limit, offloader_for=lambda _: self.offloader)
        self.values: dict[str, int] = {}
        self.pins: dict[str, int] = {}
        self.layouts: dict[str, tuple[str, int]] = {}
        self.held: list[tuple[DeviceCopy, str, int]] = []
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
        self.layouts.pop(key, None)

    @rule(key=KEYS, number=NUMBERS)
    def put_plain(self, key, number):
        self.layouts[key] = ("plain", number)
        self.cache.put(key, self.layouts[key])
        self.values[key] = number

    @rule(key=KEYS, name=st.sampled_from(["index", "masks"]), count=st.integers(0, 300))
    def copy_to_the_device(self, key, name, count):
        """A plan's, which keeps it; a value made of a layout that is there no more gets no place."""
        layout = self.layouts.get(key)
        number = 0 if layout is None else layout[1]
        mine = (Blocks(torch.full((count,), number), number), {name: torch.full((3,), number)})
        copy = self.cache.device_copy(key, layout, name, mine, torch.device("cpu"))
        assert copy is None or (key in self.cache and self.values[key] == number)
        if copy is not None:
            copy.wait()
            self.held.append((copy, name, number))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def a_plan_ends(self, data):
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache._make_room()  # as the next put or transfer does

    @rule(key=KEYS)
    def get(self, key):
        self.gets += 1
        self.right(key, self.cache.get(key))

    @rule(keys=st.lists(KEYS, max_size=6), then_get=st.booleans())
    def prefetch(self, keys, then_get):
        before = len(self.offloader.batches)
        self.cache.prefetch(keys)
        assert len(self.offloader.batches) <= before + 1
        for key in keys if then_get else ():
            self.get(key)

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
        self.layouts.clear()
        self.pins.clear()

    @rule()
    def fork(self):
        self.cache.forked()

    @rule(number=st.integers(0, 5))
    def time_goes_on(self, number):
        self.offloader.run_until(self.offloader.done + number)

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
        idle = [
            0 if entry.pins else sum(x.data.numel() for x in entry.idle()) for entry in self.cache._entries.values()
        ]
        held = stats.device_bytes - sum(idle)  # pinned, or used by plans
        # one entry may be up beyond the limit: what was asked for last, or what alone is larger
        assert stats.device_bytes <= max(self.cache.device_limit, held) + sum(sorted(idle)[-6:])

    @invariant()
    def pinned_entries_are_there(self):
        assert all(key in self.cache for key, count in self.pins.items() if count)

    @invariant()
    def what_was_given_stays_what_it_was(self):
        assert all(bool((found.rows == number).all()) for found, number in self.given[-5:])

    @invariant()
    def what_plans_hold_stays_what_it_was(self):
        for copy, name, number in self.held[-5:]:
            blocks, others = copy.value
            assert bool((blocks.rows == number).all()) and bool((others[name] == number).all())

    def teardown(self):
        """Nothing that is gone is held on to."""
        self.cache.clear()
        self.held.clear()
        held = gc.get_referents(self.cache.__dict__)
        assert not any(isinstance(one, CachedLayout) for some in held for one in gc.get_referents(some))


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
