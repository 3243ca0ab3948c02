"""The compiled extension ``tinyclip._C``: loaded once, on first use, and never a reason to crash.

The rest of the package asks ``load()`` for the module, and ``why_not()`` or ``cuda_why_not()`` for
the sentence that a user should read where something of it is missing.
"""

import json
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent


def require_installed() -> None:
    """Raise ImportError where ``tinyclip`` comes from a checkout that is not the installed one.

    A checkout's ``tinyclip`` folder lacks ``tinyclip.triton_kernels``: an editable install maps it
    there, a plain one has it in site-packages, out of reach behind the checkout.
    """
    if util.find_spec("tinyclip.triton_kernels") is None:
        raise ImportError(
            f"tinyclip was imported from the source checkout {_PACKAGE.parent}, which hides any "
            "installed package and is none itself: run from another folder, or install the "
            "checkout in editable mode with `pip install -e .`"
        )


def load() -> ModuleType | None:
    """The extension module, or None; ``why_not()`` then tells why."""
    return _load()[0]


def why_not() -> str | None:
    """Why there is no extension, or None where ``load()`` gives one."""
    return _load()[1]


def cuda_why_not(device: int | None = None) -> str | None:
    """Why the extension's CUDA code cannot run, or None where it can.

    Without ``device`` only versions are compared and no context is created; with a device index the
    device is asked whether this build holds code for it. The first call initialises CUDA, after
    which a fork of this process cannot use it: ask only where CUDA tensors are at hand.
    """
    if reason := why_not():
        return reason
    if reason := _cuda_status():
        return reason
    if device is None or (error := _probe(device)) is None:
        return None
    built = ", ".join(load().build_info()["architectures"])
    return f"the extension's CUDA code, built for {built}, cannot run on cuda:{device}: {error}"


def build_record() -> dict:
    """What the build wrote down about itself; empty where there was no build."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    import torch  # noqa: F401  # first, so that both share torch's OpenMP runtime

    try:
        return import_module("tinyclip._C"), None
    except (ImportError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "tinyclip._C"
        if not absent:
            return None, f"the extension cannot be loaded, reinstall tinyclip: {error}"
    record = build_record()
    if record.get("reason"):
        return None, f"the extension was not built: {record['reason']}"
    if record.get("extension"):
        return None, "the extension was built, but not for this Python: reinstall tinyclip"
    return None, "the extension was not built: install tinyclip with pip"


@cache
def _cuda_status() -> str | None:
    extension = load()
    built = extension.build_info()["cuda"]
    if built is None:
        reason = build_record().get("cuda_reason") or "the build gave no reason"
        return f"the extension holds no CUDA code: {reason}"
    status = extension.cuda_status()
    if status["driver"] == 0:
        return "there is no NVIDIA driver"
    # Within one major version an older driver runs newer code; cuda_probe finds the exceptions.
    if status["driver"] // 1000 < status["runtime"] // 1000:
        return (
            f"the driver supports CUDA {_version(status['driver'])}, the extension was built with "
            f"CUDA {_version(status['runtime'])}: update the driver, or reinstall tinyclip with an "
            "older nvcc"
        )
    if status["error"] or status["devices"] == 0:
        return f"no CUDA device can be used: {status['error'] or 'the driver lists none'}"
    return None


@cache
def _probe(device: int) -> str | None:
    return load().cuda_probe(device)


def _version(number: int) -> str:
    """1000 * major + 10 * minor, as CUDA counts, written as major.minor."""
    return f"{number // 1000}.{number % 1000 // 10}"
