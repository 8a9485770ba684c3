"""Other libraries' words, misspelt ones and `auto`; whose an exception is; what a backend may claim of itself."""

from __future__ import annotations

import functools

import pytest
import torch

import longspan as ls
from longspan import blockwise, errors
from longspan.execution.kernel import check_gradients, check_result

X = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
VARIABLES = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


# --- arguments that there are not -----------------------------------------------------------------------------------

OURS = {
    "softmax_scale": (0.125, "pass scale=0.125"),
    "sm_scale": (0.125, "pass scale=0.125"),
    "causal": (True, "pass is_causal=True"),
    "is_casual": (True, "pass is_causal=True"),
    "dropout": (0.1, "pass dropout_p=0.1"),
    "dropout_prob": (0.1, "pass dropout_p=0.1"),
    "cu_seqlens_q": (torch.tensor([0, 16]), "pass cu_seqlens=..."),
    "window_size": ((3, 0), "SlidingWindow(left, right)"),
    "sliding_window": (3, "SlidingWindow(left, right)"),
    "key_padding_mask": (torch.ones(1, 16), "cu_seqlens=(0, end_1"),
    "attn_mask": (torch.ones(16, 16), "is_causal=True for a triangle"),
    "attention_mask": (torch.ones(16, 16), "is_causal=True for a triangle"),
    "mask": (torch.ones(16, 16), "is_causal=True for a triangle"),
    "block_mask": (object(), "from_block_mask(block_mask)"),
    "score_mod": (None, "flex_attention"),
    "need_weights": (True, "return_lse=True"),
    "segment_lengths": ((4, 8), "longspan.Dilated("),
    "backened": ("sdpa", "pass backend='sdpa'"),
    "max_seqlen_q": (16, "leave it out"),
    "nonsense": (1, "one of pattern, is_causal, scale"),
}


@pytest.mark.parametrize("word", OURS)
def test_attention_has_its_own_word_for_a_foreign_argument(word):
    given, said = OURS[word]
    with pytest.raises(ls.ArgumentError) as caught:
        ls.attention(X, X, X, **{word: given})
    text = str(caught.value)
    assert text.startswith(f"{word}: got an argument that attention() does not have; want ")
    assert said in text and ". Next: " in text
    assert isinstance(caught.value, TypeError), "as Python's own refusal of an argument is"


@pytest.mark.parametrize("word", ["softmax_scale", "causal", "window_size", "mask", "backend", "return_lse"])
def test_so_has_a_problem(word):
    with pytest.raises(
        ls.ArgumentError, match=rf"^{word}: got an argument that Problem.like\(\) does not have; want .*"
    ):
        ls.Problem.like(X, X, X, **{word: 1})


@pytest.mark.parametrize("function", [ls.plan, ls.explain], ids=["plan", "explain"])
@pytest.mark.parametrize("arguments", [(X,), (X, X, X), (X, X, X, ls.Dense())], ids=len)
def test_tensors_in_place_of_a_problem_are_told_how_to_make_one(function, arguments):
    with pytest.raises(ls.ArgumentError, match=r"longspan.Problem.like\(query, key, value") as caught:
        function(*arguments)
    assert f"longspan.{function.__name__}(" in str(caught.value)


