"""Recall and accuracy against NumPy: sorted lists where nothing ties, all orders where it does."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyclip.eval import classification, ranking, retrieval

KS = (1, 2, 3, 5, 10)


def by_sorting(scores: np.ndarray, right: np.ndarray, ks) -> np.ndarray:
    """(Q, K): whether the first k of the sorted candidates hold a right one."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(right, order, axis=1)
    return np.stack([ranked[:, :k].any(1) for k in ks], 1).astype(float)


def over_all_orders(scores: np.ndarray, right: np.ndarray, ks) -> np.ndarray:
    """The mean of `by_sorting` over every order that the candidates can come in."""
    orders = list(itertools.permutations(range(scores.shape[1])))
    return sum(by_sorting(scores[:, o], right[:, o], ks) for o in map(list, orders)) / len(orders)


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1)


@pytest.mark.parametrize("seed", range(20))
def test_shared_places(seed):
    """Few different scores among six candidates: ties before, at and after the right ones."""
    draw = np.random.default_rng(seed)
    levels = torch.tensor(draw.integers(0, 3, (5, 6)), dtype=torch.float32)
    owners = draw.integers(0, 3, 6)
    queries = torch.arange(5) % 4  # owner 3 has no candidate
    found = ranking.hits(levels, torch.eye(6), queries, torch.tensor(owners), (1, 2, 3, 6, 9))
    right = queries.numpy()[:, None] == owners
    wanted = over_all_orders(levels.numpy(), right, (1, 2, 3, 6, 9))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_blocks_change_nothing(block, monkeypatch):
    """Also where rows are equal: their scores are the same bits wherever they stand."""
    images, texts = unit(41, 24, 0), unit(41, 24, 1).repeat(3, 1)
    owners = torch.arange(41).repeat(3)
    whole = retrieval(images, texts, owners, KS)
    monkeypatch.setattr(ranking, "_BLOCK", block * 41)
    assert retrieval(images, texts, owners, KS) == whole
    order = torch.randperm(123, generator=torch.Generator().manual_seed(2))
    assert retrieval(images, texts[order], owners[order], KS) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval(seed):
    """Any number of captions an image, any of them counts."""
    draw = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(30), draw.integers(0, 30, 50)])
    draw.shuffle(owners)
    images = unit(30, 16, seed)
    texts = F.normalize(images[owners] + 1.2 * unit(80, 16, 100 + seed), dim=1)
    scores = images.double().numpy() @ texts.double().numpy().T
    right = np.arange(30)[:, None] == owners
    assert len(np.unique(scores)) == scores.size
    texts_found, images_found = by_sorting(scores, right, KS), by_sorting(scores.T, right.T, KS)
    found = retrieval(images, texts, torch.tensor(owners), KS)
    wanted = {f"image_retrieval_recall@{k}": images_found[:, i].mean() for i, k in enumerate(KS)}
    wanted |= {f"text_retrieval_recall@{k}": texts_found[:, i].mean() for i, k in enumerate(KS)}
    assert found == pytest.approx(wanted, abs=1e-12)
    assert list(found) == list(wanted)
    # One caption an image would give something else: the others were looked at.
    first = np.array([np.flatnonzero(owners == image)[0] for image in range(30)])
    alone = by_sorting(scores, np.arange(80) == first[:, None], KS)[:, 0].mean()
    assert alone < found["text_retrieval_recall@1"] < 1


def test_retrieval_defaults_and_one_image():
    found = retrieval(unit(1, 4, 0), unit(3, 4, 1), torch.zeros(3, dtype=torch.int64))
    ways = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)]
    assert found == dict.fromkeys(ways, 1.0)


def test_a_model_that_answers_alike_to_everything_guesses():
    same = unit(1, 8, 0)
    found = retrieval(same.expand(20, -1), same.expand(40, -1), torch.arange(40) % 20)
    assert found["image_retrieval_recall@5"] == pytest.approx(5 / 20)
    # 5 of 40 drawn, 2 of them right.
    assert found["text_retrieval_recall@5"] == pytest.approx(
        1 - math.comb(38, 5) / math.comb(40, 5)
    )
    accuracy = classification(same.expand(20, -1), same.expand(10, -1), torch.arange(20) % 10)
    assert accuracy == pytest.approx({"acc1": 0.1, "acc5": 0.5, "mean_per_class_recall": 0.1})


