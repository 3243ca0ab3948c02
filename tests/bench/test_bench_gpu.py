"""`python -m bench gpu`: without a GPU, rehearsed on a CPU, and every phase of it by itself."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_command
from bench import registry, report
from bench.case import BOTH, FORWARD_GRAPHED, GRAPHED, small
from bench.gpu import command, convergence, kernels, launched, phases, profile, steps, warm
from bench.host import host_profile
from bench.measure import FAILED, MEASURED, NOT_RUN
from bench.report import ROOT, Report
from bench.run import Entry, plan
from bench.timing import Timed
from bench.worker import WorkerLost
from tests.bench.commands import check_schema, python

COMMIT = "0123abc"
NOTES = {
    "check": {"build", "kernels of check", "tests", "memcheck", "racecheck"},
    "time": {"build", "kernels of time"},
    "steps": {"build", "kernels of steps", "convergence", "commands"},
    "tune": {"build", "kernels of tune", "tiles"},
    "profile": {"build", "kernels of profile", "host", "launches"},
}


def results(base: Path) -> dict:
    (file,) = base.rglob("*.json")
    return json.loads(file.read_text())


def test_without_a_gpu_one_sentence_and_valid_json(tmp_path):
    run = python("-m", "bench", "gpu", BENCH_OUT=str(tmp_path))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    (file,) = tmp_path.rglob("*.json")
    assert file.parent.name == "no-gpu"
    assert output.strip().splitlines() == [
        f"No CUDA device is available, so nothing was run; {file} lists what would be."
    ]
    data = results(tmp_path)
    check_schema(data)
    assert {row["status"] for row in data["rows"]} == {NOT_RUN}
    assert {row["reason"] for row in data["rows"]} == {"no CUDA device is available"}
    assert data["parts"].keys() == {"check", "time"}
    assert data["tests"]["status"] == data["build"]["status"] == NOT_RUN
    assert data["complete"] is True


@pytest.mark.parametrize("part", NOTES)
def test_without_a_gpu_a_part_says_what_it_would_run(part, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--part", part, "--out", str(tmp_path)]) == 0
    data = results(tmp_path)
    check_schema(data)
    assert data.keys() >= NOTES[part]
    assert len(data["rows"]) == len(command.PARTS[part].entries("cuda", []))
    assert data["parts"] == {part: {"status": NOT_RUN}}


def rehearse(part: str, base: Path, budget: float) -> dict:
    """A part on a CPU in a process of its own, as a GPU's would be."""
    more = {"BENCH_OUT": str(base), "GPU_BUDGET_S": str(budget), "BENCH_COMMIT": COMMIT}
    run = python("-m", "bench", "gpu", "--rehearse", "--part", part, **more)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    data = results(base)
    check_schema(data)
    assert data["complete"] is True and data["env"]["commit"] == COMMIT
    assert data.keys() >= NOTES[part]
    planned = command.PARTS[part].entries("rehearsal", [])
    keys = {(row["op"], row["case"], row["mode"], row["peer"]) for row in data["rows"]}
    assert keys == {(e.case.op, e.case.name, e.mode, e.peer) for e in planned}
    assert data["parts"][part]["status"] in ("ended", "cut by its budget")
    return data


@pytest.mark.parametrize("part", NOTES)
@pytest.mark.parametrize(
    "budget", [3.0, *(pytest.param(b, marks=pytest.mark.soak) for b in (10.0, 60.0))]
)
def test_a_budget_that_ends_a_part_leaves_all_its_rows(part, budget, tmp_path):
    rehearse(part, tmp_path, budget)


@pytest.mark.soak
@pytest.mark.parametrize("part", NOTES)
def test_a_part_from_end_to_end(part, tmp_path):
    """With time enough everything that a CPU can run has run."""
    data = rehearse(part, tmp_path, 1500.0)
    assert data["parts"][part]["status"] == "ended"
    kernels_of = data[f"kernels of {part}"]
    assert kernels_of["status"] == "compiled" and not kernels_of["failed"]
    left = {row["reason"] for row in data["rows"] if row["status"] != MEASURED}
    assert left <= {"this backend exists on CUDA only", *_LEFT_OUT}
    for name in ("convergence", "commands", "host"):
        statuses = {entry["status"] for entry in data.get(name, {}).values()}
        assert statuses <= {phases.ENDED, MEASURED}, data[name]


