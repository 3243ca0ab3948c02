"""The two-layer perceptron of a transformer block: linear, activation, linear.

Letters: C channels in, F hidden, C_out channels out.
"""

import difflib

import torch
from torch import Tensor

from tinyclip.ops import _checks
from tinyclip.ops._autocast import autocast_dtype, like_linear
from tinyclip.ops._autograd import applied, first_order
from tinyclip.ops._contracts import implementation
from tinyclip.ops._dispatch import Candidate, Cannot, Op, always, make_spec, register, select
from tinyclip.ops._layout import as_rows
from tinyclip.ops._native import rows_why_not
from tinyclip.ops._triton import triton_why_not

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu")


def gelu_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    hidden_gate: Tensor | None = None,
) -> Tensor:
    """``y = (act(x fc1_weightT + fc1_bias) * hidden_gate) fc2_weightT + fc2_bias``.

    Saved for backward: `x` and the pre-activation; the activation is computed again.

    Args:
        x: (..., C), fp32, bf16, fp16 or fp64, any strides.
        fc1_weight: (F, C), fc1_bias: (F,) or None.
        fc2_weight: (C_out, F), fc2_bias: (C_out,) or None. Parameters may be fp32 while `x` is 16
            bit: they are cast to x's dtype, and their gradients come back in fp32.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"quick_gelu"`` (x sigmoid(1.702 x), as in
            OpenAI's CLIP) or ``"relu"``.
        hidden_gate: (F,), any float dtype, multiplies the activation (TinyCLIP's intermediate
            mask, Wu et al. 2023); differentiable.

    Returns:
        (..., C_out) in x's dtype, under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the text names it.
        BackendUnavailable: the backend asked for cannot run this problem.
    """
    spec, problem = _prepare(
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        activation=activation,
        hidden_gate=hidden_gate,
    )
    y = select(spec).run(*problem)
    return y.reshape(*x.shape[:-1], fc2_weight.shape[0])


def _prepare(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation="gelu", hidden_gate=None):
    op = "gelu_mlp"
    _checks.tensor(op, "x", x, "(..., C)")
    _checks.tensor(op, "fc1_weight", fc1_weight, "(F, C)")
    _checks.tensor(op, "fc2_weight", fc2_weight, "(C_out, F)")
    channels, hidden, channels_out = x.shape[-1], fc1_weight.shape[0], fc2_weight.shape[0]
    _checks.sizes(op, "fc1_weight", fc1_weight, "(F, C)", (None, channels))
    _checks.sizes(op, "fc2_weight", fc2_weight, "(C_out, F)", (None, hidden))
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        _checks.same_device(op, name, weight, "x", x)
    vectors = (
        ("fc1_bias", fc1_bias, "(F,)", hidden),
        ("fc2_bias", fc2_bias, "(C_out,)", channels_out),
        ("hidden_gate", hidden_gate, "(F,)", hidden),
    )
    for name, vector, shape, size in vectors:
        if vector is not None:
            _checks.vector(op, name, vector, shape, size, "x", x)
    if not isinstance(activation, str):
        raise TypeError(f"{op}: activation must be a string, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        near = difflib.get_close_matches(activation, ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}{hint}")

    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if autocast_dtype(x.device) is not None:
        x, *parameters = like_linear(x, *parameters)
    w1, b1, w2, b2 = (None if p is None else p.to(x.dtype) for p in parameters)
    x = as_rows(x)
    if x.device.type == "cpu" and x.element_size() == 2:
        # With AMX, oneDNN reads past the end of a row (torch 2.14), and 0 times NaN is NaN.
        x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    spec = make_spec(
        op,
        x,
        (x, *parameters, hidden_gate),
        {"rows": x.shape[0], "C": channels, "F": hidden, "C_out": channels_out},
        (activation, *(("hidden_gate",) if hidden_gate is not None else ())),
    )
    return spec, (x, w1, b1, w2, b2, hidden_gate, activation)


class _GeluMLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, gate, activation, backend):
        y, pre = implementation("gelu_mlp_fwd", backend)(x, w1, b1, w2, b2, gate, activation)
        ctx.save_for_backward(x, pre, w1, b1, w2, gate)
        ctx.activation, ctx.backend = activation, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, pre, w1, b1, w2, gate = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        backward = implementation("gelu_mlp_bwd", ctx.backend)
        gradients = backward(dy.contiguous(), x, pre, w1, w2, gate, ctx.activation, needs)
        gradients = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return first_order((*gradients, None, None), dy, x, w1, b1, w2, gate)


def _triton_why_not(spec):
    return Cannot("a size is zero") if 0 in spec.sizes.values() else triton_why_not(spec)


def _through(backend):
    return lambda *problem: applied(_GeluMLPFunction, *problem, backend)


def _example(device):
    def tensor(*shape):
        return torch.empty(*shape, device=device, requires_grad=True)

    arguments = (tensor(100, 768), tensor(3072, 768), tensor(3072), tensor(768, 3072), tensor(768))
    return arguments, {}


register(
    Op(
        "gelu_mlp",
        gelu_mlp,
        _prepare,
        (
            Candidate("triton", _triton_why_not, _through("triton")),
            Candidate("cpu", rows_why_not, _through("cpu")),
            Candidate("torch", always, _through("torch")),
            Candidate("reference", always, _through("reference")),
        ),
        _example,
    )
)
