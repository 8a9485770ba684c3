"""The native CPU kernels against the float64 oracle, and what becomes of the backend without a C compiler."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.lowering.dense import lower
from longspan.testing import oracle
from longspan_plugins.cpu_fused import binding, library, native
from longspan_plugins.cpu_fused.patterns import program_for
from longspan_plugins.cpu_fused.program import TILE, Program

NATIVE = pytest.mark.skipif(library.compiler() is None, reason="no C compiler: there are no native kernels")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def tensors(batch, heads, kv_heads, q_len, kv_len, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def compare(query, key, value, pattern, dtype, **given):
    out, lse = ls.attention(query, key, value, pattern, backend="cpu_fused", return_lse=True, **given)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    out.backward(dout)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    want, want_lse = oracle(*wide, pattern, return_lse=True, **given)
    want.backward(dout.double())
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert bool((lse[~seen] == -math.inf).all()) and not bool(out.detach()[~seen].any())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=2e-5, rtol=2e-5)
    for mine, theirs in zip((query, key, value), wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=3 * tolerance, rtol=3 * tolerance)


PATTERNS = st.one_of(
    st.just(ls.Dense()),
    st.builds(ls.SlidingWindow, st.integers(0, 90), st.integers(0, 40)),
    st.sampled_from(
        [
            ls.Dilated((64, 128), (1, 2)),
            ls.Dilated((96,), (3,)),
            ls.Dilated((64, 128, 256), (1, 2, 2), offset="block"),
            ls.Dilated((64, 160), (2, 1), heads="grouped"),
            ls.local_blocks(70, 10, block_size=32) | ls.global_blocks(1, block_size=32),
            ls.random_blocks(0.3, block_size=16, seed=5),
            ~ls.random_blocks(0.4, block_size=160, seed=5),
        ]
    ),
)


@NATIVE
@settings(max_examples=60, deadline=None)
@given(
    pattern=PATTERNS,
    dtype=st.sampled_from(list(TOLERANCE)),
    length=st.integers(1, 330),
    dim=st.sampled_from([1, 3, 16, 24, 64, 80]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, -0.3, 0.0, 0.7]),
)
def test_native_kernels_are_the_oracle(pattern, dtype, length, dim, heads, is_causal, scale):
    query, key, value = tensors(2, *heads, length, length, dim, dtype)
    given = {"is_causal": is_causal, "scale": scale, "enable_gqa": heads[0] != heads[1]}
    compare(query, key, value, pattern, dtype, **given)


@NATIVE
@settings(max_examples=30, deadline=None)
@given(
    pattern=PATTERNS,
    q_len=st.integers(1, 200),
    kv_len=st.integers(1, 200),
    offset=st.integers(0, 150),
    is_causal=st.booleans(),
)
def test_queries_that_start_anywhere(pattern, q_len, kv_len, offset, is_causal):
    query, key, value = tensors(1, 2, 2, q_len, kv_len, 16, torch.float32)
    compare(query, key, value, pattern, torch.float32, is_causal=is_causal, query_offset=offset)


@NATIVE
@settings(max_examples=30, deadline=None)
@given(pattern=PATTERNS, cuts=st.lists(st.integers(0, 200), max_size=4), is_causal=st.booleans())
def test_packed_documents(pattern, cuts, is_causal):
    query, key, value = tensors(1, 2, 2, 200, 200, 16, torch.float32)
    documents = tuple(sorted({0, *cuts, 200}))
    compare(query, key, value, pattern, torch.float32, is_causal=is_causal, cu_seqlens=documents)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_survives(dtype):
    value = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 1, -1)
    value = torch.where(value.isfinite(), value, 0.0).view(1024, 1, 1, 64)
    query = torch.zeros_like(value)
    out = ls.attention(query, query, value, backend="cpu_fused")
    if dtype is torch.bfloat16:  # products of bfloat16 take subnormal numbers for 0
        smallest = torch.finfo(dtype).tiny
        value = torch.where(value.abs() < smallest, 0.0, value)
        out = torch.where(out.abs() < smallest, 0.0, out)
    assert torch.equal(out.abs(), value.abs()) and torch.equal(out > 0, value > 0)


@NATIVE
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_large_and_far_scores(dtype):
    query, key, value = (x.detach() for x in tensors(1, 2, 2, 150, 150, 16, dtype))
    for factor in (30.0, 1e3, 1e-3):
        out, lse = ls.attention(query * factor, key, value, backend="cpu_fused", return_lse=True)
        want, want_lse = oracle((query * factor).double(), key.double(), value.double(), return_lse=True)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5 * factor)
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), want, atol=0.1 if dtype is not torch.float32 else 5e-3, rtol=0.1)


@NATIVE
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "pattern",
    [ls.Dense(), ls.SlidingWindow(40, 0), ls.Dilated((64, 128), (1, 2)), ls.local_blocks(50, 0, block_size=32)],
)
def test_nothing_that_is_hidden_leaks(pattern, dtype):
    """Bit for bit: forward and gradients of the rows before an edit, whatever the edit."""
    query, key, value = tensors(1, 2, 2, 200, 200, 32, dtype)
    out = ls.attention(query, key, value, pattern, is_causal=True, backend="cpu_fused")
    dout = torch.ones_like(out)
    dout[:, :, 120:] = 0
    grads = torch.autograd.grad(out, (query, key, value), dout)
    for bad in (math.nan, math.inf, 7.0):
        edited = [x.detach().clone() for x in (query, key, value)]
        for x in edited[1:]:
            x[:, :, 120:] = bad
        edited = [x.requires_grad_() for x in edited]
        again = ls.attention(*edited, pattern, is_causal=True, backend="cpu_fused")
        assert torch.equal(again[:, :, :120], out[:, :, :120])
        if bad == 7.0:  # rows without a gradient still bring 0 times NaN to what they see
            for mine, theirs in zip(torch.autograd.grad(again, edited, dout), grads, strict=True):
                assert torch.equal(mine[:, :, :120], theirs[:, :, :120])


@NATIVE
def test_as_many_threads_as_torch_has(monkeypatch):
    query, key, value = tensors(1, 2, 1, 700, 700, 64, torch.float32)
    found = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = ls.attention(query, key, value, is_causal=True, enable_gqa=True, backend="cpu_fused")
            found.append([out, *torch.autograd.grad(out.sum(), (query, key, value))])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
        for mine, theirs in zip(other[2:], found[0][2:], strict=True):  # parts are summed in another order
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@NATIVE
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dropout_is_everybodys(dtype):
    query, key, value = tensors(2, 2, 1, 150, 150, 16, dtype)
    given = {"dropout_p": 0.4, "dropout_seed": 11, "is_causal": True, "enable_gqa": True}
    mine = ls.attention(query, key, value, backend="cpu_fused", **given)
    theirs = ls.attention(query, key, value, backend="reference", **given)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    dout = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for a, b in zip(
        torch.autograd.grad(mine, (query, key, value), dout),
        torch.autograd.grad(theirs, (query, key, value), dout),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=4 * tolerance, rtol=4 * tolerance)


@NATIVE
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(40, 400), min_size=1, max_size=3),
    rates=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    heads=st.integers(1, 5),
    n=st.integers(40, 700),
    is_causal=st.booleans(),
)
def test_dilated_programs_keep_the_lowered_pairs(lengths, rates, heads, n, is_causal):
    pattern = ls.Dilated(tuple(lengths), tuple(rates[: len(lengths)]))
    problem = ls.Problem(batch=1, heads=heads, q_len=n, head_dim=8, pattern=pattern, is_causal=is_causal)
    program = program_for(problem, library.load())
    if program is None:
        return
    pairs = 0
    tables = (program.tiles, program.segments, program.ranges, program.of_head)
    tiles, segments, ranges, of_head = (table.tensor() for table in tables)
    for head in range(heads):
        first, last = ranges[of_head[head]].tolist()
        rows = torch.cat([t[0] + t[1] * torch.arange(t[2]) for t in tiles[first:last]])
        assert len(rows.unique()) == len(rows)
        assert not program.covered or len(rows) == n
        for tile in tiles[first:last]:
            queries = tile[3] + tile[1] * torch.arange(tile[2])
            for s in segments[tile[4] : tile[5]]:
                keys = s[3] + s[1] * torch.arange(s[2])
                pairs += int(((keys <= queries[:, None]) if is_causal else torch.ones(len(queries), len(keys))).sum())
    assert pairs == lower(problem).pairs


@NATIVE
def test_the_plan_says_who_computes_and_the_profiler_agrees():
    made = ls.plan(ls.Problem(batch=1, heads=2, q_len=256, head_dim=64), backend="cpu_fused")
    assert isinstance(made.layout, Program) and "lanes" in made.libraries[0]
    assert made.verify().ok


@NATIVE
def test_threads_of_the_caller():
    query, key, value = (x.detach() for x in tensors(1, 2, 2, 400, 400, 32, torch.float32))
    want = ls.attention(query, key, value, is_causal=True, backend="cpu_fused")
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(ls.attention(query, key, value, is_causal=True, backend="cpu_fused"), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


HEADER = re.sub(r"/\*.*?\*/", "", Path(library.HERE, "attention.h").read_text(encoding="utf-8"), flags=re.DOTALL)


def members(structure):
    """The fields of one of the header's structures, all of 64 bits: how many words each takes."""
    (body,) = re.findall(rf"typedef struct {{([^{{}}]*)}} {structure};", HEADER)
    found = {}
    for declaration in filter(None, map(str.strip, body.split(";"))):
        words = re.fullmatch(r"(int64_t|double|(?:const )?\w+ (?=\*))\s*(.*)", declaration, re.DOTALL)
        for member in words[2].split(","):
            name, count = re.fullmatch(r"\s*\*?(\w+)(?:\[(\d+)\])?", member).groups()
            assert words[1] in ("int64_t", "double") or "*" in member
            found[name] = int(count or 1)
    return found


