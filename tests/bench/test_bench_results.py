"""The results that are committed: of a commit of this history, and no more than was measured."""

import json
import subprocess

import pytest

from bench.measure import FAILED, MEASURED, NOT_RUN
from bench.report import ROOT
from tests.bench.commands import ENV

FILES = sorted((ROOT / "bench" / "results").rglob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_file(file):
    data = json.loads(file.read_text())
    assert data["env"].keys() == ENV and data["env"]["gpu"]
    assert file.stem.endswith(data["env"]["commit"])
    for row in data["rows"]:
        assert row["op"] and row["case"] and row["status"] in (MEASURED, NOT_RUN, FAILED)
        if row["status"] != MEASURED:
            assert row["raw_ms"] == [] and row["reason"]
        elif row["gate"] is None:  # timed by itself, before parts of a run had a gate
            assert len(row["raw_ms"]) == 1 and row["ratio"] is None and row["who"]
            assert row["commit"].partition("+")[0] == data["env"]["commit"]
        else:
            assert row["gate"] == "green" and len(row["raw_ms"]) >= 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_commit_is_in_the_history(file):
    commit = json.loads(file.read_text())["env"]["commit"]
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "merge-base", "--is-ancestor"]
    done = subprocess.run([*git, commit, "HEAD"], capture_output=True, text=True)
    if done.returncode == 128:  # no git here, or a history that was cut
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0


def test_there_are_results():
    assert FILES
