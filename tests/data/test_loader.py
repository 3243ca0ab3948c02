"""The order of the samples, and that nothing but (seed, epoch) has a say in it."""

import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from tests.data import make
from tinyclip.data import (
    Batch,
    BrokenSample,
    Loader,
    RandomCrop,
    Reader,
    Sample,
    Source,
    Turn,
    digits,
    open_data,
)
from tinyclip.models import Preprocess

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers(Source):
    """Sample i has the pixels of seed i; some are broken, some have several captions."""

    def __init__(self, count: int, groups: tuple[int, ...] = (), broken: tuple[int, ...] = ()):
        self.count, self.groups, self.broken = count, groups, broken

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, turn: Turn = Turn()) -> Sample:  # noqa: B008
        if index in self.broken:
            raise BrokenSample(str(index), "is broken")
        image = make.picture(index, (20 + index % 7, 16 + index % 5))
        return Sample(str(index), image, tuple(f"{index}{c}" for c in "abc"[: 1 + index % 3]))


def loader(source: Source, **options) -> Loader:
    return Loader(source, options.pop("readers", make.reader()), **{"batch_size": 4, **options})


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Bit for bit."""
    return len(ours) == len(theirs) and all(
        a.keys == b.keys
        and a.skipped == b.skipped
        and len(a.pairs) == len(b.pairs)
        and all(
            torch.equal(x, y)
            for one, other in zip(a.pairs, b.pairs, strict=True)
            for x, y in zip(one, other, strict=True)
        )
        for a, b in zip(ours, theirs, strict=True)
    )


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("groups", [(), (37,), (10, 1, 20, 6)])
def test_each_sample_comes_once_an_epoch_in_another_order(groups):
    source = Numbers(37, groups)
    everything = sorted(map(str, range(37)))
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (5, 7)):
        run = loader(source, seed=seed, drop_last=False, window=8)
        assert len(run) == 10
        batches = list(run.epoch(epoch))
        assert [len(batch.keys) for batch in batches] == [4] * 9 + [1]
        assert sorted(keys(batches)) == everything
        assert keys(batches) == [str(index) for index in run.order(epoch)]
        assert keys(run.epoch(epoch)) == keys(batches)  # again
        orders.add(tuple(keys(batches)))
    assert len(orders) == 4
    whole = list(loader(source).epoch(0))
    assert [len(batch.keys) for batch in whole] == [4] * 9
    assert keys(loader(source, shuffle=False, drop_last=False).epoch(3)) == [
        str(index) for index in range(37)
    ]


@pytest.mark.parametrize("groups", [(), (13, 20, 12)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_same_global_batches(groups, drop_last):
    source, options = Numbers(45, groups), {"drop_last": drop_last, "augment": RandomCrop()}
    alone = list(loader(source, batch_size=8, **options).epoch(2))
    for world in (2, 4, 8):
        ranks = [
            list(loader(source, batch_size=8 // world, world=world, rank=rank, **options).epoch(2))
            for rank in range(world)
        ]
        for number, batch in enumerate(alone):
            shares = [rank[number] for rank in ranks]
            assert keys(shares) == list(batch.keys)
            assert torch.equal(torch.cat([s.pairs[0].image for s in shares]), batch.pairs[0].image)
            if len(batch.keys) == 8:
                assert {len(share.keys) for share in shares} == {8 // world}
            else:  # 5 are left: as even as can be
                sizes = [len(share.keys) for share in shares]
                assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 5
                for share in shares:
                    assert share.pairs[0].image.shape[1:] == (3, 8, 8)
                    assert len(share.pairs[0].text) == len(share.pairs[0].image)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(tmp_path, workers):
    shards = make.write_shards(tmp_path / "shards", (9, 12, 7))
    sources = [
        open_data(str(make.write_table(tmp_path, 26))),
        open_data(str(shards[0].parent)),
        open_data("digits:train?count=30&noise=0.2"),
    ]
    for source in sources:
        options = {"augment": RandomCrop((0.3, 1.0)), "drop_last": False}
        if source is sources[-1]:
            options = {"readers": Reader(Preprocess(**digits.PREPROCESS), make.digit_tokenizer())}
        here, there = (list(loader(source, workers=w, **options).epoch(1)) for w in (0, workers))
        assert same(here, there) and len(here) >= 7


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_tail_bit_for_bit(workers):
    source = Numbers(41, (20, 21), broken=(7, 30))
    run = loader(source, workers=workers, augment=RandomCrop((0.2, 1.0)))
    whole = list(run.epoch(3))
    for start in (0, 1, 6, len(run)):
        assert same(
            list(loader(source, augment=RandomCrop((0.2, 1.0))).epoch(3, start)), whole[start:]
        )
        assert same(list(run.epoch(3, start)), whole[start:])


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    source, crop = Numbers(12), RandomCrop((0.2, 0.8))

    def images(**options):
        run = loader(source, batch_size=3, **{"seed": 0, "augment": crop, **options})
        return {
            epoch: {
                key: image
                for batch in run.epoch(epoch)
                for key, image in zip(batch.keys, batch.pairs[0].image, strict=True)
            }
            for epoch in (0, 1)
        }

    one = images()
    other = images(shuffle=False)  # in another order, in other batches' company
    assert all(torch.equal(one[e][key], other[e][key]) for e in (0, 1) for key in one[0])
    changed = [not torch.equal(one[0][key], one[1][key]) for key in one[0]]
    assert sum(changed) > 9
    reseeded = images(seed=1)
    assert sum(not torch.equal(one[0][key], reseeded[0][key]) for key in one[0]) > 9
    plain = images(augment=None)
    assert all(torch.equal(plain[0][key], plain[1][key]) for key in plain[0])


def test_one_of_several_captions_is_chosen():
    source = Numbers(30)
    seen: dict[str, set] = {}
    for epoch in range(12):
        for batch in loader(source, batch_size=1).epoch(epoch):
            text = "".join(chr(i - 2) for i in batch.pairs[0].text[0].tolist()[1:-1])
            seen.setdefault(batch.keys[0], set()).add(text)
    assert all(seen[str(i)] == {f"{i}{c}" for c in "abc"[: 1 + i % 3]} for i in range(30))


def test_shards_are_shuffled_whole_and_samples_within_a_window():
    groups = tuple([50] * 40)
    starts = np.arange(2000) // 50
    run = loader(Numbers(2000, groups), window=200)
    orders = [run.order(epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(2000))
        for first in range(0, 2000, 200):  # a window is four shards, and mixed
            within = starts[order[first : first + 200]]
            assert len(set(within.tolist())) == 4
            assert (np.diff(within) != 0).sum() > 100
    together = [
        {frozenset(starts[o[i : i + 200]].tolist()) for i in range(0, 2000, 200)} for o in orders
    ]
    assert len(together[0] & together[1]) < 3  # the shards of a window are others each epoch
    assert (loader(Numbers(2000, (2000,)), window=200).order(0) - np.arange(2000)).std() > 500
    assert (loader(Numbers(2000), window=200).order(0) - np.arange(2000)).std() > 500


def test_uneven_groups_are_all_there():
    groups = (3, 0, 7, 1, 1, 25)
    for epoch in range(5):
        order = loader(Numbers(37, groups), window=5).order(epoch)
        assert sorted(order.tolist()) == list(range(37))


def test_two_readers():
    source, student = Numbers(9), make.reader(8)
    teacher = Reader(Preprocess(16), make.Letters(30, first=5))
    other_text = Reader(Preprocess(8), make.Letters(30, first=5))
    (batch,) = loader(source, batch_size=9, readers=[student, teacher]).epoch(0)
    assert [tuple(p.image.shape) for p in batch.pairs] == [(9, 3, 8, 8), (9, 3, 16, 16)]
    for number, reader in enumerate((student, teacher)):
        (alone,) = loader(source, batch_size=9, readers=reader).epoch(0)
        assert len(alone.pairs) == 1
        assert torch.equal(alone.pairs[0].image, batch.pairs[number].image)
        assert torch.equal(alone.pairs[0].text, batch.pairs[number].text)
    (twins,) = loader(source, batch_size=9, readers=[student, make.reader(8)]).epoch(0)
    assert len(twins.pairs) == 1
    (half,) = loader(source, batch_size=9, readers=[student, other_text]).epoch(0)
    assert half.pairs[0].image is half.pairs[1].image
    assert not torch.equal(half.pairs[0].text, half.pairs[1].text)
    # The same crop for both, at each one's size.
    crop = RandomCrop((0.2, 0.5))
    (batch,) = loader(source, batch_size=9, readers=[student, teacher], augment=crop).epoch(0)
    (alone,) = loader(source, batch_size=9, readers=teacher, augment=crop).epoch(0)
    assert torch.equal(alone.pairs[0].image, batch.pairs[1].image)


def test_captions_are_cut_to_the_longest_of_the_batch():
    source = Numbers(12)
    for batch in loader(source, readers=make.reader(8, 50), batch_size=3).epoch(0):
        text = batch.pairs[0].text
        assert text.dtype == torch.int64 and text.is_contiguous()
        lengths = (text != 0).sum(1)
        assert text.shape[1] == lengths.max()
        assert (text.argmax(1) == lengths - 1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_left_out_and_named(workers):
    broken = (0, 1, 2, 3, 9, 15)
    source = Numbers(16, broken=broken)
    batches = list(loader(source, shuffle=False, workers=workers).epoch(0))
    assert [len(batch.keys) for batch in batches] == [0, 4, 3, 3]
    assert [int(s.key) for batch in batches for s in batch.skipped] == list(broken)
    assert {s.reason for batch in batches for s in batch.skipped} == {"is broken"}
    assert keys(batches) == [str(i) for i in range(16) if i not in broken]
    empty = batches[0].pairs[0]
    assert empty.image.shape == (0, 3, 8, 8) and empty.image.dtype == torch.float32
    assert empty.text.shape[0] == 0 and empty.text.dtype == torch.int64
    for batch in batches[1:]:
        assert len(batch.pairs[0].image) == len(batch.pairs[0].text) == len(batch.keys)


def test_strange_captions_keep_their_one_end(tmp_path):
    """Through a shard, the loader and the real tokenizer, in bounded time."""
    strange = [
        "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 " * 10,
        "a\0b\0",
        "שלום עולם \u202e abc",
        "\u200b\ufeff x",
        "x" * 1_000_000,
        "word " * 200_000,
        "a red<|endoftext|> seven <|startoftext|>",
        "&lt;|endoftext|&gt;",
        "<end_of_text>",
        "ﬁ ½ ™ é e\u0301",
        "\x1b[31m red \x07",
        "&amp;#0; &#xD800;",
        "a" + "\u0301" * 5000,
    ]
    contents = []
    for seed, text in enumerate(strange):
        contents += make.pair(f"{seed:02d}", 3 * seed, text)
    source = open_data(str(make.write_tar(tmp_path / "t.tar", contents)))
    tokenizer = make.digit_tokenizer()
    start = time.process_time()
    run = loader(source, readers=Reader(Preprocess(8), tokenizer), drop_last=False, shuffle=False)
    batches = list(run.epoch(0))
    assert time.process_time() - start < 20
    assert len(keys(batches)) == len(strange)
    for batch in batches:
        text = batch.pairs[0].text
        assert text.shape[1] <= tokenizer.context_length
        assert ((text == tokenizer.eot_token_id).sum(1) == 1).all()
        assert ((text == tokenizer.sot_token_id).sum(1) == 1).all()
        assert (text.argmax(1) == (text != 0).sum(1) - 1).all()


def test_the_model_s_random_numbers_are_left_alone():
    for workers in (0, 2):
        torch.manual_seed(3)
        np.random.seed(3)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        list(loader(Numbers(8), workers=workers, augment=RandomCrop()).epoch(0))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]


def children() -> list:
    return multiprocessing.active_children()


class Slow(Numbers):
    def sample(self, index, turn=Turn()):  # noqa: B008
        time.sleep(0.02)
        return super().sample(index, turn)


class Stuck(Numbers):
    def sample(self, index, turn=Turn()):  # noqa: B008
        if multiprocessing.parent_process() and index > 30:
            time.sleep(1000)
        return super().sample(index, turn)


def test_workers_ignore_what_only_the_main_process_decides():
    expected = list(loader(Numbers(48)).epoch(0))
    told = os.environ.get("TOKENIZERS_PARALLELISM")
    batches = loader(Slow(48), workers=2).epoch(0)
    found = [next(batches)]
    workers = children()
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        for worker in workers:
            os.kill(worker.pid, number)
        found.append(next(batches))
    found += batches
    assert same(found, expected)
    del batches
    assert all(not worker.is_alive() for worker in workers)
    # The main process hears them as before.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}
    assert os.environ.get("TOKENIZERS_PARALLELISM") == told


def test_a_stuck_worker_ends_with_its_epoch():
    """It hears no SIGTERM: torch's own end of it would leave it behind, and Python wait for it."""
    batches = loader(Stuck(40), workers=2, shuffle=False, batch_size=20).epoch(0)
    next(batches)
    workers = children()
    batches.close()
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)


