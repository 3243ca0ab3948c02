"""Small stand-ins for the registry's cases, so that a timing test takes a fraction of a second."""

import dataclasses

import pytest
import torch

from bench import registry


@pytest.fixture
def norm_case():
    """A layer_norm case whose call takes about a millisecond."""
    case = registry.find("layer_norm/4096x512", "cpu")
    return dataclasses.replace(case, sizes={"M": 2048, "C": 256}, reduced={"M": 64})


@pytest.fixture(autouse=True)
def one_thread():
    """Two test processes with every thread each would fight over the processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
