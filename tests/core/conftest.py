"""What most tests of the core share: one thread, and backends that are gone again after the test."""

from __future__ import annotations

import os

import pytest
import torch

import longspan as ls


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small tensors: on a busy machine, threads that wait for one another cost minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def register():
    """`ls.register(plugin, name)` that returns the name, undone at the end."""
    names = []

    def add(plugin, name):
        ls.register(plugin, name=name)
        names.append(name)
        return name

    yield add
    for name in reversed(names):
        ls.unregister(name)


@pytest.fixture
def give_away(monkeypatch):
    """`give_away(path)`: it belongs to another user from then on, or seems to where that takes root."""

    def give(path):
        try:
            os.chown(path, 4242, -1)
        except PermissionError:
            another = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: another)

    return give
