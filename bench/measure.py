"""One row: gate, paired timing, peak memory, percent of roof; in the present process."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench import gate, timing
from bench.case import GRAPHS, Case
from bench.peers import CannotRun, Tensors
from bench.roofline import Machine, percent, roof_ms
from bench.timing import Timed

MEASURED, NOT_RUN, FAILED = "measured", "not run", "failed"
_NO_SDPA = ("No viable backend", "No available kernel")  # PyTorch's words for "this one cannot"


class Settings(NamedTuple):
    """How to measure.

    ``device`` is "cpu" or "cuda", ``seconds`` about how long a row's timed rounds take (never fewer
    than five rounds), ``backend`` which of tinyclip's backends is ours. A `rehearsal` runs the
    GPU's cases on a CPU, at toy sizes.
    """

    device: str
    seconds: float
    backend: str = "auto"
    rehearsal: bool = False

    @property
    def cases(self) -> str:
        """Whose cases they are, as `bench.registry` names them."""
        return "rehearsal" if self.rehearsal else self.device


class Bench:
    """Measures rows of one device and keeps the present case's inputs and verdict.

    Args:
        settings: how to measure.
        machine: the device's ceilings, or None for no percent of roof.
        ops: what stands for ``tinyclip.ops`` (tests plant wrong and slow ones).
    """

    def __init__(self, settings: Settings, machine: Machine | None = None, ops: Any = None):
        self.device, self.seconds, self.backend, rehearsal = settings
        self._with_host = self.device == "cuda" or rehearsal  # on a CPU the host is the device
        self.machine = machine
        self._ops = ops
        self._case: Case | None = None
        self._tensors: Tensors = {}
        self._upstream: list[torch.Tensor] = []
        self._verdicts: dict[tuple[str, str], gate.Verdict] = {}  # a case is judged once
        self._served: dict[str, str] = {}

    def row(self, case: Case, mode: str, peer: str) -> dict[str, Any]:
        """The measured part of a report's row; a failure is a row too, never an exception."""
        try:
            return self._row(case, mode, peer)
        except CannotRun as reason:
            return {"status": NOT_RUN, "reason": str(reason)}
        except torch.OutOfMemoryError as error:
            self._forget()
            return {"status": FAILED, "reason": f"out of memory: {_first_line(error)}"}
        except Exception as error:
            if any(words in str(error) for words in _NO_SDPA):
                return {"status": NOT_RUN, "reason": "SDPA has no such kernel for this problem"}
            return {"status": FAILED, "reason": f"{type(error).__name__}: {_first_line(error)}"}

    def _row(self, case: Case, mode: str, name: str) -> dict[str, Any]:
        self.take(case)
        theirs, engine = self.peer(case, name), case.peers[name].engine
        for who in self._gated(case, name):
            verdict = self.verdict(case, who)
            if verdict.colour == "red":
                whose = f"{self.backend if who == 'ours' else who}: " if engine else ""
                reason = f"refused: gate red, {whose}{verdict.detail}"
                return {"status": FAILED, "gate": "red", "reason": reason}
        theirs = self.step(theirs, mode)
        found = {"status": MEASURED, "gate": "green", "gate_detail": verdict.detail}
        if not case.has_ours:
            raw = timing.alone(theirs, self.device, self.seconds)
            found |= {"raw_ms": raw, "peak_mb": timing.peak_mb(theirs, self.device)}
        else:
            ours = self.step(self.ours(case), mode)
            if engine:  # the row is the engine's, beside what is taken without asking for it
                ours, theirs = theirs, ours
            paired = timing.paired(ours, theirs, self.device, self.seconds)
            raw = paired.ours_ms
            found |= {"raw_ms": raw, "peer_raw_ms": paired.peer_ms, "ratio": paired.ratio}
            found |= {"ratio_p20": paired.p20, "ratio_p80": paired.p80}
            if mode not in GRAPHS:  # a replay allocates nothing, and is one call of the host
                found["peak_mb"] = timing.peak_mb(ours, self.device)
                found["peer_peak_mb"] = timing.peak_mb(theirs, self.device)
            if mode not in GRAPHS and self._with_host:
                found["host_ms"] = timing.host_ms(ours, self.device)
                found["peer_host_ms"] = timing.host_ms(theirs, self.device)
            servers = "+".join(dict.fromkeys(self._served.values())) or self.backend
            found["backend"] = name if engine else servers
        return found | self._against_roof(case, mode, timing.quantile(raw, 0.5))

    @staticmethod
    def _gated(case: Case, name: str) -> tuple[str, ...]:
        """Who has to be right for a row: what is timed as ours, and an engine of ours beside it."""
        if not case.has_ours:
            return (name,)
        return ("ours", name) if case.peers[name].engine else ("ours",)

    def _against_roof(self, case: Case, mode: str, ms: float) -> dict[str, Any]:
        work = case.passes().of(mode)
        found = {"ms": ms, "tflops": work.flops / ms / 1e9, "tb_s": work.bytes / ms / 1e9}
        if self.machine is not None:
            found["roof_ms"] = roof_ms(work, self.machine)
            found["percent_of_roof"] = percent(work, self.machine, ms)
        return found

    @property
    def ops(self):
        """tinyclip.ops, imported when first asked for: PyTorch's own rows do without."""
        if self._ops is None:
            from tinyclip import ops

            self._ops = ops
        return self._ops

    def take(self, case: Case) -> None:
        """Draw the inputs of `case`, and forget the last one's."""
        if self._case is case or (self._case is not None and self._case.id == case.id):
            return
        self._forget()
        self._tensors = case.draw(self.device)
        self._case = case

    def _forget(self) -> None:
        self._case, self._tensors, self._upstream, self._served = None, {}, [], {}
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def ours(self, case: Case) -> Timed:
        """Ours on the case's inputs, under the chosen backend."""
        import tinyclip

        call = self._call(case, self._tensors, dict(case.sizes))
        return Timed(call, lambda: tinyclip.backend(self.backend))

    def _call(self, case: Case, tensors: Tensors, sizes: dict) -> Callable[[], Any]:
        if case.ours is not None:
            return case.ours.build(tensors, sizes, self.device).call
        return lambda: case.call(self.ops, tensors, sizes)

    def _find_server(self, case: Case) -> None:
        """Note which backend serves each op of the case at its full size."""
        if case.call is None or self._served:
            return
        import tinyclip

        if self.ops is tinyclip.ops:
            with tinyclip.backend(self.backend):
                case.call(_Explained(self._served), self._tensors, dict(case.sizes))

    def peer(self, case: Case, name: str) -> Timed:
        """A peer on the case's inputs; raises CannotRun."""
        return case.peers[name].build(self._tensors, dict(case.sizes), self.device)

    def verdict(self, case: Case, who: str) -> gate.Verdict:
        """Of "ours" or of a peer against the oracle, once a case."""
        self._find_server(case)
        if (case.id, who) not in self._verdicts:
            # What holds while a peer runs forward has to hold for its backward, too.
            around = contextlib.nullcontext if who == "ours" else self.peer(case, who).context
            with around():
                found = gate.check(case, self.device, self._candidate(case, who))
            self._verdicts[case.id, who] = found
        return self._verdicts[case.id, who]

    def _candidate(self, case: Case, who: str):
        # By itself the op might serve the gate's smaller size from elsewhere: check what is timed.
        servers = set(self._served.values())
        backend = servers.pop() if len(servers) == 1 else self.backend

        def ours(tensors: Tensors, sizes: dict):
            import tinyclip

            with tinyclip.backend(backend):
                return self._call(case, tensors, sizes)()

        def theirs(tensors: Tensors, sizes: dict):
            timed = case.peers[who].build(tensors, sizes, self.device)
            with timed.context():
                return timed.call()

        return ours if who == "ours" else theirs

    def step(self, timed: Timed, mode: str) -> Timed:
        """One timed unit: a forward without gradients, or a forward and every gradient."""
        if "backward" not in mode:
            forward = Timed(timed.call, lambda: _without_gradients(timed))
            return timing.graphed(forward, self.device) if mode in GRAPHS else forward
        if not self._upstream:
            with timed.context():
                self._upstream = gate.upstream(gate.as_tuple(timed.call()))
        wanted = list(gate.leaves(self._tensors).values())

        def both() -> None:
            torch.autograd.grad(gate.as_tuple(timed.call()), wanted, self._upstream)

        stepped = Timed(both, timed.context)
        return timing.graphed(stepped, self.device) if mode in GRAPHS else stepped


class _Explained:
    """tinyclip.ops that notes which backend serves each op it is asked for."""

    def __init__(self, served: dict[str, str]):
        self._served = served

    def __getattr__(self, name: str):
        import tinyclip

        op = getattr(tinyclip.ops, name)
        if isinstance(op, type):
            return op

        def call(*args, **kwargs):
            self._served[name] = tinyclip.explain(name, *args, **kwargs).backend
            return op(*args, **kwargs)

        return call


@contextlib.contextmanager
def _without_gradients(timed: Timed):
    with torch.no_grad(), timed.context():
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
