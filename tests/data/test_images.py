"""What a picture file becomes: the pixels a viewer would show, or a named refusal."""

import io
import math
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.data import make
from tinyclip.data import BrokenSample, RandomCrop
from tinyclip.data.images import decode, read_image
from tinyclip.models import Preprocess

BROKEN = make.broken_images()


def pixels(data: bytes, **options) -> np.ndarray:
    image = decode(data, "key", **options)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused_by_name(name):
    with pytest.raises(BrokenSample) as caught:
        decode(BROKEN[name], name)
    assert caught.value.key == name
    assert len(caught.value.reason) > 5
    assert str(caught.value) == f"{name}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_picture_is_refused_or_loses_nothing():
    for format in ("PNG", "JPEG", "WEBP"):
        whole = make.encoded(make.picture(0, (16, 12)), format)
        expected, refused = pixels(whole), 0
        for end in range(len(whole)):
            try:
                assert (pixels(whole[:end]) == expected).all(), (format, end)
            except BrokenSample:
                refused += 1
        # All but the last bytes of a PNG, which are its checksum and its end mark.
        assert refused >= len(whole) - 20


def test_a_bomb_is_refused_by_its_header():
    """3.6 GB of pixels in a kilobyte; of 25 million and one, too; memory stays as it was."""
    for name in ("png_bomb", "png_large"):
        tracemalloc.start()
        with pytest.raises(BrokenSample, match="pixels"):
            decode(BROKEN[name], name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


def test_the_limits_are_the_last_that_pass():
    assert pixels(make.png(50, 20, 8, 0, bytes(51 * 20)), most_pixels=1000).shape == (20, 50, 3)
    with pytest.raises(BrokenSample, match="has 50 x 20 pixels, more than 999"):
        pixels(make.png(50, 20, 8, 0, bytes(51 * 20)), most_pixels=999)
    assert pixels(make.png(200, 1, 8, 0, bytes(201))).shape == (1, 200, 3)
    with pytest.raises(BrokenSample, match="has 201 x 1 pixels, beyond 1:200"):
        pixels(make.png(201, 1, 8, 0, bytes(202)))


def test_alpha_is_laid_over_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], dtype=np.uint8)
    shown = pixels(make.encoded(Image.fromarray(rgba)))
    assert shown.tolist() == [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]
    grey = np.array([[[100, 255], [100, 0]]], dtype=np.uint8)
    assert pixels(make.encoded(Image.fromarray(grey, "LA"))).tolist() == [[[100] * 3, [255] * 3]]
    webp = np.full((8, 8, 4), (90, 80, 70, 0), dtype=np.uint8)
    data = make.encoded(Image.fromarray(webp), "WEBP", lossless=True, exact=True)
    assert (pixels(data) == 255).all()


def test_a_palette_s_transparent_colour_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert pixels(make.encoded(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert pixels(make.encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255] * 3]]
    several = make.encoded(image, transparency=bytes([51, 255]))
    assert pixels(several).tolist() == [[[255, 204, 204], [0, 0, 255]]]


def test_a_transparent_colour_of_other_modes_is_white():
    rgb = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8))
    assert pixels(make.encoded(rgb, transparency=(9, 8, 7))).tolist() == [[[255] * 3, [1, 2, 3]]]
    grey = Image.fromarray(np.array([[9, 1]], dtype=np.uint8))
    assert pixels(make.encoded(grey, transparency=9)).tolist() == [[[255] * 3, [1] * 3]]


def test_16_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(int)
    shown = pixels(make.encoded(Image.fromarray(values)))
    assert (shown == expected[..., None]).all()
    assert shown.min() == 0 and shown.max() == 255
    for kind, channels in ((2, 3), (6, 4), (4, 2)):  # RGB, RGBA, grey with alpha
        row = np.full((1, 3, channels), 0xFFFF, dtype=">u2")
        row[..., : 3 if channels > 2 else 1] = 0x80FF
        shown = pixels(make.png(3, 1, 16, kind, b"\0" + row.tobytes()))
        assert (np.abs(shown.astype(int) - 0x80) <= 1).all(), kind