def test_the_fields_of_a_job_are_those_of_the_header():
    assert list(binding.FIELDS.items()) == list(members("Job").items())
    assert (binding.AT.batch, binding.AT.scale, binding.AT.query_at, binding.AT.failed) == (0, 7, 20, binding.WORDS - 1)


@NATIVE
def test_tiles_and_segments_have_as_many_columns_as_the_header_says():
    made = program_for(ls.Problem(batch=1, heads=1, q_len=9, head_dim=8), library.load())
    assert [table.shape[1] for table in (made.tiles, made.segments)] == [len(members("Tile")), len(members("Segment"))]
    assert int(re.search(r"TILE = (\d+)", HEADER)[1]) == TILE


@NATIVE
def test_every_field_of_a_job_is_filled_by_its_name(monkeypatch):
    """What the kernels would be told, by the header's order."""
    seen = []
    monkeypatch.setattr(native, "run", lambda function, words: seen.append(words.tolist()))
    query, key, value = tensors(2, 4, 2, 40, 40, 16, torch.float32)
    problem = ls.Problem.like(query, key, value, enable_gqa=True, is_causal=True, dropout_p=0.25)
    made = native.kernel(problem, program_for(problem, library.load()), library.load())
    numbers = torch.arange(40).expand(2, 4, 40)
    drop = ls.Dropout(0.25, 7, torch.arange(8).view(2, 4), numbers, numbers[:, :1])
    out, lse = made.forward(query, key, value, dropout=drop)
    made.backward(out, query, key, value, out, lse, dropout=drop, dlse=lse)
    for words, is_backward in zip(seen, (False, True), strict=True):
        job, places = {}, iter(words)
        for name, count in members("Job").items():
            one = [next(places) for _ in range(count)]
            job[name] = one if count > 1 else one[0]
        told = [job[name] for name in ("batch", "heads", "group", "dim", "kind", "parts")]
        assert told == [2, 4, 2, 16, 0, 1]
        for name, tensor in {"query": query, "key": key, "value": value}.items():
            assert (job[name], job[f"{name}_at"]) == (tensor.data_ptr(), list(tensor.stride()[:3]))
        for name in ("dout", "dlse", "dquery"):
            assert (job[name] != 0, any(job[f"{name}_at"])) == (is_backward, is_backward)
        assert struct.unpack("2d", struct.pack("2q", job["scale"], job["keep"])) == (0.25, 4 / 3)
        assert (job["seed"], job["threshold"], job["failed"]) == (7, 2**30 - 2**31, 0)
        assert (job["lines_at"], job["query_positions_at"], job["key_positions_at"]) == ([4, 1], [0, 0, 1], [0, 0, 1])
    assert job["lse"] == lse.data_ptr() == job["dlse"] and job["out"] == out.data_ptr() == job["dout"]


