"""Linear memory, measured: what a step takes at its worst over its inputs and gradients."""

import subprocess
import sys
from pathlib import Path

import pytest

from tinyclip import _extension

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))

# Run apart: the high-water mark of a process that has run other tests says nothing.
STEP = """
import re, sys
from pathlib import Path
import torch, torch.nn.functional as F
import tinyclip
m, d, alpha = int(sys.argv[1]), 512, float(sys.argv[2])

def status(field):
    return int(re.search(rf"^{field}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1])

def features(m):
    return F.normalize(torch.randn(m, d), dim=1)

def step(inputs, teacher):
    tinyclip.ops.contrastive_loss(*inputs, teacher=teacher, alpha=alpha).backward()

def problem(m):
    teacher = tinyclip.Teacher(features(m), features(m), 50.0) if alpha else None
    inputs = features(m), features(m), torch.tensor(50.0)
    for x in inputs:
        x.requires_grad_()
        x.grad = torch.zeros_like(x)  # gradients are not counted: they are there before
    return inputs, teacher

step(*problem(1024))  # whatever is loaded and allocated once
inputs, teacher = problem(m)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with tinyclip.backend(sys.argv[3]):
    step(inputs, teacher)
print((status("VmHWM") - before) / 1024)
"""


def megabytes(rows: int, alpha: float, backend: str) -> float:
    command = [sys.executable, "-c", STEP, str(rows), str(alpha), backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_step_takes_linear_memory(alpha):
    """M = 16,384, D = 512: 96 MB beside features and gradients; one matrix of logits is 1,024."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux lets a process reset its high-water mark")
    took = megabytes(16384, alpha, "cpu")
    print(f"alpha {alpha}: {took:.0f} MB")
    assert took <= 96