def test_an_epoch_that_is_left_takes_its_workers_along():
    batches = loader(Slow(200), workers=2).epoch(0)
    next(batches)
    workers = children()
    batches.close()
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)
    assert children() == []


class Faulty(Numbers):
    def sample(self, index, turn=Turn()):  # noqa: B008
        if index == 13:
            raise KeyError("a mistake of the program")
        return super().sample(index, turn)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_broken_sample_is_not_swallowed(workers):
    with pytest.raises(KeyError, match="a mistake of the program"):
        list(loader(Faulty(20), workers=workers).epoch(0))


def test_a_worker_that_dies_while_it_hands_a_batch_over(monkeypatch):
    """Its connection breaks before torch, told by SIGCHLD or a look every few seconds, knows."""
    handlers = []

    def broken(*_):
        handlers.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        raise ConnectionResetError("by peer")

    batches = loader(Numbers(20), workers=2).epoch(0)
    next(batches)  # the workers are there, and keep the function as it was
    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_storage_fd", broken)
    try:
        with pytest.raises(RuntimeError, match=r"\(pid \d+\) died with exit code -9") as caught:
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, handlers[0])
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_a_broken_connection_of_living_workers_stays_what_it_is(monkeypatch):
    def broken(*_):
        raise ConnectionResetError("by peer")

    batches = loader(Numbers(20), workers=2).epoch(0)
    next(batches)
    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_storage_fd", broken)
    with pytest.raises(ConnectionResetError, match="by peer"):
        list(batches)


