"""What a mask means, against every mask of three tokens, and how often one is read."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tinyclip.integrations.swaps import masks as module
from tinyclip.integrations.swaps.masks import Masks


def written(visible: torch.Tensor, kind: str) -> tuple[torch.Tensor, str]:
    """The same mask in one of the ways libraries write it, with what True means."""
    if kind == "visible":
        return visible, "visible"
    if kind == "hidden":
        return ~visible, "hidden"
    lowest = -torch.inf if kind == "inf" else torch.finfo(torch.float32).min
    return torch.zeros(visible.shape).masked_fill(~visible, lowest), "hidden"


def meant(visible: torch.Tensor) -> tuple[bool, list[bool]] | None:
    """(causal, visible keys), by trying all of them."""
    length = visible.shape[0]
    past = torch.ones(length, length, dtype=torch.bool).tril()
    for causal in (False, True):
        for code in range(2**length):
            keys = torch.tensor([bool(code >> i & 1) for i in range(length)])
            if torch.equal(visible, keys.expand(length, length) & (past if causal else True)):
                return causal, keys.tolist()
    return None


@pytest.mark.parametrize("kind", ["visible", "hidden", "inf", "lowest"])
def test_every_mask_of_three_tokens(kind):
    reader = Masks(nn.Module())
    known = 0
    for code in range(2**9):
        visible = torch.tensor([bool(code >> i & 1) for i in range(9)]).reshape(3, 3)
        found = reader.read(*written(visible, kind))
        wanted = meant(visible)
        if wanted is None:
            assert found is None, visible
            continue
        known += 1
        causal, keys = wanted
        assert found.causal == causal, visible
        mine = [True] * 3 if found.key_mask is None else found.key_mask[0].tolist()
        assert mine == keys
        assert (found.key_mask is None) == all(keys)
    # Keys 2**3 ways, causal or not; where the first key alone, or none, is visible both are one.
    assert known == 2 * 8 - 2


@pytest.mark.parametrize("shape", ["batch", "heads", "one"])
def test_masks_of_a_batch(shape):
    """(B, 1, L, L), (B H, L, L) and (1, 1, L, L): all rows must agree on what is visible."""
    batch, heads, length = 3, 2, 5
    keys = torch.ones(batch, length, dtype=torch.bool)
    keys[1, 3:] = False
    keys[2, :2] = False
    past = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (keys[:, None, None, :] & past).expand(batch, 1, length, length)
    if shape == "heads":
        visible = visible.repeat_interleave(heads, dim=1).flatten(0, 1)
    elif shape == "one":
        visible, keys = visible[1:2], keys[1:2]
    found = Masks(nn.Module()).read(visible, "visible", heads)
    assert found.causal
    assert torch.equal(found.key_mask, keys)
    other = visible.clone()
    other[-1, ..., 4, 3] ^= True  # one head, or one row of the batch, differs from the others
    assert Masks(nn.Module()).read(other, "visible", heads) is None


def test_rectangular_masks_are_never_causal():
    keys = torch.tensor([True, True, False, True])
    found = Masks(nn.Module()).read(keys.expand(2, 4), "visible")
    assert (found.causal, found.key_mask.tolist()) == (False, [keys.tolist()])
    assert Masks(nn.Module()).read(torch.ones(2, 4, dtype=torch.bool).tril(), "visible") is None


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3, 3, dtype=torch.long),
        torch.zeros(7, 3, 3, dtype=torch.bool),
        torch.zeros(0, 0, dtype=torch.bool),
        torch.zeros(1, 1, 1, 3, 3),
        torch.full((3, 3), float("nan")),
        torch.full((3, 3), -1e4).triu(1),
        torch.zeros(3, 3, requires_grad=True),
    ],
    ids=["integers", "7 is no batch of 2 heads", "empty", "5 dims", "nan", "-1e4", "learned"],
)
def test_what_is_no_mask_of_ours(mask):
    assert Masks(nn.Module()).read(mask, "hidden", 2) is None


@pytest.fixture
def reads(monkeypatch):
    """How many masks were really read."""
    count = []
    original = module._pattern

    def counted(*args):
        count.append(args[1])
        return original(*args)

    monkeypatch.setattr(module, "_pattern", counted)
    return count


def test_a_mask_is_read_once_until_it_changes(reads):
    reader = Masks(nn.Module())
    mask = torch.full((4, 4), -torch.inf).triu(1)
    for _ in range(3):
        assert reader.read(mask, "hidden").causal
    assert len(reads) == 1
    mask[0, 1] = 0
    assert reader.read(mask, "hidden") is None
    assert reader.read(mask, "hidden") is None
    assert len(reads) == 2


def test_a_new_mask_in_an_old_one_s_place_is_read(reads):
    """Python reuses addresses: an id alone says nothing."""
    reader = Masks(nn.Module())
    seen = set()
    for round_number in range(50):
        causal = round_number % 2 == 0
        mask = torch.full((4, 4), -torch.inf).triu(1) if causal else torch.zeros(4, 4)
        seen.add(id(mask))
        assert reader.read(mask, "hidden").causal == causal
        del mask
    assert len(reads) == 50
    assert len(seen) < 50, "no address was reused: the test shows nothing"
    assert len(reader._seen) <= module.MOST_SEEN


def test_an_inference_tensor_is_read_again(reads):
    """It has no version, so a change in place would go unseen."""
    reader = Masks(nn.Module())
    with torch.inference_mode():
        mask = torch.full((4, 4), -torch.inf).triu(1)
        assert reader.read(mask, "hidden").causal
        mask[0, 1] = 0
        assert reader.read(mask, "hidden") is None
    assert len(reads) == 2


def test_bool_masks_mean_two_things():
    reader = Masks(nn.Module())
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    assert reader.read(mask, "visible").causal
    assert reader.read(mask, "hidden") is None


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        causal = torch.full((4, 4), -torch.inf).triu(1)
        self.register_buffer("additive", causal.clone(), persistent=False)
        self.hides = causal < 0
        self.leaks = causal.clone()
        self.leaks[1, 2] = 0
        self.past = causal == 0
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.register_buffer("one", torch.zeros(1, 1))


def test_masks_that_a_model_holds():
    holder = nn.ModuleList([Holder()])
    reader = Masks(holder)
    assert sorted(name for _, name in reader._held) == ["additive", "hides"]
    holder.double()  # another tensor under the same name
    for again in (reader, copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        (held,) = {module for module, name in again._held}
        assert held.additive.dtype == torch.float64
        assert again.read(held.additive, "hidden").causal
