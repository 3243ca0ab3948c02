"""open_clip's modules: its blocks, its own Attention, its LayerNorms; and OpenAI's clip's.

Letters: B batch, L tokens, H heads, D head dim, C channels.
"""

import torch.nn.functional as F
from torch import nn

from tinyclip import ops
from tinyclip.integrations.swaps.base import Swap
from tinyclip.integrations.swaps.of_torch import (
    OTHER_MASK,
    KeepsDtype,
    PackedAttention,
    added,
    dropped,
)


class Attention(PackedAttention):
    """open_clip's own Attention, of its custom blocks, by `ops.attention_qkv`."""

    @classmethod
    def why_not(cls, module):
        if module.logit_scale is not None:
            return "scaled_cosine attention"
        if not isinstance(module.ln_q, nn.Identity) or not isinstance(module.ln_k, nn.Identity):
            return "qk_norm"
        return "scale_heads" if module.head_scale is not None else None

    def forward(self, x, attn_mask=None):
        causal, key_mask = False, None
        reason = dropped(self.attn_drop.p, self.training)
        if reason is None and attn_mask is not None:
            masks = self._tinyclip.session.masks
            pattern = masks.read(attn_mask, "hidden", self.num_heads)
            if pattern is None:
                reason = OTHER_MASK
            else:
                causal, key_mask = pattern
        if reason is not None:
            self._decline(reason)
            return super().forward(x, attn_mask)
        if key_mask is not None:
            key_mask = key_mask.expand(x.shape[0], -1)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        out = ops.attention_qkv(qkv, causal=causal, key_mask=key_mask)
        return self.out_drop(self.out_proj(self.ln_inner(out.flatten(-2))))


class Block(Swap):
    """ResidualAttentionBlock: the first addition and ln_2 are one op, and the mask is known.

    The mask that the text tower holds is recognised here, before the block casts it.
    """

    option = "norm"

    @classmethod
    def detail(cls, module):
        return "residual addition inside ln_2"

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        pattern = None
        if attn_mask is not None:
            masks = self._tinyclip.session.masks
            pattern = masks.read(attn_mask, "hidden", self.attn.num_heads)
        if pattern is None or pattern.key_mask is not None or not pattern.causal:
            return super().attention(q_x, k_x, v_x, attn_mask)
        return self.attn(
            q_x,
            q_x if k_x is None else k_x,
            q_x if v_x is None else v_x,
            need_weights=False,
            attn_mask=attn_mask.to(q_x.dtype),
            is_causal=True,
        )[0]

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        cross = hasattr(self, "ln_1_kv")
        k_x = self.ln_1_kv(k_x) if cross and k_x is not None else None
        v_x = self.ln_1_kv(v_x) if cross and v_x is not None else None
        attended = self.attention(q_x=self.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        y, x = added(self.ln_2, self.ls_1(attended), q_x)
        return x + self.ls_2(self.mlp(y))


class CustomBlock(Swap):
    """CustomResidualAttentionBlock: the first addition and ln_2 are one op."""

    option = "norm"

    @classmethod
    def detail(cls, module):
        return "residual addition inside ln_2"

    def forward(self, x, attn_mask=None):
        attended = self.ln_attn(self.attn(self.ln_1(x), attn_mask=attn_mask))
        y, x = added(self.ln_2, self.ls_1(attended), x)
        return x + self.ls_2(self.mlp(y))


class OpenAIBlock(Swap):
    """ResidualAttentionBlock of OpenAI's clip: the first addition and ln_2 are one op."""

    option = "norm"

    @classmethod
    def detail(cls, module):
        return "residual addition inside ln_2"

    def forward(self, x):
        y, x = added(self.ln_2, self.attention(self.ln_1(x)), x)
        return x + self.mlp(y)


_PLACE = "open_clip.transformer"
SWAPS = (
    ("clip.model", "LayerNorm", KeepsDtype),
    ("clip.model", "ResidualAttentionBlock", OpenAIBlock),
    (_PLACE, "Attention", Attention),
    (_PLACE, "LayerNorm", KeepsDtype),
    (_PLACE, "LayerNormFp32", KeepsDtype),
    (_PLACE, "ResidualAttentionBlock", Block),
    (_PLACE, "CustomResidualAttentionBlock", CustomBlock),
)
