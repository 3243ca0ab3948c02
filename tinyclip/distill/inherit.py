"""Manual weight inheritance: a student made of the leading parts of a teacher's tensors.

Wu et al. 2023 (TinyCLIP), section 3.2. A student starts from the first heads, the first channels
and every so-manieth layer of its teacher: no importance score, no rescaling.

Letters: C channels, H heads, D head dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinyclip.models import CLIP, CLIPConfig, create_model, get_config

TOWERS = ("image", "text")
_BLOCKS = {"image": "visual.transformer.resblocks.", "text": "transformer.resblocks."}


def inherited_layers(
    teacher_layers: int, student_layers: int, through: Sequence[int] = ()
) -> tuple[int, ...]:
    """The teacher's layer that each of the student's layers takes.

    Layer i takes layer ``i * (teacher_layers // student_layers)``: of 12, six take 0, 2, ..., 10,
    nine take the first nine. In stages the rule is applied from one to the next: 12 -> 9 -> 6 takes
    0 to 5.

    Args:
        teacher_layers, student_layers: how many there are; the student's at most the teacher's.
        through: the layers of the stages between, in order.

    Raises:
        ValueError: a stage has more layers than the one before.
    """
    layers = tuple(range(teacher_layers))
    for count in (*through, student_layers):
        if not 0 <= count <= len(layers):
            raise ValueError(
                f"inherited_layers: a student has at most as many layers as its teacher,"
                f" {len(layers)}, got {count}"
            )
        step = max(1, len(layers) // max(1, count))
        layers = layers[: count * step : step]
    return layers


def inherit(
    teacher: CLIP,
    config: str | Mapping[str, Any] | CLIPConfig,
    *,
    through: Sequence[str | Mapping[str, Any] | CLIPConfig] = (),
    towers: Sequence[str] = TOWERS,
    dtype: torch.dtype | None = None,
) -> CLIP:
    """A student with a teacher's weights: of each tensor the leading slice along every dimension.

    The input projections are sliced as (3, H, D, C), to the first heads of q, of k and of v and
    the first channels; layers go by `inherited_layers`. ``logit_scale`` is a new model's.

    Args:
        teacher: a model, irregular (pruned) ones included; it is not changed.
        config: the student's: a name of `list_models`, a dict, or a config. Nowhere may it be
            larger than the teacher; patches, grid, vocabulary, head dim, activation and norms'
            eps must be the teacher's; a shorter context takes the leading positions.
        through: configs between the two, in order; the layers are chosen stage by stage.
        towers: which inherit, of ``("image", "text")``; the other is new.
        dtype: of the student's parameters, by default the teacher's.

    Returns:
        The student, on the teacher's device, in training mode.

    Raises:
        ValueError: a rule above is broken; the text names the tensor or the setting.
        TypeError: an argument is of another kind.
    """
    if not isinstance(teacher, CLIP):
        raise TypeError(f"inherit: teacher must be a CLIP model, got {type(teacher).__name__}")
    towers = _check_towers(towers)
    old, state = teacher.config, teacher.state_dict()
    for new in (*map(get_config, through), get_config(config)):
        _check_settings(old, new, towers)
        state = dict(_slices(state, old, new, towers))
        old = new
    scale = teacher.logit_scale
    student = create_model(
        old,
        nonscalar_logit_scale=scale.dim() == 1,
        device=scale.device,
        dtype=dtype or scale.dtype,
    )
    with torch.no_grad():
        for name, parameter in student.state_dict().items():
            if _tower_of(name) in towers:
                parameter.copy_(state[name])
    return student


def _check_towers(towers: Sequence[str]) -> tuple[str, ...]:
    towers = (towers,) if isinstance(towers, str) else tuple(towers)
    if not towers or not set(towers) <= set(TOWERS):
        raise ValueError(f"inherit: towers must be among {TOWERS}, at least one, got {towers}")
    return towers


def _tower_of(name: str) -> str | None:
    """Whose a parameter is; the scale is nobody's."""
    if name == "logit_scale":
        return None
    return "image" if name.startswith("visual.") else "text"


def _check_settings(old: CLIPConfig, new: CLIPConfig, towers: Sequence[str]) -> None:
    """What no shape tells, or tells less clearly."""
    settings = [("the activation", "activation", old, new), ("the eps", "layer_norm_eps", old, new)]
    if "image" in towers:
        settings += [
            (f"the image tower's {name}", name, old.vision, new.vision)
            for name in ("patch_size", "grid", "head_dim")
        ]
    if "text" in towers:
        settings += [
            (f"the text tower's {name}", name, old.text, new.text)
            for name in ("vocab_size", "head_dim")
        ]
    for what, name, source, target in settings:
        theirs, ours = getattr(source, name), getattr(target, name)
        if theirs != ours:
            raise ValueError(
                f"inherit: {what} must be the teacher's, {theirs!r}, got {ours!r} in the student:"
                " inherited weights would compute something else"
            )


def _slices(
    state: Mapping[str, Tensor], old: CLIPConfig, new: CLIPConfig, towers: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a student of config `new`, cut from the state of a model of config `old`."""
    layers, head_dims = {}, {}
    for tower, source, target in (
        ("image", old.vision, new.vision),
        ("text", old.text, new.text),
    ):
        if tower in towers:
            count, most = len(target.layers), len(source.layers)
            if count > most:
                raise ValueError(
                    f"inherit: the {tower} tower must have at most the teacher's {most} layers,"
                    f" got {count}"
                )
            layers[tower] = inherited_layers(most, count)
            head_dims[tower] = target.head_dim
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CLIP(new).state_dict().items()}
    for name, shape in shapes.items():
        tower = _tower_of(name)
        if tower not in towers:
            continue
        source = _source(name, _BLOCKS[tower], layers[tower])
        if source not in state:
            raise ValueError(
                f"inherit: {name} {tuple(shape)} has no counterpart: the teacher has no {source}"
            )
        yield name, _leading(name, state[source], shape, source, head_dims[tower])


def _source(name: str, blocks: str, layers: Sequence[int]) -> str:
    """The teacher's name of a student's tensor."""
    if not name.startswith(blocks):
        return name
    index, _, rest = name.removeprefix(blocks).partition(".")
    return f"{blocks}{layers[int(index)]}.{rest}"


def _leading(name: str, value: Tensor, shape: torch.Size, source: str, head_dim: int) -> Tensor:
    """The leading slice of `shape`; q, k and v are each cut to their own first heads."""
    if any(most < size for most, size in zip(value.shape, shape, strict=True)):
        raise ValueError(
            f"inherit: {name} must be nowhere larger than the teacher's {source},"
            f" {tuple(value.shape)}, got {tuple(shape)}"
        )
    corner = tuple(slice(size) for size in shape)
    if ".in_proj_" not in name:
        return value[corner]
    by_head = value.unflatten(0, (3, -1, head_dim))
    heads = slice(shape[0] // (3 * head_dim))
    return by_head[(slice(None), heads, slice(None), *corner[1:])].reshape(shape)
