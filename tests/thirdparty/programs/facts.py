"""What longspan chooses and computes in this site: run once without third-party packages, and once beside them.

usage: facts.py REPORT.json
"""

import hashlib
import itertools
import json
import sys
import time

import torch

start = time.perf_counter()
import longspan as ls  # noqa: E402 - timed

torch.set_num_threads(1)
found = {"import longspan": {"seconds": time.perf_counter() - start}}


def acme():
    return sorted(name for name in sys.modules if name.startswith("acme"))


found["import longspan"] |= {"imported": acme(), "cuda": torch.cuda.is_initialized()}

DEVICES = ("cpu", "cuda", "sm_61", "sm_70", "sm_75", "sm_80", "sm_90", "gfx942", "mps", "xpu")
PATTERNS = ("dense", "dilated:64/1,128/2", "dilated:64/1,128/2:grouped", "window:16,3")
ARGUMENTS = {
    "plain": {},
    "causal": {"is_causal": True, "requires_grad": True},
    "shared key heads": {"kv_heads": 2},
    "dropout": {"dropout_p": 0.25},
    "documents": {"documents": (0, 100, 256)},
    "fewer queries": {"q_len": 100, "kv_len": 256, "query_offset": 156},
    "deterministic": {"deterministic": True},
    "odd head_dim": {"head_dim": 33},
}


def problems():
    dtypes = ("float16", "bfloat16", "float32", "float64")
    for device, pattern, dtype, argument in itertools.product(DEVICES, PATTERNS, dtypes, ARGUMENTS):
        shape = {"batch": 1, "heads": 4, "q_len": 256, "head_dim": 32, **ARGUMENTS[argument]}
        fields = {"pattern": ls.parse_pattern(pattern), "dtype": dtype, "device": device, **shape}
        yield f"{device} {pattern} {dtype} {argument}", ls.Problem(**fields)


def digest(*tensors):
    raw = [one.detach().contiguous().view(torch.uint8).numpy().tobytes() for one in tensors]
    return hashlib.sha256(b"".join(raw)).hexdigest()


def computed(dtype, pattern, **arguments):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 130, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    out, lse = ls.attention(*inputs, ls.parse_pattern(pattern), return_lse=True, **arguments)
    return digest(out, lse, *torch.autograd.grad(out.sum(), inputs))


found["results"] = {  # before any listing: this is what a user's program does first
    f"{dtype} {pattern} causal={causal}": computed(dtype, pattern, is_causal=causal)
    for dtype in (torch.float16, torch.float32, torch.float64)
    for pattern in PATTERNS
    for causal in (False, True)
}
found["ledger"] = [row.to_dict() for row in ls.backends()]
builtin = {row["name"] for row in found["ledger"] if row["distribution"] == "longspan"}
found["resolutions"] = {}
for name, problem in problems():
    resolution = ls.explain(problem).to_dict()
    resolution["candidates"] = [one for one in resolution["candidates"] if one["name"] in builtin]
    found["resolutions"][name] = resolution
found["imported"], found["cuda"] = acme(), torch.cuda.is_initialized()

with open(sys.argv[1], "w") as file:
    json.dump(found, file)
