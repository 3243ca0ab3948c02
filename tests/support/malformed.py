"""A table of malformed calls: a row changes one thing about a valid call.

Run as a script, it tries every row and prints one line for each that misbehaves.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from tinyclip import ops

B, L, H, D = 2, 3, 2, 4
NAN, INF = float("nan"), float("inf")
LEFT_OUT = object()


class Row(NamedTuple):
    """The valid call of `op` with `changes` put over its keywords, and what it has to raise."""

    op: str
    label: str
    changes: dict[str, Any]
    error: type[Exception]
    names: str

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}"


def rows(
    op: str, error: type[Exception], argument: str, *, names: str = "", **values: Any
) -> Iterator[Row]:
    """A row for each of the values, labelled by keyword, that `argument` must not have."""
    for label, value in values.items():
        yield Row(op, f"{argument}-{label}", {argument: value}, error, names or argument)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of the shape with unremarkable values."""
    return torch.linspace(0.1, 1.0, torch.Size(shape).numel()).reshape(shape).to(dtype)


def _teacher(m: int = 3, n: int = 3, scale: Any = 2.0) -> ops.Teacher:
    return ops.Teacher(some(m, 5), some(n, 5), scale)


def _mask(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


_PASS = {"a": some(3, D), "b": some(4, D), "teacher": _teacher(n=4), "offset": 1}
_STATS = ops.Stats(some(5, 3), some(5, 4), some(3))
VALID: dict[str, dict[str, Any]] = {
    "attention": {
        **{name: some(B, L, H, D) for name in "qkv"},
        "key_mask": _mask(B, L),
        "head_gate": some(H),
    },
    "attention_qkv": {
        "qkv": some(B, L, 3, H, D),
        "key_mask": _mask(B, L),
        "head_gate": some(B, H),
    },
    "gelu_mlp": {
        "x": some(3, 4),
        "fc1_weight": some(6, 4),
        "fc1_bias": some(6),
        "fc2_weight": some(5, 6),
        "fc2_bias": some(5),
        "hidden_gate": some(6),
    },
    "layer_norm": {
        "x": some(3, 4),
        "weight": some(4),
        "bias": some(4),
        "residual": some(3, 4),
        "channel_mask": _mask(4),
    },
    "contrastive_loss": {
        "image": some(3, D),
        "text": some(3, D),
        "logit_scale": torch.tensor(2.0),
        "teacher": _teacher(),
        "alpha": 0.5,
    },
    "contrastive_stats": {**_PASS, "scale": torch.tensor([2.0])},
    "contrastive_grads": {
        **_PASS,
        "scale": torch.tensor(2.0),
        "stats": _STATS,
        "row_weight": some(3),
        "col_weight": some(4),
        "alpha": 0.5,
    },
}
PASSES = ("contrastive_stats", "contrastive_grads")
MASKS = ("key_mask", "channel_mask")
OPTIONAL = (*MASKS, "head_gate", "fc1_bias", "fc2_bias", "hidden_gate", "weight", "bias")

# What no tensor argument may be, made from what it is in the valid call.
Spoil = Callable[[torch.Tensor], Any]
OF_WRONG_TYPE: dict[str, Spoil] = {
    "list": lambda x: [x.tolist()],
    "numpy": lambda x: x.numpy(),
    "its_shape": lambda x: x.shape,
    "string": lambda x: "tensor",
    "int64": lambda x: x.long(),
    "complex64": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e5m2),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.as_nested_tensor([x, x], layout=torch.strided),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
}
OF_WRONG_VALUE: dict[str, Spoil] = {
    "two_dims_more": lambda x: x[None, None],
    "one_dim_less": lambda x: x.flatten() if x.dim() > 1 else x[0],
    "wider": lambda x: x.repeat_interleave(2, -1),
    "narrower": lambda x: x[..., :-1],
    "empty": lambda x: x[..., :0],
    "on_meta": lambda x: x.to("meta"),
}
# The first tensor sets sizes and device, so it is the second that is found to differ from it.
LEADING = {
    "attention": ("q", "k"),
    "attention_qkv": ("qkv", "key_mask"),
    "gelu_mlp": ("x", "fc1_weight"),
    "layer_norm": ("x", "weight"),
    "contrastive_loss": ("image", "text"),
    "contrastive_stats": ("a", "b"),
    "contrastive_grads": ("a", "b"),
}
RELATIVE = ("wider", "narrower", "empty", "on_meta")


