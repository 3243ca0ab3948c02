"""The ops as PyTorch knows them: schemas, fakes, and where each implementation lives.

``torch.ops.tinyclip.<op>`` are opaque, functional and without autograd; the public functions put a
`torch.autograd.Function` on top. Their last argument names the backend, chosen once in forward.
Implementations are imported on first use, so that registering imports nothing optional.

An output that is not wanted (`needs`, or no residual) is an empty tensor: a schema has fixed arity.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tinyclip.ops import _torch
from tinyclip.ops._autocast import autocast_dtype

_LIBRARY = torch.library.Library("tinyclip", "DEF")

# Called without the registered op around it, too, where nothing watches: it costs what rows do.
_DIRECT = {
    ("gelu_mlp_fwd", "cpu"),
    ("gelu_mlp_bwd", "cpu"),
    ("layer_norm_fwd", "cpu"),
    ("layer_norm_bwd", "cpu"),
}

# (op, backend) or backend -> the module that has a function of the op's name.
_MODULES: dict[Any, str] = {
    "reference": "tinyclip.ops.reference",
    "torch": "tinyclip.ops._torch",
    ("attention_fwd", "triton"): "tinyclip.triton_kernels.attention_fwd",
    ("attention_bwd", "triton"): "tinyclip.triton_kernels.attention_bwd",
    ("attention_qkv_bwd", "triton"): "tinyclip.triton_kernels.attention_bwd",
    ("gelu_mlp_fwd", "triton"): "tinyclip.triton_kernels.gelu_mlp",
    ("gelu_mlp_bwd", "triton"): "tinyclip.triton_kernels.gelu_mlp",
    ("layer_norm_fwd", "triton"): "tinyclip.triton_kernels.layer_norm",
    ("layer_norm_bwd", "triton"): "tinyclip.triton_kernels.layer_norm",
    ("contrastive_stats", "cuda"): "tinyclip.ops._panels_cuda",
    ("contrastive_grads", "cuda"): "tinyclip.ops._panels_cuda",
    ("contrastive_stats", "triton"): "tinyclip.ops._panels_triton",
    ("contrastive_grads", "triton"): "tinyclip.ops._panels_triton",
    **dict.fromkeys(_DIRECT, "tinyclip.ops._cpu_rows"),
    "cpu": "tinyclip.ops._cpu",
}

# Plain PyTorch, called without the registered op around it, so that torch.compile sees through.
_TRANSPARENT = {
    ("gelu_mlp_fwd", "torch"): _torch.gelu_mlp_fwd,
    ("gelu_mlp_bwd", "torch"): _torch.gelu_mlp_bwd,
    ("layer_norm_fwd", "torch"): _torch.layer_norm_fwd,
    ("layer_norm_bwd", "torch"): _torch.layer_norm_bwd,
}

_loaded: dict[tuple[str, str], Callable] = {}


def _load(op: str, backend: str) -> Callable:
    key = (op, backend)
    if key not in _loaded:
        module = _MODULES.get(key) or _MODULES.get(backend)
        if module is None:
            raise ValueError(
                f"tinyclip::{op}: backend must name an implementation, got {backend!r}"
            )
        _loaded[key] = getattr(import_module(module), op)
    return _loaded[key]


def without_autocast(function: Callable, inputs: tuple) -> Any:
    """The op has cast what it wanted cast; forward or backward, nothing inside may cast again."""
    device = inputs[0].device
    if autocast_dtype(device) is not None:
        with torch.autocast(device.type, enabled=False):
            return function(*inputs)
    return function(*inputs)


def _watched(tensor: Tensor) -> bool:
    """Whether a compiler, a dispatch mode or a subclass is to see the registered op."""
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return not plain or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def implementation(op: str, backend: str) -> Callable:
    """What an autograd.Function calls: the registered op, or the plain PyTorch in its place."""
    function = _TRANSPARENT.get((op, backend))
    if function is not None:
        return lambda *inputs: without_autocast(function, inputs)
    registered = getattr(torch.ops.tinyclip, op).default
    if (op, backend) not in _DIRECT:
        return lambda *inputs: registered(*inputs, backend)

    def direct(*inputs):
        if _watched(inputs[0]):
            return registered(*inputs, backend)
        return without_autocast(_load(op, backend), inputs)

    return direct


def _define(signature: str) -> Callable:
    """Register ``name(args) -> (outputs)``; the decorated function is its fake."""
    name = signature.partition("(")[0]
    _LIBRARY.define(signature, tags=torch.Tag.pt2_compliant_tag)

    def device_function(*args):
        *inputs, backend = args
        return without_autocast(_load(name, backend), tuple(inputs))

    _LIBRARY.impl(name, device_function, "CompositeExplicitAutograd")

    def decorate(fake: Callable) -> Callable:
        torch.library.register_fake(f"tinyclip::{name}", fake, lib=_LIBRARY)
        return fake

    return decorate


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gradient(like: Tensor, needed: bool) -> Tensor:
    """A contiguous gradient of `like`, or the empty tensor."""
    return torch.empty_like(like, memory_format=torch.contiguous_format) if needed else _none(like)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


@_define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? head_gate, bool causal,"
    " float scale, str backend) -> (Tensor out, Tensor stats)"
)
def _(q, k, v, key_mask, head_gate, causal, scale, backend):
    b, lq, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(2, b, h, lq, dtype=_statistics_dtype(q.dtype))


@_define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats,"
    " Tensor? key_mask, Tensor? head_gate, bool causal, float scale, bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dhead_gate)"
)
def _(dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs, backend):
    dgate = _gradient(head_gate, True) if needs[3] else _none(q)
    return _gradient(q, needs[0]), _gradient(k, needs[1]), _gradient(v, needs[2]), dgate


@_define(
    "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor stats, Tensor? key_mask,"
    " Tensor? head_gate, bool causal, float scale, bool[] needs, str backend)"
    " -> (Tensor dqkv, Tensor dhead_gate)"
)
def _(dout, qkv, out, stats, key_mask, head_gate, causal, scale, needs, backend):
    dgate = _gradient(head_gate, True) if needs[1] else _none(qkv)
    return _gradient(qkv, needs[0]), dgate


@_define(
    "gelu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate,"
    " str activation, str backend) -> (Tensor y, Tensor pre)"
)
def _(x, w1, b1, w2, b2, gate, activation, backend):
    rows = x.shape[0]
    return x.new_empty(rows, w2.shape[0]), x.new_empty(rows, w1.shape[0])


@_define(
    "gelu_mlp_bwd(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2, Tensor? gate,"
    " str activation, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dgate)"
)
def _(dy, x, pre, w1, w2, gate, activation, needs, backend):
    return (
        _gradient(x, needs[0]),
        _gradient(w1, needs[1]),
        w1.new_empty(w1.shape[0]) if needs[2] else _none(x),
        _gradient(w2, needs[3]),
        w2.new_empty(w2.shape[0]) if needs[4] else _none(x),
        _gradient(gate, True) if needs[5] else _none(x),
    )


@_define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor? channel_mask, float eps, ScalarType out_dtype, str backend)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)"
)
def _(x, residual, weight, bias, channel_mask, eps, out_dtype, backend):
    if residual is None:
        total, dtype = _none(x), x.dtype
    else:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        total = x.new_empty(x.shape, dtype=dtype)
    statistic = x.new_empty(x.shape[0], dtype=_statistics_dtype(dtype))
    y = x.new_empty(x.shape, dtype=out_dtype)
    return y, total, statistic, torch.empty_like(statistic)


@_define(
    "layer_norm_bwd(Tensor dy, Tensor? dtotal, Tensor total, Tensor mean, Tensor rstd,"
    " Tensor? weight, Tensor? bias, Tensor? channel_mask, bool[] needs, str backend)"
    " -> (Tensor dtotal, Tensor dweight, Tensor dbias)"
)
def _(dy, dtotal, total, mean, rstd, weight, bias, channel_mask, needs, backend):
    return (
        _gradient(total, needs[0]),
        _gradient(weight, True) if needs[1] else _none(total),
        _gradient(bias, True) if needs[2] else _none(total),
    )


@_define(
    "contrastive_stats(Tensor a, Tensor b, Tensor scale, Tensor? teacher_a, Tensor? teacher_b,"
    " Tensor? teacher_scale, SymInt offset, str backend)"
    " -> (Tensor rows, Tensor cols, Tensor positive)"
)
def _(a, b, scale, teacher_a, teacher_b, teacher_scale, offset, backend):
    m, n = a.shape[0], b.shape[0]
    return scale.new_empty(5, m), scale.new_empty(5, n), scale.new_empty(m)


@_define(
    "contrastive_grads(Tensor a, Tensor b, Tensor scale, Tensor rows, Tensor cols,"
    " Tensor? row_weight, Tensor? col_weight, float alpha, Tensor? teacher_a, Tensor? teacher_b,"
    " Tensor? teacher_scale, SymInt offset, bool[] needs, str backend)"
    " -> (Tensor da, Tensor db, Tensor dscale)"
)
def _(a, b, scale, rows, cols, rw, cw, alpha, ta, tb, teacher_scale, offset, needs, backend):
    dscale = scale.new_empty(()) if needs[2] else _none(scale)
    return _gradient(a, needs[0]), _gradient(b, needs[1]), dscale


@_define(
    "contrastive_whole(Tensor a, Tensor b, Tensor scale, Tensor? teacher_a, Tensor? teacher_b,"
    " Tensor? teacher_scale, float alpha, str backend) -> (Tensor loss, Tensor ds, Tensor dscale)"
)
def _(a, b, scale, teacher_a, teacher_b, teacher_scale, alpha, backend):
    ds = scale.new_empty(a.shape[0], b.shape[0])
    return scale.new_empty(()), ds, scale.new_empty(())


# Part of the `torch` backend's attention on CUDA: like aten::contiguous, x itself or a copy.
_ALIGNED = "aligned(Tensor(a) x, bool gradient) -> Tensor(a)"
_LIBRARY.define(_ALIGNED, tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.impl("aligned", _torch.aligned, "CompositeImplicitAutograd")


# What a selective activation checkpointing policy may save instead of computing again.
SAC_SAVE_OPS = (
    torch.ops.tinyclip.attention_fwd.default,
    torch.ops.tinyclip.gelu_mlp_fwd.default,
    torch.ops.tinyclip.layer_norm_fwd.default,
    torch.ops.tinyclip.contrastive_stats.default,
    torch.ops.tinyclip.contrastive_whole.default,
)
