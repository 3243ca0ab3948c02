"""CLIP training and TinyCLIP distillation on fused kernels of our own.

Importing this package imports neither torch nor anything else that is heavy: every public name is
looked up on first use (PEP 562), so that ``tinyclip --help`` answers at once and a machine without
triton, a compiler or a GPU can import it.
"""

from importlib import import_module

from tinyclip._extension import require_installed

require_installed()

__version__ = "0.1.0"

# name -> "module" or "module:attribute"
_PUBLIC = {
    "ops": "tinyclip.ops",
    "Teacher": "tinyclip.ops:Teacher",
    "BackendUnavailable": "tinyclip.ops:BackendUnavailable",
    "backend": "tinyclip.ops:backend",
    "explain": "tinyclip.ops:explain",
    "nn": "tinyclip.nn",
    "models": "tinyclip.models",
    "create_model": "tinyclip.models:create_model",
    "list_models": "tinyclip.models:list_models",
    "save": "tinyclip.models:save",
    "accelerate": "tinyclip.integrations:accelerate",
    "restore": "tinyclip.integrations:restore",
    "load": "tinyclip.integrations:load",
    "get_tokenizer": "tinyclip.integrations:get_tokenizer",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tinyclip' has no attribute {name!r}; it has {__all__}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
