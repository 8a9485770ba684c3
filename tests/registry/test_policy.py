"""Who decides: block, then the backend named (argument, context, environment), then the preferences, then auto."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

import longspan as ls
from longspan import blockwise
from longspan.registry.policy import Policy, current, fingerprint, flag, names

VARIABLES = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT")
A, B, C, D = "test-a", "test-b", "test-c", "test-d"
AUTO = "cpu_fused"  # what auto takes where nobody asks for anything


class Mine:
    """Serves everything on a CPU, and counts."""

    def __init__(self):
        self.calls = 0

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(
            devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True, gqa=True
        )

    @ls.hookimpl
    def longspan_kernel(self, problem):
        def kernel(query, key, value):
            self.calls += 1
            return blockwise.forward(query, key, value, is_causal=problem.is_causal, scale=problem.scale)

        return kernel


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def mine():
    plugins = {name: Mine() for name in (A, B, C, D)}
    for name, plugin in plugins.items():
        ls.register(plugin, name=name)
    yield plugins
    for name in plugins:
        ls.unregister(name)


X = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))


def who(mine, backend=None):
    """Which backend ran, found out by running, and checked against what the resolution says."""
    before = {name: plugin.calls for name, plugin in mine.items()}
    ls.attention(X, X, X, backend=backend)
    ran = [name for name, plugin in mine.items() if plugin.calls > before[name]]
    chosen = ls.explain(ls.Problem.like(X, X, X), backend=backend).chosen
    assert ran == ([chosen] if chosen in mine else []), "what ran is not what was explained"
    return chosen


def decided_by(backend=None):
    return ls.explain(ls.Problem.like(X, X, X), backend=backend).decided_by


# --- the order ------------------------------------------------------------------------------------------------------


def test_auto_takes_no_plugin_that_nobody_named(mine):
    assert who(mine) == AUTO
    assert decided_by() == "auto"


def test_argument_before_context_before_environment_before_prefer(mine, monkeypatch):
    monkeypatch.setenv("LONGSPAN_PREFER", D)
    assert (who(mine), decided_by()) == (D, "environment")
    monkeypatch.setenv("LONGSPAN_BACKEND", C)
    assert (who(mine), decided_by()) == (C, "environment")
    with ls.use(backend=B):
        assert (who(mine), decided_by()) == (B, "context")
        assert (who(mine, A), decided_by(A)) == (A, "argument")
        assert (who(mine), decided_by()) == (B, "context")
    assert (who(mine), decided_by()) == (C, "environment")


def test_a_backend_named_anywhere_comes_before_a_preference_anywhere(mine, monkeypatch):
    with ls.use(prefer=(A,)):
        assert (who(mine), decided_by()) == (A, "context")
        monkeypatch.setenv("LONGSPAN_BACKEND", B)
        assert (who(mine), decided_by()) == (B, "environment")
        assert (who(mine, C), decided_by(C)) == (C, "argument")


def test_a_preference_in_a_context_comes_before_one_in_the_environment(mine, monkeypatch):
    monkeypatch.setenv("LONGSPAN_PREFER", f"{B},{A}")
    assert who(mine) == B
    with ls.use(prefer=(A, B)):
        assert (who(mine), decided_by()) == (A, "context")
    assert (who(mine), decided_by()) == (B, "environment")


@pytest.mark.parametrize("place", ["context", "environment"])
def test_block_comes_before_everything(mine, monkeypatch, place):
    with ExitStack() as stack:
        if place == "context":
            stack.enter_context(ls.use(block=(A,)))
        else:
            monkeypatch.setenv("LONGSPAN_BLOCK", A)
        with pytest.raises(ls.BackendUnavailable, match="blocked"):
            ls.attention(X, X, X, backend=A)
        with ls.use(backend=A), pytest.raises(ls.BackendUnavailable, match="blocked"):
            ls.attention(X, X, X)
        with ls.use(prefer=(A, B)):
            assert who(mine) == B
        with monkeypatch.context() as patch:
            patch.setenv("LONGSPAN_BACKEND", A)
            with pytest.raises(ls.BackendUnavailable, match="blocked"):
                ls.attention(X, X, X)
    verdict = ls.explain(ls.Problem.like(X, X, X), backend=B)[A]
    assert verdict.ok or place == "environment"
    assert mine[A].calls == 0


def test_a_block_says_how_to_lift_it(mine):
    with ls.use(block=A):
        reason = ls.explain(ls.Problem.like(X, X, X))[A].reasons[0]
    assert reason.code == "blocked"
    assert "block" in reason.fix


def test_blocking_all_that_fit_leaves_auto_without_a_choice_that_it_may_take(mine):
    with ls.use(block=(AUTO, "sdpa")), pytest.raises(ls.BackendUnavailable, match=A):
        ls.attention(X, X, X)


# --- `use` ----------------------------------------------------------------------------------------------------------


def test_nested_blocks_of_use(mine):
    with ls.use(backend=A):
        assert who(mine) == A
        with ls.use(backend=B):
            assert who(mine) == B
            with ls.use(prefer=(C,)):
                assert who(mine) == B, "a preference does not undo a name"
            with ls.use(block=(C,)):
                assert who(mine) == B
        assert who(mine) == A
    assert who(mine) == AUTO


def test_nested_preferences_replace_and_blocks_add_up(mine):
    with ls.use(prefer=(A, B, C)), ls.use(block=A):
        assert who(mine) == B
        with ls.use(block=(B,)):
            assert who(mine) == C
            with ls.use(prefer=(D, A, B)):
                assert who(mine) == D
            with ls.use(block=C):
                assert who(mine) == AUTO
        assert who(mine) == B
    assert who(mine) == AUTO


def test_use_ends_with_an_exception(mine):
    with pytest.raises(ZeroDivisionError), ls.use(backend=A, block=(B,)):
        raise ZeroDivisionError
    assert who(mine) == AUTO
    assert who(mine, B) == B


def test_use_as_a_decorator_each_time_the_function_is_called(mine):
    @ls.use(backend=A)
    def inside():
        return who(mine)

    assert who(mine) == AUTO
    assert inside() == A
    assert inside() == A
    with ls.use(backend=B):
        assert inside() == A
        assert who(mine) == B
    assert who(mine) == AUTO


def test_use_as_a_decorator_of_an_async_function(mine):
    """In force while the coroutine runs, not while it is made."""

    @ls.use(backend=A)
    async def inside():
        await asyncio.sleep(0)
        return who(mine)

    assert asyncio.run(inside()) == A
    assert who(mine) == AUTO


def test_use_as_a_decorator_of_a_generator_works_or_is_refused(mine):
    """A generator's body runs after the call that made it. In force while it runs, or refused: never dropped."""

    def inside():
        yield who(mine)

    async def inside_async():
        yield who(mine)

    async def all_of(generator):
        return [one async for one in generator]

    for function, take in ((inside, list), (inside_async, lambda made: asyncio.run(all_of(made)))):
        try:
            wrapped = ls.use(backend=A)(function)
        except ls.PolicyError as refusal:
            assert "generator" in str(refusal)
            continue
        assert take(wrapped()) == [A]
        assert who(mine) == AUTO


