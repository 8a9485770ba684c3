"""A device that bytes can leave, on a CPU: transfers that happen when they are waited for, and garbage until then."""

from __future__ import annotations

import torch


class FakeEvent:
    def __init__(self, offloader, number):
        self.offloader, self.number = offloader, number

    def wait(self):
        is_over = self.offloader.done >= self.number
        self.offloader.run_until(self.number)
        return is_over


class FakeOffloader:
    """In the order of a stream: what was started first is done first, none of it before somebody waits."""

    def __init__(self):
        self.pending, self.number, self.done = [], 0, 0
        self.used = []
        self.batches = []

    def to_host(self, data):
        host = torch.full_like(data, 255)
        self._start(lambda: host.copy_(data))
        return host

    def to_device(self, data):
        copies = [torch.full_like(flat, 255) for flat in data]
        self.batches.append(len(copies))

        def copy():
            for to, of in zip(copies, data, strict=True):
                to.copy_(of)

        return copies, self._start(copy)

    def use(self, data):
        self.used.append(data)

    def _start(self, copy):
        self.number += 1
        self.pending.append((self.number, copy))
        return FakeEvent(self, self.number)

    def run_until(self, number):
        while self.pending and self.pending[0][0] <= number:
            self.done, copy = self.pending.pop(0)
            copy()
