"""The shipped launches of the GELU-MLP and of LayerNorm, on tensors without memory."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tinyclip.triton_kernels import gelu_mlp, gelu_mlp_pointwise, layer_norm, tuning
from tinyclip.triton_kernels.gelu_mlp_fused import plan_gelu_mlp_bwd, plan_gelu_mlp_fwd
from tinyclip.triton_kernels.launch import Launch

ARCHITECTURES = (80, 90, 100)
_ROWS = 51_200


class Rows(NamedTuple):
    """A problem of rows; `products` whether it multiplies matrices, on tensor cores in 16 bit."""

    shape: str
    products: bool
    useful_fraction: float

    def useful(self, tile: tuple) -> float:
        """The elements that count over those that are computed, whatever the tile."""
        return self.useful_fraction


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def fused_launch(
    kind: str, dtype: torch.dtype, activation: str, gated: bool, tile, c: int = 768
) -> Launch:
    """The product and its epilogue of c channels and 4 c hidden ones, every gradient wanted."""
    f = 4 * c
    x, pre = _meta(_ROWS, c, dtype=dtype), _meta(_ROWS, f, dtype=dtype)
    gate = _meta(f) if gated else None
    if kind == "fwd":
        w1, b1 = _meta(f, c, dtype=dtype), _meta(f, dtype=dtype)
        return plan_gelu_mlp_fwd(x, w1, b1, gate, activation, pre, pre, tile)
    sums = _meta(_ROWS // tile.block_m, f)
    outputs = (pre, pre, sums, sums if gated else None)
    return plan_gelu_mlp_bwd(x, _meta(c, f, dtype=dtype), pre, gate, activation, outputs, tile)


def _fused() -> Iterator[tuple]:
    """Every fused row of the table, with a gate and without."""
    for row in tuning.table("gelu_mlp"):
        tile = gelu_mlp.Tile(*row["tile"])
        if tile.implementation != "fused":
            continue
        dtype = torch.bfloat16 if row["bits"] == 16 else torch.float32
        for arch in [row["arch"]] if row["bits"] == 16 else ARCHITECTURES:
            for activation, gated in (("gelu", False), ("gelu_tanh", True)):
                name = f"mlp-{row['kind']} {str(dtype).removeprefix('torch.')}"
                problem = Rows(f"768{'g' if gated else ''}", True, 1.0)
                launch = fused_launch(row["kind"], dtype, activation, gated, tile)
                yield name, arch, tile, problem, launch


def _pointwise() -> Iterator[tuple]:
    pre = _meta(_ROWS, 3072, dtype=torch.bfloat16)
    gate, sums = _meta(3072), _meta(_ROWS // gelu_mlp_pointwise.ROWS_OF_A_SUM, 3072)
    problem = Rows("3072g", False, 1.0)
    for arch in ARCHITECTURES:
        for activation in ("gelu", "gelu_tanh", "quick_gelu"):
            up = gelu_mlp_pointwise.plan_pointwise_fwd(pre, gate, activation, pre)
            down = gelu_mlp_pointwise.plan_pointwise_bwd(
                pre, pre, gate, activation, (pre, pre, sums, sums)
            )
            half = _meta(_ROWS, 3072, dtype=torch.float16)
            wide = gelu_mlp_pointwise.plan_pointwise_bwd(
                _meta(_ROWS, 3072), half, gate, activation, (half, half, sums, sums)
            )
            launches = (("fwd", up), ("bwd", down), ("bwd fp16", wide))  # its dhidden is fp32
            for kind, launch in launches:
                tile = tuning.Tile(
                    launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"], launch.num_warps, 1
                )
                yield f"act-{kind} {activation}", arch, tile, problem, launch


def norm_launch(kind: str, c: int, full: bool, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """LayerNorm of c channels; `full` with a residual (or its gradient) and a mask."""
    x, weight, statistic = _meta(_ROWS, c, dtype=dtype), _meta(c), _meta(_ROWS)
    mask, beside = (_meta(c, dtype=torch.bool), x) if full else (None, None)
    if kind == "fwd":
        outputs = (x, x, statistic, statistic)
        return layer_norm.plan_layer_norm_fwd(x, beside, weight, weight, mask, 1e-5, outputs)
    run = layer_norm.run_of_rows(_ROWS, c)
    sums = _meta(-(-_ROWS // run), c)
    fixed = (x, beside, x, statistic, statistic, weight, mask)
    return layer_norm.plan_layer_norm_bwd(*fixed, (x, sums, sums), run)


def _norms() -> Iterator[tuple]:
    for arch in ARCHITECTURES:
        for kind in ("fwd", "bwd"):
            for c, full in ((512, True), (768, False), (768, True), (1280, True), (8192, True)):
                launch = norm_launch(kind, c, full)
                block_c = launch.arguments["BLOCK_C"]
                tile = tuning.Tile(launch.arguments["ROWS"], block_c, launch.num_warps, 1)
                problem = Rows(f"{c}{'rm' if full else ''}", False, c / block_c)
                yield f"norm-{kind} bfloat16", arch, tile, problem, launch


def launches() -> Iterator[tuple]:
    """(name, architecture, tile, problem, launch) of every one."""
    yield from _fused()
    yield from _pointwise()
    yield from _norms()
