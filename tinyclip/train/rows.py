"""Files of a row a line, as JSON: metrics and broken samples."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows, in a file that is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, f"{file} could not be written: {error.strerror}") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_after(file: Path, step: int) -> None:
    """Drop the rows of steps that will be made again, and a line that a kill cut short."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and row["step"] <= step:
            kept.append(line)
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, file)
