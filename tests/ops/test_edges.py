"""Edges: nothing to compute, nothing to see, NaN out of sight, extremes, exactness, memory."""

import math

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support import contrastive
from tests.support.draw import REGIMES
from tests.support.gelu_mlp import activation
from tinyclip import _extension, ops
from tinyclip.ops import _torch
from tinyclip.ops.gelu_mlp import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned")
CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))
)
every_backend = pytest.mark.parametrize("backend", ["auto", "reference"])
NAN = float("nan")


def grads(out, *inputs):
    return torch.autograd.grad(out.sum(), inputs, allow_unused=True, materialize_grads=True)


@every_backend
@pytest.mark.parametrize("b,lq,lk,h,d", [(0, 3, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4)])
def test_attention_of_nothing(backend, b, lq, lk, h, d):
    q = torch.randn(b, lq, h, d, requires_grad=True)
    k, v = (torch.randn(b, lk, h, d, requires_grad=True) for _ in range(2))
    with tinyclip.backend(backend):
        out = ops.attention(q, k, v)
    assert out.shape == q.shape
    assert (out == 0).all()
    for x, grad in zip((q, k, v), grads(out, q, k, v), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 4), (2, 0, 3, 2, 4), (2, 5, 3, 0, 4)])
def test_packed_attention_of_nothing(backend, shape):
    qkv = torch.randn(shape, requires_grad=True)
    with tinyclip.backend(backend):
        out = ops.attention_qkv(qkv, causal=True)
    assert out.shape == (*shape[:2], *shape[3:])
    assert grads(out, qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("rows,c,f", [(0, 4, 6), (3, 0, 6), (3, 4, 0)])
def test_gelu_mlp_of_nothing(backend, rows, c, f):
    x, w1, b1 = torch.randn(rows, c), torch.randn(f, c), torch.randn(f)
    w2, b2 = torch.randn(5, f), torch.randn(5)
    inputs = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]
    with tinyclip.backend(backend):
        y = ops.gelu_mlp(*inputs)
        found = grads(y, *inputs)
    torch.testing.assert_close(y, F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2))
    assert all(g.shape == t.shape and not g.isnan().any() for g, t in zip(found, inputs))  # noqa: B905


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_norm_of_nothing(backend, shape, masked):
    x, w, b = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    inputs = [t.requires_grad_() for t in (x, w, b)]
    mask = torch.ones(shape[-1], dtype=torch.bool) if masked else None
    with tinyclip.backend(backend):
        y = ops.layer_norm(*inputs, channel_mask=mask)
        found = grads(y, *inputs)
    assert y.shape == x.shape
    assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("m,n,d", [(0, 3, 4), (0, 0, 4), (2, 3, 0)])
