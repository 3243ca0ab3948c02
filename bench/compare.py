"""``python -m bench CASE --compare REV``: this tree beside another commit's, A-B-A.

Two processes, one a tree, hold the same inputs and take turns: this one, the other, this one again.
Only one works at a time, so a ratio is paired as within one process, and two versions of one
package need not share an interpreter. The other tree is a git worktree that is removed afterwards.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import timing
from bench.case import Case
from bench.measure import FAILED, MEASURED, NOT_RUN, Settings
from bench.report import ROOT, Report, Row, blank
from bench.roofline import Machine, percent
from bench.worker import Worker, WorkerLost

_LIMIT = 120.0


@contextlib.contextmanager
def site_of(revision: str) -> Iterator[Path]:
    """A folder to put first on sys.path, holding nothing but that revision's tinyclip."""
    with tempfile.TemporaryDirectory(prefix="tinyclip-bench-") as folder:
        tree, site = Path(folder) / "tree", Path(folder) / "site"
        _git("worktree", "add", "--detach", str(tree), revision)
        try:
            _build_in_place(tree)
            site.mkdir()
            (site / "tinyclip").symlink_to(tree / "tinyclip")
            # what setuptools' package-dir says of an installed package, said of a folder
            kernels = tree / "triton_kernels"
            if kernels.is_dir() and not (tree / "tinyclip/triton_kernels").exists():
                (tree / "tinyclip/triton_kernels").symlink_to(kernels)
            yield site
        finally:
            _git("worktree", "remove", "--force", str(tree))


def peer(revision: str) -> str:
    """The rows' peer: the commit a revision names; SystemExit with git's own words if none."""
    return "rev " + _git("rev-parse", "--short", "--verify", f"{revision}^{{commit}}")


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _build_in_place(tree: Path) -> None:
    if not (tree / "setup.py").exists():
        return
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        print(f"the other tree's extension was not built: {said}", file=sys.stderr)


def run(
    report: Report,
    pairs: list[tuple[Case, str]],
    revision: str,
    settings: Settings,
    deadline: float,
    say: Callable[[Row], None],
) -> None:
    """Measure each (case, mode) of this tree against `revision`, until `deadline`."""
    name = peer(revision)
    with site_of(revision) as site:
        here, there = Worker(settings), Worker(settings, site)
        try:
            machine = Machine(**here.ask(_LIMIT, do="machine"))
            report.machine(machine)
            for case, mode in pairs:
                if time.monotonic() > deadline:
                    found = {"status": NOT_RUN, "reason": "the time budget was used up"}
                elif not (here.alive and there.alive):
                    found = {"status": NOT_RUN, "reason": "a measuring process was lost before it"}
                else:
                    found = _row(here, there, case, mode, settings)
                if found["status"] == MEASURED:
                    work = case.passes().of(mode)
                    found["percent_of_roof"] = percent(work, machine, found["ms"])
                say(report.update(blank(case, mode, name), found))
        finally:
            here.stop()
            there.stop()


def _row(here: Worker, there: Worker, case: Case, mode: str, settings: Settings) -> Row:
    try:
        return _paired(here, there, case, mode, settings)
    except WorkerLost as lost:
        return {"status": FAILED, "reason": str(lost)}


def _paired(here: Worker, there: Worker, case: Case, mode: str, settings: Settings) -> Row:
    ready = {}
    for name, worker in (("this tree", here), ("the other", there)):
        ready[name] = worker.ask(_LIMIT, do="prepare", case=case.id, mode=mode)
        if ready[name]["gate"] != "green":
            reason = f"{name}: {ready[name]['reason']}"
            return {"status": FAILED, "gate": ready[name]["gate"], "reason": reason}
    ours, theirs = ready["this tree"]["ms"], ready["the other"]["ms"]
    calls, rounds = timing.plan(
        2 * ours + theirs, min(ours, theirs), settings.device, settings.seconds
    )
    samples: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        for side, worker in zip(samples, (here, there, here), strict=True):
            side.append(worker.ask(_LIMIT, do="sample", calls=calls)["ms"])
    paired = timing.pair(*samples)
    return {
        "status": MEASURED,
        "gate": "green",
        "gate_detail": ready["this tree"]["gate_detail"],
        "raw_ms": paired.ours_ms,
        "peer_raw_ms": paired.peer_ms,
        "ms": timing.quantile(paired.ours_ms, 0.5),
        "ratio": paired.ratio,
        "ratio_p20": paired.p20,
        "ratio_p80": paired.p80,
    }
