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
    """What a number means nothing without."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = driver = None
    if device == "cuda" and torch.cuda.is_available():
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
    """``base/<gpu>/<date>-<commit>.json``, numbered rather than overwritten."""
    gpu = re.sub(r"[^a-z0-9]+", "-", (env["gpu"] or "no-gpu").lower()).strip("-")
    stem = f"{datetime.date.today().isoformat()}-{env['commit']}"
    path, again = base / gpu / f"{stem}.json", 2
    while path.exists():
        path, again = base / gpu / f"{stem}-{again}.json", again + 1
    return path


class Report:
    """The rows of a run, on disk (if `path` is given) after every change."""

    def __init__(self, path: Path | None, env: dict, rows: list[Row]):
        self.path = path
        self.data: dict[str, Any] = {
            "env": env,
            "machine": {"copy_tb_s": None, "gemm_tflops": None},
            "rows": rows,
            "complete": False,
        }
        self._at = {self._key(row): i for i, row in enumerate(rows)}
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

    def update(self, row: Row, found: Row) -> Row:
        """Replace what is known about `row`."""
        index = self._at[self._key(row)]
        reason = {} if "reason" in found else {"reason": None}
        self.rows[index] = {**row, **reason, **found}
        self.write()
        return self.rows[index]

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


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


_HEADER = ("op", "case", "mode", "peer", "ours ms", "ratio", "p20..p80", "% roof", "MB", "peer MB")


def _cells(row: Row) -> tuple[str, ...]:
    mode = {"forward": "fwd", "forward+backward": "fwd+bwd"}.get(row["mode"], "graphed")
    named = (row["op"], row["case"], mode, row["peer"])
    if row["status"] == FAILED:
        return (*named, row["reason"])
    spread = "-"
    if row["ratio"] is not None:
        spread = f"{row['ratio_p20']:.2f}..{row['ratio_p80']:.2f}"
    return (
        *named,
        _number(row["ms"], 3),
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
        row["ratio"] is not None and row["ratio_p80"] > 1.5 * row["ratio_p20"] for row in rows
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
