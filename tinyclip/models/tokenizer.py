"""CLIP's byte-pair encoding, through Hugging Face's tokenizers, from files on this machine.

A caption is only ever text: a literal ``<|endoftext|>`` in it is spelled out, and cannot end the
caption where the text tower pools.
"""

import gzip
import hashlib
import html
import json
import logging
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tinyclip.models.files import CheckpointError, read_json, write_json

_LOG = logging.getLogger("tinyclip")
_START = ("<|startoftext|>", "<start_of_text>")
_END = ("<|endoftext|>", "<end_of_text>")
_MOST_TEXT = 1 << 26
# In OpenAI's published list, the merges that were used: 49,152 less the bytes and the two marks.
_PUBLISHED_MERGES = 49152 - 256 - 2


class Tokenizer:
    """Captions to token ids, equal to open_clip's tokenizer; may be pickled.

    Captions are cleaned as there: mended (ftfy), HTML entities twice resolved, white space folded,
    lower case. Without the ftfy package broken encodings are left as they are, and said so once.

    Args:
        vocabulary: token -> id; the largest id must be the end of text.
        merges: pairs of tokens, first come, first merged.
        context_length: the length of a row, by default.

    Raises:
        ValueError: the vocabulary lacks a byte or a mark, or is not CLIP's kind.
        ImportError: the tokenizers package is not installed.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        context_length: int = 77,
    ):
        _check_length(context_length)
        self.context_length = context_length
        self.sot_token_id, self.eot_token_id = _marks(vocabulary)
        self.vocab_size = len(vocabulary)
        self._merges = [tuple(pair) for pair in merges]
        self._bpe = _bpe(vocabulary, self._merges)
        written = json.dumps([vocabulary, self._merges], sort_keys=True)
        self._digest = hashlib.sha256(written.encode()).digest()

    def __eq__(self, other: object) -> bool:
        """Whether both make the same rows of all captions: a student and its teacher then share."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self.context_length, self._digest) == (other.context_length, other._digest)

    def __hash__(self) -> int:
        return hash(self._digest)

    @classmethod
    def from_path(cls, path: str | Path, context_length: int = 77) -> "Tokenizer":
        """Read a vocabulary.

        Args:
            path: a folder with vocab.json and merges.txt or with tokenizer.json, a tokenizer.json,
                or OpenAI's ``bpe_simple_vocab_16e6.txt.gz``.
            context_length: the length of a row, by default.

        Raises:
            FileNotFoundError, ValueError: there is none, or it breaks a rule; the text names it.
        """
        path = Path(path)
        try:
            vocabulary, merges = _read(path)
            return cls(vocabulary, merges, context_length)
        except CheckpointError:
            raise
        except (ValueError, TypeError, EOFError, gzip.BadGzipFile) as error:
            raise CheckpointError(path, f"is no CLIP vocabulary: {error}") from error

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenise.

        Args:
            texts: one caption, or several.
            context_length: the length of a row, instead of the tokenizer's.

        Returns:
            (N, context_length) int64: start, tokens, end, zeros. What is too long is cut, and
            keeps its end.

        Raises:
            TypeError: a caption is not a string.
        """
        length = self.context_length if context_length is None else context_length
        _check_length(length)
        result = torch.zeros(1 if isinstance(texts, str) else len(texts), length, dtype=torch.long)
        for row, ids in zip(result, self._encode(texts), strict=True):
            ids = [self.sot_token_id, *ids[: max(0, length - 2)], self.eot_token_id][-length:]
            row[: len(ids)] = torch.tensor(ids)
        return result

    def encode(self, text: str) -> list[int]:
        """The ids of one caption, without marks, however many they are."""
        return next(self._encode(text))

    def _encode(self, texts: str | Sequence[str]) -> Iterator[list[int]]:
        cleaned = [clean(text) for text in ([texts] if isinstance(texts, str) else texts)]
        for encoding in self._bpe.encode_batch(cleaned, add_special_tokens=False):
            yield encoding.ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids up to the end of text; marks are left out."""
        tokens = []
        for token in map(int, ids):
            if token == self.eot_token_id:
                break
            if token != self.sot_token_id:
                tokens.append(self._bpe.id_to_token(token) or "")
        codes = {symbol: byte for byte, symbol in _byte_symbols().items()}
        text = "".join(tokens).replace("</w>", " ")
        raw = b"".join(b" " if c == " " else bytes([codes[c]]) for c in text)
        return raw.decode("utf-8", errors="replace").strip()

    def save(self, folder: str | Path) -> None:
        """Write vocab.json and merges.txt, which `from_path` and Hugging Face read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = self._bpe.get_vocab(with_added_tokens=False)
        write_json(
            folder / "vocab.json", dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        )
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self._merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, context_length={self.context_length})"


def clean(text: str) -> str:
    """A caption as CLIP was trained on it: mended, entities resolved, spaces folded, lower case.

    Lone surrogates, which no encoding can hold, become U+FFFD.
    """
    if not isinstance(text, str):
        raise TypeError(f"Tokenizer: texts must be strings, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = html.unescape(html.unescape(_mend()(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def _mend():
    """ftfy's repair of broken encodings, or what little can be done without it."""
    try:
        import ftfy
    except ImportError:
        _LOG.warning(
            "ftfy is not installed: captions in broken encodings are tokenised as they are, not"
            " mended as CLIP's were (pip install ftfy)"
        )
        return lambda text: unicodedata.normalize("NFC", text)
    return ftfy.fix_text


