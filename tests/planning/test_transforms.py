"""What training wraps around attention: torch.func, autocast, checkpointing, DDP, FSDP2, hooks, copies, determinism."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call, grad, jacfwd, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint

import longspan as ls
import small
from longspan import Capabilities, blockwise, hookimpl
from longspan.testing.oracle import oracle
from small import assert_same, randn

qkv = partial(small.qkv, n=13)

BACKENDS = ("sdpa", "reference")
PATTERNS = {
    "dense": ls.Dense(),
    "all": ls.Dilated((4, 8), (1, 2)),
    "grouped": ls.Dilated((4, 8), (1, 2), heads="grouped"),
    "window": ls.SlidingWindow(3, 2),
}
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pattern = pytest.mark.parametrize("name", PATTERNS)


def assert_close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- torch.func -----------------------------------------------------------------------------------------------------


@each_backend
@each_pattern
def test_vmap_is_a_loop(backend, name):
    tensors = qkv(more=(3,))

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS[name], is_causal=True, backend=backend, return_lse=True)

    looped = [torch.stack(x) for x in zip(*(attend(*one) for one in zip(*tensors, strict=True)), strict=True)]
    for got, want in zip(vmap(attend)(*tensors), looped, strict=True):
        assert_close(got, want)


def test_vmap_over_some_inputs_and_any_dimension():
    q, k, v = qkv(more=(3,))

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True)

    shared = vmap(attend, in_dims=(0, None, None))(q, k[0], v[0])
    assert_close(shared, torch.stack([attend(x, k[0], v[0]) for x in q]))
    moved = vmap(attend, in_dims=(1, 4, None), out_dims=2)(q.movedim(0, 1), k.movedim(0, 4), v[0])
    assert_close(moved, torch.stack([attend(x, y, v[0]) for x, y in zip(q, k, strict=True)], 2))


def test_vmap_over_heads():
    tensors = qkv()

    def one_head(q, k, v):
        return ls.attention(q[:, None], k[:, None], v[:, None], PATTERNS["window"], is_causal=True)[:, 0]

    want = ls.attention(*tensors, PATTERNS["window"], is_causal=True)
    assert_close(vmap(one_head, in_dims=1, out_dims=1)(*tensors), want)


def test_vmap_in_vmap():
    tensors = qkv(more=(3, 2))

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["window"])

    flat = attend(*(x.flatten(0, 2) for x in tensors))
    assert_close(vmap(vmap(attend))(*tensors), flat.view(3, 2, 2, 4, 13, 4))


def test_vmap_with_documents_and_fewer_key_heads():
    q, k, v = qkv(more=(3,), kv_heads=2)
    bounds = torch.tensor([0, 4, 4, 11])

    def attend(q, k, v, bounds):
        return ls.attention(q, k, v, PATTERNS["all"], cu_seqlens=bounds, enable_gqa=True)

    want = torch.stack([attend(*one, bounds) for one in zip(q, k, v, strict=True)])
    assert_close(vmap(attend, in_dims=(0, 0, 0, None))(q, k, v, bounds), want)
    assert_close(vmap(lambda *one: attend(*one, (0, 4, 4, 11)))(q, k, v), want)
    with pytest.raises(ls.ArgumentError, match="cu_seqlens"):
        vmap(attend)(q, k, v, bounds.expand(3, 4))


DROPPING = {"is_causal": True, "dropout_p": 0.5}


@each_backend
@each_pattern
def test_vmap_with_a_fixed_dropout_seed_is_a_loop(backend, name):
    """Each mapped entry numbers its batch entries from 0: it drops what the same call outside of vmap drops."""
    tensors = qkv(more=(3,))

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS[name], dropout_seed=7, backend=backend, **DROPPING)

    looped = torch.stack([attend(*one) for one in zip(*tensors, strict=True)])
    assert_close(vmap(attend)(*tensors), looped)
    shared = vmap(attend, in_dims=(1, None, None), out_dims=1)(tensors[0].movedim(0, 1), tensors[1][0], tensors[2][0])
    assert_close(shared, torch.stack([attend(q, tensors[1][0], tensors[2][0]) for q in tensors[0]], 1))


def test_nested_vmap_with_a_fixed_dropout_seed_is_a_loop():
    tensors = qkv(more=(2, 3))

    def attend(q, k, v):
        return ls.attention(q, k, v, dropout_seed=7, **DROPPING)

    looped = [torch.stack([attend(*one) for one in zip(*row, strict=True)]) for row in zip(*tensors, strict=True)]
    assert_close(vmap(vmap(attend))(*tensors), torch.stack(looped))


def test_vmap_honours_its_rule_for_random_numbers():
    """As of torch's own dropout: an error unless allowed, one draw for all, or one for each; never of a seed's name."""
    q = k = torch.zeros(3, 2, 1, 64, 64, dtype=torch.float64)
    value = torch.eye(64, dtype=torch.float64).expand(3, 2, 1, 64, 64)  # the result is the weights themselves

    def attend(q, k, v):
        return ls.attention(q, k, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness") as caught:
        vmap(attend)(q, k, value)
    assert "dropout_seed" not in str(caught.value)
    torch.manual_seed(3)
    same = vmap(attend, randomness="same")(q, k, value)
    torch.manual_seed(3)
    once = attend(q[0], k[0], value[0])
    assert all(torch.equal(one, once) for one in same)
    different = vmap(attend, randomness="different")(q, k, value)
    assert not any(torch.equal(different[i], different[j]) for i in range(3) for j in range(i))
    for mask in (same, different):
        assert 0.45 < (mask == 0).double().mean() < 0.55


def test_gradients_of_each_example_with_dropout():
    """vmap over grad, grad over vmap and jacrev, with a seed: all as in a loop of autograd's own."""
    tensors = qkv(more=(3,), n=5, dim=3)

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["all"], dropout_seed=7, **DROPPING).sin()

    def by_autograd(*one):
        leaves = [x.clone().requires_grad_() for x in one]
        return torch.autograd.grad(attend(*leaves).sum(), leaves)

    wanted = [torch.stack(x) for x in zip(*(by_autograd(*one) for one in zip(*tensors, strict=True)), strict=True)]
    each = vmap(grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2)))(*tensors)
    joint = grad(lambda *x: vmap(attend)(*x).sum(), argnums=(0, 1, 2))(*tensors)
    for found in (each, joint):
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want)
    one = [x[0] for x in tensors]
    found = jacrev(attend, argnums=(0, 1, 2))(*one)
    right = torch.autograd.functional.jacobian(attend, tuple(one))
    for got, want in zip(found, right, strict=True):
        assert_close(got, want)


