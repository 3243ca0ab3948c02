"""Manual inheritance against the rules written out, entry by entry, on every tensor."""

from dataclasses import replace

import pytest
import torch

import tinyclip
from tests.models import build
from tinyclip.distill import inherit, inherited_layers
from tinyclip.models import CLIPConfig, Layer, get_config

B32, M61, M40 = "ViT-B-32", "TinyCLIP-ViT-61M-32-Text-29M", "TinyCLIP-ViT-40M-32-Text-19M"
B16, M39, M8 = "ViT-B-16", "TinyCLIP-ViT-39M-16-Text-19M", "TinyCLIP-ViT-8M-16-Text-3M"


def small(layers=(4, 3), width=32, text=24, embed=20, heads=None, ratio=4, **more) -> CLIPConfig:
    """A model with 8 channels a head; heads and MLP widths per layer where they are lists."""
    heads = heads or ([width // 8] * layers[0], [text // 8] * layers[1])
    return CLIPConfig.from_dict(
        {
            "embed_dim": embed,
            "vision_cfg": {
                "image_size": more.get("image_size", 12),
                "patch_size": more.get("patch_size", 4),
                "width": width,
                "layers": layers[0],
                "head_width": more.get("head_width", 8),
                "layer_heads": heads[0],
                "layer_mlp_widths": more.get("widths", ([ratio * width] * layers[0],))[0],
            },
            "text_cfg": {
                "context_length": more.get("context", 10),
                "vocab_size": more.get("vocabulary", 40),
                "width": text,
                "layers": layers[1],
                "head_width": more.get("head_width", 8),
                "layer_heads": heads[1],
                "layer_mlp_widths": more.get("widths", (0, [ratio * text] * layers[1]))[1],
            },
            "activation": more.get("activation", "gelu"),
        }
    )


def random(config: CLIPConfig, dtype=torch.float32):
    """A model whose every entry is its own, biases and norms included."""
    model = tinyclip.create_model(config, dtype=dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def expected(teacher, student_shapes, layers, head_dim=8):
    """The paper's rules one index at a time, from the teacher's state dict, in plain Python."""
    theirs, wanted = teacher.state_dict(), {}
    for name, shape in student_shapes.items():
        tower = "image" if name.startswith("visual.") else "text"
        words = name.split(".")
        if "resblocks" in words:
            place = words.index("resblocks") + 1
            words[place] = str(layers[tower][int(words[place])])
        source = theirs[".".join(words)]
        result = torch.empty(shape, dtype=source.dtype)
        if words[-1] in ("in_proj_weight", "in_proj_bias"):
            mine, full = shape[0] // 3, source.shape[0] // 3
            for row in range(shape[0]):
                which, rest = divmod(row, mine)
                head, channel = divmod(rest, head_dim)
                picked = source[which * full + head * head_dim + channel]
                result[row] = picked[: shape[1]] if len(shape) == 2 else picked
        else:
            corner = tuple(slice(0, size) for size in shape)
            result.copy_(source[corner] if shape else source)
        wanted[name] = result
    return wanted


def check(teacher, student, layers, towers=("image", "text")):
    state = student.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if name != "logit_scale"}
    wanted = expected(teacher, shapes, layers)
    assert len(wanted) == len(state) - 1
    for name, value in wanted.items():
        inherited = ("image" if name.startswith("visual.") else "text") in towers
        assert torch.equal(state[name], value) is inherited, name
    torch.testing.assert_close(state["logit_scale"].exp().item(), 1 / 0.07, rtol=1e-2, atol=0)
    assert not torch.equal(state["logit_scale"], teacher.logit_scale)


@pytest.mark.parametrize(
    ("teacher", "student", "through", "layers"),
    [
        (12, 6, (), (0, 2, 4, 6, 8, 10)),
        (12, 9, (), tuple(range(9))),
        (12, 10, (), tuple(range(10))),
        (12, 3, (), (0, 4, 8)),
        (12, 6, (9,), tuple(range(6))),
        (12, 3, (6,), (0, 4, 8)),
        (12, 2, (9, 6), (0, 3)),
        (12, 12, (), tuple(range(12))),
        (7, 3, (), (0, 2, 4)),
        (5, 0, (), ()),
        (0, 0, (), ()),
    ],
)
def test_depth_rule(teacher, student, through, layers):
    assert inherited_layers(teacher, student, through) == layers


@pytest.mark.parametrize("counts", [(3, 4), (3, 1, (4,)), (12, 9, (6,)), (3, -1)])
def test_depth_rule_refuses_more_layers(counts):
    with pytest.raises(ValueError, match="at most as many layers as its teacher"):
        inherited_layers(*counts)


@pytest.mark.parametrize(
    ("image", "text", "through"),
    [(6, 6, ()), (9, 10, ()), (3, 12, ()), (6, 6, (9, 9)), (3, 2, (6, 9))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor(image, text, through, dtype):
    teacher = random(small((12, 12), 24, 16), dtype)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    middle = [small(through, 24, 16, ratio=3)] if through else []
    student = inherit(teacher, small((image, text), 16, 8, embed=12, ratio=2), through=middle)
    rule = {
        "image": inherited_layers(12, image, through[:1]),
        "text": inherited_layers(12, text, through[1:]),
    }
    check(teacher, student, rule)
    assert {value.dtype for value in student.state_dict().values()} == {dtype}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student.training and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("name", "student", "through", "image", "text"),
    [
        (B32, M61, (), range(12), range(9)),
        (B32, M40, (), range(12), range(0, 12, 2)),
        (B32, M40, (M61,), range(12), range(6)),
        (B16, M39, (), range(12), range(0, 12, 2)),
        (B16, M8, (), range(10), (0, 4, 8)),
    ],
)
def test_published_configs(name, student, through, image, text):
    """Real shapes, on fake tensors that know which block they came from."""
    teacher = tinyclip.create_model(name, device="meta")
    result = inherit(teacher, student, through=through)
    assert result.config == get_config(student)
    assert result.logit_scale.device.type == "meta"

    # The published shapes with 1/32 of the channels: 2 a head, so that values fit a test.
    def tiny(name):
        config = get_config(name)
        return replace(
            config,
            embed_dim=config.embed_dim // 32,
            vision=_shrink(config.vision, image_size=2 * config.vision.patch_size),
            text=_shrink(config.text, vocab_size=50),
        )

    teacher = random(tiny(name))
    result = inherit(teacher, tiny(student), through=[tiny(one) for one in through])
    layers = {"image": tuple(image), "text": tuple(text)}
    state = result.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if name != "logit_scale"}
    for name, value in expected(teacher, shapes, layers, head_dim=2).items():
        assert torch.equal(state[name], value), name


def _shrink(tower, **more):
    layers = tuple(Layer(layer.heads, layer.mlp_width // 32) for layer in tower.layers)
    return replace(tower, width=tower.width // 32, head_dim=2, layers=layers, **more)


@pytest.mark.parametrize("config", [small(), build.IRREGULAR, build.json_config()])
def test_a_student_like_its_teacher_is_its_teacher(config):
    teacher = build.model(config)
    torch.manual_seed(5)
    student = inherit(teacher, teacher.config)
    for name, value in teacher.state_dict().items():
        if name != "logit_scale":
            assert torch.equal(student.state_dict()[name], value), name
            assert not value.numel() or student.state_dict()[name].data_ptr() != value.data_ptr()
    size = teacher.config.vision.image_size
    image, text = build.images(size), build.captions(teacher.vocab_size, teacher.context_length)
    with torch.no_grad():
        for ours, theirs in zip(student(image, text)[:2], teacher(image, text)[:2], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower(tower):
    teacher = random(small())
    student = inherit(teacher, small((2, 1), 16, 8, embed=10), towers=(tower,))
    check(teacher, student, {"image": (0, 2), "text": (0,)}, towers=(tower,))
    # The other may be of any shape.
    bigger = {"image": small(text=48, vocabulary=90), "text": small(width=48, image_size=24)}
    inherit(teacher, bigger[tower], towers=tower)


def test_irregular_towers():
    """Layers without a half, on either side; a half that the teacher lacks cannot be had."""
    heads, widths = ([4, None, 3, 2], [3, 1, None]), ([9, 20, None, 0], [30, None, 5])
    teacher = random(small(heads=heads, widths=widths))
    shorter = small(
        (2, 3), 17, 9, 3, ([2, None], [2, None, None]), widths=([5, None], [2, None, 1])
    )
    check(teacher, inherit(teacher, shorter), {"image": (0, 2), "text": (0, 1, 2)})
    asked = small((2, 3), heads=([2, 3], [1, 1, 1]), widths=([5, None], [2, None, 5]))
    with pytest.raises(ValueError, match=r"resblocks.2.ln_1.weight \(24,\) has no counterpart"):
        inherit(teacher, asked)


def test_shorter_context_takes_the_leading_positions():
    teacher = random(small(context=10))
    student = inherit(teacher, small(context=7))
    assert torch.equal(student.positional_embedding, teacher.positional_embedding[:7])


def test_dtype_scale_shape_and_names():
    teacher = tinyclip.create_model(small(), nonscalar_logit_scale=True, dtype=torch.bfloat16)
    student = inherit(teacher, small((1, 1)).to_dict(), dtype=torch.float32)
    assert student.logit_scale.shape == (1,)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.visual.conv1.weight, teacher.visual.conv1.weight.float())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (small(layers=(5, 3)), "the image tower must have at most the teacher's 4 layers, got 5"),
        (small(layers=(4, 6)), "the text tower must have at most the teacher's 3 layers, got 6"),
        (small(width=40), r"visual.class_embedding must be nowhere larger .* \(32,\), got \(40,\)"),
        (small(text=40), r"positional_embedding must be .* \(10, 24\), got \(10, 40\)"),
        (small(embed=21), r"text_projection must be nowhere .*\(24, 20\), got \(24, 21\)"),
        (small(ratio=5), r"c_fc.weight must be .*\(128, 32\), got \(160, 32\)"),
        (small(heads=([5, 1, 1, 1], [1] * 3)), r"0.attn.in_proj_weight must be .*\(96, 32\)"),
        (small(context=11), r"positional_embedding must be .* \(10, 24\), got \(11, 24\)"),
        (small(vocabulary=39), "the text tower's vocab_size must be the teacher's, 40, got 39"),
        (small(patch_size=6), "the image tower's patch_size must be the teacher's, 4, got 6"),
        (small(image_size=8), r"tower's grid must be the teacher's, \(3, 3\), got \(2, 2\)"),
        (small(image_size=(12, 8)), r"grid must be the teacher's, \(3, 3\), got \(3, 2\)"),
        (small(head_width=4), "the image tower's head_dim must be the teacher's, 8, got 4"),
        (small(activation="quick_gelu"), "the activation must be the teacher's, 'gelu', got 'quic"),
        (replace(small(), layer_norm_eps=1e-6), "the eps must be the teacher's, 1e-05, got 1e-06"),
    ],
)
def test_what_cannot_be_inherited(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        inherit(random(small()), config)


def test_wrong_arguments():
    teacher = random(small())
    with pytest.raises(TypeError, match="teacher must be a CLIP model, got OrderedDict"):
        inherit(teacher.state_dict(), small())
    for towers in ((), ("images",), "visual"):
        with pytest.raises(ValueError, match="towers must be among"):
            inherit(teacher, small(), towers=towers)
    with pytest.raises(ValueError, match="'ViT-B-23' is not known; did you mean"):
        inherit(teacher, "ViT-B-23")
