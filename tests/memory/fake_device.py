"""A second tier on a CPU: transfers that happen when they are waited for, and garbage until then."""

from __future__ import annotations

import torch


class Mark:
    def __init__(self, mover, number):
        self.mover, self.number = mover, number

    def wait(self):
        self.mover.run_until(self.number)

    def seconds(self):
        return 0.5 if self.mover.done >= self.number else None


class FakeMover:
    """In the order of a stream: what was started first is done first, none of it before somebody waits."""

    def __init__(self):
        self.pending, self.number, self.done = [], 0, 0
        self.used = []
        self.batches = []

    def to_host(self, flat):
        host = torch.full_like(flat, 255)
        return host, self._start(lambda: host.copy_(flat))

    def to_device(self, flats):
        moved = [torch.full_like(flat, 255) for flat in flats]
        self.batches.append(len(moved))

        def copy():
            for to, of in zip(moved, flats, strict=True):
                to.copy_(of)

        return moved, self._start(copy)

    def use(self, flat):
        self.used.append(flat)

    def _start(self, copy):
        self.number += 1
        self.pending.append((self.number, copy))
        return Mark(self, self.number)

    def run_until(self, number):
        while self.pending and self.pending[0][0] <= number:
            self.done, copy = self.pending.pop(0)
            copy()
