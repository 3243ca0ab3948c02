"""The evidence: one JSON file that is valid at every moment of a run, and a table for the eye.

Every row of the plan is in the file from the start as "not run"; a measured row replaces its own,
and the file is replaced as a whole (written beside, then renamed) after each. A run that is killed
therefore leaves what it measured, and says what it did not.
"""

import datetime
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.case import Case
from bench.measure import FAILED, MEASURED, NOT_RUN
from bench.roofline import Machine

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


def blank(case: Case, mode: str, peer: str, reason: str = "the run was cut before it") -> Row:
    """A row nothing is known about yet."""
    return {
        "op": case.op,
        "case": case.name,
        "mode": mode,
        "dtype": str(case.dtype).removeprefix("torch."),
        "peer": peer,
        "status": NOT_RUN,
        "reason": reason,
        "gate": None,
        "raw_ms": [],
        "ratio": None,
        "percent_of_roof": None,
        "peak_mb": None,
    }


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The checkout's short commit, "-dirty" where tracked files differ; "unknown" without git.

    A copy of the tree that came without its .git can be told by BENCH_COMMIT.
    """
    if told := os.environ.get("BENCH_COMMIT"):
        return re.sub(r"[^A-Za-z0-9._-]", "-", told)
    git = ("git", "-c", f"safe.directory={ROOT}")  # the tree may belong to another user
    short = _said(*git, "rev-parse", "--short", "HEAD")
    if not short:
        return "unknown"
    return f"{short}-dirty" if _said(*git, "status", "--porcelain", "-uno") else short


def environment(device: str) -> dict[str, str | None]:
    """What a number means nothing without; `device` as `bench.registry` names its cases."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = driver = None
    if device == "rehearsal":
        gpu = "rehearsal on a CPU"
    elif device == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": gpu,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "driver": driver and driver.splitlines()[0],
    }


def results_file(base: Path, env: dict) -> Path:
    """``base/<gpu>/<date>-<commit>.json``.

    The parts of one commit, measured in one environment, share a file, whatever the day. What no
    commit names (a changed tree, no git) and other versions are numbered rather than overwritten.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", (env["gpu"] or "no-gpu").lower()).strip("-")
    folder, commit = base / gpu, env["commit"]
    if commit != "unknown" and not commit.endswith("-dirty"):
        for path in sorted(folder.glob(f"????-??-??-{commit}*.json")):
            if _load(path).get("env") == env:
                return path
    stem = f"{datetime.date.today().isoformat()}-{commit}"
    path, again = folder / f"{stem}.json", 2
    while path.exists():
        path, again = folder / f"{stem}-{again}.json", again + 1
    return path


def _load(path: Path) -> dict[str, Any]:
    """What a results file holds; nothing where it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) else {}


