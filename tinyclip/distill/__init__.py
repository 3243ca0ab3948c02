"""Distillation: inherited weights, learned masks, affinity mimicking, plans of several stages.

docs/distill.md is the page for users; `tinyclip.train` runs a plan.
"""

from tinyclip.distill.affinity import AffinityMimicking
from tinyclip.distill.inherit import TOWERS, inherit, inherited_layers
from tinyclip.distill.masks import Masked, Masks, Ramp, prunable_parameters, sparsity_of
from tinyclip.distill.prune import prune
from tinyclip.distill.stages import Plan, Stage, read_plan

__all__ = [
    "TOWERS",
    "AffinityMimicking",
    "Masked",
    "Masks",
    "Plan",
    "Ramp",
    "Stage",
    "inherit",
    "inherited_layers",
    "prunable_parameters",
    "prune",
    "read_plan",
    "sparsity_of",
]
