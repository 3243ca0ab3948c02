"""`tinyclip train` under torchrun, of which one rank is killed at a step of its first life.

torchrun ... -m tests.train.restarts RANK STEP train ...
"""

import os
import signal
import sys

from tinyclip import cli
from tinyclip.train import command, loop


def main() -> int:
    rank, at, *words = sys.argv[1:]
    doomed = os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def fit(*args, **kwargs):
        def die(step, model):
            if doomed and step == int(at):
                os.kill(os.getpid(), signal.SIGKILL)

        return loop.fit(*args, at_step=die, **kwargs)

    command.fit = fit
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
