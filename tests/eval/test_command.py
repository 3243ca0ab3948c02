"""``tinyclip eval`` from the command line: every kind of data, against loops over the model."""

import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tinyclip
from tests.eval.test_metrics import by_sorting
from tests.models import build
from tinyclip import cli
from tinyclip.data import digits
from tinyclip.data.folders import ClassFolders
from tinyclip.eval import Encoded
from tinyclip.eval.command import classes_of
from tinyclip.models import Preprocess, Tokenizer

COLOURS = {"dark_red": (150, 10, 10), "green": (20, 220, 30), "blue": (10, 30, 230)}
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "width": 32, "layers": 1,
                   "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with the digits' vocabulary, which spells out any other word."""
    where = tmp_path_factory.mktemp("saved") / "little"
    vocabulary, merges = digits.vocabulary()
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": len(vocabulary)}}
    tinyclip.save(
        build.model(config, seed=2),
        where,
        preprocess=Preprocess(**digits.PREPROCESS),
        tokenizer=Tokenizer(vocabulary, merges, digits.CONTEXT_LENGTH),
    )
    return where


def picture(colour, seed):
    """Noise around a colour: no two pictures embed alike."""
    noise = np.random.default_rng(seed).integers(0, 60, (16, 32, 3)) - 30
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def classes(tmp_path):
    """A folder a class, of 5, 4 and 3 pictures, and two files that are no pictures."""
    root = tmp_path / "classes"
    for count, (name, colour) in zip((5, 4, 3), COLOURS.items(), strict=True):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(colour, 10 * count + index).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def evaluate(folder, tmp_path, capsys):
    def call(data, *flags):
        output = tmp_path / "out" / "result.json"
        given = ["--model", str(folder), "--data", str(data), "--output", str(output)]
        flags = [*given, "--workers", "0", *flags]
        status = cli.main(["eval", *flags])
        said = capsys.readouterr()
        if status:
            return status, said.err
        return json.loads(output.read_text()), said.out

    return call


def embedded(folder, images, texts):
    """(images, texts), captions at full length, in fp64 after the model."""
    model, preprocess, tokenizer = tinyclip.load(folder)
    with torch.no_grad():
        image = torch.cat([model.encode_image(preprocess(one)[None]) for one in images])
        text = model.encode_text(tokenizer(list(texts)))
    return (F.normalize(x.double(), dim=1).numpy() for x in (image, text))


def accuracies(scores, labels):
    answers = scores.argmax(1)
    recalls = [(answers[labels == c] == c).mean() for c in np.unique(labels)]
    return {"acc1": (answers == labels).mean(), "mean_per_class_recall": np.mean(recalls)}


