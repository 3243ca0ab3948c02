"""Validation shared by the ops: an error names the argument, what it was, and the rule."""

import sys
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = sys.float_info.max


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def strided(
    op: str, name: str, value: Any, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> torch.Tensor:
    """`value` if it is a strided tensor of one of `dtypes`; `shape` is for the message alone."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor {shape}, got {type(value).__name__}")
    # A nested tensor may call itself strided, and has no sizes.
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {got}")
    if value.dtype not in dtypes:
        allowed = ", ".join(_name(dtype) for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be of dtype {allowed}, got {_name(value.dtype)}")
    return value


def tensor(
    op: str, name: str, value: Any, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> torch.Tensor:
    """`value` if it is a strided tensor of one of `dtypes` with as many dimensions as `shape`.

    `shape` is what the message shows, such as ``"(B, L, H, D)"``; a leading ``...`` frees the rest.
    """
    strided(op, name, value, shape, dtypes)
    if shape.startswith("(..."):
        if value.dim() < 1:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    elif value.dim() != (shape.count(",") + 1 if not shape.endswith(",)") else 1):
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    return value


def sizes(op: str, name: str, value: torch.Tensor, shape: str, expected: tuple) -> None:
    """Raise unless `value` has the `expected` sizes; None in `expected` leaves one free."""
    for got, want in zip(value.shape, expected, strict=True):
        if want is not None and got != want:
            wanted = ", ".join("*" if size is None else str(size) for size in expected)
            raise ValueError(
                f"{op}: {name} must have shape {shape} = ({wanted}), got {tuple(value.shape)}"
            )


def same_device(op: str, name: str, value: torch.Tensor, other: str, reference: torch.Tensor):
    """Raise unless both tensors lie on one device."""
    if value.device != reference.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other} ({reference.device}), "
            f"got {value.device}"
        )


def vector(
    op: str,
    name: str,
    value: Any,
    shape: str,
    size: int,
    other: str,
    reference: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Raise unless `value` is a tensor of `size` elements on the device of `reference`."""
    # All that is said below at once: beside a norm of microseconds each call of Python counts.
    if (
        isinstance(value, torch.Tensor)
        and not value.is_nested
        and value.layout is torch.strided
        and value.dtype in dtypes
        and value.dim() == 1
        and value.shape[0] == size
        and value.device == reference.device
    ):
        return
    tensor(op, name, value, shape, dtypes)
    sizes(op, name, value, shape, (size,))
    same_device(op, name, value, other, reference)


def same_dtype(op: str, name: str, value: torch.Tensor, other: str, reference: torch.Tensor):
    """Raise unless both tensors have one dtype."""
    if value.dtype != reference.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other} ({_name(reference.dtype)}), "
            f"got {_name(value.dtype)}"
        )


def boolean(op: str, name: str, value: Any) -> bool:
    """`value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    return value


def integer(op: str, name: str, value: Any) -> int:
    """`value` if it is an int (a symbolic one while compiling)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    return value


def number(
    op: str, name: str, value: Any, *, low: float = -_LARGEST, high: float = _LARGEST
) -> float:
    """`value` if it is an int or a float, finite and inside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    # Comparisons only: math.isfinite has no meaning for a symbolic float. They refuse NaN, the
    # infinities and the ints that no float holds.
    if not low <= value <= high:
        least = "" if low == -_LARGEST else f", at least {low:g}"
        most = "" if high == _LARGEST else f", at most {high:g}"
        raise ValueError(f"{op}: {name} must be a finite number{least}{most}, got {value}")
    return value
