"""One ordinary call of every op, for the tests of contracts: small, with every optional tensor."""

import torch

import tinyclip
from tinyclip import ops


def _normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def attention(dtype=torch.float32, n=6):
    q, k, v = (_normal(2, n, 3, 8, dtype=dtype) for _ in range(3))
    return ops.attention, {"q": q, "k": k, "v": v, "head_gate": _normal(3)}, {}


def attention_masked(dtype=torch.float32, n=6):
    _, tensors, _ = attention(dtype, n)
    key_mask = torch.rand(2, n) > 0.3
    return ops.attention, tensors, {"causal": True, "key_mask": key_mask}


def attention_qkv(dtype=torch.float32, n=6):
    tensors = {"qkv": _normal(2, n, 3, 3, 8, dtype=dtype), "head_gate": _normal(2, 3)}
    return ops.attention_qkv, tensors, {"causal": True}


def gelu_mlp(dtype=torch.float32, n=6):
    shapes = {"fc1_weight": (7, 5), "fc1_bias": (7,), "fc2_weight": (4, 7), "fc2_bias": (4,)}
    tensors = {"x": _normal(2, n, 5, dtype=dtype)}
    tensors |= {name: _normal(*shape) for name, shape in shapes.items()}
    return ops.gelu_mlp, {**tensors, "hidden_gate": _normal(7)}, {"activation": "quick_gelu"}


def layer_norm(dtype=torch.float32, n=6):
    tensors = {"x": _normal(2, n, 5, dtype=dtype), "weight": _normal(5), "bias": _normal(5)}
    tensors["residual"] = _normal(2, n, 5, dtype=dtype)
    return ops.layer_norm, tensors, {}


def layer_norm_masked(dtype=torch.float32, n=6):
    _, tensors, _ = layer_norm(dtype, n)
    del tensors["residual"]
    mask = torch.tensor([True, False, True, True, True])
    return ops.layer_norm, tensors, {"channel_mask": mask}


def contrastive_loss(dtype=torch.float32, n=6):
    image, text = (torch.nn.functional.normalize(_normal(n, 5), dim=1).to(dtype) for _ in range(2))
    teacher = tinyclip.Teacher(_normal(n, 4), _normal(n, 4), 3.0)
    tensors = {"image": image, "text": text, "logit_scale": torch.tensor(9.0)}
    return ops.contrastive_loss, tensors, {"teacher": teacher, "alpha": 0.4}


SAMPLES = (
    attention,
    attention_masked,
    attention_qkv,
    gelu_mlp,
    layer_norm,
    layer_norm_masked,
    contrastive_loss,
)


def leaves(tensors, frozen=()):
    """Fresh leaves with the same values, all but `frozen` requiring grad."""
    return {
        name: tensor.detach().clone().requires_grad_(name not in frozen)
        for name, tensor in tensors.items()
    }


def total(outs) -> torch.Tensor:
    """A scalar of every output in which each element counts differently."""
    outs = outs if isinstance(outs, tuple) else (outs,)
    weights = [torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape) for out in outs]
    return sum((out.float() * w).sum() for out, w in zip(outs, weights, strict=True))