def _tensors() -> Iterator[Row]:
    """Every tensor argument of every op, spoiled in every way."""
    for op, valid in VALID.items():
        for name, value in valid.items():
            if not isinstance(value, torch.Tensor):
                continue
            types, values = dict(OF_WRONG_TYPE), dict(OF_WRONG_VALUE)
            if name in MASKS:
                types |= {"float32": torch.Tensor.float, "uint8": torch.Tensor.byte}
            else:
                types["bool_tensor"] = torch.Tensor.bool
            if name not in (*OPTIONAL, "residual"):
                types["none"] = lambda x: None
            if name in ("logit_scale", "scale"):
                values = {"two": lambda x: x.expand(2), "empty": lambda x: x.reshape(1)[:0]}
                values |= {"1x1": lambda x: x.reshape(1, 1), "on_meta": OF_WRONG_VALUE["on_meta"]}
            elif name in ("x", "residual"):  # of any number of dimensions
                del values["two_dims_more"], values["one_dim_less"]
                values["no_dim"] = lambda x: x[0, 0]
            elif name == "qkv":  # whose D is its own affair
                values = {k: values[k] for k in ("two_dims_more", "one_dim_less", "on_meta")}
            for error, kinds in ((TypeError, types), (ValueError, values)):
                for kind, spoil in kinds.items():
                    first, second = LEADING[op]
                    blamed = second if name == first and kind in RELATIVE else name
                    yield from rows(op, error, name, names=blamed, **{kind: spoil(value)})


def _numbers() -> Iterator[Row]:
    """Every number of every op."""
    owners = {
        "scale": ("attention", "attention_qkv", *PASSES),
        "eps": ("layer_norm",),
        "logit_scale": ("contrastive_loss",),
        "alpha": ("contrastive_loss", "contrastive_grads"),
        "row_weight": ("contrastive_grads",),
        "col_weight": ("contrastive_grads",),
    }
    for name, group in owners.items():
        values = {"nan": NAN, "inf": INF, "minus_inf": -INF, "int_past_any_float": 10**400}
        types = {"bool": True, "complex": 1j, "numpy_scalar": np.float32(1), "text": "1"}
        if name in ("alpha", "eps"):
            values |= {"negative": -1e-9, "minus_one": -1}
            types |= {"none": None, "tensor": torch.tensor(0.5), "list": [0.5]}
        if name == "alpha":
            values |= {"over_one": 1.0000001, "two": 2}
        for op in group:
            if op.startswith("contrastive") and name != "alpha":
                values |= {"past_fp32": 1e39, "past_minus_fp32": -1e39}
            yield from rows(op, ValueError, name, **values)
            yield from rows(op, TypeError, name, **types)


def _teachers() -> Iterator[Row]:
    loss = ("contrastive_loss", "image", "text", "logit_scale", 3)
    for op, a, b, scale, n in (loss, *((name, "a", "b", "scale", 4) for name in PASSES)):
        good = _teacher(n=n)
        ta, tb, lost = good.image, good.text, torch.tensor(2.0, device="meta")
        wholes = {"two": good[:2], "four": (*good, 1.0), "nothing": (), "list": list(good)}
        wholes |= {"dict": good._asdict(), "tensor": ta, "bool": True, "module": torch.nn.ReLU()}
        yield from rows(op, TypeError, "teacher", **wholes)
        for error, part, teachers in (
            (TypeError, a, {"none": (None, tb, 2.0), "int": (ta.long(), tb, 2.0)}),
            (TypeError, a, {"numpy": (ta.numpy(), tb, 2.0), "nan": (NAN, tb, 2.0)}),
            (TypeError, b, {"none": (ta, None, 2.0), "complex": (ta, tb + 0j, 2.0)}),
            (TypeError, b, {"sparse": (ta, tb.to_sparse(), 2.0), "bool": (ta, tb > 0, 2.0)}),
            (TypeError, scale, {"none": (ta, tb, None), "text": (ta, tb, "2")}),
            (TypeError, scale, {"bool": (ta, tb, True), "int": (ta, tb, torch.tensor(2))}),
            (ValueError, a, {"rows": _teacher(2, n), "one_dim": (ta[0], tb, 2.0)}),
            (ValueError, a, {"on_meta": (ta.to("meta"), tb, 2.0)}),
            (ValueError, b, {"rows": _teacher(3, n + 1), "width": (ta, tb[:, 1:], 2.0)}),
            (ValueError, b, {"on_meta": (ta, tb.to("meta"), 2.0)}),
            (ValueError, scale, {"nan": (ta, tb, NAN), "past_fp32": (ta, tb, 1e39)}),
            (ValueError, scale, {"wide": (ta, tb, some(2)), "on_meta": (ta, tb, lost)}),
        ):
            labelled = {f"{part}_{label}": teacher for label, teacher in teachers.items()}
            yield from rows(op, error, "teacher", names=f"teacher.{part}", **labelled)
        if op != "contrastive_stats":
            yield from rows(op, ValueError, "teacher", names="alpha", none_for_alpha=None)


