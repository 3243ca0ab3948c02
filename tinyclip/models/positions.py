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


def resize_positions(
    table: Tensor,
    grid: int | tuple[int, int],
    mode: str = "open_clip",
    *,
    of: tuple[int, int] | None = None,
) -> Tensor:
    """Interpolate a grid of position embeddings; the class token's stays as it is.

    Args:
        table: (1 + rows*columns, C), any float dtype; row 0 is the class token's.
        grid: rows and columns of patches in the result; a number for a square.
        mode: whose result to reproduce: ``"open_clip"`` (antialias), ``"hf"`` (Hugging Face's
            ``interpolate_pos_encoding``), ``"tinyclip"`` (Microsoft's code, aligned corners).
        of: rows and columns of `table`; without it they are a square's.

    Returns:
        (1 + grid[0]*grid[1], C) in table's dtype; `table` itself where nothing changes.

    Raises:
        ValueError: `mode` is none of these, or `table` is not a class token and such a grid.
    """
    if mode not in MODES:
        raise ValueError(f"resize_positions: mode must be one of {tuple(MODES)}, got {mode!r}")
    rows = len(table) if table.dim() == 2 else 0
    old = of or (math.isqrt(max(rows - 1, 0)),) * 2
    if min(old) < 1 or math.prod(old) + 1 != rows:
        kind = f"a {old[0]} x {old[1]}" if of else "a square"
        raise ValueError(
            f"resize_positions: table must be (1 + rows*columns, C) of {kind} grid, got"
            f" {tuple(table.shape)}"
        )
    new = grid if isinstance(grid, tuple) else (grid, grid)
    if new == old:
        return table
    if min(new) < 1:
        raise ValueError(f"resize_positions: grid must be positive, got {grid}")
    work = torch.promote_types(table.dtype, torch.float32)
    patches = table[1:].to(work).T.reshape(1, -1, *old)
    patches = F.interpolate(patches, size=new, mode="bicubic", **MODES[mode])
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])