def test_other_modes():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    assert (pixels(make.encoded(grey)) == ramp[..., None]).all()
    bits = grey.point(lambda value: 255 * (value > 99)).convert("1")
    assert (pixels(make.encoded(bits)) == 255 * (ramp > 99)[..., None]).all()
    for depth, last in ((1, 1), (2, 3), (4, 15)):
        shown = pixels(make.png(8 // depth, 1, depth, 0, b"\0\x1b"))
        values = [(0x1B >> (8 - depth * (i + 1))) & last for i in range(8 // depth)]
        assert shown[0, :, 0].tolist() == [value * 255 // last for value in values]


def test_cmyk():
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (0, 0, 0, 255): (0, 0, 0)}
    for ink, expected in inks.items():
        data = make.encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
        assert np.abs(pixels(data).astype(int) - expected).max() <= 3, ink


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_of_several_frames_the_first_counts(format):
    first, second = (Image.new("RGB", (16, 16), c) for c in ((200, 10, 30), (0, 255, 0)))
    options = {"save_all": True, "append_images": [second, second], "lossless": True}
    data = make.encoded(first, format, **options)
    assert Image.open(io.BytesIO(data)).n_frames > 1
    assert (pixels(data) == (200, 10, 30)).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(format, orientation):
    """Each of the eight, from the definition: where the stored first row and column belong."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # one bright quarter, top left
    upright[8:, 16:] = 128
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    image = Image.fromarray(np.ascontiguousarray(stored))
    shown = pixels(make.encoded(image, format, exif=exif.tobytes(), **options))
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).max() <= 4


def test_files_that_are_none(tmp_path):
    (tmp_path / "good.jpg").write_bytes(make.encoded(make.picture(3)))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    # A PNG under a JPEG's name: the content counts.
    assert (np.asarray(read_image(tmp_path / "good.jpg", "k")) == make.picture(3)).all()
    for name, rule in {
        "absent.png": "there is no such file",
        "empty.png": "is empty, 0 bytes",
        "folder.png": "is no regular file",
        "pipe.png": "is no regular file",
        "nul\0.png": "cannot be read",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(BrokenSample, match=rule):
            read_image(tmp_path / name, name)


def test_names_in_messages_are_one_printable_line():
    error = BrokenSample("a\nb\x1b[31m\u202e\0" + "x" * 1000, "r\r\n\x07")
    assert error.key.startswith("a\\nb\\x1b[31m\\u202e\\x00xxx")
    assert error.key.endswith("…") and len(error.key) < 230
    assert error.reason == "r\\r\\n\\x07"
    assert str(error).isprintable()
    assert BrokenSample("\udcff", "").key == "\\udcff"
    assert BrokenSample("日本 é", "").key == "日本 é"


def test_random_crops_are_open_clip_s_kind():
    """Share of the area and ratio within bounds, both evenly spread, every place possible."""
    crop, boxes = RandomCrop((0.2, 0.6), (0.5, 2.0)), []
    for index in range(4000):
        left, top, right, bottom = crop.box(400, 300, (0, 0, index))
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        boxes.append((left, top, right - left, bottom - top))
    left, top, width, height = np.array(boxes, dtype=float).T
    area, ratio = width * height / 120_000, np.log2(width / height)
    assert 0.19 < area.min() < 0.21 and 0.59 < area.max() < 0.61
    assert -1.02 < ratio.min() < -0.9 and 0.9 < ratio.max() < 1.02
    places = left / np.maximum(400 - width, 1)
    assert abs(places.mean() - 0.5) < 0.02 and places.max() == 1 and places.min() == 0
    places = top / np.maximum(300 - height, 1)
    assert abs(places.mean() - 0.5) < 0.02 and places.max() == 1 and places.min() == 0
    small = area < 0.3  # where every ratio fits, it is even in its logarithm
    assert abs(ratio[small].mean()) < 0.1
    assert abs(area.mean() - 0.4) < 0.03


def test_random_crops_where_no_box_fits():
    assert RandomCrop((1.0, 1.0), (1.0, 1.0)).box(300, 100, (1,)) == (100, 0, 200, 100)
    assert RandomCrop((1.0, 1.0), (1.0, 1.0)).box(100, 300, (1,)) == (0, 100, 100, 200)
    assert RandomCrop((0.9, 1.0)).box(1, 1, (1,)) == (0, 0, 1, 1)


def test_random_crops_are_resized_to_the_model_s_size():
    image, where = make.picture(0, (50, 40)), (0, 1, 2)
    box = RandomCrop().box(50, 40, where)
    for size in (24, (16, 32)):
        cropped = RandomCrop()(image, Preprocess(size), where)
        shape = (24, 24) if size == 24 else (32, 16)
        expected = image.crop(box).resize(shape, Image.Resampling.BICUBIC)
        assert (np.asarray(cropped) == np.asarray(expected)).all()
    smooth = RandomCrop()(image, Preprocess(24, interpolation="bilinear"), where)
    expected = image.crop(box).resize((24, 24), Image.Resampling.BILINEAR)
    assert (np.asarray(smooth) == np.asarray(expected)).all()
    with pytest.raises(TypeError, match="must have a size"):
        RandomCrop()(image, np.asarray, where)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": (0, 1)},
        {"scale": (0.9, 1.1)},
        {"scale": (0.9, 0.5)},
        {"scale": (0.5,)},
        {"ratio": (-1, 1)},
        {"ratio": (1, math.nan)},
    ],
)
def test_malformed_crops(arguments):
    with pytest.raises(ValueError, match=f"RandomCrop: {next(iter(arguments))} must be"):
        RandomCrop(**arguments)
