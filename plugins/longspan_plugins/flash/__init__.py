"""The FlashAttention family behind one name: the FA4, FA3 or FA2 package, whichever is installed and takes the device.

Dao et al., arXiv 2205.14135, 2307.08691, 2407.08608. The first of `LIBRARIES` that is there and takes a problem serves.
torch's own flash operator is one of those of `sdpa`.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve

from longspan.plugin import Capabilities, Kernel, Problem, Reason, hookimpl, install_line
from longspan_plugins.flash.library import LIBRARIES, Library


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Half precision on CUDA devices from Ampere on, with a native backward."""
    return Capabilities(
        devices=("cuda>=8.0",),
        dtypes=("float16", "bfloat16"),
        patterns=("dense",),
        causal=True,
        gqa=True,
        backward=True,
        head_dim_min=8,
        head_dim_max=256,
        head_dim_multiple=8,
        deterministic=True,
        tier=30,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """No package that has kernels for the device; and masking comes before scaling in these kernels."""
    if serving(problem) is None:
        wanted = [library.distribution for library in LIBRARIES if library.takes(problem)]
        want = f"the package {' or '.join(wanted)}" if wanted else "an older device"
        fix = install_line("flash-attn", "--no-build-isolation") if "flash-attn" in wanted else ""
        yield Reason("package", "flash", "not installed", want, fix)
    if problem.scale <= 0:
        yield Reason("scale", "scale", str(problem.scale), "a positive number", "scale the query instead")


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """The kernel of the best library here; `serving` names it."""
    library = serving(problem)
    assert library is not None  # a problem that none serves is refused
    return evolve(library.kernel(problem), library=f"{library.name} {library.version}")


def serving(problem: Problem) -> Library | None:
    """The installed library that serves a problem, if there is one."""
    return next((library for library in LIBRARIES if library.takes(problem) and library.version is not None), None)
