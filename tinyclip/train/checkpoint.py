"""Folders that are whole or not there, and known to be whole.

A folder is written under another name in the same place, every file and folder in it synced to
disk, then renamed, and the rename synced: whoever finds the name finds all of it, after a kill or a
power cut, too. ``manifest.sha256`` lists the SHA-256 of every other file, as ``sha256sum -c`` reads
it: damage that comes later is found, and named.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tinyclip.models import CheckpointError

MANIFEST = "manifest.sha256"
_LOG = logging.getLogger("tinyclip")
_STEP = re.compile(r"step_(\d{8,})")


def commit(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` of what ``write(a folder)`` puts there; one of that name is replaced.

    Raises:
        OSError: it could not be written, because the disk is full, read-only or broken: `folder`
            is as it was.
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        part.mkdir()
        write(part)
        lines = [line + "\n" for line in _lines(part).values()]
        (part / MANIFEST).write_text("".join(lines), encoding="utf-8")
        for path in [*part.rglob("*"), part]:
            _sync(path)
        remove(folder)
        os.rename(part, folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            code = getattr(error, "errno", None)
            reason = f"{folder} could not be written, and nothing there was changed: {error}"
            raise OSError(code, reason) if code else OSError(reason) from error
        raise


def remove(folder: Path) -> None:
    """Remove a folder, such that what is left under its name is all of it or nothing."""
    if folder.exists():
        old = folder.with_name(f".{folder.name.strip('.')}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        shutil.rmtree(old)


def clean(folder: Path) -> None:
    """Remove what a killed process left of a `commit` or a `remove` in `folder`."""
    for pattern in (".*.part", ".*.old"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is damaged, missing or added; the text names it.
    """
    manifest = folder / MANIFEST
    try:
        listed = manifest.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(manifest, f"cannot be read: {error}") from error
    found = _lines(folder)
    if listed == [*found.values(), ""]:
        return
    if listed.pop() or not all(re.fullmatch(r"[0-9a-f]{64}  \S.*", line) for line in listed):
        raise CheckpointError(manifest, "is damaged")
    names = {line[66:] for line in listed}
    for name in sorted(names ^ found.keys()):
        rule = "is missing" if name in names else "is not in the manifest"
        raise CheckpointError(folder / name, rule)
    for name, line in found.items():
        if line not in listed:
            raise CheckpointError(folder / name, "is damaged: its SHA-256 is not the manifest's")
    raise CheckpointError(manifest, "is damaged")


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, whole or not, from the first step to the last."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _STEP.fullmatch(path.name):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; each newer one that is not is named in a warning.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    found = steps(folder)
    for path in reversed(found.values()):
        try:
            verify(path)
        except CheckpointError as error:
            _LOG.warning("%s; the checkpoint before it is used", error)
        else:
            return path
    if found:
        raise CheckpointError(folder, f"none of the {len(found)} checkpoints is whole")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for path in list(steps(folder).values())[:-keep]:
        remove(path)


def _lines(folder: Path) -> dict[str, str]:
    """The manifest's line of every other file, by its name in the folder."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: f"{_digest(path)}  {name}"
        for name, path in files.items()
        if path.is_file() and name != MANIFEST
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
