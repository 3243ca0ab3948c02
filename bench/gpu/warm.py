"""``python -m bench.gpu.warm PART CASES N COUNT``: compile a part's kernels by launching them.

COUNT processes share the launches; this one takes every COUNT-th, starting at N. Triton's cache
keeps the compiled kernels, so that nothing compiles during tests or timing. CASES is "cuda" or
"rehearsal". Batches are small, and multiples of 16 like the real ones, because Triton specialises
kernels on divisibility by 16.
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.case import BOTH, FORWARD, Case, small
from bench.measure import Bench, Settings

Job = tuple[str, Callable[[], object]]


def _problems(cases: str) -> Iterator[Job]:
    """Launch the kernels of the GPU tests, bf16 first, and of the sanitizers' problems."""
    from bench.gpu import sanitized
    from tests.gpu.problems import DTYPES, IMPLEMENTED, SHAPES, problems, served_by

    shapes, device = (SHAPES, "cuda") if cases == "cuda" else (1, "cpu")

    def run(problem, implementation: str) -> None:
        with served_by(implementation) as backend:
            problem.ours(backend if cases == "cuda" else "auto")

    ours = [(op, who) for op, who in IMPLEMENTED if who != "torch"]
    for dtype in DTYPES:
        for op, who in ours:
            # `large` alone draws a scale differently; what else a regime changes are values
            for problem in problems(op, dtype, who, device, shapes, ("normal", "large")):
                yield f"{op} {who} {problem.label}", partial(run, problem, who)
    for family in sanitized.FAMILIES if cases == "cuda" else ():
        yield f"checker {family}", lambda family=family: list(sanitized.family(family))


def _cases(part: str, cases: str) -> Iterator[Job]:
    """Run our side of every case of a part, forward and backward."""
    from bench.gpu import profile
    from bench.gpu.command import PARTS

    bench = Bench(Settings("cuda" if cases == "cuda" else "cpu", 0.0))
    found = [entry.case for entry in PARTS[part].entries(cases, [])] or profile.cases(cases)

    def run(case: Case) -> None:
        bench.take(case)
        step = bench.step(bench.ours(case), BOTH if case.has_backward else FORWARD)
        with step.context():
            step.call()

    for case in {case.id: case for case in found if case.has_ours}.values():
        yield case.id, partial(run, small(case))


def jobs(part: str, cases: str, number: int, count: int) -> Iterator[Job]:
    """The launches of this process."""
    if part == "tune":
        from bench.gpu import tune

        yield from tune.launches(cases, number, count)  # a sweep takes its own share of the tiles
        return
    found = _problems(cases) if part == "check" else _cases(part, cases)
    for i, job in enumerate(found):
        if i % count == number:
            yield job


def main(part: str, cases: str, number: str, count: str) -> None:
    start = time.monotonic()
    for label, run in jobs(part, cases, int(number), int(count)):
        try:
            run()
        except Exception as error:
            why = (str(error).strip().splitlines() or [""])[0]
            print(f"failed {label}: {type(error).__name__}: {why}"[:300], flush=True)
        else:
            print(f"launched {label} ({time.monotonic() - start:.1f} s)", flush=True)
    if cases == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
