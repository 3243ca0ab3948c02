"""Whether Triton's kernels can run here at all: what the `triton` candidates of every op share."""

import importlib.util
import os

import torch

from tinyclip.ops._dispatch import Cannot, Slower, Spec, fp64_why_not


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook that refuses it
        return False


_INSTALLED = _installed()
# Triton reads it when a kernel is defined; so it holds for the life of the process.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_why_not(spec: Spec) -> Cannot | Slower | None:
    """Why no Triton kernel can run a call, or None: no triton, no device for it, no such dtype."""
    if not _INSTALLED:
        return Cannot("triton is not installed")
    fp64 = fp64_why_not(spec)
    if fp64 is not None:
        return fp64
    if _INTERPRETED:
        if spec.dtype == torch.bfloat16:
            return Cannot("Triton's interpreter multiplies the bits of bf16 as integers")
        return Slower("interpreted: TRITON_INTERPRET=1 is for tests")
    if spec.device != "cuda":
        return Cannot(
            f"needs a CUDA device or TRITON_INTERPRET=1, the tensors are on {spec.device}"
        )
    if spec.capability < (8, 0):
        return Cannot(f"needs compute capability 8.0, the device has {spec.capability}")
    return None
