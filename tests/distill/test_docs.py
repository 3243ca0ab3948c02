"""docs/distill.md is true: its Python runs, and its table of keys is a stage's."""

import argparse
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tests.distill.test_stages import AUTOMATIC, PUBLISHED
from tinyclip.distill import Masks, Stage, read_plan
from tinyclip.models import create_model, get_config
from tinyclip.train import distill_command
from tinyclip.train.distill_command import _OF_MASKS

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "distill.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for plan in blocks("toml"):
        name = re.match(r"# (\w+\.toml):", plan)[1]
        (tmp_path / name).write_text(plan)
    found = blocks("python")
    assert len(found) == 8
    space = {"__name__": "__main__"}
    for block in found:
        exec(compile(block, "docs/distill.md", "exec"), space)


def test_the_plans_are_the_published_ones(tmp_path):
    for ours, theirs in zip(blocks("toml"), (PUBLISHED, AUTOMATIC), strict=True):
        (tmp_path / "theirs.toml").write_text(theirs)
        (tmp_path / "ours.toml").write_text(ours)
        assert read_plan(tmp_path / "ours.toml") == read_plan(tmp_path / "theirs.toml")


def test_the_words_of_the_masks():
    """Each key has its flag in the table, and the command is one that the parser takes."""
    table = TEXT.partition("| flag, key |")[2].partition("\n\n")[0]
    keys = re.findall(r"^\| `--([\w-]+)`, `(\w+)` \|", table, re.MULTILINE)
    assert [flag.replace("-", "_") for flag, _ in keys] == [key for _, key in keys]
    assert {key for _, key in keys} == set(_OF_MASKS)
    (command,) = re.findall(r"^tinyclip distill (.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)
    parser = argparse.ArgumentParser()
    distill_command.add_arguments(parser)
    args = parser.parse_args(shlex.split(command.replace("\\\n", "")))
    assert (args.inherit, args.sparsity, args.prune_at, args.model) == ("auto", 0.25, 3000, None)
    masks = Masks(get_config("ViT-B-32"))
    assert f"{sum(len(a) for a in masks.log_alphas()):,} of them" in TEXT


def test_the_figures_are_of_the_run():
    """Each row of the table, and what the sentences around it say."""
    found = json.loads((DOCS / "figures" / "auto.json").read_text())
    rows = {row["name"]: row for row in found["runs"]}
    for name, row in rows.items():
        shares = f"{row['zero_shot_exact']:.1%} | {1 - row['sparsity']:.1%}"
        assert f"| {name} | {shares} | {row['parameters']:,} | {row['macs'] / 1e6:.2f} |" in TEXT
        made = create_model(row["config"], device="meta")
        assert sum(p.numel() for p in made.parameters()) == row["parameters"]
    assert [row["seed"] for row in found["runs"]] == [0, 0, 0]
    assert (found["steps"], found["batch"], found["prune_at"]) == (400, 128, 200)
    assert found["mask_lr"] == 0.05
    auto, manual = rows["auto"], rows["manual"]
    assert auto["zero_shot_exact"] == pytest.approx(manual["zero_shot_exact"], abs=0.005)
    assert auto["macs"] < 0.92 * manual["macs"] and auto["sparsity"] > manual["sparsity"]
    assert f"{manual['sparsity']:.3f}" == "0.751"


def test_every_key_has_a_row():
    keys = TEXT.partition("| key | what it says")[2].partition("\n\n")[0]
    named = {key for row in re.findall(r"^\| (`.*?) \|", keys, re.MULTILINE)
             for key in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert named == {"model", *(field.name for field in fields(Stage) if field.name != "config")}
