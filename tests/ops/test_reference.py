"""The oracle itself: gradcheck in fp64, and each formula against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support.gelu_mlp import activation as plain_activation
from tinyclip import ops
from tinyclip.ops.gelu_mlp import ACTIVATIONS

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _reference():
    GENERATOR.manual_seed(7)
    with tinyclip.backend("reference"):
        yield


def leaf(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64).requires_grad_()


def unit(*shape):
    return F.normalize(leaf(*shape).detach(), dim=-1).requires_grad_()


MASK = torch.tensor([[False] * 5, [True, False, True, True, False]])


@pytest.mark.parametrize("gate", [None, (3,), (2, 3)], ids=["no_gate", "H", "BH"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["no_mask", "key_mask"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention(causal, mask, gate):
    q, k, v = leaf(2, 5, 3, 4), leaf(2, 5, 3, 4), leaf(2, 5, 3, 4)
    gate = None if gate is None else leaf(*gate)

    def call(q, k, v, gate):
        return ops.attention(q, k, v, causal=causal, key_mask=mask, head_gate=gate, scale=0.7)

    assert torch.autograd.gradcheck(call, (q, k, v, gate))
    packed = torch.stack([q, k, v], dim=2).detach().requires_grad_()

    def call_packed(qkv, gate):
        return ops.attention_qkv(qkv, causal=causal, key_mask=mask, head_gate=gate, scale=0.7)

    assert torch.autograd.gradcheck(call_packed, (packed, gate))
    torch.testing.assert_close(call(q, k, v, gate), call_packed(packed, gate))


def test_cross_attention():
    q, k, v = leaf(2, 3, 2, 4), leaf(2, 6, 2, 4), leaf(2, 6, 2, 4)
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(ops.attention(q, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no_gate"])
def test_gelu_mlp(kind, bias, gated):
    x, w1, w2 = leaf(2, 3, 4), leaf(6, 4), leaf(5, 6)
    b1, b2 = (leaf(6), leaf(5)) if bias else (None, None)
    gate = leaf(6) if gated else None

    def call(x, w1, b1, w2, b2, gate):
        return ops.gelu_mlp(x, w1, b1, w2, b2, activation=kind, hidden_gate=gate)

    assert torch.autograd.gradcheck(call, (x, w1, b1, w2, b2, gate))
    hidden = plain_activation(kind, F.linear(x, w1, b1)) * (1 if gate is None else gate)
    torch.testing.assert_close(call(x, w1, b1, w2, b2, gate), F.linear(hidden, w2, b2))


@pytest.mark.parametrize("kept", [None, [1, 0, 1, 1, 0, 1]], ids=["no_mask", "mask"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm(affine, residual, kept):
    x, other = leaf(2, 4, 6), leaf(2, 4, 6) if residual else None
    w, b = (leaf(6), leaf(6)) if affine else (None, None)
    mask = None if kept is None else torch.tensor(kept, dtype=torch.bool)

    def call(x, w, b, other):
        return ops.layer_norm(x, w, b, residual=other, channel_mask=mask)

    assert torch.autograd.gradcheck(call, (x, w, b, other))
    y = call(x, w, b, other)
    total = x + other if residual else x
    if residual:
        y, returned = y
        torch.testing.assert_close(returned, total)
    if mask is None:
        torch.testing.assert_close(y, F.layer_norm(total, (6,), w, b))
    else:
        part = [None if t is None else t[mask] for t in (w, b)]
        torch.testing.assert_close(y[..., mask], F.layer_norm(total[..., mask], (4,), *part))
        assert (y[..., ~mask] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_contrastive_loss(alpha):
    image, text, scale = unit(6, 4), unit(6, 4), torch.tensor([9.0]).double().requires_grad_()
    teacher = tinyclip.Teacher(unit(6, 9).detach(), unit(6, 9).detach(), 5.0)

    def call(image, text, scale):
        return ops.contrastive_loss(image, text, scale, teacher=teacher, alpha=alpha)

    assert torch.autograd.gradcheck(call, (image, text, scale))
    logits, labels = scale * image @ text.T, torch.arange(6)
    target = 5.0 * teacher.image @ teacher.text.T
    hard = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    soft = F.cross_entropy(logits, target.softmax(1))
    soft = soft + F.cross_entropy(logits.T, target.T.softmax(1))
    expected = 0.5 * ((1 - alpha) * hard + alpha * soft)
    torch.testing.assert_close(call(image, text, scale), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("weights", ["both", "rows", "cols", "vectors"])
def test_contrastive_passes_on_a_rectangle(weights, alpha, backend):
    """A block of rows against more columns: the weighted sum's gradients are autograd's."""
    a, b, scale = unit(4, 5), unit(9, 5), torch.tensor(7.0).double().requires_grad_()
    teacher = (unit(4, 3).detach(), unit(9, 3).detach(), 4.0)
    offset = 3
    row_weight = {"cols": 0.0, "vectors": leaf(4).detach().abs()}.get(weights, 0.3)
    col_weight = {"rows": 0.0, "vectors": leaf(9).detach().abs()}.get(weights, 0.2)
    s, t = scale * a @ b.T, 4.0 * teacher[0] @ teacher[1].T
    positive = torch.zeros(4, 9, dtype=torch.float64)
    positive[range(4), range(3, 7)] = 1.0
    by_row = ((1 - alpha) * positive + alpha * t.softmax(1)) * s.log_softmax(1)
    by_col = ((1 - alpha) * positive + alpha * t.softmax(0)) * s.log_softmax(0)
    value = -(by_row.sum(1) * row_weight).sum() - (by_col.sum(0) * col_weight).sum()
    expected = torch.autograd.grad(value, (a, b, scale))

    with tinyclip.backend(backend):
        stats = ops.contrastive_stats(a, b, scale, teacher=teacher, offset=offset)
        torch.testing.assert_close(stats.positive, s[range(4), range(3, 7)].detach())
        torch.testing.assert_close(stats.rows[0] + stats.rows[1].log(), s.logsumexp(1).detach())
        torch.testing.assert_close(stats.cols[2] + stats.cols[3].log(), t.logsumexp(0))
        found = ops.contrastive_grads(
            a,
            b,
            scale,
            stats,
            row_weight=row_weight,
            col_weight=col_weight,
            alpha=alpha,
            teacher=teacher,
            offset=offset,
        )
    # A column without a positive among these rows has a hard target elsewhere: its P - T is P.
    if alpha < 1 and weights != "rows":
        missing = torch.ones(9, dtype=torch.bool)
        missing[3:7] = False
        extra = (s.softmax(0) * (1 - alpha) * col_weight * missing).detach()
        found = (
            found[0] - scale.detach() * extra @ b.detach(),
            found[1] - scale.detach() * extra.T @ a.detach(),
            found[2] - (extra * (a @ b.T).detach()).sum(),
        )
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth)
