"""Measures a step's memory against the batch, and draws docs/figures/contrastive_memory.svg.

    python docs/contrastive_memory.py

A step is forward and backward at D = 512 in fp32, with a teacher of the same width at alpha = 1 and
without, ours beside the loss that keeps its matrices. Each is a process of its own, whose
high-water mark is reset before the step; features and their gradients are there before.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

FIGURE = Path(__file__).parent / "figures" / "contrastive_memory.svg"
BATCHES = (1024, 2048, 4096, 8192, 16384)
LINES = {
    "whole matrices, teacher": ("eager", 1.0, "#b2182b"),
    "whole matrices": ("eager", 0.0, "#ef8a62"),
    "tinyclip, teacher": ("tinyclip", 1.0, "#2166ac"),
    "tinyclip": ("tinyclip", 0.0, "#67a9cf"),
}

STEP = """
import re, sys
from pathlib import Path
import torch, torch.nn.functional as F
import tinyclip
kind, alpha, m = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])

def status(field):
    return int(re.search(rf"^{field}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1])

def features(m):
    return F.normalize(torch.randn(m, 512), dim=1)

def eager(image, text, scale, teacher):
    by_image, by_text = scale * image @ text.T, scale * text @ image.T
    if teacher is None:
        wanted = 2 * [torch.arange(len(image))]
    else:
        rows = (50 * teacher[0] @ teacher[1].T).softmax(1)
        wanted = [rows, (50 * teacher[1] @ teacher[0].T).softmax(1)]
    return (F.cross_entropy(by_image, wanted[0]) + F.cross_entropy(by_text, wanted[1])) / 2

def step(inputs, teacher):
    if kind == "eager":
        loss = eager(*inputs, teacher)
    else:
        teacher = teacher and tinyclip.Teacher(*teacher, 50.0)
        loss = tinyclip.ops.contrastive_loss(*inputs, teacher=teacher, alpha=alpha)
    loss.backward()

def problem(m):
    teacher = (features(m), features(m)) if alpha else None
    inputs = features(m), features(m), torch.tensor(50.0)
    for x in inputs:
        x.requires_grad_()
        x.grad = torch.zeros_like(x)
    return inputs, teacher

step(*problem(256))
inputs, teacher = problem(m)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(inputs, teacher)
print((status("VmHWM") - before) / 1024)
"""


def measure(kind: str, alpha: float, rows: int) -> float:
    """Megabytes."""
    command = [sys.executable, "-c", STEP, kind, str(alpha), str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def draw(measured: dict[str, list[float]]) -> str:
    """Both axes logarithmic."""
    left, right, top, bottom = 70, 480, 30, 300
    low, high = 1.0, 10_000.0

    def x(rows):
        span = math.log(BATCHES[-1] / BATCHES[0])
        return left + (right - left) * math.log(rows / BATCHES[0]) / span

    def y(megabytes):
        share = math.log(max(megabytes, low) / low) / math.log(high / low)
        return bottom - (bottom - top) * share

    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 350" font-family="sans-serif"'
           ' font-size="12"><rect width="660" height="350" fill="white"/>']  # fmt: skip
    for power in range(5):
        out.append(f'<path d="M{left} {y(10**power):.1f}H{right}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(10**power) + 4:.1f}" text-anchor="end">'
                   f"{10**power:,}</text>")  # fmt: skip
    for rows in BATCHES:
        out.append(
            f'<text x="{x(rows):.1f}" y="{bottom + 20}" text-anchor="middle">{rows:,}</text>'
        )
    out.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 40}" text-anchor="middle">batch</text>'
    )
    out.append(f'<text x="{left - 50}" y="{top - 12}">MB beside features and gradients</text>')
    for name, values in measured.items():
        color = LINES[name][2]
        points = " ".join(f"{x(m):.1f},{y(v):.1f}" for m, v in zip(BATCHES, values, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        out.append(f'<text x="{right + 8}" y="{y(values[-1]) + 4:.1f}" fill="{color}">{name}: '
                   f"{values[-1]:,.0f}</text>")  # fmt: skip
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    measured = {
        name: [measure(kind, alpha, rows) for rows in BATCHES]
        for name, (kind, alpha, _) in LINES.items()
    }
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(draw(measured))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
