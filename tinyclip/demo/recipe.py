"""What the demo trains: a CLIP, and one small CLIP in four ways.

The four begin with the same seed, see the same scenes in the same order and differ in two things:
whether they start from the teacher's weights, and whether they mimic its affinities. What is set
here was chosen on validation scenes.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tinyclip.data.digits import CONTEXT_LENGTH, IMAGE_SIZE, vocabulary

_HEAD_DIM = 32


class Variant(NamedTuple):
    """A way to train the student."""

    name: str
    inherits: bool
    mimics: bool

    @property
    def words(self) -> str:
        start = "inherited weights" if self.inherits else "new weights"
        return f"{start}, {'affinity mimicking' if self.mimics else 'CLIP loss'}"


TEACHER = "teacher"
VARIANTS = (
    Variant("scratch", inherits=False, mimics=False),
    Variant("affinity", inherits=False, mimics=True),
    Variant("inherited", inherits=True, mimics=False),
    Variant("both", inherits=True, mimics=True),
)


@dataclass(frozen=True)
class Recipe:
    """Numbers of a demo.

    Args:
        teacher_steps, student_steps: optimizer steps.
        curve_points: of each curve.
        noises: fractions of the students' training captions that are wrong; every student is
            trained with each. The teacher's are right.
        batch_size: scenes.
        lr, wd, beta2, grad_clip_norm: of AdamW; the warm-up is a tenth of the steps.
        alpha, teacher_scale: of affinity mimicking. At its own scale, near 18, the teacher is so
            sure of its pairs that little but the labels is left to learn from it.
        test_scenes: how many are read for the table; None reads all 4,000.
    """

    teacher_steps: int = 400
    student_steps: int = 300
    curve_points: int = 15
    noises: tuple[float, ...] = (0.0,)
    batch_size: int = 256
    lr: float = 1e-3
    wd: float = 0.1
    beta2: float = 0.98
    grad_clip_norm: float = 1.0
    alpha: float = 1.0
    teacher_scale: float | None = 10.0
    test_scenes: int | None = None

    def quick(self) -> "Recipe":
        """The same in one to two minutes: too short for the claim, long enough to see it."""
        return replace(self, teacher_steps=150, student_steps=60, curve_points=6, test_scenes=1_000)


def config(
    width: int, vision_layers: int, text_layers: int, mlp_ratio: float = 4.0
) -> dict[str, Any]:
    """A CLIP for the scenes, in open_clip's vocabulary."""
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": list(IMAGE_SIZE),
            "patch_size": 8,
            "width": width,
            "layers": vision_layers,
            "head_width": _HEAD_DIM,
            "mlp_ratio": mlp_ratio,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(vocabulary()[0]),
            "width": width,
            "heads": width // _HEAD_DIM,
            "layers": text_layers,
            "mlp_ratio": mlp_ratio,
        },
    }


def teacher_config() -> dict[str, Any]:
    return config(128, 4, 3)


def student_config() -> dict[str, Any]:
    """Half as wide, with narrower MLPs and 3 of 4, 2 of 3 layers."""
    return config(64, 3, 2, mlp_ratio=3.5)
