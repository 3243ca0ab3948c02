"""timm's modules: Attention, Mlp, LayerNorm, and the pre-norm block of its vision transformers.

Letters: B batch, L tokens, H heads, D head dim, C channels.
"""

from torch import nn

from tinyclip import ops
from tinyclip.integrations.swaps.base import Swap
from tinyclip.integrations.swaps.of_torch import (
    MLP,
    OTHER_MASK,
    KeepsDtype,
    PackedAttention,
    added,
    dropped,
    normalised,
    twin_dtype,
)
from tinyclip.integrations.swaps.of_torch import LayerNorm as TorchLayerNorm


class Attention(PackedAttention):
    """timm's Attention by `ops.attention_qkv`; norm, gate and projections are called as modules."""

    @classmethod
    def why_not(cls, module):
        if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
            return "qk_norm"
        return None

    def forward(self, x, attn_mask=None, is_causal=False):
        causal, key_mask = is_causal, None
        reason = dropped(self.attn_drop.p, self.training)
        if reason is None and attn_mask is not None:
            pattern = self._tinyclip.session.masks.read(attn_mask, "visible")
            if pattern is None or is_causal:
                reason = OTHER_MASK if pattern is None else "attn_mask beside is_causal"
            else:
                causal, key_mask = pattern
        if reason is not None:
            self._decline(reason)
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if key_mask is not None:
            key_mask = key_mask.expand(x.shape[0], -1)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        out = ops.attention_qkv(qkv, causal=causal, key_mask=key_mask, scale=self.scale)
        out = self.norm(out.flatten(-2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class Mlp(MLP):
    """timm's Mlp by `ops.gelu_mlp`."""

    @classmethod
    def parts(cls, module):
        return module.fc1, module.act, module.fc2, (module.drop1, module.norm, module.drop2)

    def forward(self, x):
        y = self._computed(x)
        return super().forward(x) if y is None else y


class LayerNorm(TorchLayerNorm):
    """timm's LayerNorm: torch's under another argument's name."""

    @classmethod
    def why_not(cls, module):
        if module._fast_norm:
            return "set_fast_norm: statistics in 16 bit"
        return super().why_not(module)

    def forward(self, x, residual=None):
        return normalised(self, x, residual, twin_dtype(x, residual))


class Block(Swap):
    """timm's Block: the first addition and norm2 are one op."""

    option = "norm"

    @classmethod
    def detail(cls, module):
        return "residual addition inside norm2"

    def forward(self, x, attn_mask=None, is_causal=False):
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        y, x = added(self.norm2, self.drop_path1(self.ls1(attended)), x)
        return x + self.drop_path2(self.ls2(self.mlp(y)))


SWAPS = (
    ("timm.layers.attention", "Attention", Attention),
    ("timm.layers.mlp", "Mlp", Mlp),
    ("timm.layers.norm", "LayerNorm", LayerNorm),
    ("timm.layers.norm", "LayerNormFp32", KeepsDtype),
    ("timm.models.vision_transformer", "Block", Block),
)
REFUSED = (
    ("timm.layers.attention", "AttentionRope", "attention", "rotary position embeddings"),
    ("timm.layers.mlp", "GluMlp", "mlp", "a gated MLP"),
    ("timm.layers.mlp", "SwiGLU", "mlp", "a gated MLP"),
    ("timm.layers.mlp", "ConvMlp", "mlp", "an MLP of convolutions"),
)
