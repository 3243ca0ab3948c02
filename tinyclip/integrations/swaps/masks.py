"""What an attention mask means: causal, some keys hidden, or neither.

Letters: B batch, H heads, L tokens (Lq queries, Lk keys).
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST_SEEN = 16


class Pattern(NamedTuple):
    """A mask in the words of `ops.attention`: causal, and key_mask (B or 1, Lk) or None."""

    causal: bool
    key_mask: Tensor | None


class Masks:
    """Reads each mask once, and knows the causal masks that a model holds.

    Reading waits for the device. A mask that is the same unchanged tensor is not read again. Inside
    a compiled graph nothing can be read: there, causal masks that the model holds are recognised,
    as buffers or plain attributes, and all others stay unknown.
    """

    def __init__(self, model: nn.Module):
        self._seen: dict[tuple[int, str], tuple[weakref.ref, int, Pattern | None]] = {}
        self._held: list[tuple[nn.Module, str]] = []
        for module in model.modules():
            for name, value in [*vars(module).items(), *module._buffers.items()]:
                if _could_be_causal(value) and self.read(value, "hidden") == Pattern(True, None):
                    self._held.append((module, name))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": {}}  # a weak reference is neither copied nor pickled

    def read(self, mask: Tensor, true_is: str, heads: int = 1) -> Pattern | None:
        """The pattern of a mask, None if it has another or cannot be known.

        Args:
            mask: (Lq, Lk), (B H, Lq, Lk) or (B or 1, H or 1, Lq, Lk): bool, or float with 0 where a
                query sees a key and -inf (or its dtype's lowest number) where it does not.
            true_is: ``"visible"`` or ``"hidden"``: what True means in a bool mask.
            heads: H, to split the first dimension of a mask that has three.
        """
        if torch.compiler.is_compiling():
            # The mask that a model holds is hidden where True, as torch's and open_clip's are.
            if true_is == "hidden" or mask.dtype != torch.bool:
                for module, name in self._held:
                    if getattr(module, name) is mask:
                        return Pattern(True, None)
            return None
        if mask.is_inference():  # it has no version: that it is unchanged cannot be known
            return _pattern(mask, true_is, heads)
        key = id(mask), true_is
        seen = self._seen.get(key)
        if seen is not None and seen[0]() is mask and seen[1] == mask._version:
            return seen[2]
        pattern = _pattern(mask, true_is, heads)
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen[key] = weakref.ref(mask), mask._version, pattern
        return pattern


def _could_be_causal(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.dim() == 2
        and value.shape[0] == value.shape[1] > 1
        and (value.dtype == torch.bool or value.is_floating_point())
        and value.device.type != "meta"
    )


def _pattern(mask: Tensor, true_is: str, heads: int) -> Pattern | None:
    """Read the mask: one transfer to the host."""
    if mask.requires_grad:  # a bias that is learned is none of these, whatever its present values
        return None
    if mask.dtype == torch.bool:
        visible = mask if true_is == "visible" else ~mask
        sound = torch.ones((), dtype=torch.bool, device=mask.device)
    elif mask.is_floating_point():
        visible = mask == 0
        sound = (visible | (mask <= torch.finfo(mask.dtype).min)).all()
    else:
        return None
    if visible.dim() == 2:
        visible = visible[None, None]
    elif visible.dim() == 3:
        if visible.shape[0] % heads:
            return None
        visible = visible.unflatten(0, (-1, heads))
    if visible.dim() != 4 or 0 in visible.shape:
        return None
    queries, keys = visible.shape[-2:]
    # The last query sees every key that is not hidden, in a causal mask and in others.
    key_mask = visible[:, 0, -1]
    same = key_mask[:, None, None, :]
    plain = (visible == same).all()
    if queries == keys:
        past = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        causal = (visible == (same & past)).all()
    else:
        causal = torch.zeros_like(plain)
    sound, plain, causal, everything = torch.stack([sound, plain, causal, key_mask.all()]).tolist()
    if not sound or not (plain or causal):
        return None
    return Pattern(not plain, None if everything else key_mask)