# What a CPU without Triton and without a driver cannot run.
_LEFT_OUT = {
    "there is no NVIDIA driver",
    "needs a CUDA device, the tensors are on cpu",
    "needs a CUDA device or TRITON_INTERPRET=1, the tensors are on cpu",
}


def test_a_killed_part_leaves_valid_json(tmp_path):
    more = {"BENCH_OUT": str(tmp_path), "BENCH_COMMIT": COMMIT}
    words = ("gpu", "--rehearse", "--part", "time", "--only", "layer_norm")
    run = python("-m", "bench", *words, **more)
    for line in run.stdout:
        if "measured ratio" in line:
            break
    run.send_signal(signal.SIGKILL)
    run.communicate()
    data = results(tmp_path)
    check_schema(data)
    assert data["complete"] is False
    assert {row["status"] for row in data["rows"]} >= {MEASURED, NOT_RUN}


SOURCE = """
import pytest
def test_a(): print('0.3 of it')
def test_b(): pytest.skip('x')
def test_c(): assert 1 + 1 == 2
"""


@pytest.fixture
def part(monkeypatch, tmp_path):
    """A part in this process, rehearsed; the suites are two files of `source`."""
    suites = tuple((str(tmp_path / f"test_{name}.py"),) for name in ("all", "sizes"))
    monkeypatch.setattr(phases, "TESTS", PLAIN)
    monkeypatch.setattr(phases, "SUITES", suites)
    monkeypatch.setattr(command, "_exit_on_sigterm", lambda: None)
    monkeypatch.setattr(phases, "compile_kernels", lambda *a: {"status": "compiled"})
    monkeypatch.setenv("BENCH_COMMIT", COMMIT)

    def run(name: str, *words: str, source: str = SOURCE, budget: float = 120.0):
        for (suite,), text in zip(suites, (source, "def test_it(): pass\n"), strict=True):
            Path(suite).write_text(text)
        monkeypatch.setenv("GPU_BUDGET_S", str(budget))
        argv = ["--rehearse", "--part", *name.split(), "--out", str(tmp_path / "out"), *words]
        return command.main(argv, begun=time.monotonic()), results(tmp_path / "out")

    return run


# A suite of its own: without the checkout's settings, and without its random order.
PLAIN = ("-c", os.devnull, "-p", "no:randomly", "-p", "bench.gpu.outcomes")


