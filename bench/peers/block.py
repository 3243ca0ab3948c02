"""A whole pre-norm transformer block, x (B, L, C) -> (B, L, C), as open_clip and timm build it."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import Peer, Tensors, open_clip
from bench.peers.attention import future_keys
from bench.peers.mlp import activation
from bench.timing import Timed


def plain_maths(t: Tensors, s: dict) -> Tensor:
    """The block in PyTorch's own functions, packed projection split by views (timm's way)."""
    x = t["x"]
    width = (x.shape[-1],)
    y = F.layer_norm(x, width, t["ln_1.weight"], t["ln_1.bias"])
    y = F.linear(y, t["attn.in_proj_weight"], t["attn.in_proj_bias"])
    q, k, v = y.unflatten(-1, (3, s["H"], s["D"])).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(s.get("causal")))
    y = y.transpose(1, 2).flatten(2)
    x = x + F.linear(y, t["attn.out_proj.weight"], t["attn.out_proj.bias"])
    y = F.layer_norm(x, width, t["ln_2.weight"], t["ln_2.bias"])
    y = activation(F.linear(y, t["mlp.c_fc.weight"], t["mlp.c_fc.bias"]), s)
    return x + F.linear(y, t["mlp.c_proj.weight"], t["mlp.c_proj.bias"])


def _bind(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Put leaves in the place of a module's parameters, so that gradients reach those leaves."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        holder = module.get_submodule(owner)
        delattr(holder, attribute)
        setattr(holder, attribute, tensor)
    return module


def open_clip_block() -> Peer:
    """open_clip's ResidualAttentionBlock in training, its causal mask dense as its towers build."""

    def build(t: Tensors, s: dict, device: str) -> Timed:
        width = s["H"] * s["D"]
        transformer = open_clip("transformer")
        quick = s["activation"] == "quick_gelu"
        block = transformer.ResidualAttentionBlock(
            width,
            s["H"],
            mlp_ratio=s["F"] / width,
            act_layer=transformer.QuickGELU if quick else nn.GELU,
        )
        _bind(block, {name: tensor for name, tensor in t.items() if name != "x"})
        mask = None
        if s.get("causal"):
            mask = torch.zeros(s["L"], s["L"], device=device, dtype=t["x"].dtype)
            mask.masked_fill_(future_keys(s, t["x"]), float("-inf"))
        # flash refuses a dense mask on CUDA; efficient takes it
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        return Timed(lambda: block(t["x"], attn_mask=mask), lambda: sdpa_kernel(backends))

    return Peer(build)


def eager() -> Peer:
    """`plain_maths` with attention pinned to flash."""
    pinned = functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    return Peer(lambda t, s, device: Timed(lambda: plain_maths(t, s), pinned))
