"""Whether the extension's CPU code can run here: what the `cpu` candidates of every op share."""

import torch

from tinyclip import _extension
from tinyclip.ops._dispatch import Cannot, Slower, Spec, constant_when_compiled


@constant_when_compiled
def _missing() -> str | None:
    return _extension.why_not()


def cpu_why_not(spec: Spec) -> Cannot | None:
    """What stands against any of it: tensors elsewhere, no extension."""
    if spec.device != "cpu":
        return Cannot(f"it computes on CPU tensors, these are on {spec.device}")
    missing = _missing()
    return None if missing is None else Cannot(missing)


def rows_why_not(spec: Spec) -> Cannot | Slower | None:
    """What stands against the passes over rows: LayerNorm's, and the activation's in the MLP."""
    if spec.dtype not in (torch.float32, torch.float64):
        return Cannot("fp32 and fp64 only")
    if 0 in spec.sizes.values():
        return Cannot("a size is zero")
    cannot = cpu_why_not(spec)
    if cannot is None and torch.compiler.is_compiling():
        return Slower("torch.compile fuses PyTorch's own with what stands beside it")
    return cannot
