"""The pruned model computes what the masked one does, to fp64's last bits, and trains as it."""

from dataclasses import replace

import pytest
import torch

import tinyclip
from tests.distill.test_inherit import small
from tests.models import build
from tests.support import masked_clip
from tinyclip.distill import Masks, prune
from tinyclip.models import CLIPConfig, Gates, Layer, from_canonical, to_canonical

EXACT = 1e-12


def model_of(config: CLIPConfig, dtype=torch.float64):
    """Every parameter counts, and every bias is its own."""
    made = tinyclip.create_model(config, dtype=dtype)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def inputs(config: CLIPConfig):
    size, text = config.vision.image_size, config.text
    captions = build.captions(text.vocab_size, min(text.context_length, 9), 4)
    return build.images(size, 3).double(), captions


def gone(gates: Gates, *places: tuple[str, str, int]) -> Gates:
    """The gates with all heads, or all hidden units, of some layers gone."""
    with torch.no_grad():
        for tower, kind, layer in places:
            getattr(getattr(gates, tower), kind)[layer].zero_()
    return gates


CASES = {
    "some of everything": (small(), ()),
    "quick_gelu": (small(activation="quick_gelu"), ()),
    "no heads in a first and a middle layer": (
        small(),
        (("image", "heads", 0), ("image", "heads", 2), ("text", "heads", 0), ("text", "heads", 1)),
    ),
    "no hidden unit": (
        small(),
        (("image", "hidden", 0), ("image", "hidden", 3), ("text", "hidden", 0)),
    ),
    "whole layers": (
        small(),
        tuple((tower, kind, layer) for tower, layer in (("image", 0), ("image", 1), ("text", 2))
              for kind in ("heads", "hidden")),
    ),
    "no layer at all": (
        small((2, 2)),
        tuple((tower, kind, layer) for tower in ("image", "text") for layer in (0, 1)
              for kind in ("heads", "hidden")),
    ),
    "irregular": (
        small(heads=([2, None, 1, 3], [1, None, 2]), widths=([5, 0, None, 9], [None, 4, 0])),
        (("image", "heads", 2), ("text", "heads", 0)),
    ),
}  # fmt: skip


def masked_and_pruned(name: str, dtype=torch.float64):
    config, places = CASES[name]
    model = model_of(config, dtype)
    gates = gone(masked_clip.gates(config), *places)
    return model, gates, prune(model, gates)


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_masked_models(name):
    """Against the masked forward, and against plain maths on the pruned state dict alone."""
    model, gates, pruned = masked_and_pruned(name)
    image, text = inputs(model.config)
    masked = model.encode_image(image, gates=gates.image), model.encode_text(text, gates=gates.text)
    dense = pruned.encode_image(image), pruned.encode_text(text)
    assert build.relative(dense[0], masked[0]) < EXACT and masked[0].norm() > 0
    assert build.relative(dense[1], masked[1]) < EXACT and masked[1].norm() > 0
    if "quick" not in name:
        for ours, theirs in zip(dense, build.oracle(pruned, image, text), strict=True):
            assert build.relative(ours, theirs) < EXACT
    assert torch.equal(pruned.logit_scale, model.logit_scale)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_masked_models(name):
    """A pruned weight is (kept weight) x (its gates), so the kept weight's gradient is the pruned
    one's times the gates: pruning's own rule, differentiated by hand for every tensor."""
    model, gates, pruned = masked_and_pruned(name)
    image, text = inputs(model.config)
    for module, given in ((model, (image, text, gates)), (pruned, (image, text))):
        torch.manual_seed(4)
        found = module(*given)[:2]
        sum((f * torch.randn(f.shape, dtype=f.dtype)).sum() for f in found).backward()
    for key, small_one in pruned.named_parameters():
        if key == "logit_scale":
            continue
        wanted = dict(model.named_parameters())[key].grad
        tower = gates.image if key.startswith("visual.") else gates.text
        config = model.config.vision if key.startswith("visual.") else model.config.text
        got = lifted(key, small_one.grad, wanted.shape, tower, config)
        assert (got - wanted).norm() <= 1e-11 * (1 + wanted.norm()), key