def test_the_check(part, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(phases, "check", lambda name, *a: seen.append(name) or {"errors": 0})
    status, data = part("check")
    check_schema(data)
    assert status == 0 and seen == ["memcheck", "racecheck"]
    assert data["build"]["importable"]
    wanted = {"status": "passed", "passed": 3, "failed": 0, "skipped": 1, "failures": []}
    assert data["tests"].items() >= wanted.items()
    assert list(data["tests"]["printed"].values()) == ["0.3 of it"]
    assert data["versions"].keys() >= {"setuptools", "pybind11", "pytest-xdist", "nvcc"}
    # what is wrong is the status of the whole
    for failed, errors in ((0, 1), (1, 0)):
        monkeypatch.setattr(phases, "tests", lambda *a, n=failed: {"failed": n})
        monkeypatch.setattr(phases, "check", lambda *a, n=errors: {"errors": n})
        assert part("check")[0] == 1


NORM = "layer_norm/51200x768"


def test_the_parts_of_a_commit_share_a_file(part, monkeypatch):
    status, data = part("time", "--only", NORM)
    assert status == 0
    measured = {row["mode"]: row for row in data["rows"] if row["status"] == MEASURED}
    assert BOTH in measured and measured[BOTH]["peer"] == "eager"
    assert data["machine"]["copy_tb_s"] > 0
    # a second part adds what is its own, and what it does not reach takes nothing away
    status, both = part("check time", "--only", NORM, budget=0.0)
    assert both["tests"]["status"] == NOT_RUN
    assert both["parts"]["time"]["status"] == "cut by its budget"
    assert [r for r in both["rows"] if r["status"] == MEASURED] == list(measured.values())


def test_which_results_share_a_file(tmp_path):
    env = {**report.environment("rehearsal"), "commit": COMMIT}
    row = Entry(registry.find(NORM, "cuda"), BOTH, "eager").blank()

    def write(**changed) -> Path:
        other = {**env, **changed}
        return Report(report.results_file(tmp_path, other), other, [row], merge=True).path

    first = write()
    old = first.rename(first.with_name(f"2026-01-02-{COMMIT}.json"))  # of another day
    assert write() == old
    assert write(torch="0.0") != old
    assert write(commit=f"{COMMIT}-dirty") != write(commit=f"{COMMIT}-dirty")
    old.write_text("{")  # cut by something else than us
    assert write() != old


def test_results_of_another_machine_are_merged(tmp_path, monkeypatch, capsys):
    """Two calls, each with an empty folder of its own, become one file; nothing is lost."""
    env = {**report.environment("rehearsal"), "commit": COMMIT}
    case = registry.find(NORM, "cuda")
    rows = [Entry(case, mode, "eager").blank() for mode in (BOTH, GRAPHED)]
    ran, not_run, sent = {"status": MEASURED}, {"status": NOT_RUN}, []
    failed = {"status": FAILED, "failures": ["a"], "printed": {"a": "1"}}
    passed = {"status": "passed", "failures": [], "printed": {}}
    tiles = [
        {**entry, "case": "c", "kind": kind} for entry, kind in ((ran, "fwd"), (not_run, "bwd"))
    ]
    for row, notes in (
        (rows[0], {"tests": failed, "build": ran, "host": {"a": ran}, "tiles": tiles}),
        (rows[1], {"tests": passed, "build": not_run, "host": {"a": not_run, "b": ran}}),
        (rows[1], {"tiles": [{**not_run, "case": "c", "kind": "fwd"}, {**ran, **tiles[1], **ran}]}),
    ):
        path = tmp_path / f"call{len(sent)}" / "results.json"
        written = Report(path, env, rows, notes)
        written.update(row, {"status": MEASURED, "gate": "green", "raw_ms": [1.0] * 5})
        sent.append(str(path))
    monkeypatch.setattr(report, "ROOT", tmp_path / "tree")
    assert bench_command.main(["merge", *sent]) == 0
    data = results(tmp_path / "tree")
    assert [row["status"] for row in data["rows"]] == [MEASURED, MEASURED]
    assert (data["tests"], data["build"], data["env"]) == (passed, ran, env)
    assert data["host"] == {"a": ran, "b": ran}
    assert [(entry["kind"], entry["status"]) for entry in data["tiles"]] == [
        ("fwd", MEASURED),
        ("bwd", MEASURED),
    ]
    (tmp_path / "other.json").write_text("[]")
    assert bench_command.main(["merge", str(tmp_path / "other.json")]) == 2
    assert "is no results file" in capsys.readouterr().err


def test_red_is_the_status(part, monkeypatch):
    red = {"status": FAILED, "gate": "red", "reason": "refused: gate red"}
    monkeypatch.setattr("bench.run.Runner._row", lambda *a: red)
    monkeypatch.setattr("bench.run.Runner.measure_machine", lambda *a: None)
    assert part("time", "--only", NORM)[0] == 1
    monkeypatch.setattr(steps, "untimed", lambda *a: None)
    assert part("steps", "--only", "encode_image/ViT-B-32 b1")[0] == 1


@pytest.mark.parametrize("name", NOTES)
def test_what_cannot_be_imported_is_not_run(part, monkeypatch, name):
    """PyTorch's own rows are all that there will be."""
    nothing = {"status": "failed", "importable": False}
    monkeypatch.setattr(phases, "rehearsed", lambda *a: nothing)
    status, data = part(name, "--only", "layer_norm", "encode_image", "copy")
    assert status == 1
    ours = {row["reason"] for row in data["rows"] if row["op"] != "copy"}
    assert ours <= {"tinyclip is not importable"}
    alone = [row for row in data["rows"] if row["op"] == "copy"]
    assert all(row["status"] == MEASURED for row in alone) and len(alone) == (name == "time")


def test_kernels_come_before_launches_and_the_best_peers_before_all():
    entries = kernels.PART.entries("cuda", [])
    modes = [entry.mode for entry in entries]
    assert modes[0] == GRAPHED and entries[0].case.sizes["B"] == 1024
    firsts = [modes.index(mode) for mode in (GRAPHED, FORWARD_GRAPHED, BOTH)]
    assert firsts == sorted(firsts)
    ops = {entry.case.op for entry in entries[: modes.index(FORWARD_GRAPHED)]}
    assert ops == {"attention", "attention_qkv", "contrastive_loss", "gelu_mlp", "layer_norm"}
    batches = {e.case.sizes.get("B") for e in entries if e.mode == GRAPHED}
    assert {64, 1024} <= batches
    assert {e.case.sizes["B"] for e in entries if e.case.op == "attention_qkv"} == {64, 256, 1024}
    # and no peer that the cases have is left out, but for those that compile
    assert {(e.case.id, e.peer) for e in entries} >= {
        (case.id, name)
        for case in registry.cases("cuda")
        if case.ours is None and case.op != "block"
        for name, peer in case.peers.items()
        if not peer.slow_start
    }
    assert len({(e.case.id, e.mode, e.peer) for e in entries}) == len(entries)
    alone = [entry.case.id for entry in entries if not entry.case.has_ours]
    assert [entry.case.id for entry in entries[-len(alone) :]] == alone
    assert alone == [entry.case.id for entry in plan(registry.baselines())]


def test_the_steps_that_are_timed():
    entries = steps.PART.entries("cuda", [])
    assert entries[0].case.id == "train_step/ViT-B-32 b256"
    found = {(e.case.op, e.case.sizes.get("B")) for e in entries}
    assert found >= {(op, b) for op in ("train_step", "distill_step") for b in (64, 256, 1024)}
    assert found >= {("encode_image", b) for b in (1, 32, 256)} | {("block", 256)}
    models = {e.case.sizes["model"] for e in entries if e.case.op == "train_step"}
    assert models == {"ViT-B-32", "TinyCLIP-ViT-8M-16-Text-3M"}
    slow = [e.slow_start for e in entries]
    assert slow == sorted(slow) and {e.peer for e in entries if e.slow_start} == {
        "open_clip-compile",
        "ours-compile",
    }


def test_a_step_is_the_same_on_both_sides():
    """Ours and open_clip's: one loss, one gradient, of the parameters that both hold."""
    from bench import gate

    for name in ("train_step/ViT-B-32 b64", "distill_step/TinyCLIP-ViT-8M-16-Text-3M b64"):
        case = registry.find(name, "rehearsal")
        tensors, sizes = gate._double(case.draw("cpu", seed=2)), dict(case.sizes)
        found = []
        for peer in (case.ours, case.peers["open_clip"]):

            def run(t, s, peer=peer):
                return peer.build(t, s, "cpu").call()

            found.append(gate._evaluate(case, run, tensors, sizes))
        ours, theirs = found
        assert ours.keys() == {"output 0", "gradient"}
        for key, value in ours.items():
            assert (value - theirs[key]).norm() <= 1e-5 * theirs[key].norm(), (name, key)


def test_the_gate_of_a_model_sees_a_wrong_gradient():
    """One block's MLP scaled by 1.3 in bf16 is red."""
    from bench import gate

    case = registry.find("train_step/ViT-B-32 b64", "rehearsal")

    def wrong(t, s):
        weight = "visual.transformer.resblocks.0.mlp.c_proj.weight"
        return case.ours.build({**t, weight: 1.3 * t[weight]}, s, "cpu").call()

    def right(t, s):
        return case.ours.build(t, s, "cpu").call()

    assert gate.check(case, "cpu", right).colour == "green"
    assert gate.check(case, "cpu", wrong).colour == "red"


def test_a_launch_to_compile_is_small_and_specialised_alike():
    case = registry.find("attention_qkv/197x12h b1024", "cuda")
    assert small(case).sizes == {**case.sizes, "B": 16}
    assert small(registry.find("encode_image/ViT-B-32 b1", "cuda")).sizes["B"] == 1
    assert small(registry.find("layer_norm/201728x768", "cuda")).sizes["M"] % 16 == 0


def test_processes_share_what_is_to_be_compiled(monkeypatch, capsys):
    """Each launch is one process's, and one that fails costs itself."""
    ran = []

    def fails():
        raise ValueError("no such tile\nand more")

    found = [(str(n), lambda n=n: ran.append(n)) for n in range(5)] + [("bad", fails)]
    monkeypatch.setattr(warm, "_cases", lambda part, cases: iter(found))
    for number in range(3):
        warm.main("time", "rehearsal", str(number), "3")
    assert sorted(ran) == list(range(5))
    printed = capsys.readouterr().out
    assert printed.count("launched ") == 5
    assert "failed bad: ValueError: no such tile\n" in printed


def test_every_part_has_something_to_compile():
    for part in NOTES:
        labels = [label for label, _ in warm.jobs(part, "rehearsal", 0, 1)]
        assert len(labels) > 5, part


def test_curves_that_differ_are_seen(monkeypatch):
    assert convergence.difference([1.0, 2.0], [1.0, 2.002]) == pytest.approx(0.001, rel=1e-2)
    assert convergence.difference([1.0, float("nan")], [1.0, 2.0]) == float("inf")
    monkeypatch.setattr(convergence, "_BATCH", 16)
    found = convergence.compare("affinity bf16", 2, "cpu")
    assert found["max_difference"] <= found["bound"] and len(found["ours"]) == 1
    shown = {**found, "max_difference": 2 * found["bound"]}
    for answer, status in ((found, 0), (shown, 1)):
        monkeypatch.setattr(convergence, "compare", lambda *a, answer=answer: answer)
        assert convergence.main(["cpu", "affinity bf16"]) == status


NCU = """#!{python}
import sys
assert "bench.gpu.launched" in sys.argv and "--metrics" in sys.argv
print("==PROF== Connected to process 7")
print('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
print('"0","k","gpu__time_duration.sum","us","1,234.5"')
print('"0","k","launch__registers_per_thread","register/thread","128"')
print('"0","k","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","71.25"')
print('"0","k","something__else.sum","byte","3"')
"""


def test_the_profile(part, tmp_path, monkeypatch):
    tool = tmp_path / "ncu"
    tool.write_text(NCU.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(profile, "_HOST", profile._HOST[:1])
    monkeypatch.setattr(profile, "_CALLS", 2)
    monkeypatch.setattr(profile, "KERNELS", profile.KERNELS[:1])
    status, data = part("profile")
    assert status == 0
    (kernel,) = (data["launches"][name] for name, _ in profile.KERNELS)
    assert kernel["status"] == MEASURED
    assert (kernel["duration_us"], kernel["registers"], kernel["sm_percent"]) == (
        1234.5,
        128,
        71.25,
    )
    ours = data["host"]["encode_image ours"]
    assert ours["status"] == MEASURED and ours["host_ms"] > 0
    names = [row["function"] for row in ours["functions"]]
    assert any(name.startswith("tinyclip/ops/") for name in names)
    assert not any(name.startswith("/") for name in names)
    assert data["host"]["encode_image open_clip"]["status"] in (MEASURED, NOT_RUN)


def test_what_is_profiled_runs():
    """In this process: the launches that a profiler watches, and cProfile of a call."""
    launched.main("rehearsal", NORM)
    called = []
    found = host_profile(Timed(lambda: called.append(sum(range(100)))), "cpu", 4)
    assert len(called) == 3 + 4 + 4
    (own,) = (row for row in found["functions"] if row["function"].endswith("(<lambda>)"))
    assert own["calls"] == 1 and own["cumulative_us"] >= own["own_us"] >= 0
    assert own["function"].startswith("tests/bench/test_bench_gpu.py:")
    assert found["profiled_ms"] > 0 and found["host_ms"] > 0


def test_a_profile_whose_process_is_lost(part, monkeypatch):
    def lost(*args, **request):
        raise WorkerLost("status 9")

    monkeypatch.setattr("bench.run.Runner.ask", lost)
    _, data = part("profile")
    assert {(e["status"], e["reason"]) for e in data["host"].values()} == {(FAILED, "status 9")}


def test_a_profiler_that_says_nothing(tmp_path, monkeypatch):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\necho '==ERROR== no permission'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    kernel, case = profile.KERNELS[0]
    end = time.monotonic() + 20
    found = profile.launch(kernel, case, "rehearsal", tmp_path / "x.json", end)
    assert found["status"] == "failed with status 1" and "no permission" in found["output"]


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
    first_of_pytorch = next(i for i, (_, _, name) in enumerate(names) if name.endswith("torch]"))
    compiled = [i for i, (_, _, name) in enumerate(names) if "compiled" in name]
    assert all(n.endswith("torch]") for _, _, n in names[first_of_pytorch : compiled[0]])
    assert compiled == list(range(compiled[0], len(names)))
    rule = [n for file, _, n in names if "test_rule" in file and "test_the_rule" in n]
    ours = [n for n in rule if "-torch]" not in n]
    dtypes = list(dict.fromkeys(name.partition("[torch.")[2].partition("-")[0] for name in ours))
    assert dtypes == ["bfloat16", "float16", "float32"]


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
