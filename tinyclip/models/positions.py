"""Position tables for another number of patches, in the conventions of three projects."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# All are bicubic; where the corners lie and whether shrinking low-passes is what differs.
MODES = {
    "tinyclip": {"align_corners": True},
    "open_clip": {"align_corners": False, "antialias": True},
    "hf": {"align_corners": False},
}


def resize_positions(table: Tensor, grid: int, mode: str = "open_clip") -> Tensor:
    """Interpolate a square grid of position embeddings; the class token's stays as it is.

    Args:
        table: (1 + g*g, C), any float dtype; row 0 is the class token's.
        grid: patches along one side of the result.
        mode: whose result to reproduce: ``"open_clip"`` (antialias), ``"hf"`` (Hugging Face's
            ``interpolate_pos_encoding``), ``"tinyclip"`` (Microsoft's code, aligned corners).

    Returns:
        (1 + grid*grid, C) in table's dtype; `table` itself where nothing changes.

    Raises:
        ValueError: `mode` is none of these, or `table` is not a class token and a square grid.
    """
    if mode not in MODES:
        raise ValueError(f"resize_positions: mode must be one of {tuple(MODES)}, got {mode!r}")
    side = math.isqrt(max(len(table) - 1, 0)) if table.dim() == 2 else 0
    if side < 1 or side * side + 1 != len(table):
        raise ValueError(
            "resize_positions: table must be (1 + g*g, C) of a square grid, got"
            f" {tuple(table.shape)}"
        )
    if grid == side:
        return table
    if grid < 1:
        raise ValueError(f"resize_positions: grid must be positive, got {grid}")
    work = torch.promote_types(table.dtype, torch.float32)
    patches = table[1:].to(work).T.reshape(1, -1, side, side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", **MODES[mode])
    return torch.cat([table[:1], patches.reshape(-1, grid * grid).T.to(table.dtype)])
