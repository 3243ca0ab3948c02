"""Small random models of other libraries, each with an input and with what it must be swapped to.

A library that is missing skips the test that asks for one of its models.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
VISION = {**SHAPE, "intermediate_size": 120, "image_size": 32, "patch_size": 8}
TEXT = {**SHAPE, "intermediate_size": 136, "vocab_size": 100, "max_position_embeddings": 12}


@dataclass
class Host:
    """A model in fp64, `run(model)` -> its outputs, and how many modules of a class are swapped."""

    model: nn.Module
    run: Callable[[nn.Module], list[Tensor]]
    swapped: dict[str, int]


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from zero and from one: nothing may hide behind a small weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.double()


def pixels(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def ids(count: int = 3, length: int = 12) -> Tensor:
    found = torch.randint(1, 98, (count, length), generator=torch.Generator().manual_seed(2))
    found[:, -1] = 99
    return found


def padding() -> Tensor:
    """(3, 12), 0 = ignore: at the end of a row, at its beginning (a query sees no key), nowhere."""
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 7:] = 0
    mask[1, :3] = 0
    return mask


def of(output: object) -> list[Tensor]:
    """The float tensors of an output, of any nesting."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output or ()
    return [tensor for value in values for tensor in of(value)]


def on(model: nn.Module, x: Tensor | None) -> Tensor | None:
    """x on the model's device, in its dtype if x is of floats."""
    if x is None:
        return None
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)


def hf_clip(activation: str = "quick_gelu", padded: bool = False, **options) -> Host:
    transformers = pytest.importorskip("transformers")
    special = {"bos_token_id": 98, "eos_token_id": 99, "hidden_act": activation, **options}
    vision = {**VISION, "hidden_act": activation, **options}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**TEXT, **special}, projection_dim=32
    )
    mask = padding() if padded else None

    def run(model):
        return of(
            model(
                pixel_values=on(model, pixels()),
                input_ids=on(model, ids()),
                attention_mask=on(model, mask),
            )
        )

    names = {"CLIPAttention": 4, "CLIPMLP": 4, "CLIPEncoderLayer": 4, "LayerNorm": 11}
    return Host(stirred(transformers.CLIPModel(config)), run, names)


def hf_siglip(padded: bool = False) -> Host:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipConfig(
        vision_config=VISION,
        text_config={**TEXT, "pad_token_id": 1, "bos_token_id": 98, "eos_token_id": 99},
    )
    mask = padding() if padded else None

    def run(model):
        return of(
            model(
                pixel_values=on(model, pixels()),
                input_ids=on(model, ids()),
                attention_mask=on(model, mask),
            )
        )

    names = {"SiglipAttention": 4, "SiglipMLP": 5, "SiglipEncoderLayer": 4, "LayerNorm": 11}
    names["MultiheadAttention"] = 1
    return Host(stirred(transformers.SiglipModel(config)), run, names)


def hf_vit() -> Host:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    names = {"ViTAttention": 2, "ViTMLP": 2, "LayerNorm": 5}
    model = stirred(transformers.ViTModel(config))
    return Host(model, lambda model: of(model(pixel_values=on(model, pixels()))), names)


OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
}
OPEN_CLIP_SWAPPED = {
    "MultiheadAttention": 4,
    "Sequential": 4,
    "ResidualAttentionBlock": 4,
    "LayerNorm": 11,
}


def run_both_towers(model: nn.Module) -> list[Tensor]:
    return of(model(on(model, pixels()), on(model, ids())))


def open_clip_clip(quick_gelu: bool = False) -> Host:
    library = pytest.importorskip("open_clip")
    model = library.CLIP(**OPEN_CLIP, quick_gelu=quick_gelu)
    return Host(stirred(model), run_both_towers, OPEN_CLIP_SWAPPED)


def open_clip_custom(**options) -> Host:
    """A text tower of CustomResidualAttentionBlocks, whose Attention is open_clip's own."""
    library = pytest.importorskip("open_clip")
    text = {**OPEN_CLIP["text_cfg"], "block_type": "custom", **options}
    model = library.CustomTextCLIP(32, OPEN_CLIP["vision_cfg"], text)
    names = {
        "MultiheadAttention": 2,
        "Attention": 2,
        "Sequential": 4,
        "ResidualAttentionBlock": 2,
        "CustomResidualAttentionBlock": 2,
        "LayerNorm": 11,
    }
    return Host(stirred(model), run_both_towers, names)


def open_clip_padded() -> Host:
    """CoCa's text tower: a class token at the end, one mask for causal and padding, by head."""
    library = pytest.importorskip("open_clip.transformer")
    tower = library.TextTransformer(
        **OPEN_CLIP["text_cfg"], output_dim=32, embed_cls=True, correct_cls_mask=True, pad_id=0
    )
    tokens = torch.where(padding() > 0, ids(), 0)
    names = {"MultiheadAttention": 2, "Sequential": 2, "ResidualAttentionBlock": 2, "LayerNorm": 5}
    return Host(stirred(tower), lambda model: of(model(on(model, tokens))), names)


