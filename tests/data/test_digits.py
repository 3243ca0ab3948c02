"""The digit scenes: real scans, split once and for ever, drawn by number, read in one go."""

import hashlib
import os
import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch

import tinyclip
from tests.data import make
from tinyclip.data import Loader, Reader, Source, Turn, digits, draws, open_data
from tinyclip.models import Preprocess, Tokenizer

READER = Reader(Preprocess(**digits.PREPROCESS), make.digit_tokenizer())


def scan_numbers() -> dict[str, set[int]]:
    """Which of scikit-learn's scans a split holds, found by their pixels."""
    from sklearn.datasets import load_digits

    scans = load_digits().images
    place: dict[bytes, list[int]] = {}
    for number, scan in enumerate(scans):
        place.setdefault(np.rint(scan * 255 / 16).astype(np.uint8).tobytes(), []).append(number)
    found = {}
    for split in digits.SPLITS:
        pictures, _ = digits._split(split)
        small = pictures[:, 0, 0, ::2, ::2]
        found[split] = [n for scan in small for n in place[scan.tobytes()]]
    return found


def test_splits_hold_every_scan_once():
    found = scan_numbers()
    assert {split: len(numbers) for split, numbers in found.items()} == {
        "train": 1200,
        "validation": 200,
        "test": 397,
    }
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(1797))


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "a09cacb4ec073346"),
        ("validation", "4a267015f7895406"),
        ("test", "8346059e9e56737b"),
    ],
)
def test_scenes_are_the_same_for_ever(split, digest):
    """Results are comparable only while these are: a change here is a new benchmark."""
    source = open_data(f"digits:{split}")
    drawn = digits.scenes(split, range(len(source)))
    pixels = digits.render(split, drawn)
    hashed = hashlib.sha256(pixels.tobytes() + drawn.caption.astype("<i8").tobytes())
    assert hashed.hexdigest()[:16] == digest


def test_a_picture_shows_what_its_caption_says():
    """Against a drawing of the scene by its words alone."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    rgb = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    of = {
        digit: {
            np.rint(s * 255 / 16).astype(np.uint8).tobytes()
            for s in scans.images[scans.target == digit]
        }
        for digit in range(10)
    }
    source = open_data("digits:test")
    for index in range(60):
        sample = source.sample(index)
        assert sample.image.size == (32, 16)
        pixels = np.asarray(sample.image)
        (said,) = sample.captions
        words = said.split()
        assert said == digits.captions()[source.labels[index]]
        assert (words[0], words[3], words[4], words[5]) == ("a", "left", "of", "a")
        for half, colour, digit in ((0, words[1], words[2]), (1, words[6], words[7])):
            part = pixels[:, 16 * half : 16 * half + 16]
            ink = part.max(-1)
            assert (part == ink[..., None] * np.array(rgb[colour], np.uint8)).all()
            assert ink[::2, ::2].tobytes() in of[names.index(digit)]
            assert (ink == ink[::2, ::2].repeat(2, 0).repeat(2, 1)).all()


def test_the_1600_captions():
    captions = digits.captions()
    assert len(captions) == len(set(captions)) == 1600
    assert "a red seven left of a blue three" in captions
    counts = Counter(digits.scenes("train", range(64_000)).caption.tolist())
    assert len(counts) == 1600
    # 40 each, if every digit were as frequent: a Poisson's six sigma and the scans' own share.
    assert min(counts.values()) >= 10 and max(counts.values()) <= 90


def test_every_word_is_one_token(tmp_path):
    tokenizer = make.digit_tokenizer()
    words = {word for caption in digits.captions() for word in caption.split()}
    assert len(words) == 17
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    ids = tokenizer(list(digits.captions()))
    assert ((ids != 0).sum(1) == 10).all()
    assert len(ids.unique(dim=0)) == 1600
    assert all(tokenizer.decode(row) == c for row, c in zip(ids, digits.captions(), strict=True))
    assert (ids.argmax(1) == 9).all()  # where the text tower pools


def test_the_vocabulary_makes_the_round_trip(tmp_path):
    tokenizer = make.digit_tokenizer()
    ids = tokenizer(list(digits.captions()))
    tokenizer.save(tmp_path / "alone")
    assert torch.equal(Tokenizer.from_path(tmp_path / "alone", 16)(list(digits.captions())), ids)
    model = tinyclip.create_model(
        {
            "embed_dim": 8,
            "vision_cfg": {
                "image_size": 16,
                "patch_size": 8,
                "width": 64,
                "layers": 1,
                "head_width": 64,
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": tokenizer.vocab_size,
                "width": 64,
                "heads": 1,
                "layers": 1,
            },
        }
    )
    tinyclip.save(model, tmp_path / "model", tokenizer=tokenizer)
    _, _, again = tinyclip.load(tmp_path / "model")
    assert torch.equal(again(list(digits.captions())), ids)
    assert torch.equal(again(["An odd one: 7 cafés!"]), tokenizer(["An odd one: 7 cafés!"]))


@pytest.mark.parametrize("spec", ["digits:train", "digits:train?noise=0.5", "digits:test"])
def test_the_quick_way_gives_the_slow_one_s_bits(spec):
    source, turn = open_data(spec), Turn(7, 2)
    indices = [5, 0, 999, 17, 5]
    quick = source.batch(indices, [READER], turn)
    slow = Source.batch(source, indices, [READER], turn)
    assert quick.keys == slow.keys
    assert torch.equal(quick.pairs[0].image, slow.pairs[0].image)
    assert torch.equal(quick.pairs[0].text, slow.pairs[0].text)
    assert quick.pairs[0].image.shape == (5, 3, 16, 32)
    assert quick.pairs[0].text.shape == (5, 10)
    assert quick.pairs[0].image.dtype == torch.float32


def test_an_empty_batch_has_the_shapes_of_a_full_one():
    batch = open_data("digits:test").batch([], [READER])
    assert batch.pairs[0].image.shape == (0, 3, 16, 32)
    assert batch.pairs[0].text.shape[0] == 0 and batch.keys == batch.skipped == ()


def test_captions_are_tokenised_once(tmp_path):
    """In the main process, for workers too, however many epochs there are."""

    class Counting(make.Letters):
        def __call__(self, texts):
            with open(tmp_path / "calls", "a") as opened:
                opened.write(f"{os.getpid()}\n")
            return super().__call__(texts)

    source = open_data("digits:train?count=64")
    run = Loader(source, Reader(READER.preprocess, Counting()), batch_size=16, workers=2)
    assert sum(len(batch.keys) for epoch in range(3) for batch in run.epoch(epoch)) == 192
    assert (tmp_path / "calls").read_text() == f"{os.getpid()}\n"


class Inverted(Preprocess):
    """It has a Preprocess's numbers, and does something else."""

    def __call__(self, image):
        return -super().__call__(image)