def lifted(key, gradient, shape, gates, config):
    """A pruned tensor's gradient in the full tensor's shape, times the gates; 0 where masked."""
    z = gates.channels.detach()
    words = key.split(".")
    layer = int(words[words.index("resblocks") + 1]) if "resblocks" in words else None
    per_channel = torch.repeat_interleave
    heads = hidden = None
    if layer is not None:
        heads, hidden = gates.heads[layer].detach(), gates.hidden[layer].detach()
        heads = per_channel(heads, config.head_dim)
    one = (z != 0).to(z)
    factors = {
        "conv1.weight": (z, None),
        "class_embedding": (z,),
        "positional_embedding": (None, z),
        "token_embedding.weight": (None, z),
        "proj": (z, None),
        "text_projection": (z, None),
        "in_proj_weight": (heads if heads is None else (heads != 0).to(z).repeat(3), one),
        "in_proj_bias": (heads if heads is None else (heads != 0).to(z).repeat(3),),
        "out_proj.weight": (z, heads),
        "out_proj.bias": (z,),
        "c_fc.weight": (hidden if hidden is None else (hidden != 0).to(z), one),
        "c_fc.bias": (hidden if hidden is None else (hidden != 0).to(z),),
        "c_proj.weight": (z, hidden),
        "c_proj.bias": (z,),
    }
    norm = any(word.startswith("ln_") for word in words)
    of = (one,) if norm else next(f for name, f in factors.items() if key.endswith(name))
    full = torch.zeros(shape, dtype=gradient.dtype)
    kept = torch.ones(shape, dtype=torch.bool)
    scale = torch.ones(shape, dtype=gradient.dtype)
    for dim, factor in enumerate(of):
        if factor is not None:
            view = factor.view([-1 if d == dim else 1 for d in range(len(shape))])
            kept &= view != 0
            scale *= view
    full[kept] = gradient.flatten()
    return full * scale


def test_what_is_left_of_the_config():
    config, _ = CASES["whole layers"]
    _, gates, pruned = masked_and_pruned("whole layers")
    for tower, old, given in (
        (pruned.config.vision, config.vision, gates.image),
        (pruned.config.text, config.text, gates.text),
    ):
        assert tower.width == int((given.channels != 0).sum()) < old.width
        assert tower.head_dim == old.head_dim
        for layer, head, hidden in zip(tower.layers, given.heads, given.hidden, strict=True):
            left = int((head != 0).sum()), int((hidden != 0).sum())
            assert layer == Layer(*(count or None for count in left))
    assert pruned.config.vision.layers[0] == Layer(None, None)
    assert replace(pruned.config, vision=config.vision, text=config.text) == config
    names = {name for name, _ in pruned.named_parameters()}
    assert not any(name.startswith("visual.transformer.resblocks.0.") for name in names)


@pytest.mark.parametrize("format", ["tinyclip", "microsoft"])
@pytest.mark.parametrize("name", ["some of everything", "whole layers", "no layer at all"])
def test_what_is_saved_loads(tmp_path, name, format):
    """In both formats that hold irregular towers, bit for bit, and in open_clip's names."""
    *_, pruned = masked_and_pruned(name, torch.float32)
    tinyclip.save(pruned, tmp_path, format)
    loaded, _, _ = tinyclip.load(tmp_path)
    assert loaded.config == pruned.config
    state = pruned.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    for layout in ("open_clip", "custom_text", "microsoft"):
        _, back = to_canonical("here", from_canonical(state, layout))
        assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_pruned_models_are_pruned_again():
    """Twice a stage: the second time with the gates of the smaller model."""
    model, gates, once = masked_and_pruned("no heads in a first and a middle layer")
    image, text = inputs(model.config)
    again = masked_clip.gates(once.config, seed=7)
    twice = prune(once, again)
    masked = once.encode_image(image, gates=again.image), once.encode_text(text, gates=again.text)
    assert build.relative(twice.encode_image(image), masked[0]) < EXACT
    assert build.relative(twice.encode_text(text), masked[1]) < EXACT
    assert len(gates.image.channels) > once.config.vision.width > twice.config.vision.width


def test_the_model_stays_and_shares_nothing():
    config, _ = CASES["some of everything"]
    model = model_of(config, torch.float32).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune(model, masked_clip.gates(config, zeros=0.0))
    assert not pruned.training and pruned.logit_scale.dtype == torch.float32
    assert pruned.config == config and all(p.requires_grad for p in pruned.parameters())
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    nonscalar = tinyclip.create_model(config, nonscalar_logit_scale=True)
    assert prune(nonscalar, Masks(config).gates()).logit_scale.shape == (1,)


def test_wrong_gates():
    config, _ = CASES["some of everything"]
    model = model_of(config)
    gates = masked_clip.gates(config)
    with pytest.raises(
        ValueError, match=r"prune: gates of the text tower must have the sizes \[24"
    ):
        prune(model, Gates(gates.image, gates.image))
    with torch.no_grad():
        gates.image.channels.zero_()
    with pytest.raises(ValueError, match="gates of the image tower must keep a channel, got none"):
        prune(model, gates)
