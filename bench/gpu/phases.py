"""What ``python -m bench gpu`` runs in processes of their own: build, compilers, tests, checkers.

A phase has a deadline and ends by it: what still runs is interrupted a little before, then killed,
with its children. What it leaves is counted from what it wrote while it ran.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import torch

from bench.gpu.part import LEAST, Run
from bench.measure import FAILED, NOT_RUN
from bench.report import ROOT

CHECKS = ("memcheck", "racecheck")  # compute-sanitizer's tools
TOOLS = (
    *("setuptools", "pybind11", "ninja", "pytest", "pytest-xdist", "pytest-timeout"),
    *("open_clip_torch", "transformers", "timm"),
)
TESTS = ("-m", "gpu", "-p", "no:randomly", "-p", "bench.gpu.outcomes")
# All but the sizes at once; those want the device's memory to themselves.
SUITES = (
    ("tests/gpu", "--ignore=tests/gpu/test_sizes.py"),
    ("tests/gpu/test_sizes.py",),
)
_BUILD_SHARE, _COMPILE_SHARE = 0.3, 0.25  # of what is left when they begin
_SUITE_SHARES = (0.8, 1.0)  # of what is left for tests when a suite begins
_TEST_SECONDS = 90  # the longest took 67 on an H100, compiling; one that hangs takes the rest
_PIP = ("-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", ".")
_IN_PLACE = ("setup.py", "build_ext", "--inplace")
_IMPORTS = "import tinyclip.ops, tinyclip.triton_kernels.launch"
_EXTENSION = "from tinyclip import _extension as e; print(e.cuda_why_not() or 'with CUDA')"
_LINK = ROOT / "tinyclip" / "triton_kernels"
ENDED, _STOPPED = "ended", "stopped by the budget"
_GRACE = 10.0  # seconds from an interruption to the kill, or a fifth of what there is
_MOST_JOBS = 8  # each holds half a gigabyte of the device; past 8 they wait for each other


def _start(
    command: list[str], output: IO[str], cwd: Path = ROOT, **variables: str
) -> subprocess.Popen:
    """Start a command in a process group that can be interrupted: where this process runs in the
    background it ignores SIGINT, and what it starts would, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(process: subprocess.Popen, deadline: float) -> bool:
    """Whether it ended by itself; by the deadline it has ended, and its children have."""
    left = max(0.0, deadline - time.monotonic())
    grace = min(_GRACE, left / 5)
    try:
        for send, patience in ((None, left - grace), (signal.SIGINT, grace)):
            if send is not None:
                os.killpg(process.pid, send)
            try:
                process.wait(patience)
                return send is None
            except subprocess.TimeoutExpired:
                continue
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(
    command: list[str],
    output: IO[str],
    deadline: float,
    cwd: Path = ROOT,
    ended: str = ENDED,
    **variables: str,
) -> str:
    """Run a command; returns `ended`, "failed with status N" or "stopped by the budget"."""
    process = _start(command, output, cwd, **variables)
    return _status(process, _finish(process, deadline), ended)


def _status(process: subprocess.Popen, in_time: bool, ended: str) -> str:
    if not in_time:
        return _STOPPED
    return f"{FAILED} with status {process.returncode}" if process.returncode else ended


class Logged:
    """A command that runs concurrently, with its output in a log file."""

    def __init__(self, command: list[str], log: Path, cwd: Path = ROOT):
        self.log, self._start = log, time.monotonic()
        with log.open("w") as output:
            self._process = _start(command, output, cwd)

    def end(self, deadline: float) -> dict[str, Any]:
        """Wait until `deadline`: {status, seconds, output: the last line, log: the file name}."""
        in_time = _finish(self._process, deadline)
        seconds = round(time.monotonic() - self._start, 1)
        last = (self.text.strip().splitlines() or [""])[-1]
        status = _status(self._process, in_time, ENDED)
        return {"status": status, "seconds": seconds, "output": last, "log": self.log.name}

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def preparation(target: str) -> dict[str, Any]:
    """The results of `prepare` before it has run."""
    blank = {"status": NOT_RUN, "seconds": 0.0}
    return {"build": dict(blank), f"kernels of {target}": {**blank, "launched": 0, "failed": []}}


def prepare(run: Run, target: str) -> bool:
    """Build, and compile the kernels of a part; False if tinyclip cannot be imported."""
    path = run.written.path
    make = rehearsed if run.rehearsal else build
    built = run.step("build", _BUILD_SHARE, lambda deadline: make(path, deadline))
    if not built.get("importable", True):
        return False
    name = f"kernels of {target}"
    run.step(name, _COMPILE_SHARE, lambda end: compile_kernels(target, run.cases, path, end))
    return True


