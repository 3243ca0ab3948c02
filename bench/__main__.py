"""The command line of the benchmarks; docs/benchmarks.md explains every column.

python -m bench                           every CPU case, within five minutes
python -m bench attention/197 --list      what would be measured
python -m bench layer_norm --compare HEAD~1
python -m bench gpu                       on a GPU: the checks, then the kernels' times
python -m bench gpu --part steps          one of check, time, steps, tune, profile
python -m bench merge FILE ...            add results of another machine to bench/results
python -m bench resources                 registers, spills, shared memory of every Triton tile
python -m bench predict                   the roofs on an H200, as bench/notes.md has them
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from bench import compare, notes, registry, report
from bench.measure import FAILED, MEASURED, NOT_RUN, Settings
from bench.report import Report
from bench.run import Runner, order, plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Paired times of every op beside its peers, gated by an fp64 oracle.",
        epilog="ratio = the peer's time / ours: above 1, ours is faster.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="part of a case's op/name")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="only these")
    parser.add_argument("--backend", default="auto", help="which of tinyclip's backends is ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--compare", metavar="REV", help="beside another commit, not the peers")
    parser.add_argument("--max-seconds", type=float, default=290.0, help="budget (default: 290)")
    parser.add_argument("--row-seconds", type=float, default=0.3, help="timed rounds of a row")
    return parser


def main(argv: list[str]) -> int:
    """Run a command line; the exit status."""
    if argv == ["resources"]:
        from bench import resources  # needs triton

        return resources.main()
    if argv[:1] == ["gpu"]:
        from bench.gpu import command

        return command.main(argv[1:])
    if argv[:1] == ["merge"]:
        return _merge(argv[1:])
    if argv == ["predict"]:
        print(notes.predictions())
        return 0
    return _bench(_parser().parse_args(argv))


def _merge(files: list[str]) -> int:
    """Results that a GPU machine sent back, into the files of their commits."""
    for file in files:
        try:
            print(report.merge(Path(file), report.ROOT / "bench" / "results"))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


def _bench(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.max_seconds
    cases = registry.select(registry.cases(options.device), options.cases)
    if not cases:
        print(f"no case matches {options.cases}; --list names them all", file=sys.stderr)
        return 2
    if options.list:
        print(_listing(cases))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: no CUDA device is available.", file=sys.stderr)
        return 2
    settings = Settings(options.device, options.row_seconds, options.backend)
    measure = _beside_commit if options.compare else _beside_peers
    rows = measure(options, cases, settings, deadline).rows
    print(report.table(rows))
    return 1 if any(row["gate"] == "red" for row in rows) else 0


def _beside_commit(options, cases, settings, deadline) -> Report:
    peer = compare.peer(options.compare)
    pairs = [(case, mode) for case in cases for mode in case.modes]
    rows = [report.blank(case, mode, peer) for case, mode in pairs]
    written = Report(options.json, report.environment(settings.device), rows)
    compare.run(written, pairs, options.compare, settings, deadline, _progress)
    written.note("complete", True)
    return written


def _beside_peers(options, cases, settings, deadline) -> Report:
    entries, asked = plan(cases, options.peers), []
    rows = [entry.blank() for entry in entries]
    written = Report(options.json, report.environment(settings.device), rows)
    for entry in entries:
        # Compiling costs minutes on two cores, so there it has to be asked for.
        if entry.slow_start and settings.device == "cpu" and not options.peers:
            reason = f"left out on a CPU unless asked for: --peers {entry.peer}"
            written.update(entry.blank(), {"status": NOT_RUN, "reason": reason})
        else:
            asked.append(entry)
    with Runner(written, settings, _progress) as runner:
        runner.measure_machine(deadline)
        runner.run(order(asked), deadline)
    written.note("complete", True)
    return written


def _progress(row: report.Row) -> None:
    if sys.stderr.isatty() and row["status"] in (MEASURED, FAILED):
        print(f"{row['op']}/{row['case']} {row['mode']} {row['peer']}", file=sys.stderr)


def _listing(cases) -> str:
    lines = []
    for case in cases:
        whole = case.passes().of("forward+backward")
        size = f"{whole.flops / 1e9:.3g} GFLOP, {whole.bytes / 1e6:.4g} MB both ways"
        lines.append(f"{case.id}: {case.dtype}, {size}; {', '.join(case.peers)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
