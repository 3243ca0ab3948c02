"""Part "profile": host profiles and Nsight Compute metrics.

cProfile of inference at batch 1 and of a training step at batch 64, ours and open_clip's; then one
launch of each kernel under Nsight Compute.
"""

import csv
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench import registry
from bench.case import BOTH, FORWARD, Case
from bench.gpu import phases
from bench.gpu.part import LEAST, UNREACHED, Part, Run
from bench.measure import FAILED, MEASURED, NOT_RUN
from bench.worker import WorkerLost

_MODEL = "ViT-B-32"
_HOST = (
    ("encode_image", f"encode_image/{_MODEL} b1", FORWARD),
    ("train_step", f"train_step/{_MODEL} b64", BOTH),
)
_WHO = ("ours", "open_clip")
# (kernel, the case that launches it): forward before backward, attention before the rest.
KERNELS = (
    ("_attention_fwd_kernel", "attention_qkv/197x12h b1024"),
    ("_attention_bwd_kernel", "attention_qkv/197x12h b1024"),
    ("contrastive_stats_kernel", "contrastive_loss/32768"),
    ("contrastive_grads_kernel", "contrastive_loss/32768"),
    ("_layer_norm_fwd_kernel", "layer_norm/201728x768 residual"),
    ("_layer_norm_bwd_kernel", "layer_norm/201728x768 residual"),
    ("_pointwise_fwd_kernel", "gelu_mlp/201728x768 gelu"),
    ("_pointwise_bwd_kernel", "gelu_mlp/201728x768 gelu"),
)
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "dram__bytes.sum": "dram_bytes",
}
_HOST_SHARE, _LAUNCH_SECONDS = 0.5, 45.0
_CALLS = 20


def cases(kind: str) -> list[Case]:
    """The cases that are profiled, for `bench.gpu.warm`."""
    names = dict.fromkeys([case for _, case, _ in _HOST] + [case for _, case in KERNELS])
    return [registry.find(name, kind) for name in names]


def _notes() -> dict[str, Any]:
    host = {f"{name} {who}": {"status": NOT_RUN} for name, *_ in _HOST for who in _WHO}
    launches = {kernel: {"status": NOT_RUN, "case": case} for kernel, case in KERNELS}
    return {**phases.preparation("profile"), "host": host, "launches": launches}


def _run(run: Run) -> bool:
    if not phases.prepare(run, "profile"):
        return True
    end = run.share(_HOST_SHARE)
    for name, case, mode in _HOST:
        for who in _WHO:
            found = _profiled(run, case, mode, who, end)
            run.written.note("host", {**run.written.data["host"], f"{name} {who}": found})
            print(f"host, {name} {who}: {found['status']}", flush=True)
    run.runner.release()
    for kernel, case in KERNELS:
        if run.left < LEAST:
            break
        end = min(run.deadline, time.monotonic() + _LAUNCH_SECONDS)
        found = launch(kernel, case, run.cases, run.written.path, end)
        run.written.note("launches", {**run.written.data["launches"], kernel: found})
        print(f"launch of {kernel}: {found}", flush=True)
    return False


def _profiled(run: Run, case: str, mode: str, who: str, deadline: float) -> dict[str, Any]:
    left = min(deadline, run.deadline) - time.monotonic()
    if left < LEAST:
        return dict(UNREACHED)
    known = {found.id for found in registry.select(registry.cases(run.cases), run.patterns)}
    if case not in known:
        return {"status": NOT_RUN, "reason": "left out by --only"}
    try:
        return run.runner.ask(left, do="profile", case=case, mode=mode, who=who, calls=_CALLS)
    except WorkerLost as lost:
        return {"status": FAILED, "reason": str(lost)}


def launch(kernel: str, case: str, cases: str, results: Path, deadline: float) -> dict[str, Any]:
    """Profile one launch of a kernel with Nsight Compute, without clock control."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        return {"status": "tool unavailable", "case": case}
    # Skip the first launch of the process, which runs with cold caches.
    command = [tool, "--clock-control", "none", "-k", f"regex:{kernel}", "-s", "1", "-c", "1"]
    command += ["--csv", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "bench.gpu.launched", cases, case]
    log = results.with_suffix(f".{kernel.strip('_')}.ncu.log")
    process = phases.Logged(command, log)
    ended, found = process.end(deadline), read(process.text)
    if found:
        ended["status"] = MEASURED
        del ended["output"]
    return {**ended, "case": case, **found}


def read(text: str) -> dict[str, float]:
    """Parse the metrics out of ``ncu --csv`` output mixed with the program's; names carry units."""
    table = "\n".join(line for line in text.splitlines() if line.startswith('"'))
    found = {}
    for row in csv.DictReader(io.StringIO(table)):
        name = METRICS.get(row.get("Metric Name", ""))
        if name is not None:
            unit = (row.get("Metric Unit") or "").replace("%", "").replace("register/thread", "")
            value = row["Metric Value"].replace(",", "")
            found[f"{name}_{unit}" if unit and unit.isalpha() else name] = float(value)
    return found


PART = Part(lambda cases, patterns: [], _notes, _run)
