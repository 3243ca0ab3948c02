"""Runs that are killed, all forked from one process that has imported everything.

    python -m tests.train.kills FOLDER KILLS SEED

First a run without an interruption; then one that is killed with SIGKILL, resumed from `latest`,
killed again, ... and at last left alone. Every other kill falls into a save: at a random one of
its operations on files, which an audit hook counts. The others come after a random time. After each
kill `latest` must verify and load. Prints a line a kill, and compares the two ends.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import tinyclip
from tests.train import tiny
from tinyclip.train import checkpoint

STEPS = 24
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
WATCHDOG = 120


def train(folder: Path, resume: str | None, die_at: int | None = None) -> None:
    """One run; with `die_at`, dead before that operation of its saves (from 1)."""
    torch.set_num_threads(1)
    done, checkpoints = 0, str(folder / "checkpoints")

    def count(event: str, args: tuple) -> None:
        nonlocal done
        path = str(args[0]) if event in OPERATIONS and args else ""
        if path == checkpoints or (path.startswith(checkpoints) and "/." in path):
            done += 1
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    tiny.fit(folder, resume, steps=STEPS, save_every=2, precision="fp16", keep=2)


def forked(*args) -> int:
    """A child that runs `train`; it ends without this process's cleaning up."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(WATCHDOG)
        train(*args)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    folder, kills, rand = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.monotonic()
    assert os.waitpid(forked(folder / "whole", None), 0)[1] == 0
    lasted = time.monotonic() - began
    cut, made, ended = folder / "cut", 0, 0
    while made < kills:
        # An operation that a short life reaches; or a time within the first half of a life.
        inside = made % 2 == 0
        child = forked(cut, "latest", rand.randint(1, 150) if inside else None)
        if not inside:
            time.sleep(rand.uniform(0.02, 0.5) * lasted)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, status
            # It came to its end: the next kill needs a run that has not.
            (cut / "checkpoints").rename(folder / f"finished-{ended}")
            ended += 1
            continue
        made += 1
        names = sorted(os.listdir(cut / "checkpoints")) if (cut / "checkpoints").is_dir() else []
        latest = checkpoint.latest(cut / "checkpoints")
        if latest is not None:
            tinyclip.load(latest / "model")
        half = any(name.startswith(".") for name in names)
        print(f"kill {made}, {'in a save' if inside else 'at a time'}: {latest and latest.name},"
              f" leftovers {half}", flush=True)  # fmt: skip
    assert os.waitpid(forked(cut, "latest"), 0)[1] == 0
    ends = [tiny.fingerprint(folder / name, STEPS) for name in ("cut", "whole")]
    assert ends[0] == ends[1], "the resumed run ended elsewhere"
    print("the same end")


if __name__ == "__main__":
    main()
