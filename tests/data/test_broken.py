"""Damaged data as a whole: seen + skipped = written, and too much of it stops the run."""

import pytest

from tests.data import make
from tinyclip.data import BadSamples, Batch, Loader, Skipped, TooManyBroken, open_data

GOOD = 60


def damaged(folder, kind: str) -> str:
    """Sixty good samples among forty broken ones, as a table, as shards or as class folders."""
    names, samples = [], []
    for number, (name, data) in enumerate(make.broken_images().items()):
        samples.append((f"bad_{name}", data, f"no. {number}"))
    for seed in range(GOOD):
        samples.append((f"good_{seed}", make.encoded(make.picture(seed)), f"no. {seed}"))
    if kind == "shards":
        contents = []
        for name, data, said in samples:
            contents += [(f"{name}.jpg", data), (f"{name}.txt", said.encode())]
        make.write_tar(folder / "0.tar", contents[:100])
        make.write_tar(folder / "1.tar", contents[100:])
        return str(folder / "{0..1}.tar")
    for name, data, said in samples:
        path = folder / "class" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        names.append(f"class/{name}.jpg\t{said}\n")
    (folder / "pairs.tsv").write_text("filepath\ttitle\n" + "".join(names))
    return str(folder / "pairs.tsv" if kind == "table" else folder)


@pytest.mark.parametrize("kind", ["table", "shards", "folder"])
@pytest.mark.parametrize("workers", [0, 2])
def test_forty_broken_images(tmp_path, kind, workers):
    source = open_data(damaged(tmp_path, kind))
    assert len(source) == GOOD + 40
    run = Loader(source, make.reader(), batch_size=16, workers=workers, drop_last=False)
    counted, keys, skipped = BadSamples(0.5, keep=7), [], []
    for batch in run.epoch(0):
        counted.count(batch)
        keys += batch.keys
        skipped += batch.skipped
    assert len(keys) + len(skipped) == len(source)
    assert len(set(keys)) == GOOD and all("good_" in key for key in keys)
    assert len({key for key, _ in skipped}) == 40 and all("bad_" in key for key, _ in skipped)
    assert all(reason and reason.isprintable() for _, reason in skipped)
    assert (counted.read, counted.skipped) == (GOOD, 40)
    assert list(counted.last) == skipped[-7:]
    counted.check()


def batch(read: int, *skipped: str) -> Batch:
    return Batch((), tuple(map(str, range(read))), tuple(Skipped(k, "why") for k in skipped))


def test_too_many_stop_the_run_with_the_list():
    counted = BadSamples(0.1, after=20)
    counted.count(batch(5, "one", "two"))  # 2 of 7: too early to judge
    assert counted.exceeded
    counted.count(batch(11))
    counted.count(batch(2))  # 2 of 20: the last that is accepted
    assert not counted.exceeded
    with pytest.raises(TooManyBroken) as caught:
        counted.count(batch(0, "three"))
    assert str(caught.value) == (
        "3 of 21 samples are broken, more than the accepted 10.000%; the last 3:\n"
        "  one: why\n  two: why\n  three: why"
    )
    assert (counted.read, counted.skipped) == (18, 3)
    many = BadSamples(0.1, listed="run/skipped.jsonl")
    with pytest.raises(TooManyBroken) as caught:
        many.count(batch(0, *map(str, range(5000))))
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("5000 of 5000 samples are broken") and lines[0].endswith("last 10:")
    assert lines[1:] == [*(f"  {n}: why" for n in range(4990, 5000)),
                         "all are listed in run/skipped.jsonl"]  # fmt: skip


def test_the_end_of_an_epoch_judges_whatever_was_seen():
    counted = BadSamples(0.1)
    counted.count(batch(3, "one"))
    with pytest.raises(TooManyBroken, match="1 of 4"):
        counted.check()
    nothing = BadSamples(0)
    nothing.check()
    nothing.count(batch(5000))
    assert nothing.report() == "no broken samples" and not nothing.exceeded
    with pytest.raises(TooManyBroken):
        nothing.count(batch(5000, "one"))
    everything = BadSamples(1.0, after=0, keep=3)
    for number in range(10):
        everything.count(batch(0, str(number)))
    assert [key for key, _ in everything.last] == ["7", "8", "9"]
    assert everything.skipped == 10


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"most": -0.1}, "most must be from 0 to 1"),
        ({"most": 1.1}, "most must be from 0 to 1"),
        ({"most": float("nan")}, "most must be from 0 to 1"),
        ({"after": -1}, "after must be 0 or more"),
        ({"keep": 0}, "keep 1 or more"),
    ],
)
def test_malformed(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        BadSamples(**arguments)