@pytest.mark.parametrize("classes", [1, 4, 5, 9])
def test_classification(classes):
    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, 70)
    labels[labels == 2] = 0  # a class that does not occur
    weights = unit(classes, 12, 3)
    images = F.normalize(weights[labels] + 1.5 * unit(70, 12, 4), dim=1)
    scores = images.double().numpy() @ weights.double().numpy().T
    answers = scores.argmax(1)
    found = classification(images, weights, torch.tensor(labels))
    per_class = [(answers[labels == c] == c).mean() for c in np.unique(labels)]
    assert found["acc1"] == pytest.approx((answers == labels).mean())
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(per_class))
    five = np.argsort(-scores, 1)[:, :5]
    if classes < 5:
        assert math.isnan(found["acc5"])
    else:
        assert found["acc5"] == pytest.approx((five == labels[:, None]).any(1).mean())


def test_a_duplicate_class_costs_half():
    weights = unit(3, 6, 0)[[0, 1, 2, 2]]
    found = classification(weights[[0, 1, 2]], weights, torch.tensor([0, 1, 2]))
    assert found["acc1"] == pytest.approx(2.5 / 3)


def test_autocast_changes_no_metric():
    images, texts, owners = unit(50, 32, 0), unit(50, 32, 1), torch.arange(50)
    with torch.autocast("cpu", torch.bfloat16):
        inside = retrieval(images, texts, owners), classification(images, texts, owners)
    assert inside == (retrieval(images, texts, owners), classification(images, texts, owners))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: retrieval(x, x[:, :3], torch.arange(4)), r"features must be \(N, E\) and"),
        (lambda x: retrieval(x[0], x, torch.arange(4)), r"features must be \(N, E\) and"),
        (lambda x: retrieval(x, x, torch.arange(3)), r"owners must be \(4,\) int64, got \(3,\)"),
        (lambda x: retrieval(x, x, torch.arange(4.0)), r"owners must be \(4,\) int64"),
        (lambda x: retrieval(x, x, torch.arange(4) + 1), "owners must be from 0 to 3, got 1 to 4"),
        (lambda x: retrieval(x, x, torch.zeros(4).long()), "3 of 4 have none, 1 first"),
        (lambda x: retrieval(x[:0], x[:0], torch.arange(0)), "every image must have a caption"),
        (lambda x: retrieval(x, x, torch.arange(4), (0,)), "k must be a positive integer, got 0"),
        (lambda x: retrieval(x / 0, x, torch.arange(4)), "candidates must be finite, and 4 rows"),
        (lambda x: retrieval(x, x / 0, torch.arange(4)), "queries must be finite, and 4 rows"),
        (lambda x: classification(x[:0], x, torch.arange(0)), "N > 0"),
        (
            lambda x: classification(x, x[:, :3], torch.arange(4)),
            r"\(4, 6\) and \(4, 3\)",
        ),
        (lambda x: classification(x, x, torch.arange(5)), r"labels must be \(4,\) int64"),
        (lambda x: classification(x, x[:2], torch.arange(4)), "labels must be from 0 to 1, got 0"),
        (lambda x: classification(x, x, torch.arange(4) - 1), "labels must be from 0 to 3, got -1"),
        (lambda x: classification(x, x * math.inf, torch.arange(4)), "candidates must be finite"),
    ],
)
def test_wrong_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(unit(4, 6, 0))


def test_no_matrix_is_kept(monkeypatch):
    """The largest tensor that a large set makes is a block, far below N x M."""
    largest = 0
    shared = ranking._shared_hits

    def watched(scores, *args):
        nonlocal largest
        largest = max(largest, scores.numel())
        return shared(scores, *args)

    monkeypatch.setattr(ranking, "_shared_hits", watched)
    monkeypatch.setattr(ranking, "_BLOCK", 1 << 14)
    retrieval(unit(3000, 4, 0), unit(3000, 4, 1), torch.arange(3000))
    assert 0 < largest <= 1 << 14
