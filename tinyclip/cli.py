"""The command line: ``tinyclip COMMAND ...``.

A command is a row of COMMANDS and a module with ``add_arguments(parser)`` and ``run(args) -> int``;
the module is imported only when its command is given, so that help and version answer at once. Exit
status: 0 when all is well, 1 when the command failed, 2 when it was called wrongly.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from tinyclip import __version__


class Command(NamedTuple):
    name: str
    module: str
    help: str


COMMANDS = (
    Command(
        "doctor", "tinyclip.env", "what is installed, and which backend would run each operation"
    ),
    Command(
        "convert",
        "tinyclip.integrations.convert",
        "a checkpoint of any published layout to a folder in another",
    ),
    Command(
        "train",
        "tinyclip.train.command",
        "a CLIP from images and captions; with torchrun on many processes",
    ),
    Command(
        "distill",
        "tinyclip.train.distill_command",
        "a small CLIP from a large one: inherited weights, affinity mimicking, in stages",
    ),
    Command(
        "eval",
        "tinyclip.eval.command",
        "zero-shot accuracy and retrieval recall of a model, as a table and JSON",
    ),
    Command(
        "demo",
        "tinyclip.demo.command",
        "train a CLIP on scanned digits, distill a small one four ways, and report",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (the process's arguments by default) names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has had enough, as in `tinyclip doctor | head`; nothing more may be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            traceback.print_exc()
        print(f"tinyclip {args.command}: {_sentence(error)}", file=sys.stderr)
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the one command that ``argv`` names."""
    parser = argparse.ArgumentParser(
        prog="tinyclip",
        description="CLIP training and TinyCLIP distillation on fused kernels of our own.",
    )
    parser.add_argument("--version", action="version", version=f"tinyclip {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, print where it was raised, too"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, module, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            command = import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def _sentence(error: BaseException) -> str:
    lines = (line.rstrip() for line in str(error).strip().splitlines())
    return "\n".join(line for line in lines if line) or type(error).__name__
