"""Training: `fit` is the loop, `Settings` its numbers, `Run` the folder that survives.

docs/train.md is the page for users.
"""

from tinyclip.train.loop import Summary, TrainingError, fit
from tinyclip.train.objective import Contrastive
from tinyclip.train.optimizer import learning_rate, make_optimizer
from tinyclip.train.run import Run
from tinyclip.train.settings import PRECISIONS, Settings

__all__ = [
    "PRECISIONS",
    "Contrastive",
    "Run",
    "Settings",
    "Summary",
    "TrainingError",
    "fit",
    "learning_rate",
    "make_optimizer",
]
