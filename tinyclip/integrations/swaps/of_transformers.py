"""transformers' modules: CLIP's, SigLIP's and ViT's attention, their MLP, their blocks.

Letters: B batch, L tokens, H heads, D head dim, C channels.
"""

from typing import ClassVar

import torch

from tinyclip import ops
from tinyclip.integrations.swaps.base import Swap, where
from tinyclip.integrations.swaps.masks import Pattern
from tinyclip.integrations.swaps.of_torch import MLP, OTHER_MASK, added, dropout_limit, dropped

TAKEN = "sdpa"  # the one attention whose masks and weights (none) are known


class Attention(Swap):
    """CLIPAttention and its copies by `ops.attention`. The projections are called as modules.

    LoRA in a projection, or a hook on one, works on; only what lies between them is swapped.
    """

    option = "attention"
    _names: ClassVar[tuple[str, ...]] = ("num_heads", "scale", "dropout", "out_proj")

    @classmethod
    def why_not(cls, module):
        return _other_implementation(module)

    @classmethod
    def limit(cls, module):
        return dropout_limit(cls._named(module)[2])

    @classmethod
    def example(cls, module):
        shape = 2, 50, cls._named(module)[0], module.head_dim
        q, k, v = (torch.empty(shape, **where(module)).requires_grad_() for _ in range(3))
        return "attention", (q, k, v), {}

    @classmethod
    def detail(cls, module):
        return f"attention, {cls._named(module)[0]} heads of {module.head_dim}"

    @classmethod
    def _named(cls, module) -> tuple:
        """heads, scale, dropout and the last projection, under the names of the host's class."""
        return tuple(getattr(module, name) for name in cls._names)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        pattern = self._pattern(hidden_states, attention_mask, kwargs)
        if isinstance(pattern, str):
            self._decline(pattern)
            return super().forward(hidden_states, attention_mask, **kwargs)
        _, scale, _, last = self._named(self)
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = ops.attention(
            q,
            k,
            v,
            causal=pattern.causal,
            key_mask=pattern.key_mask,
            scale=scale,
        )
        return last(out.flatten(-2)), None

    def _pattern(self, hidden_states, attention_mask, kwargs) -> Pattern | str:
        """What `ops.attention` is told, or why the host has to compute the call."""
        if reason := _other_implementation(self):
            return reason
        if reason := dropped(self._named(self)[2], self.training):
            return reason
        if kwargs.get("output_attentions"):
            return "output_attentions=True, which sdpa answers with a warning"
        if hidden_states.dim() != 3:
            return "hidden_states is not (B, L, C)"
        if attention_mask is None:
            return Pattern(bool(self._causal(kwargs)), None)
        pattern = self._tinyclip.session.masks.read(attention_mask, "visible")
        if pattern is None:
            return OTHER_MASK
        causal, key_mask = pattern
        batch = hidden_states.shape[0]
        return Pattern(causal, None if key_mask is None else key_mask.expand(batch, -1))

    def _causal(self, kwargs) -> bool:
        """Without a mask: what the caller says, else what the module is."""
        said = kwargs.get("is_causal")
        return self.is_causal if said is None else said


class SiglipAttention(Attention):
    """SiglipAttention and its copies, which do not listen to their caller's is_causal."""

    def _causal(self, kwargs):
        return self.is_causal


class ViTAttention(Attention):
    """ViTAttention and its copies: CLIP's under other names."""

    _names = ("num_attention_heads", "scaling", "attention_dropout", "o_proj")


def _other_implementation(module) -> str | None:
    implementation = module.config._attn_implementation
    if implementation == TAKEN:
        return None
    if implementation == "tinyclip":
        return "attn_implementation='tinyclip' computes it already"
    return f"attn_implementation={implementation!r}: only {TAKEN!r} is taken over"


class CLIPMLP(MLP):
    """CLIPMLP and its copies by `ops.gelu_mlp`."""

    @classmethod
    def parts(cls, module):
        return module.fc1, module.activation_fn, module.fc2, ()

    def forward(self, hidden_states):
        y = self._computed(hidden_states)
        return super().forward(hidden_states) if y is None else y


class EncoderLayer(Swap):
    """CLIPEncoderLayer and its copies: the first addition and layer_norm2 are one op."""

    option = "norm"

    @classmethod
    def detail(cls, module):
        return "residual addition inside layer_norm2"

    def forward(self, hidden_states, attention_mask, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
        )
        y, x = added(self.layer_norm2, attended, hidden_states)
        return x + self.mlp(y)


_CLIP = (
    ("clip", "CLIP"),
    ("metaclip_2", "MetaClip2"),
    ("clipseg", "CLIPSeg"),
    ("altclip", "AltCLIP"),
)
_SIGLIP = (("siglip", "Siglip"), ("siglip2", "Siglip2"))
_VIT = (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2"))


def _rows(models, attention):
    for model, prefix in models:
        place = f"transformers.models.{model}.modeling_{model}"
        yield place, f"{prefix}Attention", attention
        yield place, f"{prefix}MLP", CLIPMLP
        if attention is not ViTAttention:
            yield place, f"{prefix}EncoderLayer", EncoderLayer


# Whose attention is asked for weights by default, and not for their sake.
WEIGHTS_UNREAD = tuple(
    (f"transformers.models.{model}.modeling_{model}", f"{prefix}MultiheadAttentionPoolingHead")
    for model, prefix in _SIGLIP
)
SWAPS = (
    *_rows(_CLIP, Attention),
    *_rows(_SIGLIP, SiglipAttention),
    *_rows(_VIT, ViTAttention),
)
