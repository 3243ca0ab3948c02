"""Malformed calls: each is a TypeError or ValueError that names the op and the argument.

In this process, and in one of its own, where a crash would be seen and, under ``python -O``, where
an assert would be missing.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tinyclip
from tests.support.malformed import TABLE, VALID, call, objection
from tinyclip import ops

ROOT = Path(__file__).resolve().parents[2]


def test_a_valid_call_is_valid():
    assert set(VALID) == set(ops.OPS)
    for op, valid in VALID.items():
        assert getattr(ops, op)(**valid) is not None


def test_the_table_is_long_and_its_rows_differ():
    assert len(TABLE) >= 220
    doubles = [name for name, count in Counter(row.id for row in TABLE).items() if count > 1]
    assert doubles == []
    assert min(Counter(row.op for row in TABLE).values()) >= 50


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_malformed(row):
    assert (complaint := objection(row)) is None, complaint


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_backend_makes_no_difference(backend):
    """Arguments are looked at before a backend is."""
    with tinyclip.backend(backend):
        complaints = {row.id: objection(row) for row in TABLE}
    assert not any(complaints.values()), {k: v for k, v in complaints.items() if v}


@pytest.mark.parametrize("op", ops.OPS)
def test_explain_refuses_what_the_op_refuses(op):
    for row in TABLE:
        if row.op == op and not row.label.endswith(("unknown_keyword", "left_out")):
            with pytest.raises(row.error, match=f"^{op}: {row.names} "):
                tinyclip.explain(op, **call(row))


HUGE = """
import torch
from tinyclip import backend, ops
def wide(*shape):
    return torch.empty(1).expand(shape)
calls = (
    lambda: ops.attention(*[wide(1, 2**58, 1, 2)] * 3),
    lambda: ops.attention_qkv(wide(2**58, 1, 3, 1, 2), causal=True),
    lambda: ops.gelu_mlp(wide(2**60, 2), wide(3, 2), None, wide(2, 3), None),
    lambda: ops.gelu_mlp(wide(3, 2), wide(2**60, 2), None, wide(2, 2**60), None),
    lambda: ops.layer_norm(wide(2**60, 2), None, None),
    lambda: ops.layer_norm(wide(2, 2**60), wide(2**60), None),
    lambda: ops.contrastive_loss(wide(2**60, 2), wide(2**60, 2), 1.0),
    lambda: ops.contrastive_stats(wide(1, 2), wide(2**60, 2), 1.0, offset=2**60 - 1),
)
for name in ("torch", "reference"):
    for i, call in enumerate(calls):
        try:
            with backend(name):
                call()
        except (RuntimeError, MemoryError):
            continue
        raise SystemExit(f"call {i} on {name}: no exception")
"""


def _process(*words: str) -> None:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["plain", "optimised"])
def test_no_signal_in_a_process_of_its_own(flags):
    _process(*flags, "-m", "tests.support.malformed")


def test_a_problem_larger_than_memory_is_an_exception():
    """A legal call that no machine can serve: PyTorch's own error about memory, never a signal."""
    _process("-c", HUGE)
