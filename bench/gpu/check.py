"""Part "check": build, GPU tests, compute-sanitizer.

Builds, compiles every kernel in up to 8 processes, runs the tests marked gpu (one problem per
kernel family and dtype first, then the tolerance rule, bf16 first, with a time limit per test), and
runs our kernels under compute-sanitizer, memcheck before racecheck.
"""

from typing import Any

from bench.gpu import phases
from bench.gpu.part import Part, Run
from bench.measure import NOT_RUN

_TESTS, _CHECKER = 0.62, 0.6  # of what is left when they begin


def _notes() -> dict[str, Any]:
    checker = {"status": NOT_RUN, "launches": 0, "seconds": 0.0}
    found = {name: dict(checker) for name in phases.CHECKS}
    return {**phases.preparation("check"), "tests": phases.no_tests(NOT_RUN), **found}


def _run(run: Run) -> bool:
    if not phases.prepare(run, "check"):
        return True
    path = run.written.path
    tests = run.step("tests", _TESTS, lambda deadline: phases.tests(path, deadline))
    errors = 0
    for name in phases.CHECKS:
        found = run.step(name, _CHECKER, lambda end, name=name: phases.check(name, path, end))
        errors += found.get("errors", 0)
    return bool(tests.get("failed") or errors)


PART = Part(lambda cases, patterns: [], _notes, _run)
