"""Attention's peers: the plain maths, PyTorch's fused kernels, and the paths CLIP code takes today.

Letters: B batch, L tokens, H heads, D head dim. Every peer gives out (B, L, H, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import CannotRun, Peer, Tensors
from bench.timing import Timed


def _split(t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return t["qkv"].unbind(2) if "qkv" in t else (t["q"], t["k"], t["v"])


def _gated(out: Tensor, t: Tensors) -> Tensor:
    gate = t.get("head_gate")
    return out if gate is None else out * gate[:, None]


def future_keys(s: dict, like: Tensor) -> Tensor:
    return torch.ones(s["L"], s["L"], dtype=torch.bool, device=like.device).triu(1)


def eager(t: Tensors, s: dict) -> Tensor:
    """The formula, with its L x L matrix in memory."""
    q, k, v = _split(t)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * s["D"] ** -0.5
    if s.get("causal"):
        scores = scores.masked_fill(future_keys(s, q), float("-inf"))
    if "key_mask" in t:
        scores = scores.masked_fill(~t["key_mask"][:, None, None, :], float("-inf"))
    return _gated(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), t)


def tinyclip_masked(t: Tensors, s: dict) -> Tensor:
    """TinyCLIP's mask phase: batched products over copied heads, scaled in place by the gate."""
    q, k, v = (x.transpose(1, 2).reshape(-1, s["L"], s["D"]) for x in _split(t))
    scores = torch.bmm(q * s["D"] ** -0.5, k.transpose(1, 2))
    if s.get("causal"):
        scores = scores.masked_fill(future_keys(s, q), float("-inf"))
    out = torch.bmm(scores.softmax(-1), v).view(-1, s["H"], s["L"], s["D"])
    out *= t["head_gate"].view(1, -1, 1, 1)
    return out.transpose(1, 2).contiguous()


_ON_CPU = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


def sdpa(backend: SDPBackend) -> Peer:
    """scaled_dot_product_attention on one backend, over transposed views (no copies)."""

    def maths(t: Tensors, s: dict) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in _split(t))
        mask = t["key_mask"][:, None, None, :] if "key_mask" in t else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=bool(s.get("causal"))
        )
        return _gated(out.transpose(1, 2), t)

    def build(t: Tensors, s: dict, device: str) -> Timed:
        if device == "cpu" and backend not in _ON_CPU:
            raise CannotRun("this backend exists on CUDA only")
        return Timed(lambda: maths(t, s), lambda: sdpa_kernel(backend))

    return Peer(build)


def mha_internals() -> Peer:
    """What nn.MultiheadAttention does between its two projections, copies included.

    The packed projection, sequence first, is copied to make q, k and v contiguous; heads move into
    the batch as views; the output is copied back. A causal mask arrives dense, as open_clip and
    TinyCLIP hand it over, which the flash backend refuses on CUDA: efficient serves it.
    """

    def build(t: Tensors, s: dict, device: str) -> Timed:
        length, width = s["L"], s["H"] * s["D"]
        packed = t["qkv"]
        dense = None
        if s.get("causal"):
            dense = torch.zeros(length, length, dtype=packed.dtype, device=device)
            dense.masked_fill_(future_keys(s, packed), float("-inf"))

        def call() -> Tensor:
            projected = packed.view(-1, length, 3 * width).transpose(0, 1)
            split = projected.unflatten(-1, (3, width)).permute(2, 0, 1, 3).contiguous()
            q, k, v = (
                x.view(length, -1, s["D"]).transpose(0, 1).view(-1, s["H"], length, s["D"])
                for x in split
            )
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
            out = out.permute(2, 0, 1, 3).contiguous()
            return out.transpose(0, 1)

        wanted = SDPBackend.FLASH_ATTENTION
        if dense is not None and device == "cuda":
            wanted = SDPBackend.EFFICIENT_ATTENTION
        return Timed(call, lambda: sdpa_kernel(wanted))

    return Peer(build)
