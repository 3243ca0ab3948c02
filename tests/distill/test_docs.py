"""docs/distill.md is true: its Python runs, and its table of keys is a stage's."""

import re
from dataclasses import fields
from pathlib import Path

from tests.distill.test_stages import PUBLISHED
from tinyclip.distill import Stage, read_plan

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "distill.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (plan,) = blocks("toml")
    (tmp_path / "plan.toml").write_text(plan)
    found = blocks("python")
    assert len(found) == 6
    space = {"__name__": "__main__"}
    for block in found:
        exec(compile(block, "docs/distill.md", "exec"), space)


def test_the_plan_is_the_published_one(tmp_path):
    (tmp_path / "theirs.toml").write_text(PUBLISHED)
    (tmp_path / "ours.toml").write_text(blocks("toml")[0])
    assert read_plan(tmp_path / "ours.toml") == read_plan(tmp_path / "theirs.toml")


def test_every_key_has_a_row():
    keys = TEXT.partition("| key | what it says")[2].partition("\n\n")[0]
    named = {key for row in re.findall(r"^\| (`.*?) \|", keys, re.MULTILINE)
             for key in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert named == {"model", *(field.name for field in fields(Stage) if field.name != "config")}
