"""``python -m bench.gpu.launched CASES CASE``: run our side of a case twice, under a profiler."""

import sys

import torch

from bench import registry
from bench.case import BOTH, FORWARD
from bench.measure import Bench, Settings


def main(cases: str, identity: str) -> None:
    device = "cuda" if cases == "cuda" else "cpu"
    case, bench = registry.find(identity, cases), Bench(Settings(device, 0.0))
    bench.take(case)
    step = bench.step(bench.ours(case), BOTH if case.has_backward else FORWARD)
    with step.context():
        for _ in range(2):
            step.call()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
