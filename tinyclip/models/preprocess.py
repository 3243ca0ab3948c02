"""From a picture to what the image tower takes, as open_clip does it, without torchvision."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which Hugging Face writes


@dataclass(frozen=True)
class Preprocess:
    """Resize to cover the size, crop the centre, normalise: a callable that can be pickled.

    Args:
        size: pixels: the side of a square, or (height, width).
        mean, std: of the three channels, values from 0 to 1.
        interpolation: ``"bicubic"`` or ``"bilinear"``.

    Raises:
        ValueError: a value breaks a rule; the text names it.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in self._sides()):
            raise ValueError(
                f"Preprocess: size must be a positive integer or two of them, got {self.size!r}"
            )
        height, width = self._sides()
        object.__setattr__(self, "size", height if height == width else (height, width))
        if self.interpolation not in _RESAMPLING:
            raise ValueError(
                f"Preprocess: interpolation must be one of {tuple(_RESAMPLING)}, got"
                f" {self.interpolation!r}"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(f"Preprocess: {name} must be three numbers, got {values!r}")
            if not all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in values):
                raise ValueError(f"Preprocess: {name} must be three numbers, got {values!r}")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) <= 0:
            raise ValueError(f"Preprocess: std must be positive, got {self.std}")

    def __call__(self, image: "Image") -> Tensor:
        """A PIL image of any mode and size -> (3, height, width) fp32.

        The steps are torchvision's, in open_clip's order: an image is resized and cropped in its
        own mode and then becomes RGB.
        """
        width, height = image.size
        if width < 1 or height < 1:
            raise ValueError(f"Preprocess: image must not be empty, got {width} x {height}")
        rows, columns = self._sides()
        if rows == columns:
            short = min(width, height)
            width, height = (int(rows * side / short) for side in (width, height))
        else:
            ratio = min(height / rows, width / columns)
            width, height = round(width / ratio), round(height / ratio)
        image = image.resize((width, height), _RESAMPLING[self.interpolation])
        left, top = round((width - columns) / 2), round((height - rows) / 2)
        image = image.crop((left, top, left + columns, top + rows)).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        return (pixels - _column(self.mean)) / _column(self.std)

    def _sides(self) -> tuple[int, int]:
        """Height and width."""
        pair = isinstance(self.size, (list, tuple)) and len(self.size) == 2
        return tuple(self.size) if pair else (self.size, self.size)

    def to_dict(self) -> dict[str, Any]:
        """What `from_open_clip` reads, and this package's own JSON holds."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_open_clip(cls, data: Any, size: int | tuple[int, int]) -> "Preprocess":
        """From ``preprocess_cfg`` of an open_clip_config.json, or our own, for a model's size."""
        data = _mapping("preprocess_cfg", data)
        if data.get("resize_mode") not in (None, "shortest"):
            raise ValueError(
                f"preprocess_cfg: resize_mode must be 'shortest', got {data['resize_mode']!r}"
            )
        found = {name: data[name] for name in ("mean", "std", "interpolation") if data.get(name)}
        return cls(size, **found)

    @classmethod
    def from_hf(cls, data: Any, size: int) -> "Preprocess":
        """From a Hugging Face preprocessor_config.json, for a model's size."""
        data = _mapping("preprocessor_config.json", data)
        numbers = {number: name for name, number in _RESAMPLING.items()}
        resample = data.get("resample", 3)
        if resample not in numbers:
            raise ValueError(
                f"preprocessor_config.json: resample must be one of {sorted(numbers)}, got"
                f" {resample!r}"
            )
        found = {"mean": data.get("image_mean"), "std": data.get("image_std")}
        found = {name: values for name, values in found.items() if values}
        return cls(size, interpolation=numbers[resample], **found)

    def to_hf(self) -> dict[str, Any]:
        """A preprocessor_config.json for Hugging Face's CLIPImageProcessor."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": _RESAMPLING[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_convert_rgb": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").reshape(3, 1, 1)


def _mapping(name: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name}: must be an object, got {type(data).__name__}")
    return data
