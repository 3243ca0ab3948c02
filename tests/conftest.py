"""Fixtures of the whole suite."""

import os
import sys

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and type(tensor) is torch.Tensor:
        tensor.fill_(float("nan"))
    return tensor


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory that the package asks for is full of NaN: an unwritten output shows."""

    def wrap(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(tensor) if caller.startswith("tinyclip") else tensor

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Dynamo's cache and recompile limit are per process: no test may see another's."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