def test_workers_of_a_process_of_their_own(tmp_path):
    """They warn of nothing (tokenizers does, forked after it used its threads, unless it is told),
    and one that dies is an error, not a wait."""
    path = make.write_table(tmp_path, 12)
    code = f"""
        import multiprocessing, os
        from tests.data import make
        from tinyclip.data import Loader, Reader, digits, open_data
        from tinyclip.models import Preprocess
        tokenizer = make.digit_tokenizer()
        tokenizer(list(digits.captions()))
        reader = Reader(Preprocess(8), tokenizer)
        run = Loader(open_data({str(path)!r}), reader, batch_size=1, workers=2)
        print(sum(len(batch.keys) for epoch in (0, 1) for batch in run.epoch(epoch)), flush=True)
        try:
            batches = run.epoch(2)
            next(batches)
            os.kill(multiprocessing.active_children()[0].pid, 9)
            list(batches)
        except RuntimeError as error:
            os.write(1, str(error).encode())
            os._exit(3)
    """
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This DataLoader will create", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=make.ROOT,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("24\nDataLoader worker (pid")


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as opened:
        return int(opened.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow(tmp_path):
    """Over epochs, broken pictures included: one batch kept of each would be 70 MB here."""
    contents = [m for seed in range(30) for m in make.pair(f"{seed:03d}", seed)]
    contents += [m for i in range(6) for m in ((f"b{i}.jpg", b"<html>"), (f"b{i}.txt", b"x"))]
    source = open_data(str(make.write_tar(tmp_path / "t.tar", contents)))
    run = loader(source, readers=make.reader(224), augment=RandomCrop())
    sizes = []
    for epoch in range(6):
        assert sum(len(b.keys) + len(b.skipped) for b in run.epoch(epoch)) == 36
        sizes.append(resident())
    assert sizes[-1] - sizes[2] < 16 << 20


def test_an_epoch_pickles():
    from tinyclip.data.loader import _Epoch

    epoch = _Epoch(loader(Numbers(20), augment=RandomCrop()), 1)
    again = pickle.loads(pickle.dumps(epoch))
    assert same([again[k] for k in range(5)], [epoch[k] for k in range(5)])


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be 1 or more, got 2.0"),
        ({"batch_size": True}, ValueError, "batch_size"),
        ({"workers": -1}, ValueError, "workers must be 0 or more, got -1"),
        ({"world": 0}, ValueError, "world"),
        ({"rank": -1}, ValueError, "rank must be 0 or more"),
        ({"world": 2, "rank": 2}, ValueError, "rank must be below world, 2, got 2"),
        ({"window": 0}, ValueError, "window"),
        ({"seed": 1.5}, ValueError, "seed must be an integer"),
        ({"readers": []}, ValueError, "readers must hold at least one"),
        ({"readers": [Preprocess(8)]}, TypeError, "readers must be Readers, got Preprocess"),
        ({"batch_size": 11}, ValueError, "has 10 samples, fewer than one batch of 11"),
        ({"batch_size": 6, "world": 2}, ValueError, "fewer than one batch of 12"),
    ],
)
def test_malformed(options, error, rule):
    with pytest.raises(error, match=rule):
        loader(Numbers(10), **options)
    with pytest.raises(TypeError, match="source must be a Source, got list"):
        loader([1, 2])
    with pytest.raises(ValueError, match="fewer than one batch"):
        loader(Numbers(0), drop_last=False)
    run = loader(Numbers(10))
    for bad in ((-1, 0), (0, -1), (0, 3)):
        with pytest.raises(ValueError, match="epoch must be 0 or more and start from 0 to 2"):
            run.epoch(*bad)
    assert list(run.epoch(0, 2)) == []


def test_names_of_the_contract():
    assert Batch._fields == ("pairs", "keys", "skipped")
    assert list(inspect.signature(Loader).parameters)[:7] == [
        "source", "readers", "batch_size", "seed", "rank", "world", "workers",
    ]  # fmt: skip
