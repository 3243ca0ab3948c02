"""Part "time": every op compared with its fastest peers.

First CUDA graphs, which exclude host time: forward and backward at batch 1024 and 64, then forward
alone. Then eager calls at batch 64 and 256, as a training loop makes them, then all other peers and
PyTorch's own rows. Each case passes the gate before its first row is timed.
"""

from typing import Any

from bench import registry
from bench.case import BOTH, FORWARD, FORWARD_GRAPHED, GRAPHED, Case
from bench.gpu import phases
from bench.gpu.part import Part, Run
from bench.run import Entry, plan

# What is worth most comes first.
_TOWERS = ("197x12h", "50x12h", "77 causal x8h", "257x16h", "577x16h")
_LARGE = (
    "attention_qkv/197x12h b1024",
    "contrastive_loss/32768",
    "attention_qkv/50x12h b1024",
    "attention_qkv/77 causal x8h b1024",
    "gelu_mlp/201728x768 gelu",
    "layer_norm/201728x768 residual",
    "attention_qkv/257x16h b1024",
    "contrastive_loss/32768 teacher",
    "gelu_mlp/201728x768 quick_gelu",
    "layer_norm/201728x768",
    "layer_norm/201728x768 masked",
    "attention_qkv/577x16h b1024",
    "contrastive_loss/8192",
    "contrastive_loss/8192 teacher",
    "contrastive_loss/1024",
    "contrastive_loss/1024 teacher",
    "attention/50x12h gated b1024",
    "attention/77x12h padded b1024",
)
_OF_B16 = {64: "12608x768", 256: "50432x768"}


def _at(batch: int) -> tuple[str, ...]:
    towers = tuple(f"attention_qkv/{tower} b{batch}" for tower in _TOWERS)
    rows = _OF_B16[batch]
    others = (f"gelu_mlp/{rows} gelu", f"layer_norm/{rows} residual", f"layer_norm/{rows}")
    return (*towers, *others, f"gelu_mlp/{rows} quick_gelu", f"layer_norm/{rows} masked")


_ORDER = (
    *((GRAPHED, _LARGE), (GRAPHED, _at(64))),
    *((FORWARD_GRAPHED, _LARGE), (FORWARD_GRAPHED, _at(64))),
    *((BOTH, _at(64)), (BOTH, _at(256))),
)
# The fastest that an H100 showed (bench/results), by op or by tower; elsewhere plain PyTorch.
_BEST = {
    "attention/50x12h gated": ("sdpa-efficient", "tinyclip-masked"),
    "attention/77x12h padded": ("sdpa-efficient",),
    "attention_qkv/50x12h": ("sdpa-efficient", "sdpa-cudnn"),
    "attention_qkv/77": ("sdpa-cudnn", "sdpa-efficient"),
    "attention_qkv": ("sdpa-cudnn",),
    "contrastive_loss": ("eager",),
}


def best(case: Case) -> tuple[str, ...]:
    """The peers of a case that are timed first."""
    return next((peers for start, peers in _BEST.items() if case.id.startswith(start)), ("eager",))


def _entries(cases: str, patterns: list[str]) -> list[Entry]:
    chosen = registry.select(registry.cases(cases), patterns)
    found = {case.id: case for case in chosen if case.ours is None and case.op != "block"}
    rows = [
        Entry(found[name], mode, peer)
        for mode, names in _ORDER
        for name in names
        if name in found
        for peer in best(found[name])
    ]
    # One row a peer of each case that is left: as a user calls it, forward and backward.
    rows += [
        Entry(case, BOTH if case.has_backward else FORWARD, name)
        for case in found.values()
        for name, peer in case.peers.items()
        if not peer.slow_start
    ]
    found = {(e.case.id, e.mode, e.peer): e for e in rows}
    return [*found.values(), *plan(registry.select(registry.baselines(cases), patterns))]


def _notes() -> dict[str, Any]:
    return phases.preparation("time")


def _run(run: Run) -> bool:
    entries = _entries(run.cases, run.patterns)
    if not phases.prepare(run, "time"):
        run.give_up([entry for entry in entries if entry.case.has_ours])
        run.measure([entry for entry in entries if not entry.case.has_ours], run.deadline)
        return True
    run.runner.measure_machine(run.share(0.15))
    return run.measure(entries, run.deadline)


PART = Part(_entries, _notes, _run)
