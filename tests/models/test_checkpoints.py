"""Every layout goes in and comes out again, bit for bit."""

import argparse
import json
import logging
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tinyclip
from tests.models import build
from tinyclip import models


def same(a, b):
    """The same model: config, names, order of names, dtypes and bits."""
    assert a.config == b.config
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        other = b.state_dict()[key]
        assert value.dtype == other.dtype, key
        assert torch.equal(value, other), key


def config_for(format, activation="gelu"):
    config = build.IRREGULAR if format in ("tinyclip", "microsoft") else build.json_config()
    return {**config, "quick_gelu": activation == "quick_gelu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("format", models.FORMATS)
def test_round_trip(tmp_path, format, activation, dtype):
    ours = build.model(config_for(format, activation)).to(dtype)
    tinyclip.save(ours, tmp_path / "folder", format)
    back, preprocess, _ = tinyclip.load(tmp_path / "folder")
    same(ours, back)
    assert not back.training
    assert preprocess == models.Preprocess(ours.config.vision.image_size)
    assert not list((tmp_path / "folder").glob("*.part"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
@pytest.mark.parametrize("format", models.FORMATS)
def test_the_umask_says_who_may_read(tmp_path, format, umask):
    before = os.umask(umask)
    try:
        tinyclip.save(build.model(config_for(format)), tmp_path / "folder", format)
    finally:
        os.umask(before)
    files = list((tmp_path / "folder").iterdir())
    assert len(files) >= 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize("layout", models.LAYOUTS)
def test_names_there_and_back(layout):
    state = build.model(build.json_config()).state_dict()
    renamed = models.from_canonical(state, layout)
    found, back = models.to_canonical("somewhere", renamed)
    assert found == layout
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
    moved = {"module." + key: value for key, value in renamed.items()}
    assert models.to_canonical("somewhere", moved)[1].keys() == state.keys()


def test_four_formats_in_a_row(tmp_path):
    ours = build.model(build.json_config(True))
    path = tmp_path / "0"
    tinyclip.save(ours, path)
    for format in ("hf", "open_clip", "microsoft", "hf", "tinyclip"):
        loaded, preprocess, _ = tinyclip.load(path)
        path = tmp_path / f"{path.name}{format}"
        tinyclip.save(loaded, path, format, preprocess=preprocess)
    same(ours, tinyclip.load(path)[0])


@pytest.mark.parametrize("kind", ["folder", "file", "training file", "custom text", "ddp"])
def test_open_clip_goes_in(tmp_path, kind):
    open_clip = pytest.importorskip("open_clip")
    config = build.json_config(True)
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**config)
    state, file, options = theirs.state_dict(), tmp_path / "epoch_1.pt", {"model": config}
    if kind == "folder":
        save_file(state, tmp_path / "open_clip_model.safetensors")
        cfg = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
        file, options = tmp_path, {}
    elif kind == "file":
        torch.save(state, file)
    elif kind == "training file":
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
        torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": optimizer}, file)
    elif kind == "custom text":
        state = open_clip.model.CustomTextCLIP(**config).state_dict()
        torch.save({"state_dict": state}, file)
        state = models.to_canonical(file, state)[1]
    else:
        torch.save({"state_dict": {"module." + k: v for k, v in state.items()}}, file)
    ours, preprocess, _ = tinyclip.load(file, **options)
    assert ours.config.activation == "quick_gelu"
    for key, value in state.items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert preprocess.std == ((0.25,) * 3 if kind == "folder" else models.Preprocess().std)


def test_open_clip_takes_what_comes_out(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    for config in (build.json_config(True), {**build.json_config(), "embed_dim": 40}):
        config["vision_cfg"].update(width=150, head_width=50, mlp_ratio=1.7)
        ours = build.model(config)
        tinyclip.save(ours, tmp_path / "folder", "open_clip")
        theirs = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}").eval()
        image, text = build.images(), build.captions()
        assert build.relative(ours.encode_image(image), theirs.encode_image(image)) < 1e-5
        assert build.relative(ours.encode_text(text), theirs.encode_text(text)) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "ddp", "alias", "old"])
