"""``tinyclip convert``: from any layout to any other, read back and compared."""

import pytest
import torch

import tinyclip
from tests.models import build
from tinyclip.cli import main


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
