"""CLIP's two towers, with open_clip's parameter names and shapes.

Letters: B batch, L tokens, C channels, E embedding.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyclip.models.config import CLIPConfig, Layer, VisionConfig
from tinyclip.models.gates import Gates, TowerGates
from tinyclip.nn import LayerNorm, ResidualAttentionBlock


class Transformer(nn.Module):
    """A stack of blocks, each with its own heads and hidden width."""

    def __init__(
        self, width: int, layers: Sequence[Layer], head_dim: int, activation: str, eps: float
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(
                width,
                layer.heads or 0,
                mlp_ratio=None,
                mlp_width=layer.mlp_width,
                head_dim=head_dim,
                activation=activation,
                eps=eps,
            )
            for layer in layers
        )

    def forward(
        self, x: Tensor, is_causal: bool = False, gates: TowerGates | None = None
    ) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        of_layers = [{}] * len(self.resblocks) if gates is None else gates.layers()
        for block, given in zip(self.resblocks, of_layers, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, is_causal=is_causal, use_reentrant=False, **given)
            else:
                x = block(x, is_causal=is_causal, **given)
        return x


def _gated(x: Tensor, gates: TowerGates | None) -> tuple[Tensor, Tensor | None]:
    """An embedding times the channels' gate; and which channels are kept."""
    if gates is None:
        return x, None
    return x * gates.channels.to(x.dtype), gates.channels != 0


def _project(x: Tensor, projection: Tensor, gates: TowerGates | None) -> Tensor:
    """The last step of a tower: the gate multiplies the rows of the projection."""
    if gates is not None:
        projection = projection * gates.channels.to(projection.dtype)[:, None]
    return x @ projection


class VisionTransformer(nn.Module):
    """The image tower: patches and a class token, whose last state is projected.

    ``image_size`` is (height, width).
    """

    def __init__(self, config: VisionConfig, embed_dim: int, activation: str, eps: float):
        super().__init__()
        self.image_size, self.patch_size = config.height_width, config.patch_size
        width, scale = config.width, config.width**-0.5
        self.conv1 = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.tokens, width))
        self.ln_pre = LayerNorm(width, eps, keep_dtype=True)
        self.transformer = Transformer(width, config.layers, config.head_dim, activation, eps)
        self.ln_post = LayerNorm(width, eps, keep_dtype=True)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, image: Tensor, gates: TowerGates | None = None) -> Tensor:
        """image (B, 3, height, width) -> (B, E)."""
        height, width = self.image_size
        if image.dim() != 4 or tuple(image.shape[1:]) != (3, height, width):
            raise ValueError(
                f"encode_image: image must have shape (B, 3, {height}, {width}), got"
                f" {tuple(image.shape)}; load(..., image_size=) makes a model of another size"
            )
        x = self.conv1(image).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)
        x, kept = _gated(x, gates)
        x = self.transformer(self.ln_pre(x, channel_mask=kept), gates=gates)
        # A norm works token by token, so only the one that is kept needs it.
        return _project(self.ln_post(x[:, 0], channel_mask=kept), self.proj, gates)


class CLIP(nn.Module):
    """An image tower and a text tower that meet in one space.

    Parameter names and shapes are those of open_clip's ``CLIP`` (and of OpenAI's), irregular
    widths aside. A state dict's ``logit_scale`` may be () or (1,).

    Args:
        config: both towers.
        nonscalar_logit_scale: make ``logit_scale`` (1,) instead of (), as FSDP needs it.
    """

    def __init__(self, config: CLIPConfig, nonscalar_logit_scale: bool = False):
        super().__init__()
        self.config = config
        text, shared = config.text, (config.activation, config.layer_norm_eps)
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.visual = VisionTransformer(config.vision, config.embed_dim, *shared)
        self.transformer = Transformer(text.width, text.layers, text.head_dim, *shared)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.ln_final = LayerNorm(text.width, config.layer_norm_eps, keep_dtype=True)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        shape = [1] if nonscalar_logit_scale else []
        self.logit_scale = nn.Parameter(torch.full(shape, math.log(1 / 0.07)))
        self._initialise_text()

    def _initialise_text(self) -> None:
        """The text tower's initial weights as in OpenAI's CLIP; the image tower has torch's."""
        width, layers = self.config.text.width, self.config.text.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        into_stream = width**-0.5 * (2 * max(1, len(layers))) ** -0.5
        for block in self.transformer.resblocks:
            if block.attn is not None:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=into_stream)
            if block.mlp is not None and block.mlp.c_fc.out_features:
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=into_stream)

    def encode_image(
        self, image: Tensor, normalize: bool = False, gates: TowerGates | None = None
    ) -> Tensor:
        """Embed images.

        Args:
            image: (B, 3, height, width) of the config's size, preprocessed, float.
            normalize: divide each row by its length.
            gates: TinyCLIP's masks of the tower (Wu et al. 2023, section 3.2): the result is that
                of the smaller model that `distill.prune` makes of them.

        Returns:
            (B, E) in the parameters' dtype, under autocast in the autocast dtype; normalised, under
            CUDA autocast, in fp32, since the norm in F.normalize is one of autocast's fp32 ops.

        Raises:
            ValueError: the image has another shape.
        """
        features = self.visual(image, gates)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self, text: Tensor, normalize: bool = False, gates: TowerGates | None = None
    ) -> Tensor:
        """Embed captions, pooled at the largest token id, which is the end of text.

        Args:
            text: (B, L) token ids, int64 or int32. L may be anything up to the context length: the
                tower is causal, so what follows the end of a caption never counts.
            normalize: divide each row by its length.
            gates: as in `encode_image`.

        Returns:
            (B, E) in the parameters' dtype, under autocast in the autocast dtype; normalised, under
            CUDA autocast, in fp32, since the norm in F.normalize is one of autocast's fp32 ops.

        Raises:
            ValueError: the captions are longer than the context, or have another shape.
        """
        if text.dim() != 2 or not 1 <= text.shape[1] <= self.context_length:
            raise ValueError(
                f"encode_text: text must have shape (B, L) with L in 1..{self.context_length}, got"
                f" {tuple(text.shape)}"
            )
        x = self.token_embedding(text)
        x = x + self.positional_embedding[: text.shape[1]].to(x.dtype)
        x, kept = _gated(x, gates)
        x = self.transformer(x, is_causal=True, gates=gates)
        x = x[torch.arange(x.shape[0], device=x.device), text.argmax(dim=-1)]
        features = _project(self.ln_final(x, channel_mask=kept), self.text_projection, gates)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        gates: Gates | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """-> (image (B, E), text (B, E), scale): features L2-normalised, the scale exp'd.

        An input that is None gives None. The scale has the shape of ``logit_scale``. Under CUDA
        autocast the features are fp32 (see `encode_image`); `ops.contrastive_loss` casts them back
        to the autocast dtype.
        """
        of_image, of_text = (None, None) if gates is None else gates
        return (
            None if image is None else self.encode_image(image, normalize=True, gates=of_image),
            None if text is None else self.encode_text(text, normalize=True, gates=of_text),
            self.logit_scale.exp(),
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward, and compute the rest again."""
        self.visual.transformer.grad_checkpointing = enable
        self.transformer.grad_checkpointing = enable

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        scale = state_dict.get(prefix + "logit_scale")
        if isinstance(scale, Tensor) and scale.numel() == 1:
            state_dict[prefix + "logit_scale"] = scale.reshape(self.logit_scale.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