def test_one_use_object_many_times(mine):
    """A policy that a program keeps, entered again and again, also within itself."""
    policy = ls.use(backend=A)
    for _ in range(2):
        with policy:
            assert who(mine) == A
            with ls.use(backend=B), policy:
                assert who(mine) == A
            assert who(mine) == A
        assert who(mine) == AUTO


def test_one_use_object_in_two_threads(mine):
    """First in, first out: the other thread's block begins after this one's and ends after it."""
    policy = ls.use(backend=A)
    other_is_in, this_is_out = threading.Event(), threading.Event()
    seen = []

    def work():
        with policy:
            other_is_in.set()
            this_is_out.wait(30)
            seen.append(ls.explain(ls.Problem.like(X, X, X)).chosen)
        seen.append(ls.explain(ls.Problem.like(X, X, X)).chosen)

    def both():
        with ThreadPoolExecutor(1) as pool:
            try:
                with policy:
                    job = pool.submit(work)
                    other_is_in.wait(30)
                    assert who(mine) == A
            finally:
                this_is_out.set()
            job.result(30)
        assert who(mine) == AUTO

    contextvars.copy_context().run(both)  # what goes wrong here stays here
    assert seen == [A, AUTO]


def test_one_use_object_in_two_tasks(mine):
    policy = ls.use(backend=A)

    async def work(inside, go_on):
        with policy:
            inside.set()
            await go_on.wait()
            seen = ls.explain(ls.Problem.like(X, X, X)).chosen
        return seen, ls.explain(ls.Problem.like(X, X, X)).chosen

    async def main():
        inside, go_on = [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]
        tasks = [asyncio.create_task(work(*pair)) for pair in zip(inside, go_on, strict=True)]
        for event in inside:
            await event.wait()
        go_on[0].set()
        first = await tasks[0]
        go_on[1].set()
        return first, await tasks[1]

    assert asyncio.run(main()) == ((A, AUTO), (A, AUTO))


