"""Prompts, class weights and embeddings against plain loops over the model."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.models import build
from tinyclip.data import BrokenSample, Sample, Source
from tinyclip.data.tables import Table
from tinyclip.eval import (
    TEMPLATES,
    encode_images,
    encode_source,
    encode_texts,
    read_templates,
    zero_shot_classifier,
)

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 130, "width": 16, "heads": 2, "layers": 1},
}


def tokenizer(texts: list[str]) -> torch.Tensor:
    """A character a token; the end has the largest id."""
    result = torch.zeros(len(texts), 20, dtype=torch.long)
    for row, text in zip(result, texts, strict=True):
        ids = [*[min(ord(c), 127) for c in text[:19]], 129]
        row[: len(ids)] = torch.tensor(ids)
    return result


@pytest.fixture
def model():
    return build.model(CONFIG, seed=4)


def test_templates_are_the_published_ones():
    open_clip = pytest.importorskip("open_clip")
    assert {name: len(found) for name, found in TEMPLATES.items()} == {
        "plain": 1,
        "simple": 7,
        "openai": 80,
    }
    assert TEMPLATES["openai"] == tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert TEMPLATES["simple"] == tuple(t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES)


def test_reading_templates(tmp_path):
    assert read_templates("simple") is TEMPLATES["simple"]
    lines, listed = tmp_path / "prompts.txt", tmp_path / "prompts.json"
    lines.write_text("a {}.\n\n{} ± {}\n", encoding="utf-8")
    listed.write_text(json.dumps(["one {}"]))
    assert read_templates(lines) == ("a {}.", "{} ± {}")
    assert read_templates(str(listed)) == ("one {}",)
    for text, sentence in (("[]", "at least one"), ('["a"]', "holds {}"), ("{}", "a list of"),
                           ("[3]", "must be a string")):  # fmt: skip
        listed.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_templates(listed)
    with pytest.raises(FileNotFoundError, match="'opnai' is no file, and none of plain, simple"):
        read_templates("opnai")


@pytest.mark.parametrize("batch_size", [1, 5, 1024])
def test_classifier(model, batch_size):
    names, templates = ["cat", "a {brace}", "dog", "", "cat"], ("{}", "a photo of {}.", "{}, {}!")
    found = zero_shot_classifier(model, tokenizer, names, templates, batch_size=batch_size)
    for row, name in zip(found, names, strict=True):
        prompts = [name, f"a photo of {name}.", f"{name}, {name}!"]
        with torch.no_grad():
            mean = sum(F.normalize(model.encode_text(tokenizer([p]))[0], dim=0) for p in prompts)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    torch.testing.assert_close(found[0], found[4], rtol=0, atol=0)


def test_classifier_refuses(model):
    for names in ([], "cat"):
        with pytest.raises(ValueError, match="classnames must be a list"):
            zero_shot_classifier(model, tokenizer, names)
    with pytest.raises(ValueError, match=r"must be a string that holds \{\}"):
        zero_shot_classifier(model, tokenizer, ["cat"], ["a photo"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encoding(model, dtype):
    model = model.to(dtype)
    texts = ["one", "two, longer", "one", "three"]
    found = encode_texts(model, tokenizer, texts, batch_size=2)
    work = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        alone = torch.cat([model.encode_text(tokenizer([t])) for t in texts]).to(work)
    assert found.dtype == work
    near = {"rtol": 0, "atol": 2e-2 if dtype == torch.bfloat16 else 1e-6}
    torch.testing.assert_close(found, F.normalize(alone, dim=1), **near)
    assert torch.equal(found[0], found[2])
    assert encode_texts(model, tokenizer, []).shape == (0, 12)
    images = build.images(8, 5)
    found = encode_images(model, images, batch_size=2)
    with torch.no_grad():
        alone = F.normalize(model.encode_image(images.to(dtype)).to(work), dim=1)
    torch.testing.assert_close(found, alone, **near)


class Few(Source):
    """Seven pictures, two of them broken, keys that repeat as those of two shards' samples do."""

    def __len__(self):
        return 7

    def sample(self, index, turn=None):
        if index in (1, 5):
            raise BrokenSample(f"k{index}", "is made of glass")
        image = Image.new("RGB", (8, 8), (30 * index, 9, 200 - 20 * index))
        return Sample(f"k{index % 3}", image, (f"caption {index}", "second"))


def preprocess(image):
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32)
    return pixels.reshape(8, 8, 3).permute(2, 0, 1) / 255


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_encoding_a_source(model, workers, batch_size):
    state = torch.get_rng_state()
    found = encode_source(model, preprocess, Few(), batch_size=batch_size, workers=workers)
    assert torch.equal(torch.get_rng_state(), state)
    good = [0, 2, 3, 4, 6]
    assert found.keys == tuple(f"k{index % 3}" for index in good)
    assert found.captions == tuple((f"caption {index}", "second") for index in good)
    assert [tuple(one) for one in found.skipped] == [
        ("k1", "is made of glass"),
        ("k5", "is made of glass"),
    ]
    images = torch.stack([preprocess(Few().sample(index).image) for index in good])
    torch.testing.assert_close(found.images, encode_images(model, images), rtol=0, atol=1e-6)


def test_rows_of_one_picture_are_merged(model, tmp_path):
    """Of a table: encoded once, with the captions of all its rows, wherever those are."""
    rows = [("a", "one"), ("b", "two"), ("a", "three"), ("gone", "four"), ("a", "five")]
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    lines = ["filepath,title", *(f"{name}.png,{said}" for name, said in rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    found = encode_source(model, preprocess, Table(tmp_path / "pairs.csv"), batch_size=2)
    assert found.keys == ("a.png", "b.png")
    assert found.captions == (("one", "three", "five"), ("two",))
    assert [one.key for one in found.skipped] == ["gone.png"]
    assert len(found.images) == 2


def test_nothing_to_encode(model):
    class Empty(Few):
        def sample(self, index, turn=None):
            raise BrokenSample(f"k{index}", "is made of glass")

    found = encode_source(model, preprocess, Empty())
    assert found.images.shape == (0, 12) and found.keys == () and len(found.skipped) == 7