def _attention() -> Iterator[Row]:
    gates = {f"{shape}": some(*shape) for shape in ((3,), (1,), (2, 3), (3, 2), (2, 2, 1))}
    masks = {f"{shape}": _mask(*shape) for shape in ((B, L + 1), (B + 1, L), (L, B))}
    flags = {"none": None, "int": 1, "text": "yes", "tensor": torch.tensor(True)}
    for op in ("attention", "attention_qkv"):
        yield from rows(op, ValueError, "head_gate", **gates)
        yield from rows(op, ValueError, "key_mask", **masks)
        yield from rows(op, TypeError, "causal", **flags, numpy=np.bool_(True))
    for name in "kv":
        other = {f"{dtype}": some(B, L, H, D, dtype=dtype) for dtype in (torch.half, torch.double)}
        yield from rows("attention", TypeError, name, **other)
        shapes = ((1, L, H, D), (B, L, 1, D), (B, L, H, D + 1), (B, H, L, D))
        yield from rows("attention", ValueError, name, **{f"{s}": some(*s) for s in shapes})
    yield from rows("attention", ValueError, "v", longer_than_k=some(B, L + 1, H, D))
    for keys in (L + 1, L - 1, 0):
        changes = {"k": some(B, keys, H, D), "v": some(B, keys, H, D), "key_mask": None}
        changes["causal"] = True
        yield Row("attention", f"causal-{keys}_keys", changes, ValueError, "causal")
    shapes = ((B, L, 4, H, D), (B, L, 2, H, D), (B, L, 0, H, D), (B, 3, L + 1, H, D))
    packed = {f"{shape}": some(*shape) for shape in shapes}
    yield from rows("attention_qkv", ValueError, "qkv", **packed)


def _gelu_mlp() -> Iterator[Row]:
    op = "gelu_mlp"
    names = {"unknown": "swish", "upper_case": "GELU", "nothing": "", "space": " gelu"}
    yield from rows(op, ValueError, "activation", **names)
    others = {"none": None, "function": torch.relu, "module": torch.nn.GELU(), "bytes": b"gelu"}
    yield from rows(op, TypeError, "activation", **others)
    yield from rows(op, ValueError, "fc1_weight", turned=some(4, 6))
    yield from rows(op, ValueError, "fc2_weight", turned=some(6, 5))
    yield from rows(op, ValueError, "fc1_bias", of_fc2=some(5))
    yield from rows(op, ValueError, "fc2_bias", of_fc1=some(6), one=some(1))
    yield from rows(op, ValueError, "hidden_gate", of_rows=some(3), each_row=some(3, 6))


def _layer_norm() -> Iterator[Row]:
    op = "layer_norm"
    yield from rows(op, ValueError, "weight", shape_of_x=some(3, 4), one=some(1))
    yield from rows(op, ValueError, "bias", of_rows=some(3))
    yield from rows(op, ValueError, "channel_mask", of_rows=_mask(3), each_row=_mask(3, 4))
    shapes = ((4,), (1, 4), (3, 1), (2, 4), (1, 3, 4), (12,))
    yield from rows(op, ValueError, "residual", **{f"{shape}": some(*shape) for shape in shapes})


