"""How each op is called on a case's tensors; `ops` is tinyclip.ops, or what a test plants."""

import torch
from torch import Tensor

from bench.peers import Tensors
from bench.peers.contrastive import TEACHER_SCALE


def attention(ops, t: Tensors, s: dict) -> Tensor:
    extras = {name: t[name] for name in ("head_gate", "key_mask") if name in t}
    return ops.attention(t["q"], t["k"], t["v"], causal=bool(s.get("causal")), **extras)


def attention_qkv(ops, t: Tensors, s: dict) -> Tensor:
    extras = {name: t[name] for name in ("head_gate", "key_mask") if name in t}
    return ops.attention_qkv(t["qkv"], causal=bool(s.get("causal")), **extras)


def gelu_mlp(ops, t: Tensors, s: dict) -> Tensor:
    layers = (t[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
    gate = t.get("hidden_gate")
    return ops.gelu_mlp(t["x"], *layers, activation=s["activation"], hidden_gate=gate)


def layer_norm(ops, t: Tensors, s: dict) -> Tensor | tuple[Tensor, Tensor]:
    extras = {name: t[name] for name in ("residual", "channel_mask") if name in t}
    return ops.layer_norm(t["x"], t["weight"], t["bias"], **extras)


def contrastive_loss(ops, t: Tensors, s: dict) -> Tensor:
    if "teacher_image" not in t:
        return ops.contrastive_loss(t["image"], t["text"], t["logit_scale"])
    teacher = ops.Teacher(t["teacher_image"], t["teacher_text"], TEACHER_SCALE)
    return ops.contrastive_loss(
        t["image"], t["text"], t["logit_scale"], teacher=teacher, alpha=s["alpha"]
    )


def block(ops, t: Tensors, s: dict) -> Tensor:
    """open_clip's block from four ops and two plain projections; TinyCLIP's gates if given."""
    linear = torch.nn.functional.linear
    channel_gate = t.get("channel_gate")
    mask = None if channel_gate is None else channel_gate != 0

    def out(name: str) -> tuple[Tensor, Tensor]:
        weight, bias = t[f"{name}.weight"], t[f"{name}.bias"]
        if channel_gate is None:
            return weight, bias
        return weight * channel_gate[:, None], bias * channel_gate

    y = ops.layer_norm(t["x"], t["ln_1.weight"], t["ln_1.bias"], channel_mask=mask)
    qkv = linear(y, t["attn.in_proj_weight"], t["attn.in_proj_bias"])
    qkv = qkv.unflatten(-1, (3, s["H"], s["D"]))
    y = ops.attention_qkv(qkv, causal=bool(s.get("causal")), head_gate=t.get("head_gate"))
    y = linear(y.flatten(2), *out("attn.out_proj"))
    norm = (t["ln_2.weight"], t["ln_2.bias"])
    y, x = ops.layer_norm(y, *norm, residual=t["x"], channel_mask=mask)
    mlp = (t["mlp.c_fc.weight"], t["mlp.c_fc.bias"], *out("mlp.c_proj"))
    gate = t.get("hidden_gate")
    return x + ops.gelu_mlp(y, *mlp, activation=s["activation"], hidden_gate=gate)


def _teacher(t: Tensors):
    if "teacher_image" not in t:
        return None
    return t["teacher_image"], t["teacher_text"], TEACHER_SCALE


def contrastive_stats(ops, t: Tensors, s: dict) -> tuple[Tensor, ...]:
    stats = ops.contrastive_stats(t["image"], t["text"], t["logit_scale"], teacher=_teacher(t))
    return tuple(stats)


def contrastive_grads(ops, t: Tensors, s: dict) -> tuple[Tensor, ...]:
    weight = 1 / (2 * len(t["image"]))
    return ops.contrastive_grads(
        t["image"],
        t["text"],
        t["logit_scale"],
        ops.Stats(t["rows"], t["cols"], t["positive"]),
        row_weight=weight,
        col_weight=weight,
        alpha=s.get("alpha", 0.0),
        teacher=_teacher(t),
    )
