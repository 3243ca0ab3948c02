"""Starting the command line of the benchmarks, and what every file of it has to hold."""

import os
import subprocess
import sys

from bench.measure import FAILED, MEASURED, NOT_RUN, Settings
from bench.report import ROOT

FIELDS = {"op", "case", "peer", "status", "gate", "raw_ms", "ratio", "percent_of_roof", "peak_mb"}
ENV = {"gpu", "commit", "torch", "triton", "cuda", "driver"}
QUICK = Settings("cpu", 0.02)


def python(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more},
    )


def check_schema(data: dict) -> None:
    assert data["env"].keys() == ENV
    assert data["machine"].keys() == {"copy_tb_s", "gemm_tflops"}
    for row in data["rows"]:
        assert row.keys() >= FIELDS
        assert row["status"] in (MEASURED, NOT_RUN, FAILED)
        assert row["gate"] in ("green", "red", None)
        if row["status"] == MEASURED:
            assert row["gate"] == "green" and len(row["raw_ms"]) >= 5
        else:
            assert row["reason"] and row["ratio"] is None and row["raw_ms"] == []
