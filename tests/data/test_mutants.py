"""Seeded bugs of the data code: each is noticed by a test."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak


def mutant(name: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, f"tinyclip/data/{file}.py", old, new, (f"tests/data/test_{tests}.py",))


MUTANTS = (
    mutant(
        "the epoch is forgotten", "draws", "for word in words:", "for word in words[:2]:", "loader"
    ),
    mutant(
        "one seed for all splits",
        "digits",
        "list(SPLITS).index(split), *turn",
        "0, *turn",
        "digits",
    ),
    mutant(
        "one scan too many",
        "digits",
        "np.cumsum(counts))[place]",
        "np.cumsum(counts) + 1)[place]",
        "digits",
    ),
    mutant(
        "left is right",
        "digits",
        "(halves[:, 0], halves[:, 1])",
        "(halves[:, 1], halves[:, 0])",
        "digits",
    ),
    mutant(
        "fixed scenes are fresh", "digits", 'turn if split == "train" else FIRST', "turn", "digits"
    ),
    mutant(
        "noise may be right",
        "digits",
        "other = 1 + draws.below(len(captions()) - 1",
        "other = draws.below(20",
        "digits",
    ),
    mutant(
        "twice the noise",
        "digits",
        "index, 0) < self.noise",
        "index, 0) < 2 * self.noise",
        "digits",
    ),
    mutant(
        "the preprocess is not tried",
        "digits",
        "return torch.equal(preprocess",
        "return True or torch.equal(preprocess",
        "digits",
    ),
    mutant("any format", "images", ", formats=FORMATS)", ")", "images"),
    mutant(
        "no limit of pixels", "images", "if width * height > most_pixels:", "if False:", "images"
    ),
    mutant("strips", "images", "if max(size) > MOST_ELONGATED * min(size):", "if False:", "images"),
    mutant("16 bits are clipped", "images", "((grey + 128) // 257)", "grey.clip(0, 255)", "images"),
    mutant(
        "alpha is dropped", "images", 'image.mode in ("RGBA", "LA", "PA") or', "False or", "images"
    ),
    mutant("transparent colours", "images", ' or "transparency" in image.info', "", "images"),
    mutant(
        "orientation", "images", "_rgb(ImageOps.exif_transpose(image))", "_rgb(image)", "images"
    ),
    mutant("pipes are opened", "images", "if not S_ISREG(status.st_mode):", "if False:", "images"),
    mutant(
        "one crop for all epochs", "images", "draws.CROP, *where", "draws.CROP, where[-1]", "loader"
    ),
    mutant(
        "the last column of a crop", "images", "x * (width - w + 1)", "x * (width - w)", "images"
    ),
    mutant(
        "short rows are padded",
        "tables",
        "if len(row) != len(header):",
        "if len(row) > len(header):",
        "tables",
    ),
    mutant(
        "quotes are trusted", "tables", "quoting=quoting, strict=True", "quoting=quoting", "tables"
    ),
    mutant("paths from here", "tables", "self.path.parent / name", "name", "tables"),
    mutant("the limit stays", "tables", "csv.field_size_limit(before)", "pass", "tables"),
    mutant("any caption", "source", "if not text or text.isspace():", "if False:", "tables"),
    mutant("bytes in captions", "source", "        text.encode()\n", "        pass\n", "tables"),
    mutant(
        "a short header ends it",
        "tar",
        "if len(header) < _BLOCK:",
        "if not header:\n            return\n        if len(header) < _BLOCK:",
        "shards",
    ),
    mutant("payloads may be cut", "tar", "if end > length:", "if start > length:", "shards"),
    mutant("no checksum", "tar", "if stated != total and", "if False and", "shards"),
    mutant("what follows the end", "tar", "if data.strip(b", "if False and data.strip(b", "shards"),
    mutant("links are files", "tar", "kind in _REGULAR and not sparse", "True", "shards"),
    mutant("links have payloads", "tar", "if kind in _NO_PAYLOAD:", "if False:", "shards"),
    mutant("an extended name lasts", "tar", "        extended = {}\n", "", "shards"),
    mutant("pax sizes", "tar", 'int(extended.get("size", size))', "size", "shards"),
    mutant("the first of two members", "shards", "if len(same) > 1:", "if False:", "shards"),
    mutant(
        "repeats count once", "shards", "range(max(map(len, parts.values())))", "range(1)", "shards"
    ),
    mutant(
        "changed shards", "shards", "if _state(self._open[number]) != state:", "if False:", "shards"
    ),
    mutant("files stay open", "shards", "len(self._open) >= _MOST_OPEN", "False", "shards"),
    mutant("empty shards", "shards", "    if not found:\n", "    if False:\n", "shards"),
    mutant("zeros of a range", "names", 'if span[1].startswith("0")', "if False", "shards"),
    mutant("commands", "names", "(pipe:|", "(pope:|", "shards"),
    mutant(
        "hidden files",
        "folders",
        'for name in names if name[0] != "."',
        "for name in names",
        "folders",
    ),
    mutant(
        "labels",
        "folders",
        "np.arange(len(folders)), [len",
        "np.arange(len(folders))[::-1], [len",
        "folders",
    ),
    mutant(
        "one order for ever", "loader", "Turn(self.seed, epoch))", "Turn(self.seed, 0))", "loader"
    ),
    mutant("ranks overlap", "loader", "(self.rank, self.rank + 1)", "(0, self.rank + 1)", "loader"),
    mutant(
        "resume skips one",
        "loader",
        "range(start, len(self))",
        "range(start + 1, len(self))",
        "loader",
    ),
    mutant(
        "windows are not mixed",
        "loader",
        "np.lexsort((hashes,",
        "np.lexsort((np.arange(count),",
        "loader",
    ),
    mutant(
        "shards keep their order",
        "loader",
        "in draws.permutation(len(groups), draws.GROUPS, *turn)",
        "in range(len(groups))",
        "loader",
    ),
    mutant(
        "workers hear signals",
        "loader",
        "signal.pthread_sigmask(signal.SIG_BLOCK, _DECIDED_BY_MAIN)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        "loader",
    ),
    mutant(
        "the main process is deaf",
        "loader",
        "signal.pthread_sigmask(signal.SIG_SETMASK, signals)",
        "pass",
        "loader",
    ),
    mutant("a number of the model's", "loader", "generator=Generator(),", "", "loader"),
    mutant(
        "threads after a fork",
        "loader",
        'os.environ[_PARALLEL] = "false"',
        "os.environ.pop(_PARALLEL, None) or os.environ.setdefault('X', '1')",
        "loader",
    ),
    mutant(
        "skipped are forgotten",
        "source",
        "skipped.append(Skipped(broken.key, broken.reason))",
        "pass",
        "broken",
    ),
    mutant(
        "captions are not cut",
        "source",
        "return text[:, : int(used[-1])",
        "return text if len(used) else text[:, : int(used[-1])",
        "loader",
    ),
    mutant(
        "the teacher's is the student's",
        "source",
        "texts[_place(tokenizers, reader.tokenizer)]",
        "texts[0]",
        "loader",
    ),
    mutant(
        "always the first caption",
        "source",
        "captions.append(sample.captions[int(choice)])",
        "captions.append(sample.captions[0])",
        "loader",
    ),
    mutant("names are printed", "source", "c if c.isprintable() else", "c if True else", "images"),
    mutant(
        "judged too early",
        "broken",
        "if self.read + self.skipped >= self.after:",
        "if True:",
        "broken",
    ),
    mutant(
        "one more is accepted",
        "broken",
        "return self.skipped > self.most",
        "return self.skipped - 1 > self.most",
        "broken",
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    built = Laboratory(tmp_path_factory.mktemp("mutants"))
    for tests in sorted({mutant.tests for mutant in MUTANTS}):
        assert built.passes(*tests), f"{tests} fail without any mutant"
    return built


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_noticed(laboratory, mutant):
    assert not laboratory.survives(mutant), f"no test noticed: {mutant.name}"