PROGRAM = """
import torch, longspan as ls
from longspan.testing import oracle
from longspan_plugins.cpu_fused.library import load
torch.manual_seed(0)
print(load().name, "|", load().refusal)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)):
    for pattern in (ls.Dense(), ls.SlidingWindow(30, 0), ls.Dilated((64, 128), (1, 2))):
        for n in (40, 600):
            q, k, v = (torch.randn(1, 2, n, 16).to(dtype).requires_grad_() for _ in range(3))
            wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
            out = ls.attention(q, k, v, pattern, is_causal=True, backend="cpu_fused")
            want = oracle(*wide, pattern, is_causal=True)
            torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
            out.sum().backward(), want.sum().backward()
            for a, b in zip((q, k, v), wide):
                torch.testing.assert_close(a.grad.double(), b.grad, atol=5 * tolerance, rtol=5 * tolerance)
libraries = " ".join(ls.plan(ls.Problem(batch=1, heads=1, q_len=64, head_dim=16), "cpu_fused").libraries)
assert load().refusal in libraries and ("native, " in libraries) == (not load().refusal), libraries
print("right")
"""


def start(tmp_path, **environ):
    kept = {key: value for key, value in os.environ.items() if key not in ("CC", "PATH")}
    given = {**kept, "PATH": "/nowhere", "LONGSPAN_CACHE": str(tmp_path), **environ}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("compiler", "said"),
    [(None, "need a C compiler, and none was found"), ("/bin/false", "did not make a library")],
)
def test_without_a_compiler_torch_operators_serve(tmp_path, compiler, said):
    process = start(tmp_path, **({"CC": compiler} if compiler else {}))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "torch operators" in out and said in out and out.endswith("right\n")


