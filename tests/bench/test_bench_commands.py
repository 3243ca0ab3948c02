"""The commands: killed, out of time, with a worker lost, between two commits."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import compare, registry
from bench.measure import FAILED, MEASURED, NOT_RUN
from bench.report import ROOT, Report
from bench.run import Runner, order, plan
from bench.worker import Worker, WorkerLate, WorkerLost
from tests.bench.commands import QUICK, check_schema, python


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(signal.SIGKILL, id="SIGKILL"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.soak),
    ],
)
def test_a_killed_run_leaves_valid_json(tmp_path, kill):
    file = tmp_path / "rows.json"
    case = "attention/50x12h"
    run = python("-m", "bench", case, "--json", str(file), "--row-seconds", "0.1")

    def measured():
        # read at any moment, the file is whole
        data = json.loads(file.read_text()) if file.exists() else {"rows": []}
        return any(row["status"] == MEASURED for row in data["rows"])

    wait_for(measured)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(kill)
    run.communicate()
    data = json.loads(file.read_text())
    check_schema(data)
    assert data["complete"] is False
    entries = plan(registry.select(registry.cases("cpu"), [case]))
    assert len(data["rows"]) == len(entries)
    assert {row["status"] for row in data["rows"]} == {MEASURED, NOT_RUN}
    # beside it at most what was being written when the kill came, hidden
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["rows.json"]
    # and nothing goes on measuring for nobody
    wait_for(lambda: not any(running(child) for child in children), 10)


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_budget_is_kept(tmp_path):
    file = tmp_path / "rows.json"
    run = python("-m", "bench", "--json", str(file), "--max-seconds", "5")
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    data = json.loads(file.read_text())
    check_schema(data)
    assert data["complete"] is True
    cut = [row for row in data["rows"] if (row["reason"] or "").startswith("the time budget was")]
    assert cut and f"{sum(row['status'] == MEASURED for row in data['rows'])} of" in output


def test_the_default_leaves_no_peer_out():
    entries = plan(registry.cases("cpu"))
    assert {entry.peer for entry in entries} >= {"compile", "sdpa-cudnn", "open_clip", "tinyclip"}
    ordered = order(entries)
    assert sorted(map(id, ordered)) == sorted(map(id, entries))
    slow = [entry.slow_start for entry in ordered]
    assert slow == sorted(slow)
    ops = {entry.case.op for entry in entries}
    first_cases = {next(e.case.id for e in entries if e.case.op == op) for op in ops}
    quick = [entry for entry in ordered if not entry.slow_start]
    assert {entry.case.id for entry in quick[: len(ops)]} <= first_cases


def test_a_lost_or_late_worker_costs_one_row(tmp_path, monkeypatch):
    worker = Worker(QUICK)
    with pytest.raises(WorkerLate, match="stopped after 0 s"):
        worker.ask(0.01, do="machine")
    assert not worker.alive
    worker = Worker(QUICK)
    os.kill(worker._process.pid, signal.SIGSEGV)
    with pytest.raises(WorkerLost, match="SIGSEGV"):
        worker.ask(30, do="machine")

    entries = plan(registry.select(registry.cases("cpu"), ["layer_norm/4096x512"])[:1], ["eager"])
    written = Report(tmp_path / "rows.json", {}, [entry.blank() for entry in entries])
    killed = []

    def kill_once(row):
        if not killed:
            killed.append(runner._worker._process.pid)
            os.kill(killed[0], signal.SIGKILL)
            runner._worker._process.wait()

    with Runner(written, QUICK, kill_once) as runner:
        runner.run(entries, time.monotonic() + 60)
    assert [row["status"] for row in written.rows] == [MEASURED, MEASURED]


_PLANTED = """
from tinyclip.ops import _dispatch
_right_norm, _right_mlp = layer_norm, gelu_mlp

def layer_norm(*args, **kwargs):
    _right_norm(*args, **kwargs), _right_norm(*args, **kwargs)
    return _right_norm(*args, **kwargs)

def gelu_mlp(*args, **kwargs):
    y = _right_mlp(*args, **kwargs)
    return y if _dispatch._choice == "reference" else y * 1.001
"""


@pytest.fixture
def other_commit(tmp_path, monkeypatch):
    """A repository whose commit has a layer_norm that works thrice and a wrong gelu_mlp."""
    tree = tmp_path / "repository"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("tinyclip", "triton_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    with (tree / "tinyclip" / "ops" / "__init__.py").open("a") as ops:
        ops.write(_PLANTED)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tree)]
    for step in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "planted"]):
        subprocess.run([*git, *step], check=True)
    monkeypatch.setattr(compare, "ROOT", tree)
    return tree


def test_compare_shows_a_slow_commit_and_refuses_a_wrong_one(other_commit, tmp_path, capsys):
    file = tmp_path / "rows.json"
    cases = ["layer_norm/4096x512", "gelu_mlp/400x512 gelu"]
    options = ["--json", str(file), "--row-seconds", "0.1", "--compare", "HEAD"]
    assert command.main([*cases, *options]) == 1
    data = json.loads(file.read_text())
    check_schema(data)
    rows = {(row["op"], row["mode"]): row for row in data["rows"]}
    slow = rows["layer_norm", "forward"]
    assert (slow["status"], slow["gate"]) == (MEASURED, "green")
    assert slow["peer"].startswith("rev ")
    assert slow["ratio"] > 1.5  # thrice the work, and what the allocator makes of it
    wrong = rows["gelu_mlp", "forward"]
    assert (wrong["status"], wrong["gate"]) == (FAILED, "red")
    assert wrong["reason"].startswith("the other: refused: gate red")
    assert "refused: gate red" in capsys.readouterr().out
    listed = subprocess.run(
        ["git", "-C", str(other_commit), "worktree", "list"], capture_output=True, text=True
    )
    assert len(listed.stdout.splitlines()) == 1


def test_compare_names_an_unknown_revision(other_commit):
    with pytest.raises(SystemExit, match="nowhere"):
        command.main(["layer_norm/4096x512", "--compare", "nowhere"])


def test_the_command_line_says_what_is_wrong(capsys):
    assert command.main(["no/such/case"]) == 2
    assert "--list names them all" in capsys.readouterr().err
    assert command.main(["layer_norm", "--list"]) == 0
    assert "layer_norm/4096x512 masked" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert command.main(["layer_norm", "--device", "cuda"]) == 2