def test_contrastive_passes_of_nothing(backend, m, n, d):
    a, b = torch.randn(m, d), torch.randn(n, d)
    with tinyclip.backend(backend):
        stats = ops.contrastive_stats(a, b, 2.0)
        assert (stats.rows.shape, stats.cols.shape) == ((5, m), (5, n))
        if m == 0:
            assert (stats.cols[0] == -math.inf).all()
            assert (stats.cols[1:] == 0).all()
        found = ops.contrastive_grads(a, b, 2.0, stats, row_weight=1.0, col_weight=0.0)
    assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_query_that_sees_no_key(backend, causal, dtype):
    """Whatever it holds, and whatever comes back to it."""
    q, k, v = (torch.randn(3, 6, 2, 8, dtype=dtype) for _ in range(3))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0] = False  # a whole batch entry
    mask[1, :2] = False  # under causal, the first two queries
    blind = torch.zeros(3, 6, dtype=torch.bool)
    blind[0] = True
    blind[1, :2] = causal
    dout = torch.randn_like(q)
    q[blind], dout[blind] = NAN, math.inf
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with tinyclip.backend(backend):
        out = ops.attention(q, k, v, causal=causal, key_mask=mask)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert (out[blind] == 0).all()
    assert (dq[blind] == 0).all()
    assert (dk[~mask] == 0).all()
    assert (dv[~mask] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    assert (out[~blind] != 0).any()


@every_backend
def test_no_heads(backend):
    q, gate = torch.randn(2, 5, 0, 8), torch.randn(2, 0, requires_grad=True)
    with tinyclip.backend(backend):
        out = ops.attention(q, q, q, head_gate=gate)
    assert out.shape == q.shape
    assert grads(out, gate)[0].shape == gate.shape


@pytest.mark.parametrize("backend", ["torch", CPU, "reference"])
def test_a_gate_is_no_less_precise_than_the_problem(backend):
    """fp64 with a gate that is not: where a factor is folded into it, it is at fp64, too."""
    x, w1, w2 = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    gate = torch.randn(4)
    with tinyclip.backend(backend):
        y = ops.gelu_mlp(x, w1, None, w2, None, activation="quick_gelu", hidden_gate=gate)
    truth = (activation("quick_gelu", x @ w1.T) * gate) @ w2.T
    torch.testing.assert_close(y, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", CPU, "reference"])
def test_autocast_leaves_an_fp64_problem_alone(backend):
    """Its parameters too: bf16 on the way to fp64 would be an error of 1e-3."""
    x, w1, w2 = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4), torch.randn(4, 4)
    with tinyclip.backend(backend):
        y = ops.gelu_mlp(x, w1, None, w2, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.gelu_mlp(x, w1, None, w2, None), y)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_is_masked_does_not_leak(backend, causal, bad):
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    results = []
    for value in (0.0, bad):
        inputs = [q.clone(), k.clone(), v.clone()]
        for x in inputs[1:]:
            x[~mask] = value
        for x in inputs:
            x.requires_grad_()
        with tinyclip.backend(backend):
            out = ops.attention(*inputs, causal=causal, key_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for clean, planted in zip(*results, strict=True):
        assert torch.equal(clean, planted)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_visible_nan_stays_in_its_batch_and_head(backend):
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    k[1, 2, 0, 3] = NAN
    with tinyclip.backend(backend):
        out = ops.attention(q, k, v)
    assert out[1, :, 0].isnan().all()
    out[1, :, 0] = 0
    assert not out.isnan().any()


@pytest.mark.parametrize("backend", ["torch", CPU, "reference"])
def test_masked_channels_do_not_leak(backend):
    x, w, b = torch.randn(4, 6), torch.randn(6), torch.randn(6)
    mask = torch.tensor([True, False, True, True, False, True])
    results = []
    for value in (0.0, NAN):
        inputs = [x.clone(), w.clone(), b.clone()]
        for planted in inputs:
            planted[..., ~mask] = value
            planted.requires_grad_()
        with tinyclip.backend(backend):
            y = ops.layer_norm(*inputs, channel_mask=mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for clean, planted in zip(*results, strict=True):
        assert torch.equal(clean, planted)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integers_are_exact(backend, dtype):
    """Sums of small integers round nowhere: relu's GEMMs, and attention to a single key."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=generator).to(dtype).requires_grad_()

    with tinyclip.backend(backend):
        x, w1, b1, w2, b2 = draw(7, 8), draw(9, 8), draw(9), draw(5, 9), draw(5)
        y = ops.gelu_mlp(x, w1, b1, w2, b2, activation="relu")
        hidden = F.relu(F.linear(x.double(), w1.double(), b1.double()))
        assert y.double().norm() > 0
        truth = F.linear(hidden, w2.double(), b2.double())
        assert torch.equal(y.double(), truth.to(dtype).double())
        dout = torch.randint(-1, 2, (7, 5), generator=generator)
        ours = torch.autograd.grad(y, (b1, w2), dout.to(dtype))
        theirs = torch.autograd.grad(truth, (b1, w2), dout.double())
        for g, t in zip(ours, theirs, strict=True):
            assert torch.equal(g, t)

        q, k, v = draw(2, 6, 2, 8), draw(2, 6, 2, 8), draw(2, 6, 2, 8)
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[:, 3] = True
        out = ops.attention(q, k, v, key_mask=mask)
        assert torch.equal(out, v[:, 3:4].expand_as(out))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert (dq == 0).all()
        assert (dk == 0).all()
        assert (dv[:, 3] == 6).all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", CPU, "reference"])
def test_activation_extremes(kind, dtype, backend):
    if backend == "cpu" and dtype != torch.float32:
        pytest.skip("fp32 and fp64 only")
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = [20.0, -20.0, 0.0, -0.0, tiny, -tiny, 1e-3, -1e-3, 5.0, -5.0]
    values += [4e4, -4e4] if kind != "gelu_tanh" else []  # whose cube is written out in reference
    x = torch.tensor(values, dtype=dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    with tinyclip.backend(backend):
        y = ops.gelu_mlp(x, one, None, one, None, activation=kind)
        (dx,) = grads(y, x)
    exact = x.detach().double().requires_grad_()
    truth = activation(kind, exact)
    (slope,) = grads(truth, exact)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.double(), slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_contrastive_identities(backend):
    """Identical features give ln M, one pair gives 0, the teacher as student gives no gradient."""
    with tinyclip.backend(backend):
        same = F.normalize(torch.ones(33, 8), dim=1)
        value = ops.contrastive_loss(same, same, 100.0)
        torch.testing.assert_close(value, torch.tensor(math.log(33)))
        one = same[:1].clone().requires_grad_()
        value = ops.contrastive_loss(one, same[:1], 100.0)
        assert value.item() == 0
        assert (grads(value, one)[0] == 0).all()
        image, text = (F.normalize(torch.randn(40, 16), dim=1).requires_grad_() for _ in range(2))
        teacher = tinyclip.Teacher(image, text, 20.0)
        value = ops.contrastive_loss(image, text, 20.0, teacher=teacher, alpha=1.0)
        assert all((g.abs() < 1e-6).all() for g in grads(value, image, text))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_contrastive_symmetries(backend):
    image, text = (F.normalize(torch.randn(30, 8), dim=1) for _ in range(2))
    teacher = tinyclip.Teacher(torch.randn(30, 5), torch.randn(30, 5), 2.0)
    order = torch.randperm(30)
    with tinyclip.backend(backend):
        value = ops.contrastive_loss(image, text, 9.0, teacher=teacher, alpha=0.3)
        swapped = tinyclip.Teacher(teacher.text, teacher.image, 2.0)
        mixed = tinyclip.Teacher(teacher.image[order], teacher.text[order], 2.0)
        for other in (
            ops.contrastive_loss(text, image, 9.0, teacher=swapped, alpha=0.3),
            ops.contrastive_loss(image[order], text[order], 9.0, teacher=mixed, alpha=0.3),
        ):
            torch.testing.assert_close(other, value)


@pytest.mark.parametrize("missing", [0.1, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_positive_survives_confidence(backend, missing):
    """p(positive) = 1 - missing at scale 100: the gradient is as good as eager's, never lost."""
    other = 1 + math.log(missing / 3) / 100
    cosines = torch.full((4, 4), other, dtype=torch.float64).fill_diagonal_(1.0)
    image = torch.linalg.cholesky(cosines).float()
    labels = torch.arange(4)

    def eager(x, y):
        logits = 100 * x @ y.T
        return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))

    def gradient(loss, dtype):
        x = image.to(dtype).requires_grad_()
        return grads(loss(x, image.to(dtype)), x)[0].double()

    def ours(x, y):
        return ops.contrastive_loss(x, y, 100.0)

    with tinyclip.backend(backend):
        truth = gradient(eager, torch.float64)
        assert truth.norm() > 0
        torch.testing.assert_close(gradient(ours, torch.float64), truth, rtol=1e-8, atol=0)
        error = (gradient(ours, torch.float32) - truth).norm()
        assert error <= 2 * (gradient(eager, torch.float32) - truth).norm()


@pytest.mark.parametrize("regime", REGIMES)
def test_chunks_change_nothing(regime, monkeypatch):
    """Row chunks of the torch engine, down to one row: the same loss and gradients by the rule."""
    problem = contrastive.make(2, regimes=[regime], rows=[50], widths=[16], dtypes=[torch.float32])
    for budget in (1, 60, 1000, 1 << 20):
        monkeypatch.setitem(_torch._CHUNK_LOGITS, "cpu", budget)
        found = problem.judge("torch")
        assert max(found.values()) <= 1, (budget, found)


def test_no_matrix_of_all_logits(monkeypatch):
    """O(chunk N) memory: no tensor of M x N elements exists in forward or backward."""
    monkeypatch.setitem(_torch._CHUNK_LOGITS, "cpu", 16 * 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    image, text = (F.normalize(torch.randn(512, 8), dim=1).requires_grad_() for _ in range(2))
    teacher = tinyclip.Teacher(torch.randn(512, 8), torch.randn(512, 8), 3.0)
    with Watch(), tinyclip.backend("torch"):
        ops.contrastive_loss(image, text, 9.0, teacher=teacher, alpha=0.5).backward()
    assert 0 < largest <= 16 * 512


def test_gelu_mlp_saves_x_and_the_pre_activation_only():
    x, w1, w2 = torch.randn(64, 32, requires_grad=True), torch.randn(128, 32), torch.randn(32, 128)
    weights = {w1.data_ptr(), w2.data_ptr()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.gelu_mlp(x, w1, None, w2, None)
    activations = sum(numel for pointer, numel in saved.items() if pointer not in weights)
    assert activations == 64 * 32 + 64 * 128