RANKED = """
import json, sys
import torch, longspan as ls
from attrs import asdict
from longspan.tools.doctor import examine
from longspan.tools.demo.report import Report
query = torch.randn(1, 2, 300, 16)
found = []
for pattern in (ls.Dense(), ls.SlidingWindow(30), ls.Dilated((64, 128), (1, 2)), ls.local_blocks(50, block_size=32)):
    problem = ls.Problem.like(query, query, query, pattern)
    first = ls.plan(problem)  # where the compiler fails, this is when that comes to light: the answer is the same
    resolution = ls.explain(problem)
    assert (first.backend, first.resolution.why) == (resolution.chosen, resolution.why)
    found.append([ls.plan(problem).backend, resolution.why, list(resolution.notes)])
    assert resolution["cpu_fused"].ok and ls.plan(problem, "cpu_fused").backend == "cpu_fused"
gpu = ls.explain(problem, device="sm_90").notes
remedies = [asdict(remedy) for remedy in examine(False, 60).remedies]
print(json.dumps({"found": found, "gpu": gpu, "remedies": remedies}))
"""


@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_without_native_kernels_auto_takes_what_runs_faster_and_says_what_is_lost(tmp_path, compiler):
    (tmp_path / "apt-get").symlink_to("/bin/false")  # the package manager that this machine seems to have
    given = {key: value for key, value in os.environ.items() if key != "CC" and not key.startswith("LONGSPAN_")}
    given |= {"PATH": str(tmp_path), "LONGSPAN_CACHE": str(tmp_path), **({"CC": compiler} if compiler else {})}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RANKED], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    line = "apt-get update && apt-get install -y gcc libc6-dev"
    for chosen, why, notes in said["found"]:
        assert chosen == "sdpa" and "natively" not in why.replace("dense runs natively", "")
        (note,) = [note for note in notes if note.startswith("cpu_fused")]
        assert note.startswith("cpu_fused works, and would be faster with native kernels (needs a C compiler")
        assert note.endswith(f"; fix: {line}")
    assert not [note for note in said["gpu"] if "cpu_fused" in note], "no compiler of a CPU's helps a GPU"
    (remedy,) = [one for one in said["remedies"] if one["what"].startswith("cpu_fused")]
    assert remedy["lines"] == [line] and remedy["broken"] is False


