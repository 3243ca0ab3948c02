"""Malformed calls of the compiled engine end in a Python exception, never in a signal."""

import subprocess
import sys
from pathlib import Path

import pytest

from tinyclip import _extension

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "optimised"])
def test_malformed_calls(flags):
    command = [sys.executable, *flags, "-m", "tests.contrastive.malformed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    print(done.stdout)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert int(done.stdout.split()[-3]) >= 300
