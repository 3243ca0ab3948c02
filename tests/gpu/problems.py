"""The GPU tier's problems: few shapes, and in each of them every regime of values.

A new dtype, head dim, flag or layout is a kernel to compile, half a second to one and a half of a
processor; new values cost nothing. So an op has 13 shapes a dtype, spread evenly over the values
that it lists, with flags from the shape's seed, and 8 problems a shape: 312 an op, from about 80
kernels. The wide sweep of shapes is the interpreter tier's (tests/triton).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.support import attention, contrastive, contrastive_block, gelu_mlp, layer_norm
from tests.support.attention import DIMS
from tests.support.draw import LAYOUTS, REGIMES
from tests.support.problem import Problem
from tinyclip.ops.gelu_mlp import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = 13  # of an op in a dtype
LENGTHS = (1, 2, 17, 50, 77, 97, 197, 257, 577)
ROWS = (1, 7, 50, 77, 197, 400, 2000)
WIDTHS = (21, 32, 48, 64, 77, 100, 192, 256, 301, 384, 768, 1024)
NORM_WIDTHS = (*WIDTHS, 1280, 8192)
BATCHES = (1, 2, 17, 64, 127, 128, 129, 300, 700)
EMBEDDINGS = (1, 8, 32, 100, 384, 500, 512, 640, 768, 1024)
ALPHAS = (0.0, 0.3, 1.0)


def _attention(n: int) -> dict:
    """Every other shape has CLIP's 64 channels a head."""
    d = 64 if n % 2 else DIMS[n // 2 % len(DIMS)]
    return {"lengths": (LENGTHS[n % 9], LENGTHS[(n + 4) % 9]), "dims": (d,)}


def _packed(n: int) -> dict:
    return {**_attention(n), "lengths": (LENGTHS[n % 9],)}


def _mlp(n: int) -> dict:
    widths = (WIDTHS[n % 12], WIDTHS[(5 * n + 3) % 12])
    kinds = (ACTIVATIONS[n // 3 % len(ACTIVATIONS)],)
    return {"rows": (ROWS[n % 7],), "widths": widths, "activations": kinds}


def _norm(n: int) -> dict:
    return {"rows": (ROWS[(n + n // 7) % 7],), "widths": (NORM_WIDTHS[n % 14],)}


def _contrastive(n: int) -> dict:
    widths = (EMBEDDINGS[n % 10], EMBEDDINGS[(3 * n + 1) % 10])
    return {"rows": (BATCHES[n % 9],), "widths": widths, "alphas": (ALPHAS[n // 2 % 3],)}


def _passes(n: int) -> dict:
    """A block of M rows of N, with an offset and weights."""
    sizes = (BATCHES[n % 9], BATCHES[(n + 4) % 9])
    widths = (EMBEDDINGS[n % 10], EMBEDDINGS[(3 * n + 1) % 10])
    return {"sizes": sizes, "widths": widths, "alphas": (ALPHAS[n // 2 % 3],)}


_CHOICES = {
    "attention": (attention.make, _attention),
    "attention_qkv": (attention.make, _packed),
    "gelu_mlp": (gelu_mlp.make, _mlp),
    "layer_norm": (layer_norm.make, _norm),
    "contrastive_loss": (contrastive.make, _contrastive),
    "contrastive_passes": (contrastive_block.make, _passes),
}
# Who computes them. The MLP's two implementations by their names, the rest by the backend's.
IMPLEMENTED = (
    ("attention", "triton"),
    ("attention_qkv", "triton"),
    ("contrastive_loss", "cuda"),
    ("contrastive_loss", "triton"),
    ("contrastive_passes", "cuda"),
    ("contrastive_passes", "triton"),
    ("gelu_mlp", "pointwise"),
    ("gelu_mlp", "fused"),
    ("layer_norm", "triton"),
    *((op, "torch") for op in _CHOICES),
)


@contextmanager
def served_by(implementation: str):
    """Gives the backend's name; of the MLP's two the other is ruled out meanwhile."""
    from tinyclip.triton_kernels.gelu_mlp import IMPLEMENTATIONS, only

    if implementation in IMPLEMENTATIONS:
        with only(implementation):
            yield "triton"
    else:
        yield implementation


def problems(
    op: str,
    dtype: torch.dtype,
    implementation: str,
    device: str = "cuda",
    shapes: int = SHAPES,
    regimes=REGIMES,
) -> Iterator[Problem]:
    """The first `shapes` shapes of an op in a dtype, in each of the regimes."""
    make, choices = _CHOICES[op]
    fixed = {"packed": True} if op == "attention_qkv" else {}
    if op.startswith("contrastive"):  # dS is kept at the features' precision, in `torch` in 16 bit
        fixed = {"rounded_ds": implementation != "torch" or dtype.itemsize == 2}
    for n in range(DTYPES.index(dtype) * SHAPES, DTYPES.index(dtype) * SHAPES + shapes):
        shape = {"layouts": (LAYOUTS[(n + n // 14) % 7],), "dtypes": (dtype,), **choices(n)}
        for regime in regimes:
            yield make(n, device=device, regimes=(regime,), **fixed, **shape)