def rehearsed(results: Path, deadline: float) -> dict[str, Any]:
    """Stand in for the build in a rehearsal, which runs the installed package."""
    importable = _python("-c", _IMPORTS) is not None
    return {"status": "rehearsed", "seconds": 0.0, "importable": importable}


def versions() -> dict[str, str | None]:
    """Of what the build and the tests need: None what is not installed."""
    found: dict[str, str | None] = {}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return {"python": sys.version.split()[0], **found, "nvcc": nvcc}


def _python(*arguments: str) -> str | None:
    """What a fresh interpreter prints, None if it fails."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _architecture() -> str:
    """This device's alone: the others' code takes most of a build's time."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def build(results: Path, deadline: float) -> dict[str, Any]:
    """Install in place with the machine's own tools, or what of it can be had.

    Where pip cannot (a setuptools before 77 does not read our licence), the extension is built
    beside a folder without pyproject.toml; where that fails too, the kernels' folder is linked to
    where an install maps it. ``importable`` tells whether our ops can be reached at all.
    """
    log, start = results.with_suffix(".build.log"), time.monotonic()
    wanted = {"TINYCLIP_CUDA_ARCHS": os.environ.get("TINYCLIP_CUDA_ARCHS") or _architecture()}
    with log.open("w") as output:
        command = [sys.executable, *_PIP]
        status = run(command, output, deadline, ended="built", **wanted)
        ways = [f"pip: {status}"]
        if status not in ("built", _STOPPED):
            with _without_pyproject() as folder:
                command = [sys.executable, *_IN_PLACE]
                again = run(command, output, deadline, folder, "built", **wanted)
                ways.append(f"build_ext: {again}")
                status = "built without pip" if again == "built" else status
    importable = _python("-c", _IMPORTS) is not None
    if not importable:
        _link()
        ways.append(f"linked {_LINK.name}")
        importable = _python("-c", _IMPORTS) is not None
    found = {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "log": log.name,
        "ways": ways,
        "importable": importable,
        "extension": _python("-c", _EXTENSION) if importable else None,
    }
    print(f"build: {status} in {found['seconds']} s, extension: {found['extension']}", flush=True)
    return found


@contextlib.contextmanager
def _without_pyproject():
    """A folder that holds the checkout's entries, but for the one that setuptools cannot read."""
    with tempfile.TemporaryDirectory(prefix="tinyclip-build-") as folder:
        for entry in ROOT.iterdir():
            if entry.name not in ("pyproject.toml", "build", ".git"):
                (Path(folder) / entry.name).symlink_to(entry)
        yield Path(folder)


def _link() -> None:
    if not _LINK.exists():
        _LINK.symlink_to(ROOT / "triton_kernels")


def unlink() -> None:
    """Take away what a build without pip put into the package's folder."""
    if _LINK.is_symlink():
        _LINK.unlink()


