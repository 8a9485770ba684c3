"""Peak memory of one call, in a process of its own, from the kernel's high-water mark."""

from __future__ import annotations

import json
import subprocess
import sys

__all__ = ["peak_bytes"]

_PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
import json, sys, torch, torch.nn.functional as F
import longspan
from longspan.tools.meter import PeakMemory
side, shape, dtype, gradients, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
def run(shape):
    x = [torch.randn(shape).to(getattr(torch, dtype)).requires_grad_(gradients) for _ in range(3)]
    def call():
        if side == "SDPA":
            out = F.scaled_dot_product_attention(*x)
        else:
            out = longspan.attention(*x, backend=side)
        return (out, *torch.autograd.grad(out, x, out)) if gradients else (out,)
    return call
run([1, 2, 256, shape[3]])()
call = run(shape)
with PeakMemory(torch.device("cpu")) as meter:
    results = call()
print(int(meter.mib * 2**20) - sum(x.nbytes for x in results))
"""


def peak_bytes(side: str, shape: tuple[int, ...], dtype: str, gradients: bool) -> int:
    """Bytes beyond inputs and results (out, with `gradients` the three gradients too) at a call's peak.

    Args:
        side: a backend's name, or `SDPA` for torch's own.
        shape: `(batch, heads, seq, head_dim)`.
        dtype: a torch dtype's name.
        gradients: forward and backward.
    """
    import torch

    given = json.dumps([side, list(shape), dtype, gradients, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-c", _PROGRAM, given], capture_output=True, text=True, check=True)
    return int(done.stdout)