def test_vmap_over_grad_draws_for_each_example():
    (q, k, v) = qkv(more=(3,))
    q, k, v = (x[:1].expand_as(x) for x in (q, k, v))

    def loss(q, k, v):
        return ls.attention(q, k, v, dropout_p=0.5).sum()

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(grad(loss, argnums=2))(q, k, v)
    same, different = (vmap(grad(loss, argnums=2), randomness=word)(q, k, v) for word in ("same", "different"))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1])


@each_backend
@each_pattern
def test_func_grad(backend, name):
    tensors = qkv()
    leaves = [x.clone().requires_grad_() for x in tensors]

    def loss(q, k, v):
        out, lse = ls.attention(q, k, v, PATTERNS[name], is_causal=True, backend=backend, return_lse=True)
        return out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).cos().sum()

    for got, want in zip(
        grad(loss, argnums=(0, 1, 2))(*tensors), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert_close(got, want)


def test_gradients_of_each_example():
    """vmap over grad, as differential privacy wants it, and grad over vmap, some inputs shared."""
    q, k, v = qkv(more=(3,))

    def loss(q, k, v):
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True).sin().sum()

    def by_autograd(*tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(loss(*leaves), leaves)

    each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, 0))(q, k[0], v)
    wanted = [by_autograd(q[i], k[0], v[i]) for i in range(3)]
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(each[i], torch.stack([one[i] for one in wanted]), rtol=1e-12, atol=1e-12, msg=name)
    joint = grad(lambda q, k, v: vmap(loss, in_dims=(0, None, 0))(q, k, v).sum(), argnums=(0, 1, 2))(q, k[0], v)
    assert_close(joint[0], each[0])
    assert_close(joint[1], each[1].sum(0))
    assert_close(joint[2], each[2])


