"""A whole pre-norm transformer block, x (B, L, C) -> (B, L, C), as open_clip and timm build it."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import Peer, Tensors, open_clip
from bench.peers.attention import future_keys
from bench.peers.mlp import activation
from bench.peers.model import bind
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
        bind(block, {name: tensor for name, tensor in t.items() if name != "x"})
        mask = None
        if s.get("causal"):
            mask = torch.zeros(s["L"], s["L"], device=device, dtype=t["x"].dtype)
            mask.masked_fill_(future_keys(s, t["x"]), float("-inf"))
        # flash refuses a dense mask on CUDA; efficient takes it
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        return Timed(lambda: block(t["x"], attn_mask=mask), lambda: sdpa_kernel(backends))

    return Peer(build)


def tinyclip_masked(t: Tensors, s: dict) -> Tensor:
    """TinyCLIP's mask phase: a norm that looks for its channels, an L x L matrix, gates as passes.

    The norm's two steps are TinyCLIP's, not F.layer_norm.
    """
    kept = t["channel_gate"] != 0

    def norm(x: Tensor, name: str) -> Tensor:
        index = torch.where(kept)[0]
        part = x.index_select(-1, index)
        centred = part - part.mean(-1, keepdim=True)
        part = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        part = part * t[f"{name}.weight"][index] + t[f"{name}.bias"][index]
        return torch.zeros_like(x).index_copy(-1, index, part)

    x = t["x"]
    y = F.linear(norm(x, "ln_1"), t["attn.in_proj_weight"], t["attn.in_proj_bias"])
    q, k, v = y.unflatten(-1, (3, s["H"], s["D"])).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * s["D"] ** -0.5) @ k.transpose(-1, -2)
    if s.get("causal"):
        scores = scores.masked_fill(future_keys(s, x), float("-inf"))
    heads = scores.softmax(-1) @ v * t["head_gate"].view(-1, 1, 1)
    y = F.linear(heads.transpose(1, 2).flatten(2), *_projection(t, "attn.out_proj"))
    x = x + y * t["channel_gate"]
    y = activation(F.linear(norm(x, "ln_2"), *_projection(t, "mlp.c_fc")), s) * t["hidden_gate"]
    return x + F.linear(y, *_projection(t, "mlp.c_proj")) * t["channel_gate"]


def _projection(t: Tensors, name: str) -> tuple[Tensor, Tensor]:
    return t[f"{name}.weight"], t[f"{name}.bias"]


def eager() -> Peer:
    """`plain_maths` with attention pinned to flash."""
    pinned = functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    return Peer(lambda t, s, device: Timed(lambda: plain_maths(t, s), pinned))
