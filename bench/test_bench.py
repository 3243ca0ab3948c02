"""The registry under pytest-benchmark, for its storage and comparison.

    pytest bench --benchmark-save=before
    pytest bench --benchmark-compare=0001_before

Every CPU case, ours beside each peer, one group a case and mode. A case whose gate is red fails.
These times are not paired; `python -m bench` has the ratios.
"""

import pytest

pytest.importorskip("pytest_benchmark")

from bench import registry
from bench.measure import Bench, Settings
from bench.peers import CannotRun
from bench.run import plan

_OURS = "ours"
_BENCH = Bench(Settings("cpu", seconds=0.0))
_VERDICTS = {}  # by case: tests may come in any order, and a gate costs more than a timing


def _parameters():
    cases = registry.cases("cpu")
    quick = [(e.case, e.mode, e.peer) for e in plan(cases) if not e.slow_start]
    ours = [(case, mode, _OURS) for case in cases for mode in case.modes]
    for case, mode, name in sorted(ours + quick, key=lambda each: (each[0].id, each[1])):
        yield pytest.param(case, mode, name, id=f"{case.id}-{mode}-{name}")


@pytest.mark.parametrize(("case", "mode", "name"), list(_parameters()))
def test_speed(benchmark, case, mode, name):
    """Time one call; synchronous on a CPU, so nothing is left running when the clock stops."""
    _BENCH.take(case)
    if case.id not in _VERDICTS:
        _VERDICTS[case.id] = _BENCH.verdict(case, _OURS)
    verdict = _VERDICTS[case.id]
    assert verdict.colour == "green", f"refused: gate red, {verdict.detail}"
    try:
        timed = _BENCH.ours(case) if name == _OURS else _BENCH.peer(case, name)
    except CannotRun as reason:
        pytest.skip(str(reason))
    timed = _BENCH.step(timed, mode)
    benchmark.group = f"{case.id} {mode}"
    work = case.passes().of(mode)
    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, gate=verdict.colour)
    with timed.context():
        benchmark.pedantic(timed.call, rounds=5, iterations=1, warmup_rounds=2)
