"""`make gpu`: without a GPU, on a stand-in for one, and every phase of it by itself."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, phases, registry, report
from bench.measure import FAILED, MEASURED, NOT_RUN
from bench.report import ROOT
from bench.run import Runner, plan
from tests.bench.commands import QUICK, check_schema, python


def test_without_a_gpu_one_sentence_and_valid_json(tmp_path):
    run = python("-m", "bench", "gpu", BENCH_OUT=str(tmp_path))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    (file,) = tmp_path.rglob("*.json")
    assert file.parent.name == "no-gpu"
    assert output.strip().splitlines() == [
        f"No CUDA device is available, so nothing was run; {file} lists what would be."
    ]
    data = json.loads(file.read_text())
    check_schema(data)
    assert {row["status"] for row in data["rows"]} == {NOT_RUN}
    assert len(data["rows"]) == len(plan(registry.baselines() + registry.cases("cuda")))
    assert data["tests"]["status"] == data["build"]["status"] == NOT_RUN
    assert data["complete"] is True


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """`python -m bench gpu` on a CPU that calls itself a GPU: every phase but the build's pip."""
    norm = registry.find("layer_norm/4096x512", "cpu")
    norms = [dataclasses.replace(norm, peers={"eager": norm.peers["eager"]})]
    env = {**report.environment("cpu"), "gpu": "Stand In 1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry, "cases", lambda device: norms)
    monkeypatch.setattr(registry, "baselines", list)
    monkeypatch.setattr(report, "environment", lambda device: env)
    monkeypatch.setattr(gpu, "Settings", lambda device, seconds, backend: QUICK)
    monkeypatch.setattr(gpu, "_raise_on_sigterm", lambda: None)
    monkeypatch.setattr(phases, "_PIP", ("-c", "print('built')"))
    monkeypatch.setattr(phases, "_architecture", lambda: "90a")
    monkeypatch.setattr(phases, "TESTS", PLAIN)
    suites = tuple((str(tmp_path / f"test_{name}.py"),) for name in ("all", "sizes"))
    monkeypatch.setattr(phases, "SUITES", suites)
    for (suite,) in suites:
        Path(suite).write_text("def test_it(): pass\n")

    def run(source: str, budget: float = 540.0) -> tuple[int, dict]:
        Path(suites[0][0]).write_text(source)
        monkeypatch.setenv("GPU_BUDGET_S", str(budget))
        status = gpu.main([], tmp_path / "results", begun=time.monotonic())
        (file,) = (tmp_path / "results" / "stand-in-1").glob("*.json")
        return status, json.loads(file.read_text())

    return run


# A suite of its own: without the checkout's settings, and without its random order.
PLAIN = ("-c", os.devnull, "-p", "no:randomly", "-p", "bench.outcomes")


def test_the_gpu_command_from_end_to_end(stand_in):
    source = (
        "import pytest\ndef test_a(): print('0.3 of it')\ndef test_b(): pytest.skip('x')\n"
        "def test_c(): assert 1 + 1 == 2\n"
    )
    status, data = stand_in(source)
    check_schema(data)
    assert status == 0
    assert data["build"]["status"] == "built" and data["build"]["importable"]
    wanted = {"status": "passed", "passed": 3, "failed": 0, "skipped": 1, "failures": []}
    assert data["tests"].items() >= wanted.items()
    assert list(data["tests"]["printed"].values()) == ["0.3 of it"]
    assert data["machine"]["copy_tb_s"] > 0
    assert data["versions"].keys() >= {"setuptools", "pybind11", "pytest-xdist", "nvcc"}
    assert next(row["peer"] for row in data["rows"] if row["status"] == MEASURED) == "eager"


BASELINE = dataclasses.replace(registry.baselines()[0], device="cpu", dtype=torch.float32)


def test_the_baselines_are_there_before_the_build(stand_in, monkeypatch):
    """PyTorch alone needs no build: a run that ends in it has what the tables are read against."""
    monkeypatch.setattr(registry, "baselines", lambda: [BASELINE])
    monkeypatch.setattr(Runner, "_row", lambda *a: {"status": FAILED, "reason": "a stand-in"})
    seen = []

    def build(results, deadline):
        data = json.loads(results.read_text())
        seen.append((data["machine"]["copy_tb_s"], data["rows"][0]["status"]))
        return {"status": "not built", "seconds": 0.0, "log": "x.log", "importable": False}

    monkeypatch.setattr(phases, "build", build)
    status, data = stand_in("")
    ((copied, row),) = seen
    assert copied > 0 and row == FAILED
    assert status == 1 and data["complete"] is True
    assert data["tests"]["status"] == NOT_RUN
    assert {row["reason"] for row in data["rows"][1:]} == {"tinyclip is not importable"}


@pytest.mark.soak
def test_the_whole_ends_within_its_budget(stand_in):
    """Though the tests hang, and do not listen."""
    start = time.monotonic()
    _, data = stand_in(
        "import signal, time\ndef test_a(): pass\ndef test_b():\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(600)\n",
        budget=60.0,
    )
    assert time.monotonic() - start < 60
    assert data["tests"]["status"] == "stopped by the budget"
    assert data["tests"]["passed"] >= 1  # what came before the hang; the other suite, if in time
    assert data["complete"] is True


def test_what_pip_cannot_build_is_built_without_it(tmp_path, monkeypatch):
    """setuptools before 77 does not read our licence: no pyproject.toml, then, and a link."""
    link = tmp_path / "triton_kernels"
    monkeypatch.setattr(phases, "_LINK", link)
    monkeypatch.setattr(phases, "_EXTENSION", "print('none')")

    def build(pip, in_place, imports):
        monkeypatch.setattr(phases, "_PIP", ("-c", pip))
        monkeypatch.setattr(phases, "_IN_PLACE", ("-c", in_place))
        monkeypatch.setattr(phases, "_IMPORTS", f"import os; raise SystemExit(not {imports})")
        found = phases.build(tmp_path / "x.json", time.monotonic() + 120)
        return found["status"], found["ways"], found["importable"]

    where = "import os; here = os.listdir()\n"
    where += "raise SystemExit('csrc' not in here or 'pyproject.toml' in here)"
    fails, linked = "raise SystemExit(3)", f"os.path.islink({str(link)!r})"
    told = ["pip: failed with status 3", "build_ext: built", "linked triton_kernels"]
    assert build(fails, where, linked) == ("built without pip", told, True)
    assert link.resolve() == ROOT / "triton_kernels"
    phases.unlink()
    assert not link.is_symlink()
    told[1] = "build_ext: failed with status 3"
    assert build(fails, fails, linked) == ("failed with status 3", told, True)
    phases.unlink()
    assert build("pass", fails, "True") == ("built", ["pip: built"], True)
    assert not link.is_symlink()
    assert build("pass", fails, "False")[2] is False


SUITE = """
import os, time, pytest
def test_a(): pass
def test_b(): assert 0, "the figure was 7"
@pytest.mark.parametrize("n", range(4))
def test_c(n): print(n)
def test_dies(): os._exit(7)
def test_d(): {last}
"""


@pytest.mark.parametrize("parallel", [[], ["-n", "2", "--maxschedchunk=1"]], ids=["one", "two"])
def test_outcomes_survive_what_ends_the_suite(tmp_path, monkeypatch, parallel):
    """A worker that dies costs one test; alone it costs what comes after it, and no count."""
    tests = tmp_path / "test_gpu.py"
    tests.write_text(SUITE.format(last="time.sleep(600)" if parallel else "pass"))
    monkeypatch.setattr(phases, "TESTS", PLAIN)
    monkeypatch.setattr(phases, "SUITES", ((str(tests),), (str(tests), "-k", "test_a")))
    monkeypatch.setattr(phases, "_parallel", lambda: parallel)
    found = phases.tests(tmp_path / "x.json", time.monotonic() + 25)
    named = {failure["test"].rpartition("::")[2]: failure["why"] for failure in found["failures"]}
    assert found["passed"] == 5
    assert "the figure was 7" in named["test_b"]
    if parallel:
        assert found["status"] == "stopped by the budget"
        assert named.keys() >= {"test_b", "test_dies"}
        assert found["failed"] == len(named) and "crashed" in named["test_dies"]
    else:
        assert (found["status"], found["failed"]) == ("pytest ended with status 7", 1)
    assert sorted(found["printed"].values()) == ["0", "1", "2", "3"]


def test_how_many_tests_run_at_once(monkeypatch):
    version = {"pytest-xdist": "3.8.0"}
    monkeypatch.setattr(phases.importlib.metadata, "version", version.get)
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert phases._parallel() == ["-n", "8", "--maxschedchunk=1"]
    version["pytest-xdist"] = "2.5.0"
    assert phases._parallel() == ["-n", "8"]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert phases._parallel() == []
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert phases._parallel() == []


def test_what_is_worth_most_runs_first():
    suite = [part for part in phases.SUITES[0] if "=" not in part]
    run = python("-m", "pytest", *phases.TESTS[:4], "--collect-only", "-q", *suite)
    output, _ = run.communicate(timeout=120)
    names = [line.partition("::") for line in output.splitlines() if "::" in line]
    files = list(dict.fromkeys(file.rpartition("/")[2] for file, _, _ in names))
    assert files[:3] == ["test_smoke.py", "test_rule.py", "test_contrastive.py"]
    first_of_pytorch = next(i for i, (_, _, name) in enumerate(names) if "-torch]" in name)
    compiled = [i for i, (_, _, name) in enumerate(names) if "compiled" in name]
    assert all("-torch]" in name for _, _, name in names[first_of_pytorch : compiled[0]])
    assert compiled == list(range(compiled[0], len(names)))


LOST = """
import pytest, torch
from tests.gpu.conftest import _device
torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
@pytest.mark.parametrize("n", range(6))
def test_it(n):
    def lost(): raise RuntimeError("an illegal memory access was encountered")
    if n == 2:
        torch.cuda.synchronize = lost
        assert 0, "wrong"
"""


@pytest.mark.parametrize("parallel", [[], ["-n", "2", "--maxschedchunk=1"]], ids=["one", "two"])
def test_a_lost_device_fails_one_test(tmp_path, monkeypatch, parallel):
    """Whatever else its process ran would fail for nothing: another takes over, or the run ends."""
    tests = tmp_path / "test_gpu.py"
    tests.write_text(LOST)
    monkeypatch.setattr(phases, "TESTS", PLAIN)
    monkeypatch.setattr(phases, "SUITES", ((str(tests),), (str(tests), "-k", "0")))
    monkeypatch.setattr(phases, "_parallel", lambda: parallel)
    found = phases.tests(tmp_path / "x.json", time.monotonic() + 120)
    ((failure, why),) = [failure.values() for failure in found["failures"]]
    assert failure.endswith("[2]") and "wrong" in why
    assert found["passed"] == (5 if parallel else 2)


def test_a_checkers_figures_are_counted_as_they_come(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    said = "echo 4 launches; echo 8 launches; echo '========= ERROR SUMMARY: {n} error'"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def check(n, then):
        tool.write_text(f"#!/bin/sh\n{said.format(n=n)}; {then}\n")
        tool.chmod(0o755)
        return phases.check("memcheck", tmp_path / "x.json", time.monotonic() + 3)

    clean, errors, stopped = check(0, "exit 0"), check(2, "exit 9"), check(0, "exec sleep 60")
    assert (clean["status"], clean["launches"], clean["errors"]) == ("clean", 8, 0)
    assert (errors["status"], errors["errors"]) == ("errors found", 2)
    assert (stopped["status"], stopped["launches"]) == ("stopped by the budget", 8)
    assert stopped["seconds"] <= 3.5
