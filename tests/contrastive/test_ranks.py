"""The loss over process groups: W gloo processes against one, and the bytes they send."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, store: Path, world: int) -> list[str]:
    """What each of the ranks printed; all of them are waited for, none longer than the watchdog."""
    command = [sys.executable, "-m", module, str(store)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    told = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=300)
            told.append((process.returncode, out, err))
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
    for code, _, err in told:
        assert code == 0, err[-4000:]
    return [out.strip() for _, out, _ in told]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equal_to_one_process(world, tmp_path):
    """Even, uneven and empty ranks, alpha 0 to 1, three backends, fp64: 1e-12, the scale too."""
    print(*launch("tests.contrastive.ranks", tmp_path / "store", world), sep="\n")


def test_bytes_on_the_wire(tmp_path):
    """At D = 512 a rank sends at most 0.55 of what open_clip's gather_with_grad sends."""
    (first, *_) = launch("tests.contrastive.traffic", tmp_path / "store", 4)
    ratios = [float(word) for word in first.split()]
    print(f"CLIP {ratios[0]:.3f}, uneven rows {ratios[1]:.3f} of open_clip's bytes")
    assert len(ratios) == 2
    assert all(0 < ratio <= 0.55 for ratio in ratios)
