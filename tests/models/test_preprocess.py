"""Pixels equal open_clip's transform, in every mode, for every shape."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tinyclip.models import Preprocess

SIZES = [(224, 224), (640, 480), (333, 777), (50, 40), (1, 1), (225, 224), (3, 1000), (1920, 1080)]
MODES = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "YCbCr"]


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    smooth = np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None]
    image = Image.fromarray((pixels // 2 + smooth // 2).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 1 << 16, (size[1], size[0]), dtype=np.uint16))
    return image.convert(mode)


# open_clip resizes to a rectangle bicubically, whatever it is asked for.
@pytest.mark.parametrize(
    ("side", "interpolation"),
    [
        *((side, how) for side in (224, 336, 32) for how in ("bicubic", "bilinear")),
        ((16, 32), "bicubic"),
        ((48, 20), "bicubic"),
    ],
)
def test_equals_open_clip(side, interpolation):
    transform = pytest.importorskip("open_clip.transform")
    theirs = transform.image_transform(side, is_train=False, interpolation=interpolation)
    ours = Preprocess(side, interpolation=interpolation)
    for size in SIZES:
        for mode in MODES if size == (640, 480) else MODES[:1]:
            image = picture(size, mode)
            mine, other = ours(image), theirs(image)
            assert mine.dtype == torch.float32
            assert mine.shape == (3, *(side if isinstance(side, tuple) else (side, side)))
            assert mine.is_contiguous()
            # 1/255 of the range before it is normalised; all that was seen is 0.
            assert ((mine - other).abs().amax((1, 2)) * torch.tensor(ours.std)).max() <= 1 / 255
            assert (mine - other).abs().max() < 1e-6, (size, mode)


def test_hugging_face_reads_and_writes_it():
    ours = Preprocess(96, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
    assert Preprocess.from_hf(ours.to_hf(), 96) == ours
    assert Preprocess.from_open_clip(ours.to_dict(), 96) == ours
    assert Preprocess.from_hf({}, 224) == Preprocess.from_open_clip({}, 224) == Preprocess()


def test_pickles_and_prints():
    assert pickle.loads(pickle.dumps(Preprocess(64))) == Preprocess(64)
    assert "size=64" in repr(Preprocess(64))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"size": 0}, "size"),
        ({"size": 22.4}, "size"),
        ({"size": (16, 0)}, "size"),
        ({"size": (16, 32, 3)}, "size"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.5, 0)}, "std"),
        ({"std": "abc"}, "std"),
    ],
)
def test_malformed(arguments, rule):
    with pytest.raises(ValueError, match=f"Preprocess: {rule}"):
        Preprocess(**arguments)
    with pytest.raises(ValueError, match="resize_mode"):
        Preprocess.from_open_clip({"resize_mode": "squash"}, 224)
    with pytest.raises(ValueError, match="resample"):
        Preprocess.from_hf({"resample": 0}, 224)