@pytest.mark.parametrize("preprocess", [Inverted(**digits.PREPROCESS), Preprocess(24)])
def test_any_preprocess_is_what_is_applied(preprocess):
    source = open_data("digits:validation")
    other = Reader(preprocess, READER.tokenizer)
    batch = source.batch([1, 2], [READER, other])
    for index, image in zip([1, 2], batch.pairs[-1].image, strict=True):
        assert torch.equal(image, preprocess(source.sample(index).image))
    assert torch.equal(batch.pairs[0].image, source.batch([1, 2], [READER]).pairs[0].image)


def test_training_scenes_are_fresh_and_fixed_ones_are_not():
    train, test = open_data("digits:train"), open_data("digits:test")
    everything = range(200)

    def captions(source, turn):
        return tuple(source.sample(i, turn).captions[0] for i in everything)

    turns = [Turn(0, 0), Turn(0, 1), Turn(1, 0), Turn(1, 1)]
    assert len({captions(train, turn) for turn in turns}) == 4
    assert len({captions(test, turn) for turn in turns}) == 1


def test_noise_replaces_the_fraction_it_says():
    clean, noisy = open_data("digits:train"), open_data("digits:train?noise=0.3")
    turn, indices = Turn(3, 4), range(4000)
    right, said = (s.batch(indices, [READER], turn).pairs[0] for s in (clean, noisy))
    assert torch.equal(right.image, said.image)
    wrong = (right.text != said.text).any(1).float().mean().item()
    assert abs(wrong - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    everything = open_data("digits:train?noise=1").batch(indices, [READER], turn).pairs[0]
    assert (everything.text != right.text).any(1).all()
    assert torch.equal(noisy.batch([3], [READER], turn).pairs[0].text[0], said.text[3])


def test_options():
    assert len(open_data("digits")) == len(open_data("digits:train")) == 25_600
    assert len(open_data("digits:train?count=77&noise=0.1")) == 77
    assert (len(open_data("digits:validation")), len(open_data("digits:test"))) == (1000, 4000)
    assert open_data("digits:train?noise=0.25").noise == 0.25


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("digits:tests", "split must be one of"),
        ("digits:train?noise=1.5", "noise must be from 0 to 1"),
        ("digits:train?noise=nan", "noise must be from 0 to 1"),
        ("digits:train?noise=much", "could not convert"),
        ("digits:test?noise=0.3", "noise is for the training captions"),
        ("digits:train?count=0", "count must be a positive integer"),
        ("digits:train?count=1.5", "invalid literal"),
        ("digits:train?scans=3", "its options are noise, count, not 'scans'"),
        ("digits:train?noise", "bad query field"),
    ],
)
def test_malformed(spec, rule):
    with pytest.raises(ValueError, match=rule):
        open_data(spec)
    with pytest.raises(IndexError, match="index must be from 0"):
        open_data("digits:test").sample(4000)


def test_pickles():
    source = open_data("digits:train?noise=0.3&count=50")
    source.batch([1], [READER])
    again = pickle.loads(pickle.dumps(source))
    ours, theirs = (s.batch([1, 2], [READER]).pairs[0] for s in (source, again))
    assert torch.equal(ours.image, theirs.image) and torch.equal(ours.text, theirs.text)


def test_a_batch_of_256_is_cheap():
    """Under 10 ms of one core's time; measured 1.4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = Loader(open_data("digits:train"), READER, batch_size=256).epoch(0)
        next(batches)
        start = time.process_time()
        assert sum(1 for _ in batches) == 99
        assert time.process_time() - start < 99 * 0.010
    finally:
        torch.set_num_threads(threads)


def test_draws_are_a_pure_function():
    """Pinned: a resumed run, and a run on another machine, draw these."""
    index = np.arange(5)
    assert draws.draw(1, 2, index).dtype == np.uint64
    assert [int(draws.draw(1, 2, int(i))) for i in index] == draws.draw(1, 2, index).tolist()
    assert draws.draw(1, 2, 3) != draws.draw(1, 3, 2) != draws.draw(2, 1, 3)
    assert draws.draw(0).item() == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
    assert int(draws.draw(draws.ORDER, 5, -1)) == int(draws.draw(draws.ORDER, 5, 2**64 - 1))
    many = draws.uniform(9, np.arange(100_000))
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 5 / np.sqrt(12 * 100_000)
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 5 / np.sqrt(100_000)
    counts = np.bincount(draws.below(7, 4, np.arange(70_000)), minlength=7)
    assert np.abs(counts - 10_000).max() < 6 * 100
    assert sorted(draws.permutation(1000, 3)) == list(range(1000))
