"""CSV and TSV: every row is a sample or a named, counted broken one."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.data import make
from tinyclip.data import BrokenSample, Loader, open_data


def table(folder: Path, text: str | bytes, name: str = "t.tsv") -> Path:
    for index in range(3):
        (folder / f"{index}.png").write_bytes(make.encoded(make.picture(index)))
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def outcome(source) -> list[tuple]:
    found = []
    for index in range(len(source)):
        try:
            sample = source.sample(index)
            found.append((sample.key, *sample.captions))
        except BrokenSample as broken:
            found.append((broken.key, "BROKEN", broken.reason))
    return found


@pytest.mark.parametrize("separator", ["\t", ","])
def test_reads_pictures_and_captions(tmp_path, separator):
    source = open_data(str(make.write_table(tmp_path, 20, separator)))
    assert len(source) == 20 and source.groups == ()
    for index in (0, 7, 19):
        sample = source.sample(index)
        assert sample.key == f"images/{index:03d}.png"
        assert sample.captions == (f"no. {index}",)
        assert (np.asarray(sample.image) == np.asarray(make.picture(index))).all()


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("t.tsv", "filepath\ttitle\n0.png\ta, b\n", {}),
        ("t.csv", 'filepath,title\n0.png,"a, b"\n', {}),
        ("t.csv", "filepath\ttitle\n0.png\ta, b\n", {}),  # open_clip's tables are .csv with tabs
        ("t.csv", "filepath;title\n0.png;a, b\n", {}),
        ("t.csv", "filepath|title\n0.png|a, b\n", {"separator": "|"}),
        ("t.csv", "filepath\ttitle\n0.png\ta, b\n", {"separator": "\\t"}),
        ("t.csv", "filepath\ttitle\n0.png\ta, b\n", {"separator": "tab"}),
        ("t.txt", "filepath\ttitle\n0.png\ta, b\n", {"kind": "csv"}),
        ("t.tsv", "\ufefffilepath\ttitle\n0.png\ta, b\n", {}),
        ("t.tsv", "filepath\ttitle\r\n0.png\ta, b\r\n", {}),
        ("t.tsv", "id\ttitle\tfilepath\n1\ta, b\t0.png\n", {}),
        ("t.tsv", "img\tsaid\n0.png\ta, b\n", {"image_key": "img", "caption_key": "said"}),
        ("t.csv", 'img,"the, caption"\n0.png,"a, b"\n',
         {"image_key": "img", "caption_key": "the, caption"}),
        ("t.tsv", "\n\nfilepath\ttitle\n\n0.png\ta, b\n\n", {}),
    ],
)  # fmt: skip
def test_formats(tmp_path, name, text, options):
    path = table(tmp_path, text.removeprefix("\n\n") if options else text, name)
    if text.startswith("\n"):
        with pytest.raises(ValueError, match="its columns are none"):
            open_data(str(path), **options)
        path.write_text(text.removeprefix("\n\n"))
    assert outcome(open_data(str(path), **options)) == [("0.png", "a, b")]


def test_quoting(tmp_path):
    text = 'filepath,title\n0.png,"two\nlines, ""quoted"""\n1.png,a "mid" quote\n'
    path = table(tmp_path, text, "t.csv")
    assert outcome(open_data(str(path))) == [
        ("0.png", 'two\nlines, "quoted"'),
        ("1.png", 'a "mid" quote'),
    ]
    # Of a quote that is never closed, the rest of the file would be one caption.
    path = table(tmp_path, 'filepath\ttitle\n0.png\t"unclosed\n1.png\tb\n2.png\tc\n')
    with pytest.raises(ValueError, match=r"t\.tsv: line 4: .*quoted=False"):
        open_data(str(path))
    found = outcome(open_data(str(path), quoted=False))
    assert found == [("0.png", '"unclosed'), ("1.png", "b"), ("2.png", "c")]


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    path = make.write_table(tmp_path / "there", 2)
    absolute = (tmp_path / "there" / "images" / "000.png").resolve()
    other = tmp_path / "elsewhere.tsv"
    other.write_text(f"filepath\ttitle\n{absolute}\tabsolute\nthere/images/001.png\trelative\n")
    monkeypatch.chdir(tmp_path)
    assert outcome(open_data("there/pairs.tsv")) == outcome(open_data(str(path)))
    assert [said for _, said in outcome(open_data(str(other)))] == ["absolute", "relative"]