def test_use_with_nothing_changes_nothing(mine):
    with ls.use(backend=A), ls.use():
        assert who(mine) == A


@pytest.mark.parametrize("bad", ["", 5, (A,), True, b"sdpa"], ids=repr)
def test_use_refuses_a_backend_that_is_no_name(bad):
    before = current()
    with pytest.raises(ls.PolicyError, match="backend"), ls.use(backend=bad):
        pass
    assert current() == before


def test_a_policy_is_read_when_a_plan_is_made_never_when_it_runs(mine):
    made = ls.plan(ls.Problem.like(X, X, X), backend=A)
    with ls.use(backend=B, block=(A,)):
        made(X, X, X)
    assert (mine[A].calls, mine[B].calls) == (1, 0)


def test_gradients_come_from_the_backend_that_ran_forward(mine):
    x = X.clone().requires_grad_()
    with ls.use(backend=A):
        out = ls.attention(x, x, x)
    with ls.use(backend=B, block=(A,)):
        out.sum().backward()
    assert x.grad is not None
    assert mine[B].calls == 0


# --- threads and tasks ----------------------------------------------------------------------------------------------


def test_threads_do_not_see_each_others_policy(mine):
    """All are inside their blocks at the same time, and none sees another's."""
    wanted = [A, B, C, D, None] * 3
    together = threading.Barrier(len(wanted))

    def work(name):
        with ls.use(backend=name):
            together.wait(30)
            seen = [ls.explain(ls.Problem.like(X, X, X)).chosen for _ in range(5)]
            together.wait(30)
            return seen

    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(work, wanted))
    assert found == [[name or AUTO] * 5 for name in wanted]
    assert who(mine) == AUTO


def test_a_thread_started_in_a_block_decides_for_itself(mine):
    """Whether it inherits the policy is Python's rule for context variables; it never changes its parent's."""
    seen = []

    def work():
        with ls.use(backend=B):
            seen.append(who(mine))

    with ls.use(backend=A):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
        assert seen == [B]
        assert who(mine) == A


def test_tasks_do_not_see_each_others_policy(mine):
    async def work(name, turn):
        seen = []
        with ls.use(backend=name):
            for _ in range(4):
                seen.append(ls.explain(ls.Problem.like(X, X, X)).chosen)
                await turn.wait()
                await asyncio.sleep(0)
        seen.append(ls.explain(ls.Problem.like(X, X, X)).chosen)
        return seen

    async def main():
        turn = asyncio.Event()
        with ls.use(backend=D):  # tasks inherit it, and go back to it
            tasks = [asyncio.create_task(work(name, turn)) for name in (A, B, C)]
            await asyncio.sleep(0)
        turn.set()
        return await asyncio.gather(*tasks), ls.explain(ls.Problem.like(X, X, X)).chosen

    found, outside = asyncio.run(main())
    assert found == [[name] * 4 + [D] for name in (A, B, C)]
    assert outside == AUTO