def _contrastive() -> Iterator[Row]:
    op, alone = "contrastive_loss", {"teacher": None, "alpha": 0.0}
    for n in (2, 4):
        yield Row(op, f"text-{n}_rows", {"text": some(n, D), **alone}, ValueError, "text")
    nothing = {"image": some(0, D), "text": some(0, D), **alone}
    yield Row(op, "image-no_rows", nothing, ValueError, "image")
    yield from rows(op, TypeError, "group", text="world", int=0, ranks=[0, 1], object=object())
    op = "contrastive_grads"
    others = {"none": None, "tuple": tuple(_STATS), "tensor": some(5, 3), "teacher": _teacher()}
    yield from rows(op, TypeError, "stats", **others)
    r, c, p = _STATS
    for part, error, stats in (
        ("rows", ValueError, {"of_fewer_rows": ops.Stats(r[:, 1:], c, p), "swapped": (c, r, p)}),
        ("rows", ValueError, {"turned": (r.T, c.T, p), "without_teacher": (r[:2], c[:2], p)}),
        ("rows", TypeError, {"fp64": (r.double(), c, p), "sparse": (r.to_sparse(), c, p)}),
        ("cols", ValueError, {"of_more": (r, c.repeat(1, 2), p), "meta": (r, c.to("meta"), p)}),
        ("cols", TypeError, {"none_inside": (r, None, p), "bf16": (r, c.bfloat16(), p)}),
        ("positive", ValueError, {"of_columns": (r, c, some(4)), "empty": (r, c, some(0))}),
        ("positive", TypeError, {"numpy": (r, c, p.numpy()), "a_float": (r, c, 1.0)}),
    ):
        made = {f"{part}_{label}": ops.Stats(*value) for label, value in stats.items()}
        yield from rows(op, error, "stats", names=f"stats.{part}", **made)
    yield from rows(op, ValueError, "row_weight", of_columns=some(4))
    yield from rows(op, ValueError, "col_weight", of_rows=some(3), turned=some(1, 4))
    low, past = (-1, -(2**63)), (2, 4, 2**31, 2**62, 2**63 - 1, 2**63, 2**64)
    outside = {f"{offset}": offset for offset in (*low, *past)}
    others = {"float": 1.0, "nan": NAN, "text": "1", "none": None, "bool": True, "complex": 1j}
    others |= {"tensor": torch.tensor(1), "numpy": np.int64(1)}
    for op in PASSES:
        yield from rows(op, ValueError, "offset", **outside)
        yield from rows(op, TypeError, "offset", **others)
        yield Row(op, "b-fewer_rows", {"b": some(2, D), "teacher": None}, ValueError, "offset")


def _keywords() -> Iterator[Row]:
    """Python's own message, which names the function and the argument."""
    for op in VALID:
        for word in ("is_causal", "mask", "normalized_shape", "inplace"):
            yield from rows(op, TypeError, word, unknown_keyword=True)
    needed = {
        "attention": ("k", "v"),
        "gelu_mlp": ("fc1_bias", "fc2_bias"),
        "layer_norm": ("weight", "bias"),
        "contrastive_loss": ("logit_scale",),
        "contrastive_grads": ("stats", "row_weight", "col_weight"),
    }
    for op, words in needed.items():
        for word in words:
            yield from rows(op, TypeError, word, left_out=LEFT_OUT)


def _table() -> list[Row]:
    parts = (_tensors, _numbers, _teachers, _attention, _gelu_mlp, _layer_norm, _contrastive)
    with warnings.catch_warnings():
        # PyTorch announces that nested and quantized tensors may change.
        warnings.simplefilter("ignore", UserWarning)
        return [row for part in (*parts, _keywords) for row in part()]


TABLE = _table()


def call(row: Row) -> dict[str, Any]:
    """The keywords of a row's call."""
    keywords = {**VALID[row.op], **row.changes}
    return {name: value for name, value in keywords.items() if value is not LEFT_OUT}


def _ordinary(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument whose values can be looked at."""
    if isinstance(value, torch.Tensor):
        if not value.is_nested and (value.layout, value.device.type) == (torch.strided, "cpu"):
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _ordinary(item)


def objection(row: Row) -> str | None:
    """What is wrong with the answer to a row's call, or None."""
    keywords = call(row)
    before = [(x, x.clone(), x._version) for v in keywords.values() for x in _ordinary(v)]
    try:
        getattr(ops, row.op)(**keywords)
    except Exception as error:
        if type(error) is not row.error:
            return f"{type(error).__name__}, not {row.error.__name__}: {error}"
        ours = str(error).startswith(f"{row.op}: {row.names} ")
        pythons = f"{row.op}()" in str(error) and f"'{row.names}'" in str(error)
        if not (ours or pythons):
            return f"the op or {row.names!r} is not named: {error}"
    else:
        return "no exception"
    for x, copy, version in before:
        if x._version != version or x.requires_grad or not x.equal(copy):
            return "an input was changed"
    return None


if __name__ == "__main__":
    complaints = [f"{row.id}: {text}" for row in TABLE if (text := objection(row)) is not None]
    print("".join(f"{line}\n" for line in complaints), end="")
    sys.exit(len(complaints) > 0)