def _jobs() -> int:
    """Number of concurrent processes; each compiles kernels on one core."""
    return max(1, min(_MOST_JOBS, (os.cpu_count() or 1) // 2))


def compile_kernels(target: str, cases: str, results: Path, deadline: float) -> dict[str, Any]:
    """Compile a part's kernels into Triton's cache, with `bench.gpu.warm` in `_jobs` processes."""
    jobs = _jobs()
    command = [sys.executable, "-m", "bench.gpu.warm", target, cases]
    started = [
        Logged([*command, str(n), str(jobs)], results.with_suffix(f".{target}.warm{n}.log"))
        for n in range(jobs)
    ]
    ended = [process.end(deadline) for process in started]
    text = "\n".join(process.text for process in started)
    found = {
        "status": next((e["status"] for e in ended if e["status"] != ENDED), "compiled"),
        "launched": len(re.findall(r"^launched ", text, re.MULTILINE)),
        "failed": re.findall(r"^failed (.*)", text, re.MULTILINE)[:50],
        "seconds": max(e["seconds"] for e in ended),
    }
    print(f"kernels of {target}: {found}", flush=True)
    return found


def _time_limit() -> list[str]:
    """Options of pytest-timeout, if it is installed."""
    if importlib.util.find_spec("pytest_timeout") is None:
        return []
    # The thread method also ends a process that waits for a kernel; xdist replaces the worker.
    method = "thread" if _parallel() else "signal"
    return [f"--timeout={_TEST_SECONDS}", f"--timeout-method={method}"]


def _parallel() -> list[str]:
    """Options of pytest-xdist, if it is installed."""
    if importlib.util.find_spec("xdist") is None:
        return []
    jobs = _jobs()
    words = ["-n", str(jobs)]
    version = importlib.metadata.version("pytest-xdist").split(".")
    if tuple(int(part) for part in version[:2]) >= (3, 2):
        words += ["--maxschedchunk=1"]  # in the order of their worth, as near as may be
    return words if jobs > 1 else []


def no_tests(status: str) -> dict[str, Any]:
    """The tests' entry while there is nothing in it."""
    counts = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
    return {"status": status, **counts, "failures": [], "printed": {}, "unreached": []}


def tests(results: Path, deadline: float) -> dict[str, Any]:
    """The tests marked gpu, counted; what the budget stopped keeps what it had counted."""
    log, start = results.with_suffix(".tests.log"), time.monotonic()
    outcomes = results.with_suffix(".tests.jsonl")
    outcomes.unlink(missing_ok=True)
    statuses = []
    with log.open("w") as output:
        for suite, share in zip(SUITES, _SUITE_SHARES, strict=True):
            parallel = _parallel() if suite is SUITES[0] else []
            if deadline - time.monotonic() < LEAST:
                statuses.append(_STOPPED)
                continue
            suite_deadline = time.monotonic() + share * (deadline - time.monotonic())
            words = [*TESTS, "-q", *parallel, *_time_limit(), *suite]
            command = [sys.executable, "-m", "pytest", *words]
            variables = {"GPU_TESTS_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
            process = _start(command, output, **variables)
            in_time = _finish(process, suite_deadline)
            names = {0: "passed", 1: FAILED, 5: "no test is marked gpu"}
            ended = f"pytest ended with status {process.returncode}"
            statuses.append(names.get(process.returncode, ended) if in_time else _STOPPED)
    found = counted(outcomes)
    worst = [status for status in statuses if status != "passed"] or ["passed"]
    found["status"] = _STOPPED if _STOPPED in worst else worst[0]
    found["seconds"] = round(time.monotonic() - start, 1)
    said = {name: found[name] for name in ("status", "passed", "failed", "skipped", "seconds")}
    print(f"tests: {said}, log {log}", flush=True)
    for failure in found["failures"]:
        print(f"  {failure['test']}: {(failure['why'].splitlines() or [''])[0]}", flush=True)
    return found | {"log": log.name}


def counted(outcomes: Path) -> dict[str, Any]:
    """The tests' entry from what `bench.outcomes` wrote; a test counts once, by its worst."""
    found, by_test, planned = no_tests(NOT_RUN), {}, {}
    for line in outcomes.read_text().splitlines() if outcomes.exists() else ():
        try:
            told = json.loads(line)
        except ValueError:  # the line that a kill cut
            continue
        if "planned" in told:
            planned |= dict.fromkeys(told["planned"])
        elif by_test.get(told["test"], {}).get("outcome") != "failed":
            by_test[told["test"]] = told
    found["unreached"] = [name for name in planned if name not in by_test]
    for name, told in by_test.items():
        found[told["outcome"]] += 1
        if told["outcome"] == "failed":
            found["failures"].append({"test": name, "why": told["why"]})
        if told["printed"]:
            found["printed"][name] = told["printed"]
    return found


def check(tool_name: str, results: Path, deadline: float) -> dict[str, Any]:
    """Our kernels under compute-sanitizer, every allocation one of its own; or its absence."""
    log, start = results.with_suffix(f".{tool_name}.log"), time.monotonic()
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return {"status": "tool unavailable", "launches": 0, "seconds": 0.0}
    command = [tool, "--tool", tool_name, "--error-exitcode", "9"]
    with log.open("w") as output:
        command += [sys.executable, "-m", "bench.gpu.sanitized"]
        process = _start(command, output, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        in_time = _finish(process, deadline)
    outcomes = {0: "clean", 9: "errors found"}
    status = outcomes.get(process.returncode, f"ended with status {process.returncode}")
    text = log.read_text(errors="replace")
    launches = re.findall(r"^(\d+) launches$", text, re.MULTILINE)
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    found = {
        "status": status if in_time else _STOPPED,
        "launches": int(launches[-1]) if launches else 0,
        "errors": int(errors[-1]) if errors else text.count("========= Invalid "),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(f"{tool_name}: {found}", flush=True)
    return found | {"log": log.name}