# --- the environment ------------------------------------------------------------------------------------------------


def test_a_changed_environment_takes_effect_at_the_next_call(mine, monkeypatch):
    assert who(mine) == AUTO
    monkeypatch.setenv("LONGSPAN_BACKEND", A)
    assert who(mine) == A
    monkeypatch.setenv("LONGSPAN_BACKEND", B)
    assert who(mine) == B
    monkeypatch.delenv("LONGSPAN_BACKEND")
    monkeypatch.setenv("LONGSPAN_PREFER", f" {C} , {A} ")
    assert who(mine) == C
    monkeypatch.setenv("LONGSPAN_BLOCK", C)
    assert who(mine) == A
    monkeypatch.setenv("LONGSPAN_BLOCK", f"{C},{A}")
    assert who(mine) == AUTO
    monkeypatch.delenv("LONGSPAN_BLOCK")
    assert who(mine) == C
    monkeypatch.delenv("LONGSPAN_PREFER")
    assert who(mine) == AUTO


def test_an_environment_that_cannot_be_read_is_an_error_even_where_an_argument_decides(mine, monkeypatch):
    """A block that nobody can read may not be lost."""
    ls.attention(X, X, X, backend=A)
    monkeypatch.setenv("LONGSPAN_BLOCK", "a b")
    with pytest.raises(ls.PolicyError, match="LONGSPAN_BLOCK"):
        ls.attention(X, X, X, backend=A)
    monkeypatch.delenv("LONGSPAN_BLOCK")
    assert who(mine, A) == A


def test_the_fingerprint_changes_with_everything_that_decides(mine, monkeypatch):
    seen = {fingerprint()}
    for variable in ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK"):
        monkeypatch.setenv(variable, A)
        seen.add(fingerprint())
    with ls.use(backend=A):
        seen.add(fingerprint())
    with ls.use(prefer=A):
        seen.add(fingerprint())
    with ls.use(block=A):
        seen.add(fingerprint())
    assert len(seen) == 7
    assert hash(fingerprint()) == hash(fingerprint())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", ()), ("  ", ()), ("sdpa", ("sdpa",)), ("sdpa,reference", ("sdpa", "reference")),
        (" sdpa ,\treference ", ("sdpa", "reference")), ("acme-flash_2.0", ("acme-flash_2.0",)), ("FA3", ("FA3",)),
    ],
)  # fmt: skip
def test_names(text, want):
    assert names("LONGSPAN_X", {"LONGSPAN_X": text}) == want


@pytest.mark.parametrize(
    "text", [",", "a,", ",a", "a,,b", "a b", "a;b", "a:b", "'a'", "é", "٣", "a/b", "a=b", "a\nb", "*"]
)
def test_names_that_cannot_be_read(text):
    with pytest.raises(ls.PolicyError) as caught:
        names("LONGSPAN_X", {"LONGSPAN_X": text})
    assert "LONGSPAN_X" in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "Next:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1", True), ("true", True), ("YES", True), (" on ", True), ("0", False), ("False", False), ("no", False),
        ("off", False), ("", False), (" ", False),
    ],
)  # fmt: skip
def test_flags(text, want):
    assert flag("LONGSPAN_X", {"LONGSPAN_X": text}) is want
    assert flag("LONGSPAN_X", {}) is False


@pytest.mark.parametrize("text", ["2", "maybe", "-1", "y e s", "1,0", "tru", "none"])
def test_flags_that_cannot_be_read(text):
    with pytest.raises(ls.PolicyError) as caught:
        flag("LONGSPAN_X", {"LONGSPAN_X": text})
    assert "LONGSPAN_X" in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "Next:" in str(caught.value)


def test_current_reads_any_mapping_and_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "sdpa")
    found = current(None, {"LONGSPAN_PREFER": "reference", "LONGSPAN_BLOCK": "x,x,y"})
    assert found == Policy(prefer=("reference",), prefer_from="environment", deny=("x", "y"))
    assert current("z", {}) == Policy(backend="z", backend_from="argument")
    assert current(None, {}) == Policy()