def timm_vit(**options) -> Host:
    library = pytest.importorskip("timm.models.vision_transformer")
    model = library.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=7, **options
    )
    names = {"Attention": 2, "Mlp": 2, "Block": 2, "LayerNorm": 5}
    return Host(stirred(model), lambda model: of(model(on(model, pixels()))), names)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OpenAILayerNorm(nn.LayerNorm):
    def forward(self, x):
        kept = x.dtype
        wide = torch.promote_types(kept, torch.float32)
        return super().forward(x.to(wide)).to(kept)


class OpenAIBlock(nn.Module):
    """OpenAI's block: the mask is an attribute, no buffer, and is cast again at every call."""

    def __init__(self, width, heads, attn_mask=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = OpenAILayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": QuickGELU(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)
        self.ln_2 = OpenAILayerNorm(width)
        self.attn_mask = attn_mask

    def attention(self, x):
        if self.attn_mask is not None:
            self.attn_mask = self.attn_mask.to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def openai() -> Host:
    mask = torch.full((12, 12), -torch.inf, dtype=torch.float64).triu_(1)
    model = nn.Sequential(*(OpenAIBlock(64, 2, mask) for _ in range(2)))
    x = torch.randn(12, 3, 64, generator=torch.Generator().manual_seed(3)).double()
    names = {"MultiheadAttention": 2, "Sequential": 2}
    return Host(stirred(model), lambda model: of(model(on(model, x))), names)


def openai_package(monkeypatch) -> Host:
    """The same, as it is where the package `clip` is installed."""
    package = types.ModuleType("clip.model")
    package.LayerNorm, package.ResidualAttentionBlock = OpenAILayerNorm, OpenAIBlock
    monkeypatch.setitem(sys.modules, "clip.model", package)
    host = openai()
    host.swapped |= {"OpenAILayerNorm": 4, "OpenAIBlock": 2}
    return host


def torch_encoder() -> Host:
    """torch.nn.TransformerEncoderLayer, causal, pre-norm."""
    layer = nn.TransformerEncoderLayer(64, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    x = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(3)).double()
    mask = nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float64)

    def run(model):
        return of(model(on(model, x), on(model, mask), is_causal=True))

    return Host(stirred(layer), run, {"MultiheadAttention": 1, "LayerNorm": 2})


HOSTS: dict[str, Callable[[], Host]] = {
    "hf_clip": hf_clip,
    "hf_clip_erf": lambda: hf_clip("gelu"),
    "hf_clip_padded": lambda: hf_clip(padded=True),
    "hf_siglip": hf_siglip,
    "hf_siglip_padded": lambda: hf_siglip(padded=True),
    "hf_vit": hf_vit,
    "open_clip": open_clip_clip,
    "open_clip_quick": lambda: open_clip_clip(quick_gelu=True),
    "open_clip_custom": open_clip_custom,
    "open_clip_padded": open_clip_padded,
    "timm": timm_vit,
    "openai": openai,
    "torch": torch_encoder,
}


NORMS = (
    "torch.nn:LayerNorm",
    "open_clip.transformer:LayerNorm",
    "open_clip.transformer:LayerNormFp32",
    "timm.layers:LayerNorm",
    "timm.layers:LayerNormFp32",
)


def stream_dtypes(model: nn.Module) -> list[tuple[str, torch.dtype]]:
    """Where to look at the dtypes of the residual stream: what blocks and attentions give back."""
    found = []

    def look(path):
        def hook(module, args, output):
            found.append((path, of(output)[0].dtype))

        return hook

    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith(("Block", "EncoderLayer", "Attention")):
            module.register_forward_hook(look(path))
    return found


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, both finite."""
    assert ours.shape == theirs.shape
    assert ours.isfinite().all() and theirs.isfinite().all()
    gap = (ours.double() - theirs.double()).norm().item()
    return gap and gap / theirs.double().norm().item()


def gradients(host: Host, model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and every parameter's gradient under a fixed weighting of the outputs."""
    model.zero_grad(set_to_none=True)
    outputs = host.run(model)
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator)).sum() for out in outputs
    )
    loss.backward()
    found = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }
    return [out.detach() for out in outputs], found


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-11) -> None:
    """Each gradient to the tolerance; one that is zero but for rounding, to that of the largest."""
    assert ours.keys() == theirs.keys()
    largest = max(g.norm().item() for g in theirs.values() if g is not None)
    for name, theirs_of in theirs.items():
        assert (ours[name] is None) == (theirs_of is None), name
        if theirs_of is not None:
            gap = (ours[name] - theirs_of).norm().item()
            assert gap <= tolerance * (theirs_of.norm().item() + 1e-2 * largest), (name, gap)