def test_a_folder_of_classes(folder, classes, evaluate):
    (classes / "green" / "broken.png").write_bytes(b"<html>")
    result, said = evaluate(classes, "--templates", "simple", "--max-bad-fraction", "0.1")
    files = sorted(classes.glob("*/[0-9].png"))
    names = ["blue", "dark red", "green"]
    labels = np.array([names.index(file.parent.name.replace("_", " ")) for file in files])
    prompts = [t.replace("{}", n) for n in names for t in tinyclip.eval.TEMPLATES["simple"]]
    images, texts = embedded(folder, [Image.open(file) for file in files], prompts)
    weights = texts.reshape(3, 7, -1).mean(1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    wanted = accuracies(images @ weights.T, labels)
    metrics = result.pop("metrics")
    assert metrics.pop("acc5") is None  # fewer than five classes
    assert metrics == pytest.approx(wanted)
    ((key, reason),) = result.pop("skipped")
    assert key == "green/broken.png" and reason
    assert result == {
        "dataset": str(classes),
        "model": "little",
        "pretrained": str(folder),
        "task": "zeroshot_classification",
        "language": "en",
        "samples": 12,
    }
    assert "12 pictures, 1 skipped" in said and "acc5                   -" in said
    assert f"acc1                   {wanted['acc1']:.4f}" in said and "skipped green/" in said


def test_too_many_broken(classes, evaluate):
    (classes / "green" / "broken.png").write_bytes(b"<html>")
    status, said = evaluate(classes)
    assert status == 1 and "1 of 13 samples are broken" in said and "green/broken.png" in said


def test_class_names(folder, classes, evaluate, tmp_path):
    """By the caption's name, by the folders' order, or by a mapping; anything else is named."""
    files = sorted(classes.glob("*/*.png"))
    own = ["blue", "dark red", "green"]
    labels = np.array([own.index(file.parent.name.replace("_", " ")) for file in files])

    def wanted(names, places):
        images, texts = embedded(folder, [Image.open(file) for file in files], names)
        return accuracies(images @ texts.T, np.array(places)[labels])

    def found(text, name="names.txt"):
        (tmp_path / name).write_text(text)
        return evaluate(classes, "--classnames", str(tmp_path / name))

    more = ["green", "yellow", "blue", "dark red", "one", "two"]
    metrics = found("\n".join(more))[0]["metrics"]
    assert metrics.pop("acc5") is not None
    assert metrics == pytest.approx(wanted(more, [2, 3, 0]))
    others = ["a red seven", "zero", "two"]
    metrics = found("\n\n".join(others))[0]["metrics"]
    assert {**metrics, "acc5": 0} == pytest.approx({**wanted(others, [0, 1, 2]), "acc5": 0})
    mapped = {"green": "seven", "dark red": "zero", "blue": "one", "grey": "two"}
    metrics = found(json.dumps(mapped), "names.json")[0]["metrics"]
    expected = wanted(["one", "zero", "seven"], [0, 1, 2])
    assert {**metrics, "acc5": 0} == pytest.approx({**expected, "acc5": 0})
    for text, name, sentence in (
        (
            "green\nblue\ndark rde",
            "a.txt",
            "is not among the 3 that .* mean 'dark rde'",
        ),
        ("one\ntwo", "b.txt", "the data's 'blue' is not among the 2 that"),
        ("green\nblue\ndark red\ngreen", "c.txt", "'green' is there twice"),
        ('{"green": "one"}', "d.json", "'blue' is not among the 1"),
        ("[]", "e.json", "must be a list of names, or an object of names, and not empty"),
        ('{"green": 1}', "f.json", "must be a list of names"),
        ("", "g.txt", "not empty"),
    ):
        status, said = found(text, name)
        assert status == 1
        assert re.search(sentence, said), said


@pytest.mark.parametrize(
    ("named", "names", "labels"),
    [
        (None, ["blue", "dark red", "green"], [2, 1, 1, 0]),
        (["green", "x", "blue", "dark red"], ["green", "x", "blue", "dark red"], [0, 3, 3, 2]),
        (["x", "y", "z"], ["x", "y", "z"], [2, 1, 1, 0]),
        ({"green": "g", "blue": "b", "dark red": "d", "x": "y"}, ["b", "d", "g"], [2, 1, 1, 0]),
        ({"green": "same", "blue": "b", "dark red": "same"}, ["b", "same", "same"], [2, 1, 1, 0]),
    ],
)
def test_which_class_is_which(classes, named, names, labels):
    said = (("green",), ("dark red",), ("dark red", "dark red"), ("blue",))
    encoded = Encoded(torch.zeros(4, 2), tuple("abcd"), said, ())
    assert classes_of(ClassFolders(classes), encoded, named) == (names, labels)


def table(tmp_path):
    """Six pictures of one to three captions each, whose rows are mixed."""
    rows = []
    for index, (name, colour) in enumerate(list(COLOURS.items()) * 2):
        picture(colour, index).save(tmp_path / f"{index}.png")
        rows += [
            (f"{index}.png", f"{name} {digits.DIGITS[index + j]}") for j in range(index % 3 + 1)
        ]
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[i] for i in order]
    lines = ["image;text", *(";".join(row) for row in rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return rows


def retrieved(folder, images, rows, ks):
    """Of (image's number, caption) rows, by brute force."""
    image, text = embedded(folder, images, [said for _, said in rows])
    scores = image @ text.T
    right = np.arange(len(images))[:, None] == np.array([owner for owner, _ in rows])
    ways = {"image_retrieval": by_sorting(scores.T, right.T, ks).mean(0)}
    ways["text_retrieval"] = by_sorting(scores, right, ks).mean(0)
    return {
        f"{way}_recall@{k}": v for way, row in ways.items() for k, v in zip(ks, row, strict=True)
    }


@pytest.mark.parametrize("workers", ["0", "2"])
def test_retrieval_of_a_table_with_several_captions(folder, evaluate, tmp_path, workers):
    rows = table(tmp_path)
    flags = ("--csv-img-key", "image", "--csv-caption-key", "text", "--csv-separator", ";")
    result, said = evaluate(
        tmp_path / "pairs.csv", *flags, "--batch-size", "4", "--workers", workers,
        "--recall-k", "1", "2", "3",
    )  # fmt: skip
    images = [Image.open(tmp_path / f"{i}.png") for i in range(6)]
    rows = [(int(name[0]), caption) for name, caption in rows]
    assert result["metrics"] == pytest.approx(retrieved(folder, images, rows, (1, 2, 3)))
    assert (result["task"], result["samples"]) == ("zeroshot_retrieval", 6)
    assert "text_retrieval_recall@3" in said


def test_tar_shards_with_lists_of_captions(folder, evaluate, tmp_path):
    """Keys are the same in both shards; a json has several captions."""
    images, rows = [], []
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for key, (name, colour) in enumerate(COLOURS.items()):
                said = [f"{name} {digits.DIGITS[shard * 4 + j]}" for j in range(key + 1)]
                images.append(picture(colour, 9 * shard + key))
                rows += [(len(images) - 1, one) for one in said]
                file = io.BytesIO()
                images[-1].save(file, "png")
                for suffix, data in (("png", file.getvalue()),
                                     ("json", json.dumps({"caption": said}).encode())):  # fmt: skip
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    result, _ = evaluate(f"{tmp_path}/{{0,1}}.tar", "--task", "auto")
    assert result["samples"] == 6
    assert result["metrics"] == pytest.approx(retrieved(folder, images, rows, (1, 5, 10)))


def test_classes_as_captions_of_a_table(folder, evaluate, tmp_path):
    """A table is for retrieval unless it is said that its captions are classes."""
    rows = []
    for index, (name, colour) in enumerate(list(COLOURS.items()) * 3):
        picture(colour, index).save(tmp_path / f"{index}.png")
        rows.append((f"{index}.png", name))
    (tmp_path / "pairs.tsv").write_text("\n".join(map("\t".join, [("filepath", "title"), *rows])))
    result, _ = evaluate(tmp_path / "pairs.tsv", "--task", "zeroshot_classification")
    names = sorted(COLOURS)
    labels = np.array([names.index(name) for _, name in rows])
    images, texts = embedded(folder, [Image.open(tmp_path / f) for f, _ in rows], names)
    wanted = accuracies(images @ texts.T, labels)
    assert {**result["metrics"], "acc5": 0} == pytest.approx({**wanted, "acc5": 0})
    with (tmp_path / "pairs.tsv").open("a") as file:
        file.write("\n0.png\tgreen")
    status, said = evaluate(tmp_path / "pairs.tsv", "--task", "zeroshot_classification")
    assert status == 1 and "0.png: classification needs one caption, the class, got" in said


def test_digits_at_every_precision(folder, evaluate):
    """Zero-shot over all 1,600 captions, however few are shown."""
    data = "digits:validation?count=200"
    source = tinyclip.data.open_data(data)
    images, texts = embedded(folder, [source.sample(i).image for i in range(200)], source.classes)
    answers = np.argsort(-(images @ texts.T), 1)
    right = answers == source.labels[:, None]
    for precision, near in (("fp32", 1e-12), ("fp64", 1e-12), ("amp_bf16", 0.02)):
        result, _ = evaluate(data, "--precision", precision)
        assert result["task"] == "zeroshot_classification"
        assert result["metrics"]["acc1"] == pytest.approx(right[:, 0].mean(), abs=near)
        assert result["metrics"]["acc5"] == pytest.approx(right[:, :5].any(1).mean(), abs=near)


def test_the_name_is_the_published_models(tmp_path, folder):
    from tinyclip.eval.command import _name
    from tinyclip.models import get_config

    assert _name(get_config("ViT-B-32"), tmp_path / "x") == "ViT-B-32"
    config = tinyclip.load(folder)[0].config
    assert _name(config, folder) == "little"
    assert _name(config, tmp_path / "run" / "model") == "run"


def test_wrong_calls(folder, classes, evaluate, tmp_path):
    for flags, sentence in (
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--workers", "-1"), "--workers must be at least 0, got -1"),
        (("--templates", "all"), "'all' is no file, and none of plain, simple, openai"),
        (("--classnames", "gone.txt"), "gone.txt"),
        (("--dataset-type", "zip"), "kind (--dataset-type) must be one of"),
        (("--recall-k", "1", "0"), "--recall-k must be at least 1, got 0"),
        (("--tokenizer", str(tmp_path / "gone")), "no such file"),
        (("--device", "tpu"), "tpu"),
    ):
        status, said = evaluate(classes, *flags)
        assert status == 1 and sentence in said, said
    for output, sentence in (
        (tmp_path, "is a folder"),
        (folder / "tinyclip.json" / "a", "tinyclip.json"),
    ):
        status, said = evaluate(tmp_path / "nothing", "--output", str(output))
        assert status == 1 and sentence in said, said  # before anything else was looked at
    status, said = evaluate(tmp_path / "nothing")
    assert status == 1 and "no such file or folder" in said
    with pytest.raises(SystemExit):
        evaluate(classes, "--task", "linear_probe")


def test_the_digits_vocabulary_by_name(folder, evaluate, tmp_path):
    """As train has it: for a model without one, the same figures as with its own."""
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for name in ("vocab.json", "merges.txt"):
        (bare / name).unlink()
    data = "digits:test?count=40"
    own, _ = evaluate(data)
    status, said = evaluate(data, "--model", str(bare))
    assert status == 1 and "--tokenizer" in said
    named, _ = evaluate(data, "--model", str(bare), "--tokenizer", "digits")
    assert named["metrics"] == own["metrics"]


def test_json_captions_and_quotes(evaluate, tmp_path):
    """--json-key and --csv-unquoted: what the messages of a shard and a table point to."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index in range(6):
            written = io.BytesIO()
            picture((40 * index, 90, 30), index).save(written, "png")
            said = json.dumps({"text": f"colour {index}"}).encode()
            for suffix, data in (("png", written.getvalue()), ("json", said)):
                entry = tarfile.TarInfo(f"{index}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            (tmp_path / f"{index}.png").write_bytes(written.getvalue())
    status, said = evaluate(tmp_path / "a.tar")
    assert status == 1 and "no text at 'caption' of its .json (--json-key)" in said
    assert evaluate(tmp_path / "a.tar", "--json-key", "text")[0]["samples"] == 6
    rows = [f'{index}.png\t"six {index}' for index in range(6)]
    (tmp_path / "a.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    status, said = evaluate(tmp_path / "a.tsv")
    assert status == 1 and "--csv-unquoted" in said
    assert evaluate(tmp_path / "a.tsv", "--csv-unquoted")[0]["samples"] == 6
