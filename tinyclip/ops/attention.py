"""Scaled dot-product attention over (B, L, H, D), from separate or packed projections.

Letters: B batch, L tokens (Lq queries, Lk keys), H heads, D head dim.
"""

import torch
from torch import Tensor

from tinyclip.ops import _checks, _torch
from tinyclip.ops._autocast import like_linear
from tinyclip.ops._autograd import applied, barrier, first_order
from tinyclip.ops._contracts import implementation
from tinyclip.ops._dispatch import (
    Candidate,
    Cannot,
    Op,
    Slower,
    always,
    make_spec,
    register,
    select,
)
from tinyclip.ops._layout import unit_stride
from tinyclip.ops._triton import triton_why_not

# Rows longer than this go to PyTorch: 5/7 of the products is what its backward does of ours.
LONGEST_ROW = 1024


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    head_gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of queries over keys and values, head by head.

    ``out[b, i, h] = head_gate[h] * sum_j softmax_j(scale * q[b, i, h] . k[b, j, h]) v[b, j, h]``
    (Vaswani et al. 2017, section 3.2.1; the gate is TinyCLIP's head mask, Wu et al. 2023).

    Args:
        q: (B, Lq, H, D), fp32, bf16, fp16 or fp64, any strides.
        k: (B, Lk, H, D), v: (B, Lk, H, D), dtype and device of `q`.
        causal: query i sees keys 0..i; needs Lq == Lk.
        key_mask: bool (B, Lk), True = may be attended. What lies under False never reaches the
            result. A query that sees no key gives 0 and zero gradients.
        head_gate: (H,) or (B, H), any float dtype, multiplies each head's output; differentiable.
        scale: multiplies the scores, finite; default ``D ** -0.5``.

    Returns:
        (B, Lq, H, D) in q's dtype, under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the text names it.
        BackendUnavailable: the backend asked for cannot run this problem.
    """
    spec, problem = _prepare(
        q, k, v, causal=causal, key_mask=key_mask, head_gate=head_gate, scale=scale
    )
    return select(spec).run(*problem)


def attention_qkv(
    qkv: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    head_gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Self-attention from packed projections: `attention` of ``qkv.unbind(2)``.

    Args:
        qkv: (B, L, 3, H, D): queries, keys and values as one projection writes them. Read by
            stride; the gradient is written packed.
        causal, key_mask, head_gate, scale: as in `attention`, with Lq = Lk = L.

    Returns:
        (B, L, H, D) in qkv's dtype, under autocast in the autocast dtype.

    Raises:
        As `attention`.
    """
    spec, problem = _prepare_qkv(
        qkv, causal=causal, key_mask=key_mask, head_gate=head_gate, scale=scale
    )
    return select(spec).run(*problem)


def _prepare(q, k, v, *, causal=False, key_mask=None, head_gate=None, scale=None):
    op = "attention"
    _checks.tensor(op, "q", q, "(B, Lq, H, D)")
    _checks.tensor(op, "k", k, "(B, Lk, H, D)")
    _checks.tensor(op, "v", v, "(B, Lk, H, D)")
    b, lq, h, d = q.shape
    lk = k.shape[1]
    _checks.sizes(op, "k", k, "(B, Lk, H, D)", (b, None, h, d))
    _checks.sizes(op, "v", v, "(B, Lk, H, D)", (b, lk, h, d))
    for name, x in (("k", k), ("v", v)):
        _checks.same_device(op, name, x, "q", q)
        _checks.same_dtype(op, name, x, "q", q)
    scale = _options(op, q, lk, causal, key_mask, head_gate, scale)
    if causal and lq != lk:
        raise ValueError(f"{op}: causal needs Lq == Lk, got Lq = {lq} and Lk = {lk}")
    q, k, v = (unit_stride(x) for x in like_linear(q, k, v))
    spec = _spec(op, q, lk, (q, k, v, head_gate), causal, key_mask, head_gate)
    return spec, (q, k, v, key_mask, head_gate, causal, scale)


def _prepare_qkv(qkv, *, causal=False, key_mask=None, head_gate=None, scale=None):
    op = "attention_qkv"
    _checks.tensor(op, "qkv", qkv, "(B, L, 3, H, D)")
    _checks.sizes(op, "qkv", qkv, "(B, L, 3, H, D)", (None, None, 3, None, None))
    q = qkv[:, :, 0]
    scale = _options(op, q, q.shape[1], causal, key_mask, head_gate, scale)
    (qkv,) = (unit_stride(x) for x in like_linear(qkv))
    spec = _spec(op, qkv[:, :, 0], q.shape[1], (qkv, head_gate), causal, key_mask, head_gate)
    return spec, (qkv, key_mask, head_gate, causal, scale)


def _options(op, q, lk, causal, key_mask, head_gate, scale) -> float:
    """Validate what both forms share; the scale as a number."""
    b, _, h, d = q.shape
    _checks.boolean(op, "causal", causal)
    if key_mask is not None:
        _checks.tensor(op, "key_mask", key_mask, "(B, Lk)", (torch.bool,))
        _checks.sizes(op, "key_mask", key_mask, "(B, Lk)", (b, lk))
        _checks.same_device(op, "key_mask", key_mask, "q", q)
    if head_gate is not None:
        shape = "(H,)" if not isinstance(head_gate, Tensor) or head_gate.dim() < 2 else "(B, H)"
        _checks.tensor(op, "head_gate", head_gate, shape)
        _checks.sizes(op, "head_gate", head_gate, shape, (b, h)[-head_gate.dim() :])
        _checks.same_device(op, "head_gate", head_gate, "q", q)
    if scale is None:
        return d**-0.5 if d > 0 else 1.0
    return _checks.number(op, "scale", scale)


def _spec(op, q, lk, differentiable, causal, key_mask, head_gate):
    b, lq, h, d = q.shape
    flags = {"causal": causal, "key_mask": key_mask is not None, "head_gate": head_gate is not None}
    return make_spec(
        op,
        q,
        differentiable,
        {"B": b, "Lq": lq, "Lk": lk, "H": h, "D": d},
        tuple(name for name, on in flags.items() if on),
    )


def _torch_why_not(spec):
    """scaled_dot_product_attention is not defined on every zero size; the reference is."""
    return Cannot("a size is zero") if 0 in spec.sizes.values() else None


def _triton_why_not(spec):
    sizes = spec.sizes
    if 0 in sizes.values():
        return Cannot("a size is zero")
    if sizes["D"] > 128:
        return Cannot(f"head dims go to 128, this one is {sizes['D']}")
    reason = triton_why_not(spec)
    if reason is None and max(sizes["Lq"], sizes["Lk"]) > LONGEST_ROW:
        return Slower(
            f"made for short rows: past {LONGEST_ROW} tokens 7 products in backward, predicted"
            " 0.7x of scaled_dot_product_attention's 5"
        )
    return reason


class _AttentionFunction(torch.autograd.Function):
    """attention through a backend that has a forward and a backward of its own."""

    @staticmethod
    def forward(ctx, q, k, v, key_mask, head_gate, causal, scale, backend):
        forward = implementation("attention_fwd", backend)
        out, stats = forward(q, k, v, key_mask, head_gate, causal, scale)
        ctx.save_for_backward(q, k, v, out, stats, key_mask, head_gate)
        ctx.causal, ctx.scale, ctx.backend = causal, scale, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        *saved, key_mask, head_gate = ctx.saved_tensors
        need_q, need_k, need_v, _, need_gate, *_ = ctx.needs_input_grad
        needs = [need_q, need_k, need_v, need_gate]
        backward = implementation("attention_bwd", ctx.backend)
        gradients = backward(
            unit_stride(dout), *saved, key_mask, head_gate, ctx.causal, ctx.scale, needs
        )
        dq, dk, dv, dgate = (g if need else None for g, need in zip(gradients, needs, strict=True))
        gradients = (dq, dk, dv, None, dgate, None, None, None)
        return first_order(gradients, dout, *saved, head_gate)


class _AttentionQKVFunction(torch.autograd.Function):
    """The same from packed projections, with a packed gradient."""

    @staticmethod
    def forward(ctx, qkv, key_mask, head_gate, causal, scale, backend):
        forward = implementation("attention_fwd", backend)
        out, stats = forward(*qkv.unbind(2), key_mask, head_gate, causal, scale)
        ctx.save_for_backward(qkv, out, stats, key_mask, head_gate)
        ctx.causal, ctx.scale, ctx.backend = causal, scale, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        *saved, key_mask, head_gate = ctx.saved_tensors
        need_qkv, _, need_gate, *_ = ctx.needs_input_grad
        needs = [need_qkv, need_gate]
        backward = implementation("attention_qkv_bwd", ctx.backend)
        gradients = backward(
            unit_stride(dout), *saved, key_mask, head_gate, ctx.causal, ctx.scale, needs
        )
        dqkv, dgate = (g if need else None for g, need in zip(gradients, needs, strict=True))
        gradients = (dqkv, None, dgate, None, None, None)
        return first_order(gradients, dout, *saved, head_gate)


def _run_torch(q, k, v, key_mask, head_gate, causal, scale):
    q, k, v, head_gate = barrier(q, k, v, head_gate)
    return _torch.attention(q, k, v, key_mask, head_gate, causal, scale)


def _run_torch_qkv(qkv, key_mask, head_gate, causal, scale):
    qkv, head_gate = barrier(qkv, head_gate)
    return _torch.attention(*qkv.unbind(2), key_mask, head_gate, causal, scale)


def _through(function, backend):
    """A candidate's `run`: the problem through an autograd.Function, on one backend."""
    return lambda *problem: applied(function, *problem, backend)


def _example(device):
    q, k, v = (torch.empty(2, 50, 12, 64, device=device, requires_grad=True) for _ in range(3))
    return (q, k, v), {}


def _example_qkv(device):
    return (torch.empty(2, 50, 3, 12, 64, device=device, requires_grad=True),), {}


register(
    Op(
        "attention",
        attention,
        _prepare,
        (
            Candidate("triton", _triton_why_not, _through(_AttentionFunction, "triton")),
            Candidate("torch", _torch_why_not, _run_torch),
            Candidate("reference", always, _through(_AttentionFunction, "reference")),
        ),
        _example,
    )
)
register(
    Op(
        "attention_qkv",
        attention_qkv,
        _prepare_qkv,
        (
            Candidate("triton", _triton_why_not, _through(_AttentionQKVFunction, "triton")),
            Candidate("torch", _torch_why_not, _run_torch_qkv),
            Candidate("reference", always, _through(_AttentionQKVFunction, "reference")),
        ),
        _example_qkv,
    )
)
