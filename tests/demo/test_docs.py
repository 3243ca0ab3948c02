"""docs/demo.md is true: its tables are those of the runs that are committed beside it."""

import json
from pathlib import Path

import pytest

import tinyclip
from tinyclip.demo import report, summary
from tinyclip.demo.recipe import Recipe, student_config, teacher_config

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "demo.md").read_text()
RESULTS = json.loads((DOCS / "figures" / "demo.json").read_text())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_tables_are_of_the_runs(noise):
    rows = RESULTS["runs"]
    for lines in (report.table(rows, noise), report.gain_table(rows, noise)):
        for line in lines:
            assert "| " + " | ".join(line) + " |" in TEXT


def test_the_runs_are_of_this_recipe():
    recipe = Recipe()
    for name in ("teacher_steps", "student_steps", "lr", "wd", "alpha", "teacher_scale"):
        assert RESULTS["recipe"][name] == getattr(recipe, name), name
    sizes = {row["name"]: row["parameters"] for row in RESULTS["runs"]}
    for name, config in (("teacher", teacher_config()), ("both", student_config())):
        model = tinyclip.create_model(config, device="meta")
        assert sizes[name] == sum(p.numel() for p in model.parameters())


def test_the_claim_held():
    rows = RESULTS["runs"]
    assert RESULTS["seeds"] >= 3
    assert all(good for good, _ in summary.verdicts(rows))
    for noise in (0.0, 0.3):
        assert all(gain.mean > 0 for gain in summary.gains(rows, noise))
