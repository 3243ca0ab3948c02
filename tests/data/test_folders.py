"""A sub-folder a class; what else opens by itself."""

import numpy as np
import pytest

from tests.data import make
from tinyclip.data import BrokenSample, Source, open_data
from tinyclip.data.digits import DigitScenes
from tinyclip.data.folders import ClassFolders
from tinyclip.data.shards import Shards
from tinyclip.data.tables import Table


def folders(root):
    for seed, name in enumerate(("tench/b.png", "tench/a.jpg", "great_white/x/y.webp")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.encoded(make.picture(seed)))
    (root / "tench" / ".DS_Store").write_bytes(b"hidden")
    (root / ".git").mkdir()
    (root / ".git" / "c.png").write_bytes(b"hidden")
    (root / "list.txt").write_text("beside the classes")
    (root / "great_white" / "notes.txt").write_text("no picture")
    (root / "void").mkdir()
    return root


def test_classes_and_labels(tmp_path):
    source = open_data(str(folders(tmp_path)))
    assert source.classes == ("great white", "tench", "void")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert len(source) == 4
    with pytest.raises(BrokenSample, match=r"great_white/notes\.txt: is no JPEG"):
        source.sample(0)
    samples = [source.sample(index) for index in (1, 2, 3)]
    assert [s.key for s in samples] == ["great_white/x/y.webp", "tench/a.jpg", "tench/b.png"]
    assert [s.captions for s in samples] == [("great white",), ("tench",), ("tench",)]
    for sample, seed in zip(samples, (2, 1, 0), strict=True):
        assert (np.asarray(sample.image) == np.asarray(make.picture(seed))).all()
    with pytest.raises(IndexError):
        source.sample(4)


def test_folders_without_samples(tmp_path):
    with pytest.raises(ValueError, match="must hold one sub-folder a class"):
        open_data(str(tmp_path))
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match="no file is in any of its 1 sub-folders"):
        open_data(str(tmp_path))
    with pytest.raises(NotADirectoryError):
        open_data(str(make.write_table(tmp_path, 1)), kind="folder")


def test_kinds_are_known_by_their_names(tmp_path):
    classes = folders(tmp_path / "classes")
    shards = make.write_shards(tmp_path / "shards[1]", (2, 3))
    rows = make.write_table(tmp_path / "rows", 2)
    for spec, kind in {
        "digits:test": DigitScenes,
        str(classes): ClassFolders,
        str(rows): Table,
        str(shards[0]): Shards,
        f"{shards[0]}::{shards[1]}": Shards,
        str(shards[0].parent): Shards,
    }.items():
        source = open_data(spec)
        assert type(source) is kind and isinstance(source, Source)
    assert len(open_data(str(shards[0].parent))) == 5
    assert len(open_data(shards[0])) == 2  # a Path, too


@pytest.mark.parametrize(
    ("spec", "options", "error", "rule"),
    [
        ("absent", {}, FileNotFoundError, "'absent': no such file or folder"),
        ("a\nb", {}, FileNotFoundError, r"'a\\nb'"),
        ("", {}, ValueError, "spec must name a data set"),
        ("here.parquet", {}, ValueError, "must be a .csv, a .tsv, .tar shards, a folder"),
        ("digits", {"kind": "dataset"}, ValueError, r"kind \(--dataset-type\) must be one of"),
        ("digits", {"most_pixels": 0}, ValueError, "most_pixels must be a positive integer"),
    ],
)
def test_malformed(tmp_path, monkeypatch, spec, options, error, rule):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.parquet").write_bytes(b"PAR1")
    with pytest.raises(error, match=rule):
        open_data(spec, **options)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    from tinyclip.data import digits

    rows, shards = make.write_table(tmp_path, 1), make.write_shards(tmp_path, (1,))[0]
    digits._scans.cache_clear()
    digits._split.cache_clear()
    for name in ("PIL", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for spec in (rows, shards):
        with pytest.raises(ImportError, match=r"Pillow: pip install 'tinyclip\[train\]'"):
            open_data(str(spec))
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'tinyclip\[train\]'"):
        open_data("digits:test")
