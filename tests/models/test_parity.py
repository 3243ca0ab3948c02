"""Features equal those of open_clip, transformers and TinyCLIP's plain maths; strictly loaded."""

import pytest
import torch

import tinyclip
from tests.models import build


def agrees(ours, image, text, expected_image, expected_text):
    assert build.relative(ours.encode_image(image), expected_image) < 1e-5
    assert build.relative(ours.encode_text(text), expected_text) < 1e-5


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["erf", "quick"])
def test_open_clip(quick_gelu):
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    config = build.json_config(quick_gelu)
    theirs = open_clip.CLIP(**config).eval()
    ours = tinyclip.create_model(config).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    image, text = build.images(), build.captions()
    agrees(ours, image, text, theirs.encode_image(image), theirs.encode_text(text))
    theirs.load_state_dict(build.model(config).state_dict())


def test_open_clip_gradients():
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    config = build.json_config()
    theirs = open_clip.CLIP(**config)
    ours = tinyclip.create_model(config)
    ours.load_state_dict(theirs.state_dict())
    image, text = build.images(), build.captions(count=3)
    for built in (theirs, ours):
        i, t, scale = built(image, text)
        loss = torch.nn.functional.cross_entropy(scale * i @ t.T, torch.arange(3))
        loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert build.relative(mine.grad, other.grad) < 1e-4, name


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_hugging_face(tmp_path, activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    # The random weights of a CLIPModel are so small that its towers do next to nothing.
    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": activation}
    vocabulary = {"vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599}
    config = transformers.CLIPConfig(
        vision_config={**shape, "hidden_size": 128, "intermediate_size": 500},
        text_config={**shape, **vocabulary, "hidden_size": 64, "intermediate_size": 250},
        projection_dim=40,
    )
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _, _ = tinyclip.load(tmp_path / "theirs")
    image, text = build.images(), build.captions()
    expected = (
        theirs.get_image_features(pixel_values=image),
        theirs.get_text_features(input_ids=text),
    )
    agrees(ours, image, text, *(getattr(out, "pooler_output", out) for out in expected))

    tinyclip.save(ours, tmp_path / "ours", "hf")
    back, report = transformers.CLIPModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert back.config.vision_config.hidden_act == activation


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["erf", "quick"])
@pytest.mark.parametrize("shape", ["uniform", "irregular"])
def test_the_plain_maths_of_tinyclip(shape, quick_gelu):
    config = build.json_config() if shape == "uniform" else build.IRREGULAR
    ours = build.model({**config, "quick_gelu": quick_gelu})
    image, text = build.images(ours.config.vision.image_size), build.captions()
    expected = build.oracle(ours, image, text)
    agrees(ours, image, text, *(out.float() for out in expected))


def test_irregular_towers_train():
    ours = build.model(build.IRREGULAR).double()
    image, text = build.images(64, 2).double(), build.captions(count=2)
    features = torch.cat([ours.encode_image(image), ours.encode_text(text)])
    features.square().sum().backward()
    plain = build.model(build.IRREGULAR).double()
    parameters = dict(plain.named_parameters())

    class Bare:
        config = plain.config

        def state_dict(self):
            return parameters

    torch.cat(build.oracle(Bare(), image, text)).square().sum().backward()
    for name, parameter in ours.named_parameters():
        if name == "logit_scale" or not parameter.numel():
            continue
        assert build.relative(parameter.grad, parameters[name].grad) < 1e-10, name


def test_short_captions_are_exact():
    ours = build.model(build.json_config()).double()
    text = build.captions(length=12)
    whole = torch.nn.functional.pad(text, (0, 65))
    assert build.relative(ours.encode_text(text), ours.encode_text(whole)) < 1e-14
    for length in (0, 78):
        with pytest.raises(ValueError, match="text must have shape"):
            ours.encode_text(torch.zeros(2, length, dtype=torch.long))


def test_forward_normalises_and_exponentiates():
    ours = build.model(build.json_config())
    image, text, scale = ours(build.images(), build.captions())
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))
    assert ours(text=build.captions())[0] is None
    assert ours(build.images())[1] is None
    with pytest.raises(ValueError, match="image must have shape"):
        ours.encode_image(build.images(196))


def test_logit_scale_takes_both_shapes():
    config = build.json_config()
    scalar = tinyclip.create_model(config)
    vector = tinyclip.create_model(config, nonscalar_logit_scale=True)
    assert (scalar.logit_scale.shape, vector.logit_scale.shape) == ((), (1,))
    with torch.no_grad():
        vector.logit_scale.fill_(1.25)
    scalar.load_state_dict(vector.state_dict())
    assert scalar.logit_scale.item() == 1.25
    with torch.no_grad():
        scalar.logit_scale.fill_(2.5)
    vector.load_state_dict(scalar.state_dict())
    assert vector.logit_scale.tolist() == [2.5]


def test_grad_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        ours = build.model(build.IRREGULAR).train()
        ours.set_grad_checkpointing(enable)
        ours.encode_image(build.images(64)).square().sum().backward()
        gradients.append([p.grad for p in ours.visual.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_16_bit_autocast_follows_open_clip():
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**build.json_config()).eval()
    ours = tinyclip.create_model(build.json_config()).eval()
    ours.load_state_dict(theirs.state_dict())
    image, text = build.images(), build.captions()
    exact = theirs.encode_image(image), theirs.encode_text(text)
    with torch.autocast("cpu", torch.bfloat16):
        mine = ours.encode_image(image), ours.encode_text(text)
        other = theirs.encode_image(image), theirs.encode_text(text)
    for a, b, truth in zip(mine, other, exact, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert build.relative(a.float(), truth) < 2 * build.relative(b.float(), truth) + 1e-3


def test_compiles_whole():
    ours = build.model(build.IRREGULAR)
    image, text = build.images(64), build.captions()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for mine, plain in zip(compiled(image, text), ours(image, text), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)