def _check_length(length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"Tokenizer: context_length must be an integer from 2 on, got {length!r}")


def _marks(vocabulary: dict[str, int]) -> tuple[int, int]:
    """The ids of start and end; pooling takes the largest id, so the end must have it."""
    if not vocabulary or not all(isinstance(i, int) for i in vocabulary.values()):
        raise ValueError("the vocabulary must map tokens to integers")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the ids must be 0 to {len(vocabulary) - 1}, each once")
    found = [next((name for name in names if name in vocabulary), None) for names in (_START, _END)]
    if None in found:
        raise ValueError(f"the vocabulary must hold {_START[0]} and {_END[0]}")
    start, end = (vocabulary[name] for name in found)
    if end != len(vocabulary) - 1:
        raise ValueError(
            f"the end of text must have the largest id, {len(vocabulary) - 1}, not {end}"
        )
    return start, end


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte, those that print first: GPT-2's alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


@lru_cache(maxsize=1)
def _words() -> str:
    """The pattern of CLIP's words, on cleaned text.

    Which characters are letters changes with Unicode. open_clip asks the regex package, so it is
    asked here, too, where it is installed; the tokenizers library's own tables are older.
    """
    try:
        import regex
    except ImportError:
        letters, digits = r"\p{L}", r"\p{N}"
    else:
        everything = "".join(map(chr, range(0x110000)))
        letters, digits = (
            "".join(
                rf"\x{{{match.start():X}}}-\x{{{match.end() - 1:X}}}"
                for match in regex.finditer(rf"\p{{{name}}}+", everything)
            )
            for name in "LN"
        )
    # U+017F: the pattern ignores case, and the long s is an s.
    endings = "'[s\u017f]|'t|'re|'ve|'m|'ll|'d"
    return f"{endings}|[{letters}]+|[{digits}]|[^ {letters}{digits}]+"


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    try:
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ImportError("captions need the tokenizers package: pip install tokenizers") from error
    lacking = [
        symbol + ending
        for symbol in _byte_symbols().values()
        for ending in ("", "</w>")
        if symbol + ending not in vocabulary
    ]
    if lacking:
        raise ValueError(f"the vocabulary lacks {len(lacking)} byte tokens, {lacking[0]!r} first")
    try:
        model = models.BPE(vocabulary, merges, end_of_word_suffix="</w>")
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from error
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_words()), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _read(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if path.is_dir():
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return read_json(path / "vocab.json"), _pairs(_text(path / "merges.txt").split("\n"))
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{path}: needs tokenizer.json, or vocab.json and merges.txt")
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        model = read_json(path).get("model")
        if not isinstance(model, dict) or model.get("end_of_word_suffix") != "</w>":
            raise ValueError("its model must be BPE with the end_of_word_suffix '</w>'")
        return model["vocab"], _pairs(model["merges"])
    merges = _pairs(_text(path).split("\n")[1 : _PUBLISHED_MERGES + 1])
    symbols = list(_byte_symbols().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges)]
    tokens += [_START[0], _END[0]]
    return {token: index for index, token in enumerate(tokens)}, merges


def _text(file: Path) -> str:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
        data = opened.read(_MOST_TEXT + 1)
    if len(data) > _MOST_TEXT:
        raise ValueError(f"more than {_MOST_TEXT} bytes of merges")
    return data.decode("utf-8")


def _pairs(lines: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges, written as lines or as pairs; comments and blank lines left out."""
    pairs = []
    for line in lines:
        parts = line.split() if isinstance(line, str) else line
        if not parts or (isinstance(line, str) and line.startswith("#version")):
            continue
        if len(parts) != 2:
            raise ValueError(f"a merge must be two tokens, got {line!r}")
        pairs.append((parts[0], parts[1]))
    return pairs
