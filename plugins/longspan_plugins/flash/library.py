"""What the flash backend knows of each library: its distribution, what it takes, how to make a kernel."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from attrs import frozen

from longspan.plugin import Kernel, Problem

__all__ = ["Library"]


@frozen
class Library:
    """One library of the family. Nothing is imported before a kernel is made.

    `modules` must be found; `distribution` gives the version; `capabilities` are the CUDA capabilities, lowest and
    highest major version, that it has kernels for.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    majors: tuple[int, int]
    kernel: Callable[[Problem], Kernel]

    @property
    def version(self) -> str | None:
        """The version that is installed; None where a module of the library is missing."""
        try:
            if any(find_spec(module) is None for module in self.modules):
                return None
            return version(self.distribution)
        except (ImportError, PackageNotFoundError, ValueError):
            return None

    def takes(self, problem: Problem) -> bool:
        """Whether it has kernels for the problem's device, a recent one where its capability is not known."""
        major, _ = problem.device.capability or (8, 0)
        return self.majors[0] <= major <= self.majors[1]
