"""CLIP's tokenizer: equal to open_clip's, from any of its files, and captions are only text."""

import gzip
import json
import pickle
import random
import subprocess
import sys
import time

import pytest
import torch

import tinyclip
from tinyclip import models
from tinyclip.data import digits
from tinyclip.integrations import vocabulary
from tinyclip.models import tokenizer as module
from tinyclip.models.tokenizer import clean

WORDS = """
&amp; &lt;b&gt; &amp;lt; &#39;s &#x1F600; &nbsp; &bogus; & don't I'LL we've it'\u017fx 'S ''s
rock'n'roll WORLD _x_ a-b 12½ Ã© â€™ e\u0301 ﬁ Ǆ İstanbul ß ﬅ \u202eabc\u202c \U0001d518\U0001d52b
👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽 שלום مرحبا 日本語 ไทย \U0001e900 \U00031350 \ufffd \ufeff
\u00ad ²³ ٣٤ Ⅷ hello
"""
PIECES = [*WORDS.split(), "\x00", "\x1c", "\u2028", "\t", "\n", "<", "مرحبا بالعالم"]


def caption(draw: random.Random) -> str:
    """One fuzzed caption: of pieces, of characters from everywhere, or of one thing repeated."""
    length = draw.choice([0, 1, 2, 5, 12, 40, 300])
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(["", " "]).join(draw.choice(PIECES) for _ in range(length))
    if kind == 1:
        ranges = [(0, 0x80), (0, 0x250), (0x590, 0x700), (0x1F300, 0x1FB00), (0, 0x110000)]
        codes = (draw.randrange(*draw.choice(ranges)) for _ in range(length))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    if kind == 2:
        return draw.choice([*PIECES, "a", " ", "ab", "1"]) * (length * draw.choice([1, 10]))
    return " ".join(draw.choice(["a", "photo", "of", "the", "Cat's"]) for _ in range(length))


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def ours():
    pytest.importorskip("open_clip")
    return tinyclip.get_tokenizer()


def test_equals_open_clip_on_5000_fuzzed_captions(ours, theirs):
    draw = random.Random(20)
    captions = [caption(draw) for _ in range(5000)]
    mine, other = ours(captions), theirs(captions)
    different = (mine != other).any(dim=1).nonzero().flatten().tolist()
    assert not different, [captions[index][:80] for index in different[:5]]
    assert mine.dtype == torch.long


def test_cuts_as_open_clip_does(ours, theirs):
    captions = ["a", "a photo of " * 30, ""]
    for length in (2, 3, 12, 77, 200):
        assert torch.equal(ours(captions, length), theirs(captions, length))
    assert torch.equal(ours("one"), theirs("one"))
    assert ours([]).shape == (0, 77)


@pytest.mark.parametrize(
    "text",
    [
        "<|endoftext|>",
        "a <|startoftext|> b <|endoftext|> c",
        "&lt;|endoftext|&gt;",
        "<end_of_text>",
        "<start_of_text>x<end_of_text>",
        "<|ENDOFTEXT|>" * 50,
        "endoftext</w>",
    ],
)
def test_a_mark_in_a_caption_is_text(ours, text):
    row = ours(text)[0]
    assert (row == ours.eot_token_id).sum() == 1
    assert (row == ours.sot_token_id).sum() == 1
    length = int(row.argmax()) + 1
    assert row[0] == ours.sot_token_id
    assert (row[length:] == 0).all()
    assert ours.decode(ours.encode(text)).replace(" ", "") == clean(text).replace(" ", "")


@pytest.mark.parametrize(
    "text",
    ["", " \n\t ", "\0\0", "\ud800 lone \udfff", "a" * 10**6, "🤖" * 10**5, " " * 10**6 + "x",
     "&" * 10**6, "'" * 10**6, "<|endoftext|>" * 10**5],
    ids=lambda text: repr(text[:6]),
)  # fmt: skip
def test_anything_ends_once_in_bounded_time(ours, text):
    start = time.process_time()
    row = ours(text)[0]
    assert time.process_time() - start < 20
    assert (row == ours.eot_token_id).sum() == 1
    assert row.max() == ours.eot_token_id


def test_decode(ours):
    for text in ("a photo of a cat", "wörld 🤖 日本", "it ' s"):
        assert ours.decode(ours.encode(text)) == text
        assert ours.decode(ours(text)[0]) == text


def test_every_file_gives_the_same(ours, tmp_path):
    captions = ["A photo of &amp; 🤖 don't", "日本語 x1", ""]
    expected = ours(captions)
    ours.save(tmp_path / "folder")
    vocabulary_ = json.loads((tmp_path / "folder/vocab.json").read_text())
    merges = (tmp_path / "folder/merges.txt").read_text().split("\n")[1:-1]
    bpe = {"type": "BPE", "vocab": vocabulary_, "end_of_word_suffix": "</w>"}
    for name, pairs in (("lines", merges), ("pairs", [line.split() for line in merges])):
        (tmp_path / name).mkdir()
        data = json.dumps({"model": {**bpe, "merges": pairs}})
        (tmp_path / name / "tokenizer.json").write_text(data)
    published = vocabulary.open_clip_vocabulary()
    plain = tmp_path / "bpe.txt"
    plain.write_bytes(gzip.decompress(published.read_bytes()))
    sources = [tmp_path / "folder", tmp_path / "lines", str(tmp_path / "pairs"), published, plain]
    sources += [tmp_path / "lines" / "tokenizer.json", "ViT-B-32", None]
    for source in sources:
        assert torch.equal(tinyclip.get_tokenizer(source)(captions), expected), source
    assert torch.equal(pickle.loads(pickle.dumps(ours))(captions), expected)
    assert tinyclip.get_tokenizer(context_length=20)(captions).shape == (3, 20)