def test_tinyclip_goes_in(tmp_path, kind, caplog):
    config = build.json_config() if kind == "old" else build.IRREGULAR
    ours = build.model(config)
    state = ours.state_dict()
    named = build.microsoft(state, ddp=kind == "ddp")
    if kind == "alias":
        # Pruning registers the encoders a second time, under the name of the property.
        for tower in ("image", "text"):
            start = f"_{tower}_encoder."
            for key in [key for key in named if key.startswith(start)]:
                named[f"{tower}_encoder_without_ddp." + key.removeprefix(start)] = named[key]
    elif kind == "old":
        named = {"module." + key: value for key, value in state.items()}
    run = {"args": argparse.Namespace(lr=1e-4, model="TinyCLIP"), "epoch": 6, "optimizer": [{}]}
    torch.save({**run, "state_dict": named}, tmp_path / "TinyCLIP-auto.pt")
    with caplog.at_level(logging.WARNING, "tinyclip"):
        back, _, _ = tinyclip.load(tmp_path / "TinyCLIP-auto.pt")
    same(ours, back)
    # TinyCLIP's names settle the activation, open_clip's do not.
    assert bool(caplog.records) == (kind == "old")


def test_openai_goes_in(tmp_path):
    ours = build.model(build.json_config(True))
    state = {
        key: value.half() if value.dim() > 1 and "embedding" not in key else value
        for key, value in ours.state_dict().items()
    }
    torch.save(state, tmp_path / "mixed.pt")
    marks = {"input_resolution": 224, "context_length": 77, "vocab_size": 600}
    marks = {key: torch.tensor(value) for key, value in marks.items()}
    torch.save({**{k: v.float() for k, v in state.items()}, **marks}, tmp_path / "marked.pt")
    for name in ("mixed.pt", "marked.pt"):
        back, _, _ = tinyclip.load(tmp_path / name)
        assert back.config == ours.config
        for key, value in back.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, state[key].float()), key
        with pytest.raises(models.CheckpointError, match="quick_gelu"):
            tinyclip.load(tmp_path / name, activation="gelu")
        with pytest.raises(models.CheckpointError, match="OpenAI"):
            tinyclip.load(tmp_path / name, model=build.json_config(False))


def test_hugging_face_shards(tmp_path):
    ours = build.model(build.json_config(True))
    tinyclip.save(ours, tmp_path, "hf")
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: names[index % 2] for index, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    same(ours, tinyclip.load(tmp_path)[0])

    where["visual_projection.weight"] = "../" + names[0]
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(models.CheckpointError, match="beside its index"):
        tinyclip.load(tmp_path)
    del where["visual_projection.weight"]
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(models.CheckpointError, match=r"visual_projection.*shard"):
        tinyclip.load(tmp_path)


def test_a_file_finds_the_config_beside_it(tmp_path):
    ours = build.model(build.json_config(True))
    tinyclip.save(ours, tmp_path, "open_clip")
    same(ours, tinyclip.load(tmp_path / "open_clip_model.safetensors")[0])


def test_dtype_and_scale_shape(tmp_path):
    ours = tinyclip.create_model(build.json_config(), nonscalar_logit_scale=True)
    tinyclip.save(ours, tmp_path / "own")
    assert tinyclip.load(tmp_path / "own")[0].logit_scale.shape == (1,)
    tinyclip.save(ours, tmp_path / "hf", "hf")
    assert tinyclip.load(tmp_path / "hf")[0].logit_scale.shape == ()
    half = tinyclip.load(tmp_path / "own", dtype=torch.bfloat16)[0]
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in half.parameters())


def test_blocks_of_which_nothing_is_left(tmp_path):
    config = json.loads(json.dumps(build.IRREGULAR))
    config["vision_cfg"].update(layer_heads=[None, 2, 1, None], layer_mlp_widths=[None, 7, 9, None])
    ours = build.model(config)
    for format in ("tinyclip", "microsoft"):
        tinyclip.save(ours, tmp_path / format, format)
        same(ours, tinyclip.load(tmp_path / format)[0])
    # A file alone cannot tell of an empty last block, and needs none.
    alone = tmp_path / "alone.pt"
    alone.write_bytes((tmp_path / "microsoft" / "model.pt").read_bytes())
    bare = tinyclip.load(alone)[0]
    assert len(bare.config.vision.layers) == 3
    assert torch.equal(bare.encode_image(build.images(64)), ours.encode_image(build.images(64)))


def test_parameters_that_were_saved_as_such(tmp_path):
    ours = build.model(build.json_config())
    parameters = dict(ours.named_parameters())
    parameters["visual.conv1.weight"].requires_grad_(False)
    torch.save(parameters, tmp_path / "a.pt")
    back = tinyclip.load(tmp_path / "a.pt", activation="gelu")[0]
    assert all(p.is_leaf and p.requires_grad for p in back.parameters())
    for key, value in parameters.items():
        assert torch.equal(back.state_dict()[key], value)


