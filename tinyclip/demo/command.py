"""``tinyclip demo``: train a CLIP, inherit, distill, compare, and write a report."""

import argparse
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tinyclip.demo import report
from tinyclip.demo.recipe import Recipe
from tinyclip.demo.runs import Row, read_scenes, run_seed
from tinyclip.train.lock import LOCK
from tinyclip.train.run import environment

_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder, made anew (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a version of one to two minutes: it shows no claim"
    )
    parser.add_argument(
        "--noise",
        type=float,
        metavar="FRACTION",
        help="train every student once more with so many of its training captions wrong, as 0.3",
    )


def run(args: argparse.Namespace) -> int:
    """Train, measure, write; say what was found."""
    if args.seeds < 1:
        raise ValueError(f"--seeds must be 1 or more, got {args.seeds}")
    if args.noise is not None and not 0 < args.noise <= 1:
        raise ValueError(f"--noise must be above 0 and at most 1, got {args.noise:g}")
    recipe = Recipe().quick() if args.quick else Recipe()
    if args.noise is not None:
        recipe = replace(recipe, noises=(0.0, args.noise))
    _make_room(args.out)
    test = read_scenes("test", recipe.test_scenes)
    rows: list[Row] = []
    models = {}
    for seed in range(_SEED, _SEED + args.seeds):
        found, trained = run_seed(seed, recipe, args.out, _say)
        rows += found
        models = models or trained
    results = {
        "seeds": args.seeds,
        "quick": args.quick,
        "recipe": asdict(recipe),
        "environment": environment(torch.device("cpu"), 1),
        "runs": rows,
    }
    files = report.write(args.out, results, models, test)
    print(_plain(report.table(rows)), *report.claim(rows), sep="\n")
    if args.quick:
        print("This was the quick version; without --quick it trains long enough for the claim.")
    print(
        f"The report is {files[2]}; the models are beside it, as {args.out / f'both-{_SEED}/model'}"
    )
    return 0


def _make_room(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if not out.exists():
        return
    if any(out.iterdir()) and not (out / "results.json").is_file() and not _unfinished(out):
        raise ValueError(f"--out {out} holds files that are no demo's: give another folder")
    shutil.rmtree(out)


def _unfinished(out: Path) -> bool:
    """Whether all there is are the runs of a demo that was interrupted."""
    return all(
        (path / "config.json").is_file()
        or (path.is_dir() and all(inner.name == LOCK for inner in path.iterdir()))
        for path in out.iterdir()
    )


def _plain(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