class Report:
    """The rows of a run, on disk (if `path` is given) after every change.

    Args:
        path: of the file.
        env: `environment`.
        rows: all that is planned, each as `blank`.
        notes: what else is planned, as it is to be read where nothing becomes of it.
        merge: keep what an earlier run left in the file and this one does not measure again.
    """

    def __init__(
        self,
        path: Path | None,
        env: dict,
        rows: list[Row],
        notes: dict[str, Any] | None = None,
        merge: bool = False,
    ):
        self.path = path
        before = _load(path) if merge else {}
        self.data: dict[str, Any] = {
            "machine": {"copy_tb_s": None, "gemm_tflops": None},
            **(notes or {}),
            **before,
            "env": env,
            "complete": False,
        }
        self.planned = {self._key(row) for row in rows}
        known = {self._key(row): row for row in before.get("rows", ())}
        self.data["rows"] = list(({self._key(row): row for row in rows} | known).values())
        self._at = {self._key(row): i for i, row in enumerate(self.rows)}
        self.write()

    @staticmethod
    def _key(row: Row) -> tuple[str, str, str, str]:
        return row["op"], row["case"], row["mode"], row["peer"]

    @property
    def rows(self) -> list[Row]:
        return self.data["rows"]

    def machine(self, machine: Machine) -> None:
        """Record the ceilings."""
        self.note("machine", machine._asdict())

    def note(self, name: str, value: object) -> None:
        """Record something beside the rows."""
        self.data[name] = value
        self.write()

    @property
    def of_this_run(self) -> list[Row]:
        """The rows that were planned, as they are by now."""
        return [row for row in self.rows if self._key(row) in self.planned]

    def update(self, row: Row, found: Row) -> Row:
        """Replace what is known about `row`; "not run" replaces nothing that was measured."""
        index = self._at[self._key(row)]
        reason = {} if "reason" in found else {"reason": None}
        new = {**row, **reason, **found}
        if new["status"] != NOT_RUN or self.rows[index]["status"] == NOT_RUN:
            self.rows[index] = new
            self.write()
        return new

    def write(self) -> None:
        """Replace the file by the present state: a reader sees the old one or the new, whole."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=self.path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self.data, file, indent=1, allow_nan=False, default=str)
                file.write("\n")
            os.chmod(beside, 0o644)
            os.replace(beside, self.path)
        except BaseException:
            os.unlink(beside)
            raise


def merge(source: Path, base: Path) -> Path:
    """Add a results file of another folder to the one of its commit under `base`; that one's path.

    Raises:
        ValueError: `source` is no results file.
    """
    found = _load(source)
    if not found or not isinstance(found.get("env"), dict):
        raise ValueError(f"merge: {source} is no results file of `python -m bench gpu`")
    env, rows = found.pop("env"), found.pop("rows")
    written = Report(results_file(base, env), env, rows, merge=True)
    for row in rows:
        written.update(row, row)
    for name, value in found.items():
        written.note(name, _merged(written.data.get(name), value))
    return written.path


def _merged(known: Any, new: Any) -> Any:
    """`new` where it was run, else `known`: phases as a whole, groups of them entry by entry."""
    if isinstance(known, dict) and isinstance(new, dict) and "status" not in new:
        return known | {name: _merged(known.get(name), entry) for name, entry in new.items()}
    if isinstance(known, list) and isinstance(new, list):  # the tiles
        ran = [entry for entry in new if _ran(entry)]
        sweeps = {(entry["case"], entry["kind"]) for entry in ran}
        return [e for e in known if (e["case"], e["kind"]) not in sweeps] + ran
    return new if known is None or _ran(new) else known


def _ran(value: Any) -> bool:
    """Whether a note tells of something that was run."""
    return value["status"] != NOT_RUN if isinstance(value, dict) else value is not None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


_HEADER = ("op", "case", "mode", "peer", "ours ms", "ratio", "p20..p80", "% roof", "MB", "peer MB")


def _cells(row: Row) -> tuple[str, ...]:
    mode = row["mode"].replace("forward", "fwd").replace("backward", "bwd")
    named = (row["op"], row["case"], mode, row["peer"])
    if row["status"] == FAILED:
        return (*named, row["reason"])
    spread = "-"
    if row.get("ratio_p20") is not None:
        spread = f"{row['ratio_p20']:.2f}..{row['ratio_p80']:.2f}"
    return (
        *named,
        _number(row.get("ms"), 3),
        _number(row["ratio"]),
        spread,
        _number(row["percent_of_roof"], 0),
        _number(row["peak_mb"], 1),
        _number(row.get("peer_peak_mb"), 1),
    )


def table(rows: list[Row]) -> str:
    """What was measured and what failed, then how many rows were not run and why."""
    shown = [_cells(row) for row in rows if row["status"] != NOT_RUN]
    widths = [
        max(len(line[i]) for line in [_HEADER, *shown] if i < 4 or len(line) > 5)
        for i in range(len(_HEADER))
    ]
    lines = []
    for cells in [_HEADER, *shown] if shown else []:
        text = [
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=False))
        ]
        lines.append("  ".join(text).rstrip())
    if shown:
        lines.append("ratio = the peer's time / ours: above 1, ours is faster.")
    wide = sum(
        row.get("ratio_p20") is not None and row["ratio_p80"] > 1.5 * row["ratio_p20"]
        for row in rows
    )
    if wide:
        lines.append(
            f"{wide} ratios spread over more than 1.5x: something else kept the machine busy."
        )
    reasons = Counter(row["reason"] for row in rows if row["status"] == NOT_RUN)
    lines += [f"not run: {count} rows, {reason}" for reason, count in reasons.most_common()]
    measured = sum(row["status"] == MEASURED for row in rows)
    lines.append(f"{measured} of {len(rows)} rows measured.")
    return "\n".join(lines)
