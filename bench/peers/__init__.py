"""Whom an op is measured beside. A peer that cannot run says why; it is never left out.

Every peer computes the same function of the same tensors as the op (tests/bench checks that), in
the layout its own project would hold them. SDPA's backend is always pinned: its default changed
from one PyTorch to the next, and an unpinned number cannot be read.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import Timed

Tensors = dict[str, Tensor]
Maths = Callable[[Tensors, dict], Tensor | tuple[Tensor, ...]]


class CannotRun(Exception):
    """Why a peer is not measured here; becomes the row's reason."""


class Peer(NamedTuple):
    """``build(tensors, sizes, device)`` -> the call to time, or raises `CannotRun`."""

    build: Callable[[Tensors, dict, str], Timed]
    slow_start: bool = False  # compiles for seconds: comes last, and on a CPU only when asked for
    engine: bool = False  # one of our own: gated as ours is, and the row's figures are its own


def plain(maths: Maths) -> Peer:
    """A peer that is just a function of the tensors."""
    return Peer(lambda t, s, device: Timed(lambda: maths(t, s)))


def compiled(maths: Maths) -> Peer:
    """`maths` under torch.compile, tuned as far as it goes on a GPU.

    Without its own CUDA graphs: whether launches are graphed is decided for both sides alike.
    """

    def build(t: Tensors, s: dict, device: str) -> Timed:
        names = tuple(t)
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
        # Past eight shapes of one function Dynamo would quietly run eager: forget the others.
        torch.compiler.reset()

        @functools.partial(torch.compile, mode=mode, dynamic=False, fullgraph=True)
        def compiled_maths(*tensors: Tensor):
            return maths(dict(zip(names, tensors, strict=True)), s)

        return Timed(lambda: compiled_maths(*t.values()))

    return Peer(build, slow_start=True)


def open_clip(module: str) -> ModuleType:
    """A module of open_clip, or why there is none."""
    try:
        return importlib.import_module(f"open_clip.{module}")
    except ImportError as error:
        if importlib.util.find_spec("open_clip") is None:
            raise CannotRun("open_clip is not installed") from None
        raise CannotRun(f"open_clip cannot be imported: {error}") from None
