"""``tinyclip convert``: from any layout to any other, read back and compared."""

import json

import pytest
import torch

import tinyclip
from tests.models import build
from tinyclip.cli import main
from tinyclip.data import digits
from tinyclip.models import Tokenizer


@pytest.mark.parametrize("format", ["tinyclip", "open_clip", "hf", "microsoft"])
def test_converts(tmp_path, capsys, format):
    ours = build.model(build.json_config())
    source = tmp_path / "source.pt"
    torch.save({"state_dict": build.microsoft(ours.state_dict(), ddp=True)}, source)
    assert main(["convert", str(source), str(tmp_path / "out"), "--format", format]) == 0
    said = capsys.readouterr().out
    assert f"({format})" in said
    assert "gelu, image 224 px, 3 + 2 layers; read back and equal" in said
    back = tinyclip.load(tmp_path / "out")[0]
    for key, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_carries_the_vocabulary(tmp_path):
    pytest.importorskip("open_clip")
    config = build.json_config(vocab_size=49408)
    tinyclip.save(tinyclip.create_model(config), tmp_path / "a")
    for source, folder, format in (("a", "b", "hf"), ("b", "c", "tinyclip")):
        arguments = [str(tmp_path / source), str(tmp_path / folder), "--format", format]
        assert main(["convert", *arguments]) == 0
        assert (tmp_path / folder / "vocab.json").is_file()


@pytest.mark.parametrize("format", ["tinyclip", "open_clip", "hf", "microsoft"])
def test_a_vocabulary_of_ones_own_goes_along(tmp_path, capsys, format):
    """And is said to where the format's other readers would not look for one."""
    tokens, merges = digits.vocabulary()
    config = build.json_config(vocab_size=len(tokens))
    ours = Tokenizer(tokens, merges, 77)
    tinyclip.save(tinyclip.create_model(config), tmp_path / "a", tokenizer=ours)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", format]) == 0
    said = capsys.readouterr().out
    assert ("vocabulary of 558 tokens is written" in said) == (format in ("open_clip", "microsoft"))
    back = tinyclip.load(tmp_path / "b")[2]
    assert torch.equal(back(["a red seven"]), ours(["a red seven"]))


def test_a_vocabulary_that_is_missing_is_said(tmp_path, capsys):
    tinyclip.save(build.model(build.json_config()), tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "no vocabulary is written: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("tinyclip", "open_clip"),
        ("hf", "tinyclip"),
        ("tinyclip", "microsoft"),
        ("microsoft", "tinyclip"),
    ],
)
def test_two_layouts_do_not_mix(tmp_path, capsys, first, then):
    tinyclip.save(build.model(build.json_config()), tmp_path / "a")
    tinyclip.save(build.model(build.json_config()), tmp_path / "b", first)
    before = sorted((tmp_path / "b").iterdir())
    words = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--force", "--format"]
    assert main([*words, then]) == 1
    assert "b holds a model in another layout, " in capsys.readouterr().err
    assert sorted((tmp_path / "b").iterdir()) == before
    assert main([*words, first]) == 0


def test_the_config_may_be_a_file(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(build.json_config(True)))
    torch.save(build.model(build.json_config(True)).state_dict(), tmp_path / "a.pt")
    words = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "b"), "--model"]
    assert main([*words, str(tmp_path / "t.json")]) == 0
    assert tinyclip.load(tmp_path / "b")[0].config.activation == "quick_gelu"


def test_what_is_no_model_is_named(tmp_path, capsys):
    """A run's folder, finished and not; a name, which has no weights."""
    for name in ("run/checkpoints/step_00000003/model", "run/checkpoints/step_00000012/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("config.json", "environment.json"):
        (tmp_path / "run" / name).write_text("{}")
    words = ["convert", str(tmp_path / "run"), str(tmp_path / "b")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "is the folder of a run: its model is" in said and "step_00000012/model" in said
    (tmp_path / "run" / "model").mkdir()
    assert main(words) == 1
    assert capsys.readouterr().err.endswith(f"its model is {tmp_path / 'run' / 'model'}\n")
    assert main(["convert", "ViT-B-16", str(tmp_path / "b")]) == 1
    assert "ViT-B-16: no such file or folder; a model's name has no" in capsys.readouterr().err


def test_refuses_what_it_must(tmp_path, capsys):
    tinyclip.save(build.model(build.IRREGULAR), tmp_path / "a")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "a")]
    assert main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "hf"]) == 1
    assert "uniform towers only" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "b")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_other_size_and_activation(tmp_path):
    torch.save(build.model(build.json_config(True)).state_dict(), tmp_path / "a.pt")
    options = ["--activation", "quick_gelu", "--image-size", "96"]
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b"), *options]) == 0
    config = tinyclip.load(tmp_path / "b")[0].config
    assert (config.activation, config.vision.image_size) == ("quick_gelu", 96)
