"""Position tables equal those of each project's own code."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinyclip.models import resize_positions

GRIDS = [1, 5, 7, 9, 14]


def table(side: int = 7, width: int = 6) -> torch.Tensor:
    return torch.randn(side * side + 1, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS)
def test_open_clip(grid):
    module = pytest.importorskip("open_clip.model")

    class Model:
        class visual:
            grid_size = (grid, grid)

    state = {"visual.positional_embedding": table()}
    module.resize_pos_embed(state, Model)
    assert torch.equal(resize_positions(table(), grid), state["visual.positional_embedding"])


@pytest.mark.parametrize("grid", [*GRIDS, (5, 12)])
def test_hugging_face(grid):
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    config = clip.CLIPVisionConfig(
        hidden_size=6, num_attention_heads=1, image_size=112, patch_size=16
    )
    theirs = clip.CLIPVisionEmbeddings(config)
    with torch.no_grad():
        theirs.position_embedding.weight.copy_(table())
        rows, columns = grid if isinstance(grid, tuple) else (grid, grid)
        expected = theirs.interpolate_pos_encoding(
            torch.zeros(1, rows * columns + 1, 6), 16 * rows, 16 * columns
        )
    torch.testing.assert_close(
        resize_positions(table(), grid, "hf"), expected.reshape(-1, 6), rtol=0, atol=0
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_tinyclip_aligns_the_corners(grid):
    """Its code is not installed: cubic convolution (Keys 1981, a = -0.75) by hand, in fp64."""
    source, result = table().double(), resize_positions(table(), grid, "tinyclip").double()
    side = math.isqrt(len(source) - 1)

    def weights(size: int) -> torch.Tensor:
        matrix = torch.zeros(size, side, dtype=torch.double)
        for row in range(size):
            at = row * (side - 1) / max(1, size - 1)
            for tap in range(-1, 3):
                near = math.floor(at) + tap
                d, a = abs(at - near), -0.75
                value = (
                    (a + 2) * d**3 - (a + 3) * d**2 + 1
                    if d <= 1
                    else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                    if d < 2
                    else 0.0
                )
                matrix[row, min(max(near, 0), side - 1)] += value
        return matrix

    w = weights(grid)
    patches = torch.einsum("ia,jb,abc->ijc", w, w, source[1:].reshape(side, side, -1))
    expected = torch.cat([source[:1], patches.reshape(grid * grid, -1)])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_the_conventions_differ_and_keep_what_they_must():
    shrunk = [resize_positions(table(), 4, mode) for mode in ("open_clip", "hf", "tinyclip")]
    assert not any(torch.equal(shrunk[i], shrunk[i - 1]) for i in range(3))
    assert all(torch.equal(rows[0], table()[0]) for rows in shrunk)
    same = table()
    assert resize_positions(same, 7) is same
    half = resize_positions(table().half(), 9)
    assert half.dtype == torch.float16
    expected = F.cosine_similarity(half.float(), resize_positions(table().half().float(), 9), dim=1)
    assert expected.min() > 0.999


def test_there_and_back_through_a_rectangle():
    """Aligned corners: twice the patches less one contain the old ones where they were."""
    wide = resize_positions(table().double(), (7, 13), "tinyclip")
    again = resize_positions(wide, (7, 7), "tinyclip", of=(7, 13))
    torch.testing.assert_close(again, table().double())
    with pytest.raises(ValueError, match="a 7 x 12 grid"):
        resize_positions(wide, 7, "tinyclip", of=(7, 12))


@pytest.mark.parametrize(
    ("rows", "grid", "mode", "rule"),
    [
        (torch.zeros(11, 3), 7, "hf", "square grid"),
        (torch.zeros(10), 7, "hf", "square grid"),
        (torch.zeros(1, 3), 7, "hf", "square grid"),
        (torch.zeros(10, 3), 7, "bicubic", "mode must be one of"),
        (torch.zeros(10, 3), 0, "hf", "grid must be positive"),
    ],
)
def test_malformed(rows, grid, mode, rule):
    with pytest.raises(ValueError, match=rule):
        resize_positions(rows, grid, mode)