@pytest.mark.parametrize("function", [ls.plan, ls.explain], ids=["plan", "explain"])
def test_arguments_of_the_problem_are_not_those_of_a_plan(function):
    problem = ls.Problem.like(X, X, X)
    with pytest.raises(ls.ArgumentError, match=r"is_causal as an argument of longspan\.Problem\.like"):
        function(problem, is_causal=True)
    with pytest.raises(ls.ArgumentError, match="arguments too many"):
        function(problem, "sdpa", 3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_refused_argument_is_refused_in_a_compiled_function_too(compiled):
    def function(x):
        return ls.attention(x, x, x, softmax_scale=0.1)

    with pytest.raises(Exception, match=r"scale=0\.1"):
        (torch.compile(function, backend="eager") if compiled else function)(X)


PATTERNS = {
    "a mask": (torch.ones(16, 16), "name the arguments, as the fourth of torch's attention is a mask"),
    "a text": ("dense", r"longspan.parse_pattern\('dense'\)"),
    "a class": (ls.Dilated, r"longspan.Dilated\(\("),
    "a number": (3, r"longspan.Dense\(\)"),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_what_is_no_pattern_is_told_what_would_be(case):
    given, said = PATTERNS[case]
    for call in (ls.attention, ls.Problem.like):
        with pytest.raises(ls.ArgumentError, match=said) as caught:
            call(X, X, X, given)
        assert len(str(caught.value)) < 400, "a tensor is not printed"


def test_a_block_mask_is_told_how_it_is_read():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 16, 16, device="cpu")
    with pytest.raises(ls.ArgumentError, match=r"longspan.from_block_mask\(block_mask\)"):
        ls.attention(X, X, X, mask)


@pytest.mark.parametrize("given", ["no", "yes", 1, 0, None], ids=repr)
def test_return_lse_is_true_or_false(given):
    with pytest.raises(ls.ArgumentError, match=r"return_lse: got .* want True or False"):
        ls.attention(X, X, X, return_lse=given)


@pytest.mark.parametrize("given", [None, 3, ls.Dense(), b"dense"], ids=repr)
def test_what_is_no_text_is_no_pattern_either(given):
    with pytest.raises(ls.ArgumentError, match="pattern"):
        ls.parse_pattern(given)


def test_an_error_never_prints_all_of_what_it_was_given():
    assert errors.brief(10**5000) == "an integer of 16610 bits"
    assert len(errors.brief(torch.ones(50, 50))) < 120
    assert errors.brief("x") == "'x'"


# --- auto -----------------------------------------------------------------------------------------------------------


def decided(**given):
    resolution = ls.explain(ls.Problem.like(X, X, X), **given)
    return resolution.chosen, resolution.decided_by


def test_auto_is_the_same_as_none_everywhere(monkeypatch):
    usual = decided()
    assert usual[1] == "auto"
    assert decided(backend="auto") == usual
    ls.attention(X, X, X, backend="auto")
    assert ls.plan(ls.Problem.like(X, X, X), backend="auto").backend == usual[0]
    with ls.use(backend="auto"):
        assert decided() == usual
    with ls.use(backend="sdpa"), ls.use("auto"):
        assert decided() == decided(backend="auto") == ("sdpa", "context"), "none is named here, so the outer one is"
    monkeypatch.setenv("LONGSPAN_BACKEND", "auto")
    assert decided() == usual
    monkeypatch.setenv("LONGSPAN_BACKEND", "sdpa")
    assert decided(backend="auto") == ("sdpa", "environment")


def test_auto_in_a_graph(monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "auto")
    run = torch.compile(lambda x: ls.attention(x, x, x, backend="auto"), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(X), ls.attention(X, X, X))


def test_the_command_line_takes_auto(capsys):
    from longspan.tools.cli.app import app

    app(["explain", "--shape", "1,2,64,8", "--backend", "auto"], standalone_mode=False)
    assert "decided by auto" in capsys.readouterr().out


def test_no_backend_may_be_called_auto():
    class Plugin:
        @ls.hookimpl
        def longspan_capabilities(self):
            return ls.Capabilities()

    with pytest.raises(ls.PluginError, match="not auto"):
        ls.register(Plugin(), name="auto")


def test_a_preference_that_another_wish_overrides_is_noted(monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "reference")
    with ls.use(prefer="sdpa"):
        resolution = ls.explain(ls.Problem.like(X, X, X))
    assert resolution.chosen == "reference"
    note = "sdpa (preferred in the context) was not considered: reference was named in the environment"
    assert note in resolution.notes
    monkeypatch.delenv("LONGSPAN_BACKEND")
    with ls.use(backend="reference"), ls.use(prefer=("sdpa", "flash")):
        noted = ls.explain(ls.Problem.like(X, X, X)).notes
    assert any("sdpa, flash (preferred in the context) was not considered" in note for note in noted)
    assert not ls.explain(ls.Problem.like(X, X, X), backend="reference").notes


# --- whose an exception is ------------------------------------------------------------------------------------------


class Oops(Exception):
    """A plugin's own."""


class Faulty:
    """Raises where it is told to."""

    def __init__(self, where, native=False, backward=True):
        self.where, self.native, self.backward = where, native, backward

    def fail(self, where):
        if self.where == where:
            raise Oops(where)

    @ls.hookimpl
    def longspan_capabilities(self):
        patterns = ("dense", "window") if self.native else ("dense",)
        return ls.Capabilities(devices=("cpu",), dtypes=("float32",), patterns=patterns, causal=True, backward=True)

    @ls.hookimpl
    def longspan_pattern(self, problem):
        self.fail("longspan_pattern")

    @ls.hookimpl
    def longspan_buffers(self, problem):
        self.fail("longspan_buffers")
        return 3 if self.where == "garbage" else ()

    @ls.hookimpl
    def longspan_kernel(self, problem):
        self.fail("longspan_kernel")
        run = functools.partial(blockwise.forward, is_causal=problem.is_causal, scale=problem.scale)
        back = functools.partial(blockwise.backward, is_causal=problem.is_causal, scale=problem.scale)

        def forward(*tensors):
            self.fail("forward")
            return run(*tensors)

        def backward(*tensors):
            self.fail("backward")
            return back(*tensors)

        return ls.Kernel(forward, backward)


@pytest.fixture
def faulty():
    def register(where, **given):
        plugin = Faulty(where, **given)
        ls.register(plugin, name="acme")
        return plugin

    yield register
    ls.unregister("acme")


def noted(error):
    return [note for note in getattr(error.value, "__notes__", ()) if "'acme'" in note]


@pytest.mark.parametrize("hook", ["longspan_pattern", "longspan_buffers", "longspan_kernel"])
def test_an_exception_of_a_hook_names_the_hook_and_the_backend(faulty, hook):
    faulty(hook)
    with pytest.raises(Oops) as caught:
        ls.attention(X, X, X, ls.SlidingWindow(2), backend="acme")
    (note,) = noted(caught)
    assert hook in note and "longspan explain" in note


@pytest.mark.parametrize("elsewhere", [lambda x: x.to("meta"), lambda x: x.to_sparse()])
def test_results_that_lie_elsewhere_are_refused(elsewhere):
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    check_result("mine", (out, lse), out)
    check_gradients("mine", (out, out, out), (out, out, out))
    for result in ((elsewhere(out), lse), (out, elsewhere(lse))):
        with pytest.raises(ls.PluginError, match=r"^mine's kernel returned .*Next: "):
            check_result("mine", result, out)
    with pytest.raises(ls.PluginError, match=r"^mine's backward returned .*Next: "):
        check_gradients("mine", (elsewhere(out), out, out), (out, out, out))


def test_garbage_of_a_hook_names_it(faulty):
    faulty("garbage")
    with pytest.raises(ls.PluginError, match=r"acme.s longspan_buffers returned 3; want longspan\.BufferSpecs"):
        ls.attention(X, X, X, backend="acme")


@pytest.mark.parametrize("pattern", [ls.Dense(), ls.SlidingWindow(2), ls.local_blocks(11, block_size=4)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_an_exception_of_a_kernel_names_the_backend(faulty, pattern, grad):
    plugin = faulty("nowhere")
    x = X.clone().requires_grad_(grad)
    ls.attention(x, x, x, pattern, backend="acme")  # the checked path, then the quick one
    plugin.where = "forward"
    with pytest.raises(Oops) as caught:
        ls.attention(x, x, x, pattern, backend="acme")
    assert len(noted(caught)) == 1 and "kernel" in noted(caught)[0]


@pytest.mark.parametrize("pattern", [ls.Dense(), ls.SlidingWindow(2)], ids=str)
def test_an_exception_of_a_backward_names_the_backend(faulty, pattern):
    plugin = faulty("nowhere")
    x = X.clone().requires_grad_()
    out = ls.attention(x, x, x, pattern, backend="acme")
    plugin.where = "backward"
    with pytest.raises(Oops) as caught:
        out.sum().backward()
    assert len(noted(caught)) == 1


# --- claims that nothing would understand ---------------------------------------------------------------------------

CLAIMS = {
    "gpu": ({"devices": ("gpu",)}, "write 'cuda'"),
    "misspelt device": ({"devices": ("cudda>=8.0",)}, "write 'cuda'"),
    "an architecture": ({"devices": ("sm_86",)}, "cuda>=8.6"),
    "no minor number": ({"devices": ("cuda>=8",)}, "write 'cuda>=8.0'"),
    "a number": ({"devices": ("cuda:0",)}, "write 'cuda'"),
    "sparse": ({"patterns": ("sparse",)}, "write 'block_sparse'"),
    "sliding window": ({"patterns": ("dense", "sliding_window")}, "write 'window'"),
    "causal among patterns": ({"patterns": ("dense", "causal")}, "causal=True"),
    "fp16": ({"dtypes": ("fp16",)}, "write 'float16'"),
    "torch's dtype": ({"dtypes": (torch.bfloat16,)}, "write 'bfloat16'"),
    "yes": ({"causal": "yes"}, "causal=True"),
    "one": ({"backward": 1}, "backward=True"),
    "none": ({"exact": None}, "exact=False"),
    "limits the wrong way round": ({"head_dim_min": 64, "head_dim_max": 32}, "at least head_dim_min, 64"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_claim_that_nothing_understands_is_refused_with_the_nearest_that_is(case):
    claims, said = CLAIMS[case]
    with pytest.raises(ls.ArgumentError) as caught:
        ls.Capabilities(**claims)
    assert str(caught.value).startswith(f"Capabilities.{list(claims)[-1]}: got ") and said in str(caught.value)


def test_all_words_that_there_are_may_be_claimed():
    class Own(ls.Pattern):
        kind = "test-own-pattern"

    made = ls.Capabilities(
        devices=("cpu", "cuda", "cuda>=8.0", "cuda==6.1", "rocm", "mps", "xpu", "hpu", "npu", "meta"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense", "window", "dilated", "block_sparse", "topk_blocks", "test-own-pattern"),
    )
    assert all(word in made.patterns for word in ("dense", Own.kind))