@pytest.mark.parametrize(
    ("programs", "said"),
    [(("dnf",), "dnf install -y gcc"), (("apk", "xyz"), "apk add gcc musl-dev"), ((), "set CC to a C compiler")],
)
def test_the_line_that_installs_a_compiler_is_that_of_the_package_manager(tmp_path, monkeypatch, programs, said):
    for name in programs:
        (tmp_path / name).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said in library.installing()


@NATIVE
def test_with_a_compiler_nothing_is_lacking():
    assert not library.missing() and not library.failure()
    assert not [row for row in ls.backends() if row.lacks]
    assert ls.explain(ls.Problem(batch=1, heads=2, q_len=300, head_dim=16)).chosen == "cpu_fused"


@NATIVE
def test_processes_that_build_at_once(tmp_path):
    """By a compiler that takes two seconds to copy a library which was made before."""
    library.load()
    ready = next(path for path in made(Path(os.environ["LONGSPAN_CACHE"])) if path.suffix == ".so")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nsleep 2\nwhile [ "$1" != -o ]; do shift; done\ncat "{ready}" > "$2"\n')
    compiler.chmod(0o755)
    processes = [start(tmp_path, PATH=os.environ["PATH"], CC=str(compiler)) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "native" in out and out.endswith("right\n")
    assert [path.suffix for path in (tmp_path / "cpu_fused").iterdir()] == [".so"]


@NATIVE
def test_a_kept_program_is_shared_and_cannot_be_changed():
    problem = ls.Problem(batch=1, heads=2, q_len=300, head_dim=16, pattern=ls.SlidingWindow(40, 0))
    one, other = (ls.plan(problem, backend="cpu_fused") for _ in range(2))
    assert one.layout is other.layout
    one.layout.tiles.tensor().fill_(-1)
    assert int(other.layout.tiles.tensor().min()) >= 0
    again = pickle.loads(pickle.dumps(one.layout.tiles))
    assert again == one.layout.tiles and torch.equal(again.tensor(), one.layout.tiles.tensor())


@NATIVE
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_largest_scores_still_choose_a_key(dtype):
    """Scaled scores so large that a rounding of their maximum is more than float32's exponents hold."""
    query, key, value = tensors(1, 2, 2, 150, 150, 64, dtype)
    factor = 2e4 if dtype is torch.float16 else 1e6
    query, key = ((x.detach().clamp(-3, 3) * factor).requires_grad_() for x in (query, key))
    given = {"is_causal": True, "scale": 1.0, "return_lse": True}
    out, lse = ls.attention(query, key, value, backend="cpu_fused", **given)
    want, want_lse = oracle(query.detach(), key.detach(), value.detach(), **given)
    assert float(want_lse.abs().max()) > 2**33
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=0.0, rtol=1e-6)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    chosen = torch.zeros(1, 2, 150, dtype=torch.float64)  # rows choose one key each: its value gets their gradients
    scores = query.detach().double() @ key.detach().double().mT
    best = scores.masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), -math.inf).argmax(-1)
    chosen.scatter_add_(2, best, torch.ones_like(chosen))
    torch.testing.assert_close(grads[2].double(), chosen[..., None].expand_as(value), atol=1e-5, rtol=1e-5)


@NATIVE
@pytest.mark.parametrize("scale", [1e-46, 1e-39, 1e39, -1e39])
def test_scales_that_float32_does_not_hold(scale):
    query, key, value = (x.detach() for x in tensors(1, 2, 2, 90, 90, 16, torch.float32))
    out = ls.attention(query, key, value, is_causal=True, scale=scale, backend="cpu_fused")
    want = oracle(query, key, value, is_causal=True, scale=scale)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


