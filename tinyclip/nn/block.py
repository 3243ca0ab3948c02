"""A pre-norm transformer block with open_clip's parameter names. Letters: C channels, F hidden."""

from torch import Tensor, nn

from tinyclip.nn.attention import MultiheadAttention
from tinyclip.nn.layer_norm import LayerNorm
from tinyclip.nn.mlp import GELUMLP


class ResidualAttentionBlock(nn.Module):
    """``x = x + attn(ln_1(x)); x = x + mlp(ln_2(x))``, open_clip's block with self-attention.

    The first addition and ln_2 are one op. Either half may be absent, as in a pruned TinyCLIP
    tower; with neither the block is the identity and has no parameters.

    Args:
        d_model: C.
        n_head: heads; 0 leaves ln_1 and attn out.
        mlp_ratio: F / C; None with no `mlp_width` leaves ln_2 and mlp out.
        activation: of the MLP, as in `GELUMLP`.
        head_dim: channels of a head, by default ``C / n_head``.
        mlp_width: F, instead of `mlp_ratio`.
        eps: of both norms.
        batch_first: (B, L, C) instead of (L, B, C).
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float | None = 4.0,
        *,
        activation: str = "gelu",
        head_dim: int | None = None,
        mlp_width: int | None = None,
        eps: float = 1e-5,
        batch_first: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if mlp_width is None and mlp_ratio is not None:
            mlp_width = int(d_model * mlp_ratio)
        self.ln_1 = self.attn = self.ln_2 = self.mlp = None
        if n_head:
            self.ln_1 = LayerNorm(d_model, eps, keep_dtype=True, **factory)
            self.attn = MultiheadAttention(
                d_model, n_head, head_dim=head_dim, batch_first=batch_first, **factory
            )
        if mlp_width is not None:
            self.ln_2 = LayerNorm(d_model, eps, keep_dtype=True, **factory)
            self.mlp = GELUMLP(d_model, mlp_width, activation, **factory)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False):
        """x (B, L, C) -> (B, L, C); the masks as in `MultiheadAttention`."""
        attended = None
        if self.attn is not None:
            y = self.ln_1(x)
            attended, _ = self.attn(y, y, y, attn_mask=attn_mask, is_causal=is_causal)
        if self.mlp is None:
            return x if attended is None else x + attended
        if attended is None:
            return x + self.mlp(self.ln_2(x))
        y, x = self.ln_2(attended, residual=x)
        return x + self.mlp(y)
