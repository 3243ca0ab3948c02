"""What tells data from other data: it is the listing, not the place, and reads no picture."""

import pytest

from tests.data import make
from tinyclip.data import open_data


def table(folder, rows=("a.jpg,one", "b.jpg,two")) -> str:
    path = folder / "pairs.csv"
    path.write_text("\n".join(["filepath,title", *rows]) + "\n")
    return str(path)


def shards(folder, keys=("0", "1"), picture=b"no picture", name="0.tar") -> str:
    members = [(f"{key}.{suffix}", picture) for key in keys for suffix in ("jpg", "txt")]
    make.write_tar(folder / name, members)
    return str(folder / name)


def classes(folder, names=("cat/0.png", "dog/1.png")) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    return str(folder)


CASES = {
    "a caption": (table, {"rows": ("a.jpg,one", "b.jpg,too")}),
    "a path": (table, {"rows": ("a.jpg,one", "c.jpg,two")}),
    "the order": (table, {"rows": ("b.jpg,two", "a.jpg,one")}),
    "where a path ends": (table, {"rows": ("a.jp,one", "gb.jpg,two")}),
    "a key": (shards, {"keys": ("0", "2")}),
    "a shard's size": (shards, {"picture": b"no picture" * 6000}),
    "a shard's name": (shards, {"name": "1.tar"}),
    "a file": (classes, {"names": ("cat/0.png", "dog/2.png")}),
    "a class": (classes, {"names": ("cat/0.png", "cow/1.png")}),
}


@pytest.mark.parametrize("case", CASES)
def test_another_listing_has_another_fingerprint(tmp_path, case):
    make_data, changed = CASES[case]
    found = []
    for name, changes in (("here", {}), ("moved", {}), ("other", changed)):
        (tmp_path / name).mkdir()
        found.append(open_data(make_data(tmp_path / name, **changes)).fingerprint())
    assert found[0] == found[1] != found[2]


def test_of_digits():
    specs = ("digits:train", "digits:test", "digits:train?noise=0.5", "digits:train?count=7")
    assert len({open_data(spec).fingerprint() for spec in specs}) == len(specs)
