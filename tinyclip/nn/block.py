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

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        head_gate: Tensor | None = None,
        hidden_gate: Tensor | None = None,
        channel_gate: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, C) -> (B, L, C), under TinyCLIP's masks if given (Wu et al. 2023, section 3.2).

        Where a gate is 0, the block computes what the smaller block without that head, hidden unit
        or channel computes, by the same fused ops and without a host synchronisation.

        Args:
            x: (B, L, C), or (L, B, C) if not batch_first; in masked channels 0 or anything.
            attn_mask, is_causal: as in `MultiheadAttention`.
            head_gate: (H,) multiplies each head's output.
            hidden_gate: (F,) multiplies the MLP's activation.
            channel_gate: (C,) multiplies what both halves add to the stream; both norms are over
                the channels where it is not 0, and not multiplied.
        """
        kept = None if channel_gate is None else channel_gate != 0
        attended = None
        if self.attn is not None:
            y = self.ln_1(x, channel_mask=kept)
            attended, _ = self.attn(
                y,
                y,
                y,
                attn_mask=attn_mask,
                is_causal=is_causal,
                head_gate=head_gate,
                out_gate=channel_gate,
            )
        if self.mlp is None:
            return x if attended is None else x + attended
        if attended is None:
            y = self.ln_2(x, channel_mask=kept)
        else:
            y, x = self.ln_2(attended, residual=x, channel_mask=kept)
        return x + self.mlp(y, hidden_gate=hidden_gate, out_gate=channel_gate)
