"""Multi-head attention with torch's signature and state dict, on the fused ops.

Letters: B batch, L tokens (Lq queries, Lk keys), H heads, D head dim, C channels.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyclip import ops
from tinyclip.nn.mlp import gated


class MultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention's twin: same constructor, arguments, mask polarity, state dict.

    ``out = concat_h(softmax(q_h k_hT / sqrt(D)) v_h) out_projT`` (Vaswani et al. 2017, 3.2.2).
    Self-attention takes the packed projection as it is: no transposes, no copies.

    Args:
        embed_dim: C.
        num_heads: H.
        dropout: must be 0: no backend drops attention weights.
        bias: whether the projections have one.
        add_bias_kv, add_zero_attn: must be False.
        kdim, vdim: must be None or C.
        batch_first: (B, L, C) instead of (L, B, C), as in torch.
        head_dim: D, by default C / H. ``H D`` need not be C: in_proj_weight is (3 H D, C) and
            out_proj.weight (C, H D), as in pruned TinyCLIP towers.

    Raises:
        ValueError: an argument breaks a rule above; the text names it.
    """

    # torch.nn.TransformerEncoderLayer asks whether it may take the weights and leave this out.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        head_dim: int | None = None,
    ):
        super().__init__()
        unsupported = {
            "dropout": (dropout, dropout == 0),
            "add_bias_kv": (add_bias_kv, not add_bias_kv),
            "add_zero_attn": (add_zero_attn, not add_zero_attn),
            "kdim": (kdim, kdim in (None, embed_dim)),
            "vdim": (vdim, vdim in (None, embed_dim)),
        }
        for name, (value, fine) in unsupported.items():
            if not fine:
                raise ValueError(f"MultiheadAttention: {name}={value} is not supported")
        if embed_dim < 1 or num_heads < 1:
            raise ValueError(
                "MultiheadAttention: embed_dim and num_heads must be positive,"
                f" got {embed_dim} and {num_heads}"
            )
        if head_dim is None:
            head_dim, rest = divmod(embed_dim, num_heads)
            if rest:
                raise ValueError(
                    f"MultiheadAttention: embed_dim {embed_dim} must be divisible by num_heads"
                    f" {num_heads}, or head_dim be given"
                )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.batch_first = batch_first
        self.inner_dim = inner = num_heads * head_dim
        factory = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim, **factory))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner, **factory)) if bias else None
        self.out_proj = nn.Linear(inner, embed_dim, bias, **factory)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        self._causal_mask: tuple[weakref.ref, int] | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        head_gate: Tensor | None = None,
        out_gate: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend, and project.

        Args:
            query: (Lq, B, C), (B, Lq, C) if batch_first, or (Lq, C); key, value: the same with Lk.
            key_padding_mask: bool (B, Lk) or (Lk,), True = ignore.
            need_weights: must be False, which is the default here and not in torch: the weights
                are never stored.
            attn_mask: None, or exactly the causal mask: (L, L), bool with True above the diagonal,
                or float with -inf (or its dtype's lowest number) above and 0 elsewhere. Reading a
                mask waits for the device, once a mask, and breaks a compiled graph: there, give
                `is_causal`.
            average_attn_weights: without meaning, as there are no weights.
            is_causal: query i sees keys 0..i. As in torch it is trusted: `attn_mask` is not read.
            head_gate: (H,) or (B, H), multiplies each head's output; as in `ops.attention`.
            out_gate: (C,), multiplies the projected output.

        Returns:
            (out, None), out of query's shape.

        Raises:
            ValueError, TypeError: a rule above is broken; the text names the argument.
        """
        if need_weights:
            raise ValueError(
                "MultiheadAttention: need_weights must be False, got True: fused attention never"
                " stores the weights"
            )
        batched = query.dim() == 3
        if not batched:
            if query.dim() != 2:
                raise ValueError(
                    "MultiheadAttention: query must have 2 or 3 dimensions, got"
                    f" {tuple(query.shape)}"
                )
            same_kv, same_q = value is key, key is query
            query = query.unsqueeze(self._batch_dim)
            key = query if same_q else key.unsqueeze(self._batch_dim)
            value = key if same_kv else value.unsqueeze(self._batch_dim)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        lengths = tuple(x.shape[1 - self._batch_dim] for x in (query, key))
        causal = is_causal or (attn_mask is not None and self._is_causal(attn_mask, lengths))
        options = {
            "causal": causal,
            "key_mask": _key_mask(key_padding_mask),
            "head_gate": head_gate,
        }
        out = attend(
            query,
            key,
            value,
            self.in_proj_weight,
            self.in_proj_bias,
            heads=self.num_heads,
            batch_first=self.batch_first,
            **options,
        )
        if not self.batch_first:
            out = out.transpose(0, 1)
        out = F.linear(out.flatten(2), *gated(self.out_proj, out_gate))
        return (out if batched else out.squeeze(self._batch_dim)), None

    @property
    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    def _is_causal(self, mask: Tensor, lengths: tuple[int, int]) -> bool:
        """True for the causal mask; any other raises. A mask that is unchanged is read once."""
        if not isinstance(mask, Tensor):
            raise TypeError(
                "MultiheadAttention: attn_mask must be None or a torch.Tensor (L, L), got"
                f" {type(mask).__name__}"
            )
        fits, seen = tuple(mask.shape) == lengths, self._causal_mask
        if fits and seen is not None and seen[0]() is mask and seen[1] == mask._version:
            return True
        if not (fits and _exactly_causal(mask)):
            raise ValueError(
                "MultiheadAttention: attn_mask must be None or exactly the causal mask (L, L),"
                f" here {lengths}, got another one of shape {tuple(mask.shape)} and dtype"
                f" {mask.dtype}; keys are masked with key_padding_mask"
            )
        # A mask made under inference_mode has no version to tell whether it has changed.
        if not (torch.compiler.is_compiling() or mask.is_inference()):
            self._causal_mask = weakref.ref(mask), mask._version
        return True

    def __getstate__(self):
        return self.__dict__ | {"_causal_mask": None}

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads} heads of {self.head_dim}"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    heads: int,
    batch_first: bool,
    **options,
) -> Tensor:
    """Project with weight (3 H D, C), rows in the order q, k, v, and attend -> (B, L, H, D).

    query, key, value are (B, L, C), or (L, B, C) if not batch_first; `options` go to the op. Where
    the three are one tensor, the packed projection is taken as it is.
    """
    inner = weight.shape[0] // 3

    def project(x: Tensor, first: int, count: int) -> Tensor:
        """`count` projections from the `first` of q, k, v on: (B, L, count, H, D) by stride."""
        rows = slice(first * inner, (first + count) * inner)
        w = weight if count == 3 else weight[rows]
        b = bias if count == 3 or bias is None else bias[rows]
        x = F.linear(x, w, b).unflatten(-1, (count, heads, inner // heads))
        return x if batch_first else x.transpose(0, 1)

    if value is key and key is query:
        return ops.attention_qkv(project(query, 0, 3), **options)
    q = project(query, 0, 1).squeeze(2)
    if value is key:
        k, v = project(key, 1, 2).unbind(2)
    else:
        k, v = project(key, 1, 1).squeeze(2), project(value, 2, 1).squeeze(2)
    return ops.attention(q, k, v, **options)


def _key_mask(key_padding_mask: Tensor | None) -> Tensor | None:
    """The op's polarity: True = may be attended."""
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype is not torch.bool:
        raise TypeError(
            "MultiheadAttention: key_padding_mask must be bool (True = ignore), got"
            f" {key_padding_mask.dtype}"
        )
    return ~key_padding_mask


def _exactly_causal(mask: Tensor) -> bool:
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype is torch.bool:
        return torch.equal(mask, future)
    if not mask.is_floating_point():
        return False
    hidden = mask <= torch.finfo(mask.dtype).min
    return torch.equal(hidden, future) and not mask.masked_select(~future).any().item()