def test_transformers_reads_what_is_saved(ours, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    text = "a photo of two cats, 1 dog"
    assert theirs(text)["input_ids"] == [ours.sot_token_id, *ours.encode(text), ours.eot_token_id]


def test_open_clip_is_found_but_not_imported():
    code = "import sys, tinyclip; tinyclip.get_tokenizer()('a'); print('open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_ftfy_and_regex(ours, monkeypatch, caplog):
    for name in ("ftfy", "regex"):
        monkeypatch.setitem(sys.modules, name, None)
    for cached in (module._mend, module._words):
        cached.cache_clear()
    try:
        plain = tinyclip.get_tokenizer()
        captions = ["A photo of &amp; 🤖 don't", "e\u0301 日本語 x1"]
        assert torch.equal(plain(captions), ours(captions))
        plain("Ã©")
        assert sum("ftfy" in record.message for record in caplog.records) == 1
    finally:
        monkeypatch.undo()
        for cached in (module._mend, module._words):
            cached.cache_clear()


def test_no_vocabulary(monkeypatch, tmp_path):
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install open_clip_torch"):
        tinyclip.get_tokenizer()
    models.save(models.create_model({**CONFIG}), tmp_path)
    model, _, tokenizer = tinyclip.load(tmp_path)
    assert model.encode_text(torch.tensor([[1, 2]])).shape == (1, 8)
    with pytest.raises(FileNotFoundError, match="install open_clip_torch"):
        tokenizer("a photo")


CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def test_the_vocabulary_goes_with_the_model(ours, tmp_path, monkeypatch):
    models.save(models.create_model(CONFIG), tmp_path, tokenizer=ours)
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    tokenizer = tinyclip.load(tmp_path)[2]
    assert torch.equal(tokenizer("A photo"), ours("A photo"))


def test_equal_where_the_rows_are_equal(ours, tmp_path):
    models.save(models.create_model(CONFIG), tmp_path, tokenizer=ours)
    again = tinyclip.load(tmp_path)[2]
    assert again is not ours
    assert again == ours == pickle.loads(pickle.dumps(ours))
    assert hash(again) == hash(ours)
    assert tinyclip.get_tokenizer(context_length=12) != ours
    vocabulary, merges = digits.vocabulary()
    small = models.Tokenizer(vocabulary, merges)
    assert small != models.Tokenizer(vocabulary, merges[:-1])
    assert small != ours
    assert small != "a tokenizer"


def test_a_vocabulary_of_another_size_is_not_used(ours, tmp_path):
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 600}}
    models.save(models.create_model(config), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"600 tokens.*49408"):
        tinyclip.load(tmp_path)[2]("a photo")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda v, m: v.pop("<|endoftext|>"), "ids must be|must hold"),
        (lambda v, m: v.update({"<|endoftext|>": 0, "!": len(v) - 1}), "largest id"),
        (lambda v, m: v.update({"zzz": v.pop("a</w>")}), "byte tokens"),
        (lambda v, m: v.update({"!": 1}), "each once"),
        (lambda v, m: v.update({"!": "x"}), "integers"),
        (lambda v, m: m.append("xx yy zz"), "two tokens"),
        (lambda v, m: m.append("qqq zzz"), "merges do not fit"),
    ],
)
def test_a_broken_vocabulary(ours, tmp_path, change, rule):
    ours.save(tmp_path)
    words = json.loads((tmp_path / "vocab.json").read_text())
    merges = (tmp_path / "merges.txt").read_text().strip().split("\n")
    change(words, merges)
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    with pytest.raises(ValueError, match=rule) as error:
        tinyclip.get_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_broken_files(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip")
    with gzip.open(tmp_path / "bomb.txt.gz", "wb") as file:
        for _ in range(80):
            file.write(b"\0" * (1 << 20))
    (tmp_path / "b.json").write_text("{}")
    for name, rule in (("a.txt.gz", "vocabulary"), ("bomb.txt.gz", "bytes"), ("b.json", "BPE")):
        with pytest.raises(ValueError, match=rule):
            tinyclip.get_tokenizer(tmp_path / name)
    for missing in (tmp_path, tmp_path / "c.json"):
        with pytest.raises(FileNotFoundError):
            tinyclip.get_tokenizer(missing)
    with pytest.raises(TypeError, match="strings, got bytes"):
        tinyclip.get_tokenizer()([b"bytes"])
    with pytest.raises(ValueError, match="context_length"):
        tinyclip.get_tokenizer()("a", 1)


def test_the_hub(monkeypatch, ours, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    ours.save(tmp_path)

    def download(name, file):
        assert name == "owner/name"
        if not (tmp_path / file).exists():
            raise OSError(f"404: no {file}")
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert torch.equal(tinyclip.get_tokenizer("owner/name")("a b"), ours("a b"))
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*404: no tokenizer.json"):
        tinyclip.get_tokenizer("owner/name")
    with pytest.raises(FileNotFoundError, match="no id on the hub"):
        tinyclip.get_tokenizer("ViT-B-23")
