"""One process at a time trains in a folder."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from tinyclip.train.ranks import Ranks

LOCK = ".lock"
_LOG = logging.getLogger("tinyclip")


@contextlib.contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold a run's folder, which is made if need be, until the process leaves or ends in any way.

    Raises:
        ValueError: another process holds it; on all ranks.
    """
    file = None
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if any(flag for (flag,) in ranks.tell(file is not None and not _locks(file))):
            raise ValueError(
                f"{folder} is in use by another process, which trains there: wait for its end, or"
                " give this run another name"
            )
        yield
    finally:
        if file is not None:
            os.close(file)


def _locks(file: int) -> bool:
    # Of POSIX's locks and not flock's: those would live on in the data workers of a killed process.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _LOG.warning("this file system has no locks (%s): start one process a folder", error)
    return True