@NATIVE
@pytest.mark.parametrize("pattern", [ls.SlidingWindow(16, 1), ls.SlidingWindow(0, 500), ls.Dense()])
@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (3, 1)])
def test_dropout_of_heads_that_share_keys(pattern, heads):
    query, key, value = tensors(2, *heads, 193, 193, 16, torch.float32)
    given = {"dropout_p": 0.35, "dropout_seed": 3, "enable_gqa": True}
    mine = ls.attention(query, key, value, pattern, backend="cpu_fused", **given)
    theirs = ls.attention(query, key, value, pattern, backend="reference", **given)
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
    dout = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    both = [torch.autograd.grad(out, (query, key, value), dout) for out in (mine, theirs)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=8e-5, rtol=8e-5)


@NATIVE
@pytest.mark.parametrize("start", [0, 1])
def test_pairs_that_start_at_any_element(start):
    """An even step between rows that start at an odd element: pairs of bfloat16 lie across 4-byte boundaries."""
    packed = torch.randn(1, 2, 150, 18, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    query, key, value = (packed[..., start : start + 16].detach().requires_grad_() for _ in range(3))
    compare(query, key, value, ls.Dense(), torch.bfloat16, is_causal=True)


@NATIVE
@pytest.mark.parametrize("far", [2**31 - 20, 2**60, 2**62])
def test_positions_and_reaches_beyond_32_bits(far):
    for pattern, options in (
        (ls.Dense(), {"is_causal": True, "query_offset": far}),
        (ls.SlidingWindow(far, far), {}),
        (ls.SlidingWindow(far, 0), {"query_offset": far}),
        (ls.Dilated((64, far), (1, 2)), {}),
    ):
        compare(*tensors(1, 2, 2, 90, 90, 16, torch.float32), pattern, torch.float32, **options)


@NATIVE
def test_reaches_of_any_size_are_no_limit():
    query, key, value = tensors(1, 2, 2, 90, 90, 16, torch.float32)
    want = ls.attention(query, key, value, backend="cpu_fused")
    for far in (2**62 - 1, 2**62):
        assert torch.equal(ls.attention(query, key, value, ls.SlidingWindow(far, far), backend="cpu_fused"), want)
        dilated = ls.attention(query, key, value, ls.Dilated((far,), (1,)), backend="cpu_fused")
        torch.testing.assert_close(dilated, want, atol=2e-6, rtol=2e-6)


@NATIVE
@pytest.mark.parametrize(
    ("rates", "program"), [((1, 1024), True), ((1, 1025), False), ((32, 31, 2), True), ((32, 33), False)]
)
def test_long_periods_are_lowered(rates, program):
    pattern = ls.Dilated((2**16,) * len(rates), rates)
    problem = ls.Problem(batch=1, heads=1, q_len=2**16, head_dim=8, pattern=pattern)
    assert isinstance(ls.plan(problem, backend="cpu_fused").layout, Program) == program


@NATIVE
@pytest.mark.parametrize(("batch", "heads"), [(1, 0), (0, 2), (0, 0)])
def test_kernels_of_nothing(batch, heads):
    problem = ls.Problem(batch=batch, heads=heads, q_len=200, head_dim=16)
    program = program_for(problem, library.load())
    kernel = native.kernel(problem, program, library.load())
    query = torch.empty(batch, heads, 200, 16)
    out, lse = kernel.forward(query, query, query)
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    assert all(grad.shape == query.shape for grad in kernel.backward(out, query, query, query, out, lse))


def made(folder):
    return sorted(path for path in (folder / "cpu_fused").iterdir())


@NATIVE
def test_the_compiler_may_have_arguments_and_spaces(tmp_path, monkeypatch):
    usual = library.compiler()[0]
    spaced = tmp_path / "a folder" / "my compiler"
    spaced.parent.mkdir()
    spaced.symlink_to(usual)
    for wanted, want in (
        (f"{usual} -O1 -DX='a b'", (usual, "-O1", "-DX=a b")),
        (str(spaced), (str(spaced),)),
        (f"'{spaced}' -O1", (str(spaced), "-O1")),
        ('"unclosed', library.compiler()),
        ("no-such-compiler", library.compiler()),
    ):
        monkeypatch.setenv("CC", wanted)
        assert library.compiler() == want
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "the cache"))
    monkeypatch.setenv("CC", f"'{spaced}' -O1")
    assert library.load.__wrapped__().handle and len(made(tmp_path / "the cache")) == 1
    monkeypatch.setenv("CC", str(spaced))
    assert library.load.__wrapped__().handle and len(made(tmp_path / "the cache")) == 2


