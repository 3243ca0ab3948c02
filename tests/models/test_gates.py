"""CLIP under TinyCLIP's masks: the plain maths, no host syncs, and nothing without masks."""

import pytest
import torch

import tinyclip
from tests.models import build
from tests.support import masked_clip
from tests.support.masked_block import NoSync
from tinyclip.models import Gates

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 40, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 30, "width": 32, "heads": 4, "layers": 2},
}
IRREGULAR = {**build.IRREGULAR, "vision_cfg": {**build.IRREGULAR["vision_cfg"], "image_size": 32}}


def problem(config: dict, kind: str = "gelu"):
    model = build.model({**config, "activation": kind}).double()
    size = config["vision_cfg"]["image_size"]
    text = config["text_cfg"]
    captions = build.captions(text["vocab_size"], min(text["context_length"], 12), 4)
    return model, build.images(size, 3).double(), captions, masked_clip.gates(model.config)


def gradients(features, inputs):
    torch.manual_seed(3)
    loss = sum((f * torch.randn_like(f)).sum() for f in features)
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def close(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = (0.0 if t is None else t for t in (mine, other))
        assert torch.as_tensor(mine - other).norm() <= tolerance * (
            1 + torch.as_tensor(other).norm()
        )


@pytest.mark.parametrize("config", [SMALL, IRREGULAR], ids=["regular", "irregular"])
@pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_masked_forward(config, kind, backend):
    """Features and the gradients of every parameter and gate, and nothing waits for the device."""
    model, image, text, given = problem(config, kind)
    inputs = [p for name, p in model.named_parameters() if name != "logit_scale"]
    inputs += [gate for gate in masked_clip.leaves(given) if len(gate)]
    with NoSync(), tinyclip.backend(backend):
        ours = (
            model.encode_image(image, gates=given.image),
            model.encode_text(text, gates=given.text),
        )
        found = gradients(ours, inputs)
    theirs = masked_clip.reference(model, image, text, given)
    close(ours, theirs, 1e-12)
    close(found, gradients(theirs, inputs), 1e-11)
    assert sum(g is not None and g.norm() > 0 for g in found) > 0.8 * len(inputs)


def test_features_of_both_towers_are_normalised():
    model, image, text, given = problem(SMALL)
    found = model(image, text, given)
    for ours, plain in zip(found, masked_clip.reference(model, image, text, given), strict=False):
        torch.testing.assert_close(ours, plain / plain.norm(dim=1, keepdim=True))
    assert torch.equal(model(image, None, given)[0], found[0])
    assert model(None, text, given)[0] is None


def test_gates_of_one_are_no_gates():
    model, image, text, given = problem(IRREGULAR)
    ones = Gates(
        *(
            tower._replace(
                channels=torch.ones_like(tower.channels),
                heads=[torch.ones_like(gate) for gate in tower.heads],
                hidden=[torch.ones_like(gate) for gate in tower.hidden],
            )
            for tower in given
        )
    )
    close(model(image, text, ones), model(image, text), 1e-13)
    assert not torch.allclose(model(image, text, given)[0], model(image, text)[0])


def test_under_activation_checkpointing():
    """The same bits, gradients of the gates included."""
    model, image, text, given = problem(SMALL)
    inputs = [*model.parameters(), *masked_clip.leaves(given)]
    plain = model(image, text, given)
    wanted = gradients(plain, inputs)
    model.set_grad_checkpointing()
    found = model(image, text, given)
    assert all(map(torch.equal, found, plain))
    assert all(map(torch.equal, gradients(found, inputs), wanted))


def test_under_autocast():
    """Features in bf16, near the fp32 ones; fp32 gates lift nothing."""
    model, image, _, given = problem(SMALL)
    model, image = model.float(), image.float()
    given = Gates(
        *(
            tower._replace(
                channels=tower.channels.float(),
                heads=[gate.float() for gate in tower.heads],
                hidden=[gate.float() for gate in tower.hidden],
            )
            for tower in given
        )
    )
    plain = model.encode_image(image, gates=given.image)
    dtypes = []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, inputs: dtypes.append(inputs[0].dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode_image(image, gates=given.image)
        model.encode_image(image)
    assert dtypes[0] == dtypes[1] and half.dtype == torch.bfloat16
    assert (half - plain).norm() < 0.05 * plain.norm()


@pytest.mark.soak
def test_compiles_whole():
    model, image, text, given = problem(SMALL)
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(image, text, given), model(image, text, given), 1e-12)
