"""A launch as a value: what a kernel is called with, to run it or to compile it ahead of time."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

LOG2E = 1.4426950408889634


class Launch(NamedTuple):
    """A kernel, its number of programs (grid axis 0), its arguments by name, and its warps.

    `max_registers` of a thread, where more programs at once are worth more than they cost. Without
    `fma` a product is rounded before anything is added to it.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    max_registers: int | None = None
    fma: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told, at run time and ahead of time."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": self.fma}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    def run(self, on: torch.Tensor) -> None:
        """Launch on the device of `on`, whichever is current, in the current stream."""
        with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)

    def milliseconds(self, on: torch.Tensor) -> float:
        """The median time of a launch; writes what a launch writes."""
        return time_call(lambda: self.run(on), on)


def time_call(call: Callable[[], object], on: torch.Tensor) -> float:
    """The median milliseconds of a call, on the device of `on`."""
    from triton.testing import do_bench

    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        return do_bench(call, return_mode="median")


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: as torch.get_float32_matmul_precision() says for fp32 products."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