@NATIVE
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_very_large_scores_of_one_row_leave_the_others_bits(dtype):
    query, key, value = (x.detach() for x in tensors(1, 2, 2, 100, 100, 16, dtype))
    louder = key.clone()
    louder[..., 40, :] = 3e4
    results = []
    for keys in (key, louder):
        q, k, v = (x.clone().requires_grad_() for x in (query, keys, value))
        out, lse = ls.attention(q, k, v, is_causal=True, backend="cpu_fused", return_lse=True)
        dquery, _, _ = torch.autograd.grad(out.float().square().sum() + lse[..., :40].sum(), (q, k, v))
        results.append((out, lse, dquery))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(results[0][0], results[1][0])


# ---------------------------------------------------------------------------------------------------------- shares

SHARED = {
    "causal": (ls.Dense(), {"is_causal": True}),
    "window": (ls.SlidingWindow(100, 0), {}),
    "both-ways": (ls.SlidingWindow(60, 90), {}),
    "random": (ls.random_blocks(0.2, 64), {}),
    "global": (ls.local_blocks(300, 10, 64) | ls.global_tokens((0,), 64), {}),
    "heads": (ls.per_head([ls.local_blocks(300, 10, 64), ls.random_blocks(0.2, 64)]), {"heads": 2}),
    "dilated": (ls.Dilated((512, 2048), (1, 4)), {"is_causal": True}),
    "documents": (ls.SlidingWindow(100, 0), {"documents": (0, 700, 701, 4000, 4096)}),
}


@NATIVE
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("name", SHARED)
def test_every_tile_is_in_one_share(name, count):
    from longspan_plugins.cpu_fused.library import load
    from longspan_plugins.cpu_fused.patterns import program_for
    from longspan_plugins.cpu_fused.shares import share

    pattern, more = SHARED[name]
    program = program_for(
        ls.Problem(**{"batch": 1, "heads": 1, "q_len": 4096, "head_dim": 16, "pattern": pattern, **more}), load()
    )
    found = share(program, count)
    assert found.count == count
    runs = found.tiles.tensor()
    if found.between is not None:
        runs = torch.cat([runs, found.between.tensor()], dim=1)
        assert name not in ("causal", "random", "global")
    for (first, last), mine in zip(program.ranges.tensor().tolist(), runs, strict=True):
        tiles = torch.cat([torch.arange(a, b) for a, b in mine.tolist()])
        assert torch.equal(tiles.sort().values, torch.arange(first, last))
    if name == "window" and count == 2:
        assert found.between is not None


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 20])
@pytest.mark.parametrize("name", [name for name in SHARED if name not in ("heads", "documents")])
def test_gradients_whatever_the_number_of_threads(name, dim, dtype):
    pattern, more = SHARED[name]
    query, key, value = (x.detach().to(dtype) for x in tensors(1, 1, 1, 1500, 1500, dim, torch.float32))
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    grads = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            out = ls.attention(*leaves, pattern, backend="cpu_fused", **more)
            grads.append(torch.autograd.grad(out, leaves, dout))
            again = ls.attention(*leaves, pattern, backend="cpu_fused", **more)
            repeated = torch.autograd.grad(again, leaves, dout)
            assert all(torch.equal(*pair) for pair in zip(grads[-1], repeated, strict=True))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 if dtype is torch.float32 else 2e-2, rtol=2e-2)


@NATIVE
@pytest.mark.parametrize("scale", [-1e6, -1e3, 1e3, -0.1])
def test_gradients_of_bfloat16_under_any_scale(scale):
    query, key, value = (x.detach().bfloat16().requires_grad_() for x in tensors(1, 1, 1, 64, 64, 64, torch.float32))
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    out = ls.attention(query, key, value, scale=scale, backend="cpu_fused")
    want = oracle(*wide, ls.Dense(), scale=scale)
    (dvalue,) = torch.autograd.grad(out, value, dout)
    (wanted,) = torch.autograd.grad(want, wide[2], dout.double())
    assert float((dvalue.double() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
