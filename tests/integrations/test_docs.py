"""docs/accelerate.md is true: its Python runs, its report is printed, its classes exist."""

import re
from pathlib import Path

import pytest

from tinyclip.integrations.swaps import SWAPS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "accelerate.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_runs_and_prints_what_it_says(capsys):
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    space = {"__name__": "__main__"}
    found = blocks("python")
    assert len(found) == 5
    exec(compile(found[0], "docs/accelerate.md", "exec"), space)
    (printed,) = blocks("text")
    *lines, check = printed.splitlines()
    *ours, our_check = capsys.readouterr().out.splitlines()
    assert ours == lines
    number = r"[\d.e-]+"
    pattern = rf"check: worst relative error {number}, time {number} of before"
    assert re.fullmatch(pattern, check) and re.fullmatch(pattern, our_check)
    for block in found[1:]:
        exec(compile(block, "docs/accelerate.md", "exec"), space)
    said = capsys.readouterr().out
    for text in ("add_bias_kv", "more than one dimension", "need_weights=True", "strict is True"):
        assert text in said
    assert "attn_implementation='tinyclip' computes it already" in said


def test_the_table_names_what_is_swapped():
    rows = dict(re.findall(r"^\| (\S+) \| (.* \| .* \| .*) \|$", TEXT, re.MULTILINE))
    rows["clip"] = re.search(r"^\| OpenAI's clip \| (.*) \|$", TEXT, re.MULTILINE)[1]
    for library in ("torch.nn", "open_clip", "timm", "clip"):
        named = set(re.findall(r"`([A-Z]\w+)`", rows[library]))
        known = {name for place, name, _ in SWAPS if place.startswith(library)}
        assert named == known, library
    models = re.sub(r"[ -]", "", rows["transformers"]).lower()
    for place in {place for place, *_ in SWAPS if place.startswith("transformers")}:
        model = place.split(".")[2].replace("_", "")
        assert model in models, model


def test_every_class_of_the_table_is_there():
    """In the versions that are installed: a name that has gone would never be found again."""
    import importlib

    for place, name, _ in SWAPS:
        library = place.split(".")[0]
        if library != "clip":  # OpenAI's package is on no index
            pytest.importorskip(library)
            assert isinstance(getattr(importlib.import_module(place), name), type)
