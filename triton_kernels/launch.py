"""A launch as a value: what a kernel is called with, to run it or to compile it ahead of time."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

LOG2E = 1.4426950408889634


class Launch(NamedTuple):
    """A kernel, its number of programs (grid axis 0), its arguments by name, and its warps."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int

    def run(self, on: torch.Tensor) -> None:
        """Launch on the device of `on`, whichever is current, in the current stream."""
        with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
            self.kernel[(self.programs,)](
                **self.arguments, num_warps=self.num_warps, enable_fp_fusion=True
            )

    def milliseconds(self, on: torch.Tensor) -> float:
        """The median time of a launch; writes what a launch writes."""
        from triton.testing import do_bench

        return do_bench(lambda: self.run(on), return_mode="median")


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: as torch.get_float32_matmul_precision() says for fp32 products."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
