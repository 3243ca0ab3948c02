"""Distillation: inherited weights, affinity mimicking, plans of several stages.

docs/distill.md is the page for users; `tinyclip.train` runs a plan.
"""

from tinyclip.distill.affinity import AffinityMimicking
from tinyclip.distill.inherit import TOWERS, inherit, inherited_layers
from tinyclip.distill.stages import Plan, Stage, read_plan

__all__ = [
    "TOWERS",
    "AffinityMimicking",
    "Plan",
    "Stage",
    "inherit",
    "inherited_layers",
    "read_plan",
]
