"""A process whose tensors lie on cuda:1: what the extension leaves current, and initialized.

    python -m tests.gpu.second_device

First nothing has used cuda:0, then it has a context. Prints a line for each check that fails.
"""

import ctypes
import sys
from unittest import mock

import torch
import torch.nn.functional as F

import tinyclip
from tinyclip import _extension, ops
from tinyclip.ops import _panels_cuda


def state(driver) -> dict:
    """What the driver and torch say is current in this thread, and whether cuda:0 is in use."""
    context, flags, active = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    first = driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
    assert first == 0
    return {
        "the driver's context": context.value,
        "torch's device": torch.cuda.current_device(),
        "cuda:0 initialized": bool(active.value),
    }


def main() -> int:
    """Every call of the extension that sets a device, one that fails among them; the failures."""
    driver, failures = ctypes.CDLL("libcuda.so.1"), 0
    features = [F.normalize(torch.randn(300, 64), dim=1) for _ in range(2)]
    none = torch.cuda.device_count()  # no device has this number
    for first in (False, True):
        if first:
            torch.zeros(1, device="cuda:0")
        image, text = (x.to("cuda:1").requires_grad_() for x in features)
        before = state(driver)
        print(f"before: {before}")

        def unchanged(when: str, before=before) -> bool:
            after = state(driver)
            print(
                *(f"{when}: {k} {before[k]}, {after[k]}\n" for k in before if before[k] != after[k])
            )
            return after == before

        with tinyclip.backend("cuda"):
            failures += _extension.load().cuda_probe(1) is not None
            failures += not unchanged("probe")
            failures += _extension.load().cuda_probe(none) is None
            failures += not unchanged("probe of no device")
            value = ops.contrastive_loss(image, text, 10.0)
            failures += not unchanged("forward")
            value.backward()
            failures += not unchanged("backward")
            with mock.patch.object(_panels_cuda, "_launch", lambda x: (none, 0)):
                try:
                    ops.contrastive_loss(image, text, 10.0)
                except RuntimeError as error:
                    print(error)
                else:
                    failures += 1
            failures += not unchanged("exception")
    return failures


if __name__ == "__main__":
    sys.exit(main())
