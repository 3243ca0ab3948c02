"""Tar shards: every sample of a sound shard, and never half a shard without a word."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from tests.data import make
from tinyclip.data import BrokenSample, Loader, open_data
from tinyclip.data.names import expand
from tinyclip.data.shards import ShardError
from tinyclip.data.tar import TarError, members

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def outcome(source) -> list[tuple]:
    found = []
    for index in range(len(source)):
        try:
            sample = source.sample(index)
            found.append((sample.key, *sample.captions))
        except BrokenSample as broken:
            found.append((broken.key, "BROKEN", broken.reason))
    return found


def listed(path) -> list[tuple]:
    with open(path, "rb") as opened:
        return [(m.name, m.offset, m.size, m.regular) for m in members(opened.fileno())]


def test_reads_every_sample(tmp_path):
    paths = make.write_shards(tmp_path, (5, 1, 8))
    source = open_data(str(tmp_path / "{000..002}.tar"))
    assert len(source) == 14 and source.groups == (5, 1, 8)
    for index in range(14):
        sample = source.sample(index)
        shard = 0 if index < 5 else 1 if index < 6 else 2
        assert sample.key == f"{paths[shard].name}/{index:05d}"
        assert sample.captions == (f"no. {index}",)
        expected = make.encoded(make.picture(index), ("PNG", "JPEG", "WEBP")[index % 3])
        with make.Image.open(io.BytesIO(expected)) as image:
            assert (np.asarray(sample.image) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_tarfile_s(tmp_path, format):
    """Names short, long, longer and not ASCII; sizes around the block; every kind of member."""
    names = ["a.txt", "d/" * 40 + "b.jpg", "x" * 98 + ".j", "long/" * 12 + "y" * 90 + ".txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".txt", "日本/é.png", "\udcff\udcfe.txt"]
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
        for index, name in enumerate(names):
            member = tarfile.TarInfo(name)
            # webdataset's times are fractions, for which pax writes an extra header each.
            member.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
            member.size = (0, 1, 511, 512, 513, 1024, 5000)[index]
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"kind{kind.decode()}.txt")
            member.size = 700  # of what a link is to: no payload follows
            member.type, member.linkname = kind, "a.txt" * (10 if format == FORMATS[0] else 30)
            archive.addfile(member)
        last = tarfile.TarInfo("last.txt")
        # What is beyond seven octal digits, GNU writes 256-based and pax in the extra header.
        last.size, last.uid = 3, 1 << (20 if format == FORMATS[0] else 30)
        archive.addfile(last, io.BytesIO(b"end"))
    with tarfile.open(path, errors="surrogateescape") as archive:
        found = archive.getmembers()
        expected = [(m.name, m.offset_data, m.size * m.isreg(), m.isreg()) for m in found]
    assert [(name.rstrip("/"), *rest) for name, *rest in listed(path)] == expected
    assert len(expected) == len(names) + 5


def test_sizes_beyond_octal(tmp_path):
    """8 GiB and more, as holes: GNU's 256-based sizes and pax's."""
    for format in FORMATS[1:]:
        member = tarfile.TarInfo("big.jpg")
        member.size = (1 << 33) + 5
        after = tarfile.TarInfo("after.txt")
        header = member.tobuf(format)
        path = tmp_path / f"{format}.tar"
        with path.open("wb") as file:
            file.write(header)
            file.seek(len(header) + (1 << 33) + 512)
            file.write(after.tobuf(format) + bytes(1024))
        (big, last) = listed(path)
        assert big == ("big.jpg", len(header), (1 << 33) + 5, True)
        assert last[0] == "after.txt"


def test_a_cut_tar_is_noticed_wherever_it_is_cut(tmp_path):
    """seen + skipped = written, or an error: at 60 random places, and at every 64th byte."""
    contents = [m for seed in range(10) for m in make.pair(f"{seed:03d}", seed)]
    whole = make.write_tar(tmp_path / "whole.tar", contents).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    cut, path = {"error": 0, "whole": 0}, tmp_path / "cut.tar"
    places = np.random.default_rng(0).integers(0, len(whole), 60).tolist()
    for place in sorted({*places, *range(0, len(whole), 64), end, end + 511, end + 512}):
        path.write_bytes(whole[:place])
        try:
            found = outcome(open_data(str(path)))
        except ShardError as error:
            assert "is cut" in str(error) or "is empty, 0 bytes" in str(error)
            cut["error"] += 1
            continue
        assert sorted(found) == [(f"cut.tar/{s:03d}", f"no. {s}") for s in range(10)]
        assert place >= end + 512  # nothing is lost but zeros after the end mark
        cut["whole"] += 1
    assert cut["error"] > 100 and cut["whole"] > 10


def test_a_damaged_tar_is_noticed(tmp_path):
    """Any byte of any header: the checksum is wrong, or the byte was of no meaning."""
    contents = [m for seed in range(3) for m in make.pair(f"{seed:03d}", seed)]
    for format in FORMATS:
        path = make.write_tar(tmp_path / "whole.tar", contents, format)
        whole, expected = path.read_bytes(), outcome(open_data(str(path)))
        headers = [offset - 512 for _, offset, _, _ in listed(path)]
        for place in [h + d for h in headers for d in (0, 3, 100, 124, 130, 148, 156, 257, 345)]:
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            try:
                assert outcome(open_data(str(path))) == expected, place
                assert whole[place] in b"\0 0"  # of the checksum, whose zeros may be blanks
            except ShardError as error:
                assert "no header at byte" in str(error)


def test_archives_that_were_put_together(tmp_path):
    """tarfile would read the first and forget the second."""
    one, two = make.write_shards(tmp_path, (2, 3))
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(ShardError, match="goes on after the end of its archive"):
        open_data(str(tmp_path / "both.tar"))


def test_shards_that_are_none(tmp_path):
    make.write_shards(tmp_path, (2,))
    (tmp_path / "text.tar").write_text("<html>" + "404 " * 500)
    (tmp_path / "empty.tar").write_bytes(b"")
    make.write_tar(tmp_path / "void.tar", [])
    make.write_tar(tmp_path / "other.tar", [("README", b"x"), ("a.cls", b"1")])
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for name, rule in {
        "text": "is damaged, or no tar: no header at byte 0",
        "empty": "is empty, 0 bytes",
        "void": "holds no sample: no .jpg",
        "other": "holds no sample: no .jpg",
        "folder": "directory",
        "pipe": "is empty, 0 bytes",
        "absent": "No such file or directory",
    }.items():
        with pytest.raises(ShardError, match=rf"1 of 2 shards .*{name}\.tar: .*{rule}"):
            open_data(str(tmp_path / f"{{000,{name}}}.tar"))
    with pytest.raises(ShardError, match=r"8 of 9 .*\(and 3 more\)"):
        open_data(f"{tmp_path}/000.tar::{tmp_path}/gone{{0..7}}.tar")


def test_members_in_any_order_make_whole_samples(tmp_path):
    contents = [m for seed in range(9) for m in make.pair(f"k/{seed}", seed)]
    expected = {(f"t.tar/k/{seed}", f"no. {seed}") for seed in range(9)}
    for order in range(5):
        mixed = [contents[i] for i in np.random.default_rng(order).permutation(len(contents))]
        source = open_data(str(make.write_tar(tmp_path / "t.tar", mixed)))
        assert set(outcome(source)) == expected and len(source) == 9


def test_what_is_wrong_with_a_sample_is_said(tmp_path):
    image = make.encoded(make.picture(0))
    contents = [
        *make.pair("good", 0),
        ("alone.png", image),
        ("mute.txt", b"no picture"),
        *make.pair("twice", 1), *make.pair("twice", 2), ("twice.txt", b"which?"),
        ("blank.png", image), ("blank.txt", b" \n"),
        ("bytes.png", image), ("bytes.txt", b"\xff\xfe"),
        ("bad.jpg", b"<html>"), ("bad.txt", b"a page"),
        ("nil.jpg", b""), ("nil.txt", b"no bytes"),
        ("key.png", image), ("key.json", b'{"title": "other"}'),
        ("list.png", image), ("list.json", b'{"caption": ["one", "two"]}'),
        ("none.png", image), ("none.json", b'{"caption": null}'),
        ("torn.png", image), ("torn.json", b'{"caption": '),
        ("deep.png", image), ("deep.json", b"[" * 100_000),
        ("number.png", image), ("number.json", b'{"caption": [1]}'),
        ("both.png", image), ("both.txt", b"text"), ("both.json", b'{"caption": "json"}'),
        ("UP.PNG", image), ("UP.TXT", b"upper case"),
        ("a.b/c.d.png", image), ("a.b/c.txt", b"another key: the name has two dots"),
        ("./dot.png", image), ("dot.txt", b"the same folder"),
        (".hidden.png", image), ("x.cls", b"3"), ("evil.pyd", b"\x80\x04."),
    ]  # fmt: skip
    path = make.write_tar(tmp_path / "t.tar", contents)
    source = open_data(str(path))
    found = {}
    for key, *rest in outcome(source):
        found.setdefault(key.removeprefix("t.tar/"), []).append(rest)
    assert len(source) == sum(map(len, found.values()))
    reasons = {k: v[0][1] for k, v in found.items() if v[0][0] == "BROKEN"}
    assert found["good"] == [["no. 0"]]
    assert reasons.pop("alone") == "has no caption: no .txt, .json"
    assert reasons.pop("mute") == "has no picture: no .jpg, .jpeg, .png, .webp"
    # Two pictures and three captions: none is guessed, and two samples or more are counted.
    assert reasons.pop("twice") == "its .txt is there 2 times"
    assert len(found["twice"]) == 2
    assert reasons.pop("blank") == "has an empty caption"
    assert reasons.pop("bytes") == "has a caption that is no UTF-8"
    assert reasons.pop("bad") == "is no JPEG, PNG, WEBP file"
    assert reasons.pop("nil") == "is empty, 0 bytes"
    for key in ("key", "none", "number"):
        assert reasons.pop(key) == "has no text at 'caption' of its .json (--json-key)"
    for key in ("torn", "deep"):
        assert reasons.pop(key).startswith("has a .json that is none")
    assert reasons.pop("a.b/c") == "has no picture: no .jpg, .jpeg, .png, .webp"
    assert reasons == {}
    assert found["list"] == [["one", "two"]] and found["both"] == [["text"]]
    assert found["UP"] == [["upper case"]] and found["dot"] == [["the same folder"]]
    assert not {"x", "evil", ".hidden", ""} & set(found)
    other = open_data(str(path), json_key="title")
    assert "t.tar/key" in {k for k, *rest in outcome(other) if rest == ["other"]}


def test_only_regular_files_are_read(tmp_path):
    """A link out of the archive, a device, a sparse file: named, not followed."""
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        for kind, link in ((tarfile.SYMTYPE, "/etc/hostname"), (tarfile.CHRTYPE, "")):
            member = tarfile.TarInfo(f"{kind.decode()}.txt")
            member.type, member.linkname = kind, link
            archive.addfile(member)
        sparse = tarfile.TarInfo("sparse.txt")
        sparse.pax_headers = {"GNU.sparse.size": "100"}
        archive.addfile(sparse)
        for key in ("2", "3", "sparse", "../../up"):
            data = make.encoded(make.picture(1))
            image = tarfile.TarInfo(f"{key}.png")
            image.size = len(data)
            archive.addfile(image, io.BytesIO(data))
        up = tarfile.TarInfo("../../up.txt")
        up.size = 2
        archive.addfile(up, io.BytesIO(b"up"))
    before = sorted(tmp_path.parent.rglob("*"))
    found = outcome(open_data(str(path)))
    refused = "is no regular file, but a link or a device"
    assert sorted(found) == [
        ("t.tar/../../up", "up"),
        ("t.tar/2", "BROKEN", refused),
        ("t.tar/3", "BROKEN", refused),
        ("t.tar/sparse", "BROKEN", refused),
    ]
    assert sorted(tmp_path.parent.rglob("*")) == before  # nothing was extracted


def hostile(name: str) -> bytes:
    member = tarfile.TarInfo("a.txt")
    header = bytearray(member.tobuf())

    def checked(block: bytearray) -> bytes:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    if name == "negative size":
        header[124:136] = b"\xff" * 12
    elif name == "size in letters":
        header[124:136] = b"0000000000x\0"
    elif name == "huge size":
        header[124:136] = b"\x80" + b"\x7f" * 11
    elif name == "long name of megabytes":
        header[156:157], header[124:136] = b"L", b"00010000000\0"
        return checked(header) + bytes(1 << 22)
    elif name in ("pax length", "pax size", "pax digits", "pax zero"):
        record = {
            "pax length": b"99 path=x\n",
            "pax size": b"11 size=-1\n",
            "pax digits": b"8" * 30 + b" path=x\n",
            "pax zero": b"0 path=x\n",
        }[name]
        header[156:157], header[124:136] = b"x", b"%011o\0" % len(record)
        return checked(header) + record.ljust(512, b"\0") + bytes(1024)
    elif name == "long name":
        record = b"50012 path=" + b"x" * 50_000 + b"\n"
        header[156:157], header[124:136] = b"x", b"%011o\0" % len(record)
        body = record + bytes(-len(record) % 512)
        return checked(header) + body + tarfile.TarInfo("b.txt").tobuf() + bytes(1024)
    return checked(header) + bytes(1024)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("negative size", "is damaged, or no tar"),
        ("size in letters", "is damaged, or no tar"),
        ("huge size", "is cut"),
        ("long name of megabytes", "extended header of 2097152 bytes"),
        ("pax length", "cannot be read"),
        ("pax size", "cannot be read"),
        ("pax digits", "cannot be read"),
        ("pax zero", "cannot be read"),
        ("long name", "has a name of 50000 characters"),
    ],
)
def test_hostile_headers(tmp_path, name, rule):
    path = tmp_path / "t.tar"
    path.write_bytes(hostile(name))
    with pytest.raises(TarError, match=rule):
        listed(path)


def test_a_shard_that_changes_is_noticed(tmp_path):
    (path,) = make.write_shards(tmp_path, (4,))
    source = open_data(str(path))
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(ShardError, match=r"000\.tar: has changed since it was opened"):
        source.sample(0)
    source = open_data(str(path))
    assert source.sample(0).captions == ("no. 0",)
    os.truncate(path, 700)
    with pytest.raises(ShardError, match="was cut while it was in use"):
        source.sample(3)
    source = pickle.loads(pickle.dumps(source))
    path.unlink()
    with pytest.raises(BrokenSample, match="cannot be read"):
        source.sample(1)


def test_few_files_are_open_at_once(tmp_path):
    make.write_shards(tmp_path, (1,) * 50)
    source, before = open_data(str(tmp_path)), len(os.listdir("/proc/self/fd"))
    for index in [*range(50), *range(50)]:
        assert source.sample(index).captions == (f"no. {index}",)
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= 32
    again = pickle.loads(pickle.dumps(source))
    assert again.sample(3).captions == ("no. 3",)
    del source, again
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_more_ranks_and_workers_than_shards(tmp_path):
    (path,) = make.write_shards(tmp_path, (9,))
    seen = []
    for rank in range(3):
        loader = Loader(
            open_data(str(path)), make.reader(), batch_size=2, world=3, rank=rank, workers=3,
            drop_last=False,
        )  # fmt: skip
        seen += [key for batch in loader.epoch(0) for key in batch.keys]
    assert sorted(seen) == [f"000.tar/{index:05d}" for index in range(9)]


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{000..001}.tar", ["000.tar", "001.tar"]),
        ("{a,bc,}-x.tar", ["a-x.tar", "bc-x.tar", "-x.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("b.tar::a{1..2}.tar", ["b.tar", "a1.tar", "a2.tar"]),
        ("a.tar::a.tar", ["a.tar", "a.tar"]),
    ],
)
def test_names(spec, paths):
    assert expand(spec) == paths


def test_wild_cards(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt", "[d].tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [str(tmp_path / n) for n in ("[d].tar", "a.tar", "b.tar")]
    assert expand(f"{tmp_path}/?.t*") == [str(tmp_path / n) for n in ("a.tar", "b.tar", "c.txt")]
    assert expand(f"{tmp_path}/[d].tar") == [str(tmp_path / "[d].tar")]  # as it is, if it is there
    with pytest.raises(FileNotFoundError, match="no file matches"):
        expand(f"{tmp_path}/*.gone")


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("pipe:curl -s http://x/a.tar", "'pipe:' is read by no one here"),
        ("http://x/{0..9}.tar", "'http://' is read"),
        ("s3://bucket/a.tar", "'s3://' is read"),
        ("a.tar::gs://x/b.tar", "'gs://' is read"),
        ("a.tar::", "is empty"),
        ("a.tar.gz", "is compressed"),
        ("{0..1}.tgz", "is compressed"),
        ("{3..1}.tar", "a range must ascend"),
        ("{0..99999999}.tar", "a range must ascend, by fewer than"),
        ("{0..9999}{0..9999}.tar", "more than 1000000 shards"),
        ("{a..c}.tar", "braces must hold a range of numbers"),
        ("{1}.tar", "braces must hold a range of numbers"),
        ("{a,{b,c}}.tar", "braces must"),
        ("{a,b.tar", "braces must match"),
        ("a}.tar", "braces must match"),
    ],
)
def test_malformed_names(spec, rule):
    with pytest.raises(ValueError, match=rule):
        expand(spec)
    with pytest.raises(ValueError, match=rule):
        open_data(spec, kind="webdataset")