def test_autograd_through_vmap():
    q, k, v = qkv(more=(3,), grad=True)
    k_one = k.detach()[0].requires_grad_()

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["window"], is_causal=True)

    mapped = vmap(attend, in_dims=(0, None, 0))(q, k_one, v)
    looped = torch.stack([attend(q[i], k_one, v[i]) for i in range(3)])
    dout = randn(*mapped.shape, seed=5)
    for got, want in zip(*(torch.autograd.grad(x, (q, k_one, v), dout) for x in (mapped, looped)), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", ["dense", "all"])
def test_jacrev(name):
    tensors = qkv(batch=1, heads=2, n=5, dim=3)

    def attend(*tensors):
        return ls.attention(*tensors, PATTERNS[name], is_causal=True, return_lse=True)

    def right(*tensors):
        return oracle(*tensors, PATTERNS[name], is_causal=True, return_lse=True)

    got = jacrev(attend, argnums=(0, 1, 2))(*tensors)
    want = torch.autograd.functional.jacobian(right, tuple(tensors))
    for ours, theirs in zip(got, want, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)


def test_vjp_and_functional_call():
    model = Layer()
    x = randn(2, 13, 16, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    out, pull = vjp(lambda parameters: functional_call(model, parameters, (x,)), parameters)
    (found,) = pull(torch.ones_like(out))
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, 1e-5)


# --- what no kernel can do is refused -----------------------------------------------------------------------------


@each_backend
@each_pattern
def test_double_backward_is_refused_clearly(backend, name):
    q, k, v = qkv(grad=True)
    out = ls.attention(q, k, v, PATTERNS[name], backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(ls.LongspanError, match=r"second derivative.*Next:"):
        first.sum().backward()


def test_double_backward_is_refused_under_torch_func_too():
    q, k, v = qkv()

    def loss(x):
        return ls.attention(x, k, v).square().sum()

    with pytest.raises(ls.LongspanError, match="gradient of its gradient"):
        grad(lambda x: grad(loss)(x).sum())(q)
    with pytest.raises(ls.LongspanError, match="gradient of its gradient"):
        jacrev(jacrev(loss))(q)


@each_backend
@each_pattern
def test_forward_mode_is_right_or_refused(backend, name):
    q, k, v = qkv(batch=1, heads=2, n=5, dim=3)
    tangent = randn(*q.shape, seed=9)

    def attend(q):
        return ls.attention(q, k, v, PATTERNS[name], is_causal=True, backend=backend)

    step = 1e-6
    want = (attend(q + step * tangent) - attend(q - step * tangent)) / (2 * step)

    def dual():
        with torch.autograd.forward_ad.dual_level():
            out = attend(torch.autograd.forward_ad.make_dual(q, tangent))
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    for way in (dual, lambda: torch.func.jvp(attend, (q,), (tangent,))[1], lambda: jacfwd(attend)(q)):
        try:
            got = way()
        except NotImplementedError:
            continue
        assert got is not None, "the tangent was dropped in silence"
        got = got if got.shape == want.shape else torch.einsum("bhndBHND,BHND->bhnd", got, tangent)
        assert_close(got, want, 1e-7)


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("under", HALVES, ids=str)
@pytest.mark.parametrize("dtypes", list(product(FLOATS, repeat=3)), ids=lambda x: "-".join(str(d)[6:] for d in x))
def test_autocast_gives_what_torch_gives(under, dtypes):
    """Every mixture of dtypes: the same result dtype as torch's own function, or refused where that refuses."""
    tensors = [x.to(dtype).requires_grad_() for x, dtype in zip(qkv(), dtypes, strict=True)]
    with torch.autocast("cpu", dtype=under):
        try:
            want = F.scaled_dot_product_attention(*tensors)
        except RuntimeError:
            want = None
        for backend in BACKENDS:
            if want is None:
                with pytest.raises(ls.ArgumentError):
                    ls.attention(*tensors, backend=backend)
                continue
            out, lse = ls.attention(*tensors, backend=backend, return_lse=True)
            assert out.dtype == want.dtype
            assert lse.dtype == (torch.float64 if want.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
            gradients = torch.autograd.grad(out.float().sum(), tensors)
            assert [x.dtype for x in gradients] == list(dtypes)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_ends_where_it_ends():
    tensors = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ls.attention(*tensors).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert ls.attention(*tensors).dtype == torch.float32
    assert ls.attention(*tensors).dtype == torch.float32
    with torch.autocast("cuda", dtype=torch.float16):  # another device's autocast is not the CPU's
        assert ls.attention(*tensors).dtype == torch.float32


def test_plans_follow_autocast():
    tensors = qkv(dtype=torch.float32)
    plan = ls.plan(ls.Problem.like(*(x.bfloat16() for x in tensors), PATTERNS["all"], is_causal=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = plan(*tensors)
    assert torch.equal(out, plan(*(x.bfloat16() for x in tensors))[0])
    with pytest.raises(ls.ArgumentError, match="query"):
        plan(*tensors)


def test_a_layer_trains_under_autocast():
    model, x = Layer(), randn(2, 13, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    want = copy.deepcopy(model)
    want.zero_grad()
    want(x).square().sum().backward()
    for one, other in zip(model.parameters(), want.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() <= 5e-2 * other.grad.norm()


# --- checkpointing ------------------------------------------------------------------------------------------------


@each_backend
@each_pattern
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, name, reentrant):
    def attend(q, k, v):
        given = {"is_causal": True, "cu_seqlens": torch.tensor([0, 5, 13]), "backend": backend}
        return ls.attention(q.sin(), k, v.cos(), PATTERNS[name], **given).sin().sum()

    plain, again = qkv(grad=True), qkv(grad=True)
    attend(*plain).backward()
    checkpoint(attend, *again, use_reentrant=reentrant).backward()
    assert_same([x.grad for x in again], [x.grad for x in plain])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_resolves_nothing_anew(register, reentrant):
    """The second run finds the first one's plan: no hook is called again."""
    counting = Counting()
    register(counting, "test-counting")

    def attend(q, k, v):
        return ls.attention(q.sin(), k, v, PATTERNS["all"], is_causal=True, backend="test-counting").sum()

    for _ in range(3):
        checkpoint(attend, *qkv(grad=True), use_reentrant=reentrant).backward()
        made, counting.made = counting.made, 0
    assert made == 0, "a plan was made again"


def test_the_helper_gives_the_same_gradients():
    def attend(q, k, v):
        return ls.attention(q.sin(), k, v, PATTERNS["all"], is_causal=True).sin().sum()

    plain, again = qkv(grad=True), qkv(grad=True)
    attend(*plain).backward()
    ls.checkpoint(attend, *again).backward()
    assert_same([x.grad for x in again], [x.grad for x in plain])


class Counting:
    """A dense backend that counts the kernels that it makes."""

    def __init__(self):
        self.made = 0

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("float64",), patterns=("dense",), causal=True)

    @hookimpl
    def longspan_kernel(self, problem):
        self.made += 1
        return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)


# --- saved-tensor hooks ---------------------------------------------------------------------------------------------


@each_backend
@each_pattern
def test_saved_tensors_go_through_hooks(backend, name):
    """Offloading and compression of activations work, and nothing is kept beside them."""
    tensors, kept = qkv(grad=True), []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor.detach().numpy().copy()

    def attend():
        return ls.attention(*tensors, PATTERNS[name], is_causal=True, backend=backend)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        out = attend()
    assert sorted(kept) == sorted([x.shape for x in tensors] + [out.shape, out.shape[:3]])
    dout = randn(*out.shape, seed=5)
    wanted = torch.autograd.grad(attend(), tensors, dout)
    assert_same(torch.autograd.grad(out, tensors, dout), wanted)
    with torch.autograd.graph.save_on_cpu():
        out = attend()
    assert_same(torch.autograd.grad(out, tensors, dout), wanted)


def test_module_and_tensor_hooks_see_the_gradients():
    tensors = qkv(grad=True)
    seen = []
    tensors[0].register_hook(lambda gradient: seen.append(gradient.shape) or gradient * 2)
    out = ls.attention(*tensors)
    out.register_hook(lambda gradient: seen.append("out"))
    out.sum().backward()
    assert seen == ["out", tensors[0].shape]
    (plain,) = torch.autograd.grad(ls.attention(tensors[0].detach().requires_grad_(), *tensors[1:]).sum(), tensors[1])
    assert_same([tensors[1].grad], [plain])


# --- determinism ----------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_backend
@each_pattern
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_run_to_run(deterministic, backend, name, dtype, threads):
    tensors = qkv(batch=2, n=150, dim=16, kv_heads=2, dtype=dtype, grad=True)
    dout = randn(2, 4, 150, 16, seed=5, dtype=dtype)

    def run():
        given = {"is_causal": True, "enable_gqa": True, "backend": backend, "return_lse": True}
        out, lse = ls.attention(*tensors, PATTERNS[name], **given)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, tensors, dout)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = run()
        for _ in range(4):
            assert_same(run(), first)
    finally:
        torch.set_num_threads(before)


def test_memory_that_nobody_filled_reaches_no_result(deterministic):
    """Under deterministic algorithms torch fills fresh memory with NaN: what the core forgets to write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    for name, backend in product(PATTERNS, BACKENDS):
        for bounds in (None, (0, 4, 4, 9)):
            tensors = qkv(grad=True)
            given = {"is_causal": True, "cu_seqlens": bounds, "backend": backend, "return_lse": True}
            out, lse = ls.attention(*tensors, PATTERNS[name], **given)
            assert not out.isnan().any() and not lse.isnan().any()
            assert not any(x.isnan().any() for x in torch.autograd.grad(out.sum(), tensors))


def test_a_backend_that_cannot_repeat_itself_is_refused_then(register):
    class Careless(Counting):
        @hookimpl
        def longspan_capabilities(self):
            return Capabilities(devices=("cpu",), dtypes=("float64",), patterns=("dense",), causal=True)

    register(Careless(), "test-careless")
    tensors = qkv()
    ls.attention(*tensors, backend="test-careless")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ls.BackendUnavailable, match="deterministic") as caught:
            ls.attention(*tensors, backend="test-careless")
        assert {x.field for x in caught.value.resolution["test-careless"].reasons} == {"deterministic"}
        with ls.use(prefer=("test-careless",)):
            ls.attention(*tensors)  # passed over, not refused
    finally:
        torch.use_deterministic_algorithms(False)
    ls.attention(*tensors, backend="test-careless")


# --- copies -------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Projections around attention, by function or by plan."""

    def __init__(self, pattern=PATTERNS["all"], plan=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.into, self.back = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.pattern, self.plan = pattern, plan

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.plan is None:
            out = ls.attention(q, k, v, self.pattern, is_causal=True)
        else:
            out, _ = self.plan(q, k, v)
        return x + self.back(out.transpose(1, 2).flatten(2))


def planned():
    shape = {"batch": 2, "heads": 4, "q_len": 13, "head_dim": 4, "dtype": "float32"}
    return Layer(plan=ls.plan(ls.Problem(**shape, pattern=PATTERNS["all"], is_causal=True), backend="reference"))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [Layer, planned])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded])
def test_copies_of_modules(make, twin):
    module, x = make(), randn(2, 13, 16, dtype=torch.float32)
    module(x)
    other = twin(module)
    assert_same([other(x)], [module(x)])
    assert other.pattern == module.pattern
    if module.plan is not None:
        assert other.plan.backend == "reference" and other.plan.problem == module.plan.problem
    with torch.no_grad():
        other.into.weight.zero_()
    assert not torch.equal(other(x), module(x))


def test_state_dict_holds_no_attention():
    assert set(Layer().state_dict()) == {"into.weight", "into.bias", "back.weight", "back.bias"}


# --- distributed wrappers -------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model, x):
    model(x).sin().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]


def test_ddp(one_process):
    from torch.nn.parallel import DistributedDataParallel

    x = randn(2, 13, 16, dtype=torch.float32)
    wanted = gradients(Layer(), x)
    wrapped = DistributedDataParallel(Layer())
    assert_same(gradients(wrapped, x), wanted)
    with wrapped.no_sync():  # accumulation
        wrapped(x).sin().sum().backward()
    assert_same([p.grad for p in wrapped.parameters()], [2 * g for g in wanted])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp2(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, x = init_device_mesh("cpu", (1,)), randn(2, 13, 16, dtype=torch.float32)
    wanted = gradients(Layer(), x)
    assert_same(gradients(fully_shard(Layer(), mesh=mesh), x), wanted)
    checkpointed = Layer()
    inner = checkpointed.forward
    checkpointed.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    assert_same(gradients(fully_shard(checkpointed, mesh=mesh), x), wanted)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed = fully_shard(Layer(), mesh=mesh, mp_policy=policy)
    assert mixed(x).dtype == torch.bfloat16
    for one, other in zip(gradients(mixed, x), wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 5e-2 * other.norm()