def test_rows_that_cannot_be_used_are_samples_too(tmp_path):
    text = (
        b"filepath\ttitle\n"
        b"0.png\tgood\n"
        b"1.png\n"
        b"1.png\ta\tb\n"
        b"\tno path\n"
        b"2.png\t\n"
        b"2.png\t \xc2\xa0 \n"
        b"1.png\tbad \xff utf-8\n"
        b"gone\nline.png\tx\n"
        b"gone.png\tx\n"
        b"\xff.png\tundecodable name\n"
        b"http://example.com/a.png\ta URL\n"
        b"/dev/zero\ta device\n"
        b"t.tsv\tno picture\n"
    )
    path = table(tmp_path, text)
    (tmp_path / "\udcff.png").write_bytes(make.encoded(make.picture(9)))
    found = outcome(open_data(str(path)))
    assert [entry[1] for entry in found].count("BROKEN") == 12
    assert len(found) == 14 and found[0] == ("0.png", "good")
    assert found[10] == ("\udcff.png", "undecodable name")
    reasons = {index: entry[2] for index, entry in enumerate(found) if entry[1] == "BROKEN"}
    assert reasons[1] == "line 3 has 1 columns, not 2"
    assert reasons[2] == "line 4 has 3 columns, not 2"
    assert reasons[3] == "line 5 names no picture in 'filepath'"
    assert reasons[4] == reasons[5] == "has an empty caption"
    assert reasons[6] == "has a caption that is no UTF-8"
    assert reasons[9] == reasons[11] == "there is no such file"
    assert reasons[12] == "is no regular file"
    assert reasons[13].startswith("is no JPEG, PNG, WEBP file")
    loader = Loader(open_data(str(path)), make.reader(), batch_size=4, drop_last=False)
    batches = list(loader.epoch(0))
    assert sum(len(b.keys) for b in batches) == 2
    assert sorted(s.reason for b in batches for s in b.skipped) == sorted(reasons.values())
    assert all(text.isprintable() for b in batches for text in (*b.keys, *map(str, b.skipped)))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "image\tcaption\n0.png\ta\n",
            r"no column 'filepath' \(image_key, --csv-img-key\); its columns are 'im",
        ),
        (
            "filepath\tcaption\n0.png\ta\n",
            r"no column 'title' \(caption_key, --csv-caption-key\); its columns are 'f",
        ),
        ("filepath\ttitle\ttitle\n0.png\ta\tb\n", "more than one column 'title'"),
        ("filepath title\n0.png a\n", "its columns are 'filepath title'"),
        ("", "its columns are none"),
        ("a\x1b[31m\tb\n", r"its columns are 'a\\x1b\[31m', 'b'"),
        ("filepath\ttitle\n".encode("utf-16"), "must be UTF-8"),
        (b"\xff\xfef\0", "must be UTF-8"),
    ],
)
def test_headers_that_lack_a_column(tmp_path, text, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        open_data(str(table(tmp_path, text)))
    assert "t.tsv" in str(caught.value)


def test_other_mistakes(tmp_path):
    path = table(tmp_path, "filepath\ttitle\n0.png\ta\n")
    with pytest.raises(
        ValueError, match=r"separator must be one character \(--csv-separator\), got ', '"
    ):
        open_data(str(path), separator=", ")
    with pytest.raises(FileNotFoundError):
        open_data(str(tmp_path / "absent.csv"))
    with pytest.raises(IndexError):
        open_data(str(path)).sample(1)
    with pytest.raises(IndexError):
        open_data(str(path)).sample(-1)


def test_a_caption_may_be_long_and_the_limit_is_put_back(tmp_path):
    path = table(tmp_path, "filepath\ttitle\n0.png\t" + "x" * 1_000_000 + "\n")
    before = csv.field_size_limit(4321)
    try:
        assert outcome(open_data(str(path))) == [("0.png", "x" * 1_000_000)]
        assert csv.field_size_limit() == 4321
    finally:
        csv.field_size_limit(before)


def test_pickles_small(tmp_path):
    lines = "".join(f"{i % 3}.png\tcaption number {i}\n" for i in range(20_000))
    source = open_data(str(table(tmp_path, "filepath\ttitle\n" + lines)))
    data = pickle.dumps(source)
    assert len(data) < len(lines) + 20_000 * 2 * 8 + 2000
    assert pickle.loads(data).sample(19_999).captions == ("caption number 19999",)