def test_the_activation_is_the_configs(tmp_path):
    tinyclip.save(build.model(build.json_config(True)), tmp_path)
    assert tinyclip.load(tmp_path, activation="quick_gelu")[0].config.activation == "quick_gelu"
    with pytest.raises(ValueError, match=r"tinyclip.json.*'quick_gelu', got 'gelu'"):
        tinyclip.load(tmp_path, activation="gelu")
    with pytest.raises(ValueError, match="model="):
        tinyclip.load(tmp_path, model=build.json_config(False))
    with pytest.raises(ValueError, match="activation must be the config's"):
        tinyclip.create_model("ViT-B-32", activation="quick_gelu")


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    pruned = build.model(build.IRREGULAR)
    for format in ("open_clip", "hf"):
        with pytest.raises(ValueError, match="uniform towers only"):
            tinyclip.save(pruned, tmp_path / format, format)
        assert not (tmp_path / format).exists()
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'onnx'"):
        tinyclip.save(pruned, tmp_path, "onnx")


def test_the_default_device_and_dtype_do_not_matter(tmp_path):
    tinyclip.save(build.model(build.json_config()), tmp_path)
    plain, preprocess, _ = tinyclip.load(tmp_path)
    picture = Image.new("RGB", (300, 240), (200, 30, 90))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model, again, _ = tinyclip.load(tmp_path)
            image = again(picture)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(image, preprocess(picture))
    for mine, parameter in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, parameter)


def test_other_image_size(tmp_path):
    ours = build.model(build.json_config())
    torch.save({"state_dict": build.microsoft(ours.state_dict())}, tmp_path / "a.pt")
    tinyclip.save(ours, tmp_path / "oc", "open_clip")
    tinyclip.save(ours, tmp_path / "hf", "hf")
    table = ours.visual.positional_embedding.detach()
    for path, mode in (("a.pt", "tinyclip"), ("oc", "open_clip"), ("hf", "hf")):
        big, preprocess, _ = tinyclip.load(tmp_path / path, image_size=288)
        assert preprocess.size == big.config.vision.image_size == 288
        expected = models.resize_positions(table, 9, mode)
        assert torch.equal(big.visual.positional_embedding, expected)
        assert big.encode_image(build.images(288)).shape == (3, 64)
    chosen = tinyclip.load(tmp_path / "oc", image_size=288, positions="hf")[0]
    assert torch.equal(chosen.visual.positional_embedding, models.resize_positions(table, 9, "hf"))


def test_rectangular_images(tmp_path):
    """A model of 64 x 96 pixels, against open_clip's own towers."""
    open_clip = pytest.importorskip("open_clip")
    config = build.json_config()
    config["vision_cfg"]["image_size"] = [64, 96]
    ours = build.model(config)
    assert (ours.config.vision.grid, ours.config.vision.tokens) == ((2, 3), 7)
    theirs = open_clip.model.CLIP(**ours.config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(3, 3, 64, 96)
    expected = theirs.encode_image(image)
    for format in ("tinyclip", "open_clip", "microsoft"):
        tinyclip.save(ours, tmp_path / format, format)
        back, preprocess, _ = tinyclip.load(tmp_path / format)
        assert preprocess.size == back.config.vision.image_size == (64, 96)
        assert build.relative(back.encode_image(image), expected) < 1e-5
    with pytest.raises(ValueError, match="image must have shape"):
        ours.encode_image(image.mT)
    with pytest.raises(ValueError, match="holds square images only"):
        tinyclip.save(ours, tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match=r"a rectangle, give its config: model="):
        file = tmp_path / "open_clip" / "open_clip_model.safetensors"
        shutil.move(file, tmp_path / "alone.safetensors")
        tinyclip.load(tmp_path / "alone.safetensors")
    alone, _, _ = tinyclip.load(tmp_path / "alone.safetensors", model=ours.config)
    assert build.relative(alone.encode_image(image), expected) < 1e-5

    wide = tinyclip.load(tmp_path / "tinyclip", image_size=(64, 160))[0]
    state = {"visual.positional_embedding": ours.visual.positional_embedding.detach()}
    expected = models.resize_positions(*state.values(), (2, 5), of=(2, 3))
    assert torch.equal(wide.visual.positional_embedding, expected)
    square = tinyclip.load(tmp_path / "tinyclip", image_size=(96, 96))[0]
    assert square.config.vision.image_size == 96
