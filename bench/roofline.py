"""The floor under a time: what the machine's own ceilings leave no implementation below.

Ceilings are measured in the run that uses them (a large copy, a large matrix product), because a
datasheet's rates are not this machine's. ``H200`` holds measured constants for predictions made
where there is no GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench import timing
from bench.work import Work


class Machine(NamedTuple):
    """Ceilings: TB/s of a copy (bytes read plus written) and TFLOP/s of a matrix product."""

    copy_tb_s: float
    gemm_tflops: float


H200 = Machine(copy_tb_s=4.3, gemm_tflops=790.0)  # bf16 product, random data


def roof_ms(work: Work, machine: Machine) -> float:
    """The larger of the two floors, in milliseconds."""
    arithmetic = work.flops / (machine.gemm_tflops * 1e12)
    memory = work.bytes / (machine.copy_tb_s * 1e12)
    return 1e3 * max(arithmetic, memory)


def percent(work: Work, machine: Machine, ms: float) -> float:
    """How much of the roof a time reaches; above 100 only where a cache holds the data."""
    return 100 * roof_ms(work, machine) / ms


def measure(device: str) -> Machine:
    """The ceilings of this machine: bf16 product on a GPU, fp32 on a CPU, random data in both."""
    return Machine(_copy_tb_s(device), _gemm_tflops(device))


def _copy_tb_s(device: str) -> float:
    # far larger than any cache, into memory that is already there
    elements, dtype = (2**31, torch.bfloat16) if device == "cuda" else (2**26, torch.float32)
    source = torch.empty(elements, dtype=dtype, device=device).uniform_(-1, 1)
    target = torch.empty_like(source).fill_(0)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device) / 1e12


def _gemm_tflops(device: str) -> float:
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: torch.mm(a, b), device) / 1e12


def _fastest(call: Callable[[], object], device: str) -> float:
    """Seconds: a ceiling is the best the machine was seen to do, so the least of a few."""
    clock = timing.clock(device)
    clock(call, 2)
    return min(clock(call, 1) for _ in range(8)) / 1e3
