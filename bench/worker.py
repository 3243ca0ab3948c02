"""A process that measures, commanded over pipes: what crashes or hangs in it costs one row.

Parent and worker exchange one JSON object a line. The parent sets time limits; a worker that
outlives one, or dies of a signal, is replaced. A worker can be given another tree's ``tinyclip``
(`bench.compare`), and dies with its parent.

    python -m bench.worker '{"device": "cpu", "seconds": 0.3, "backend": "auto", "site": null}'
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import registry, roofline, timing
from bench.host import host_profile
from bench.measure import FAILED, MEASURED, NOT_RUN, Bench, Settings
from bench.peers import CannotRun
from bench.roofline import Machine

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_PDEATHSIG = 1


class WorkerLost(Exception):
    """The worker died; the text says of what."""


class WorkerLate(WorkerLost):
    """The worker was stopped because it did not answer in time."""


class Worker:
    """The parent's side of one worker process."""

    def __init__(self, settings: Settings, site: Path | None = None):
        config = {**settings._asdict(), "site": str(site) if site else None}
        # both live as long as this object; `stop` closes them
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._answers = b""

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        """One request, one answer within `timeout` seconds; else the worker is gone."""
        deadline = time.monotonic() + timeout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerLost(self._cause()) from None
        while b"\n" not in self._answers:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self.stop()
                raise WorkerLate(f"stopped after {timeout:.0f} s without an answer")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise WorkerLost(self._cause())
            self._answers += chunk
        line, self._answers = self._answers.split(b"\n", 1)
        answer = json.loads(line)
        if answer.pop("leaving", False):  # its device is beyond use; the answer itself counts
            self.stop()
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _cause(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()[-1:] or ["it printed nothing"]
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return f"the measuring process ended with {died}: {said[0][:300]}"

    def stop(self) -> None:
        """End the process, now."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            pipe.close()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Server:
    """Answers the requests; its methods' names are the requests'."""

    def __init__(self, settings: Settings):
        self.device, self.cases = settings.device, settings.cases
        self.bench = Bench(settings)
        self._prepared: Any = None

    def machine(self) -> dict[str, Any]:
        return roofline.measure(self.device)._asdict()

    def row(self, case: str, mode: str, peer: str, machine: dict | None) -> dict[str, Any]:
        self.bench.machine = Machine(**machine) if machine else None
        found = self.bench.row(registry.find(case, self.cases), mode, peer)
        return found | {"leaving": self._device_is_lost()}

    def prepare(self, case: str, mode: str) -> dict[str, Any]:
        """Gate and warm up one case for `sample`."""
        found = registry.find(case, self.cases)
        try:
            self.bench.take(found)
            verdict = self.bench.verdict(found, "ours")
            if verdict.colour == "red":
                return {"gate": "red", "reason": f"refused: gate red, {verdict.detail}"}
            self._prepared = self.bench.step(self.bench.ours(found), mode)
            clock = timing.clock(self.device)
            ms = timing.warm(self._prepared, clock, self.device)
        except Exception as error:
            return {"gate": None, "reason": f"{type(error).__name__}: {error}"[:300]}
        return {"gate": "green", "gate_detail": verdict.detail, "ms": ms}

    def sample(self, calls: int) -> dict[str, Any]:
        with self._prepared.context():
            return {"ms": timing.clock(self.device)(self._prepared.call, calls)}

    def profile(self, case: str, mode: str, who: str, calls: int) -> dict[str, Any]:
        """Where the host's time goes in ours or in a peer."""
        found = registry.find(case, self.cases)
        try:
            self.bench.take(found)
            timed = self.bench.ours(found) if who == "ours" else self.bench.peer(found, who)
            step = self.bench.step(timed, mode)
            return {"status": MEASURED, "case": case, **host_profile(step, self.device, calls)}
        except CannotRun as reason:
            return {"status": NOT_RUN, "case": case, "reason": str(reason)}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            return {"status": FAILED, "case": case, "reason": reason}

    def _device_is_lost(self) -> bool:
        """A kernel's illegal access makes every later call of the process fail."""
        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
            return False
        except RuntimeError:
            return True


def main() -> None:
    """Serve until the parent closes its end."""
    _die_with_parent()
    config = json.loads(sys.argv[1])
    # What libraries print belongs to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if site := config.pop("site"):
        sys.path.insert(0, site)
    server = _Server(Settings(**config))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
