"""Attention of any transformers model by name: ``attn_implementation="tinyclip"``.

Importing this module adds the name to transformers' two registries, of attention functions and of
the masks that they are given, and changes nothing else. Unlike `accelerate`, it needs no look at a
mask's values: padding arrives as the key mask that it is, so nothing waits for the device.

Letters: B batch, H heads, L tokens (Lq queries, Lk keys), D head dim.
"""

import logging

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from tinyclip import ops

NAME = "tinyclip"
_FOREIGN = ("softcap", "position_bias", "sliding_window", "s_aux", "output_attentions")
_said: set[str] = set()


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options,
) -> Tensor | None:
    """The mask that `attention` is given, by its shape: what sdpa's mask would say, in less.

    Returns:
        None: as sdpa, no mask but is_causal. (B, Lk): causal, and True where a key is visible.
        (B, 1, 1, Lk): the same without causal. (B, 1, Lq, Lk): sdpa's own mask, of any other kind.
    """
    causal = mask_function is causal_mask_function
    skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    square = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    padded = attention_mask is None or attention_mask.shape == (batch_size, kv_length)
    if square and padded and skip and (causal or mask_function is bidirectional_mask_function):
        if attention_mask is None or _all_visible(attention_mask):
            return None
        return attention_mask if causal else attention_mask[:, None, None, :]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )


def _all_visible(key_mask: Tensor) -> bool:
    """True for a mask that hides nothing, where it can be read without waiting."""
    if torch.compiler.is_compiling() or key_mask.device.type != "cpu":
        return False
    return bool(key_mask.all())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:
    """`ops.attention` with transformers' signature; what it does not compute goes to sdpa.

    Args:
        query: (B, H, Lq, D); key, value: (B, H, Lk, D).
        attention_mask: as `attention_mask` above returns it.
        scaling: multiplies the scores; dropout, is_causal and the rest: as of sdpa.

    Returns:
        ((B, Lq, H, D), None). A call that goes to sdpa is logged, once for each reason.
    """
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_mask = None
    if attention_mask is not None:
        causal = attention_mask.dim() == 2
        key_mask = attention_mask if causal else attention_mask[:, 0, -1]
    if reason := _why_not(query, key, attention_mask, causal, dropout, options):
        if attention_mask is not None and causal:
            past = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            attention_mask = attention_mask[:, None, None, :] & past
        _say(f"{type(module).__name__}: {reason}, sdpa computes it")
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    out = ops.attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        causal=bool(causal) and length > 1,
        key_mask=key_mask,
        scale=scaling,
    )
    return out, None


def _why_not(query, key, mask, causal, dropout, options) -> str | None:
    if dropout:
        return f"dropout {dropout:g}"
    if key.shape[1] != query.shape[1]:
        return "fewer heads of keys than of queries"
    if mask is None and causal and key.shape[2] != query.shape[2]:
        return "causal, and not as many keys as queries"
    if mask is not None and (mask.dtype != torch.bool or (mask.dim() == 4 and mask.shape[2] != 1)):
        return "a mask that is neither causal nor hides the same keys from every query"
    asked = [name for name in _FOREIGN if options.get(name) is not None]
    asked = [name for name in asked if options[name] is not False]
    return f"{', '.join(asked)} asked for" if asked else None


def _say(text: str) -> None:
    if not torch.compiler.is_compiling() and text not in _said:
        _said.add(text)
        logging.getLogger("tinyclip").warning("attn_implementation=%r: %s", NAME, text)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
