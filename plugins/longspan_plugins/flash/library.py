"""What the flash backend knows of each library of the family: its distribution, what it takes, what to call."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from attrs import frozen

from longspan.plugin import Kernel, Problem
from longspan_plugins.flash.package import kernel_of

__all__ = ["LIBRARIES", "Library"]


@frozen
class Library:
    """One library of the family. Nothing is imported before a kernel is made.

    `distribution` gives the version; `modules` must be found; `majors` are the lowest and the highest major version of
    the CUDA capabilities that it has kernels for; `functions` of the module `interface` are its low-level forward and
    backward, which either writes its gradients into tensors or returns them.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    majors: tuple[int, int]
    interface: str
    functions: tuple[str, str] = ("_flash_attn_forward", "_flash_attn_backward")
    gradients_returned: bool = False

    def kernel(self, problem: Problem) -> Kernel:
        """Its kernel for a dense problem."""
        package = import_module(self.interface)
        forward, backward = (getattr(package, name) for name in self.functions)
        return kernel_of(problem, forward, backward, self.gradients_returned)

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


LIBRARIES = (
    Library(  # the CuTe DSL kernels, for Hopper and Blackwell
        "FlashAttention 4",
        "flash-attn-4",
        ("flash_attn.cute",),
        (9, 10),
        "flash_attn.cute.interface",
        ("_flash_attn_fwd", "_flash_attn_bwd"),
        gradients_returned=True,
    ),
    Library(
        "FlashAttention 3", "flash_attn_3", ("flash_attn_interface", "flash_attn_3"), (9, 9), "flash_attn_interface"
    ),
    Library(
        "FlashAttention 2",
        "flash-attn",
        ("flash_attn", "flash_attn_2_cuda"),
        (8, 12),
        "flash_attn.flash_attn_interface",
    ),
)
"""Best first."""
