"""Any sequence of operations on an arena: what lives is nobody else's, and what it counts is what it holds."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import longspan as ls
from longspan.memory.arena import BufferArena

CPU = torch.device("cpu")
KIB = 1024
SIZES = st.integers(0, 9000)  # KiB; extents are multiples of 2 MiB


def whole(tensor, number):
    """A byte of each page, and the last."""
    return bool((tensor[:: 4 * KIB] == number).all()) and bool((tensor[-1:] == number).all())


class ArenaMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(0, 32 * KIB), threshold=st.sampled_from([0, 64, 2048, 4096]))
    def start(self, limit, threshold):
        self.arena = BufferArena(limit=limit * KIB, threshold=threshold * KIB, poison=True)
        self.reservations = [self.arena.reserve() for _ in range(2)]
        self.living: list[tuple[torch.Tensor, int, ExitStack | None]] = []
        self.number = 0

    def mark(self, tensor, stack):
        self.number = self.number % 100 + 1
        tensor.fill_(self.number)
        self.living.append((tensor, self.number, stack))

    def who(self, data):
        return data.draw(st.sampled_from([self.arena, *self.reservations]))

    @rule(data=st.data(), size=SIZES)
    def allocate(self, data, size):
        self.mark(self.who(data).allocate(ls.BufferSpec("x", (size * KIB,), "uint8"), CPU), None)

    @rule(data=st.data(), size=SIZES, always=st.booleans())
    def lease(self, data, size, always):
        stack = ExitStack()
        spec = ls.BufferSpec("x", (size * KIB,), "uint8")
        self.mark(stack.enter_context(self.who(data).lease(spec, CPU, always=always)), stack)

    def pop(self, data):
        return self.living.pop(data.draw(st.integers(0, len(self.living) - 1)))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def end(self, data):
        tensor, number, stack = self.pop(data)
        assert whole(tensor, number)
        del tensor
        if stack is not None:
            stack.close()

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def end_but_keep_a_view(self, data):
        tensor, number, stack = self.pop(data)
        view = tensor[tensor.numel() // 3 :]
        del tensor
        if stack is not None:
            stack.close()
        self.living.append((view, number, None))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def release(self, data):
        tensor, number, stack = self.pop(data)
        self.arena.release(tensor)
        self.living.append((tensor, number, stack))

    @rule()
    def trim(self):
        self.arena.trim()

    @rule(index=st.integers(0, 1))
    def a_plan_dies(self, index):
        self.reservations[index] = self.arena.reserve()

    @rule()
    def fork(self):
        self.arena.forked()

    @invariant()
    def what_lives_is_whole(self):
        assert all(whole(tensor, number) for tensor, number, _ in self.living)

    @invariant()
    def what_lives_is_nobody_elses(self):
        addresses = [tensor.untyped_storage().data_ptr() for tensor, _, _ in self.living if tensor.numel()]
        assert len(addresses) == len(set(addresses))

    @invariant()
    def what_is_counted_is_what_is_held(self):
        gc.disable()  # it may find a plan that died, and its memory goes at once: between two looks
        try:
            self.look()
        finally:
            gc.enable()

    def look(self):
        stats = self.arena.stats
        assert stats.held == sum(extent.size for extent in self.arena._extents)
        assert stats.leased <= stats.held <= max(self.arena.limit, 0)
        assert stats.extents == len(self.arena._extents)
        free = {extent.address for extent in self.arena._extents if extent.is_free()}
        assert not free & {tensor.untyped_storage().data_ptr() for tensor, _, _ in self.living if tensor.numel()}

    def teardown(self):
        if not hasattr(self, "arena"):
            return
        for _, _, stack in self.living:
            if stack is not None:
                stack.close()
        self.living.clear()
        gc.collect()
        self.arena.trim()
        assert self.arena.stats.held == 0


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
