"""The interpreter tier is a process of its own: Triton reads TRITON_INTERPRET when it defines."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    reason = "needs a process with TRITON_INTERPRET=1: make test starts one"
    for item in items:
        if "interpreter" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def interpreter():
    """Asked for by every test that interprets kernels."""
    import triton

    assert triton.knobs.runtime.interpret
