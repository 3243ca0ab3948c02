"""Small data sets on disk, sound and damaged, and the readers that read them."""

import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyclip.data import Reader, digits
from tinyclip.models import Preprocess, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SIDE = 8


@dataclass(frozen=True)
class Letters:
    """A tokenizer of code points, with CLIP's marks: the least that the contract asks for."""

    context_length: int = 12
    first: int = 2

    def __call__(self, texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            tokens = [1, *(self.first + ord(c) for c in text[: self.context_length - 2]), 1 << 21]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def reader(size: int = SIDE, context_length: int = 12) -> Reader:
    return Reader(Preprocess(size), Letters(context_length))


def digit_tokenizer() -> Tokenizer:
    return Tokenizer(*digits.vocabulary(), digits.CONTEXT_LENGTH)


def picture(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Random pixels, width x height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: the header may claim anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


def broken_images() -> dict[str, bytes]:
    """Forty files that are no picture, each in a way of its own."""
    good = {f: encoded(picture(0, (64, 48)), f) for f in ("PNG", "JPEG", "WEBP")}
    found = {"empty": b"", "one_byte": b"\xff", "zeros": bytes(4096), "text": b"not a picture"}
    found["html"] = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    found["json"] = b'{"error": "gone"}'
    found["svg"] = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
    found["svg_xml"] = b'<?xml version="1.0"?>' + found["svg"]
    found["gzip"] = b"\x1f\x8b\x08\x00" + bytes(40)
    found["zip"] = b"PK\x03\x04" + bytes(60)
    found["pdf"] = b"%PDF-1.4\n%%EOF"
    found["pickle"] = b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00]\x94."
    for name in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"):  # pictures, but not of those allowed
        found[name.lower()] = encoded(picture(1, (16, 16)), name)
    for format, data in good.items():
        for part in (2, 30, 60, 95):
            found[f"{format.lower()}_cut_at_{part}"] = data[: len(data) * part // 100]
    body = bytearray(good["PNG"])
    body[len(body) // 2] ^= 0xFF
    found["png_flipped"] = bytes(body)
    found["png_no_data"] = good["PNG"][:33] + good["PNG"][-12:]
    found["png_bad_zlib"] = png(8, 8, 8, 2, b"").replace(zlib.compress(b""), b"\xff" * 8)
    found["png_bad_header"] = good["PNG"][:20] + b"\1" + good["PNG"][21:]
    found["png_no_width"] = png(0, 8, 8, 2, b"\0")
    found["png_bomb"] = png(60_000, 60_000, 8, 0, bytes(1000))
    found["png_large"] = png(5_001, 5_000, 1, 0, bytes(1000))
    found["png_strip"] = png(9_000, 10, 8, 0, bytes(90_010))
    found["jpeg_shell"] = b"\xff\xd8\xff\xd9"
    found["jpeg_header"] = good["JPEG"][:200]
    assert len(found) == 40, len(found)
    return found


def write_table(folder: Path, count: int = 20, separator: str = "\t") -> Path:
    """`count` pictures below the folder, and pairs.tsv or pairs.csv."""
    lines = [separator.join(("filepath", "title"))]
    for index in range(count):
        name = f"images/{index:03d}.png"
        (folder / "images").mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(encoded(picture(index)))
        lines.append(separator.join((name, f"no. {index}")))
    path = folder / ("pairs.tsv" if separator == "\t" else "pairs.csv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tar(path: Path, contents: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def pair(key: str, seed: int, caption: str | None = None) -> list[tuple[str, bytes]]:
    """A sample's members; every third has its caption in JSON."""
    caption = f"no. {seed}" if caption is None else caption
    text = (f"{key}.txt", caption.encode())
    if seed % 3 == 2:
        text = (f"{key}.json", json.dumps({"caption": caption, "status": "success"}).encode())
    format, suffix = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[seed % 3]
    return [(f"{key}.{suffix}", encoded(picture(seed), format)), text]


def write_shards(folder: Path, sizes: tuple[int, ...]) -> list[Path]:
    """Shards 000.tar on, of so many samples each."""
    paths, seed = [], 0
    for number, size in enumerate(sizes):
        contents = []
        for _ in range(size):
            contents += pair(f"{seed:05d}", seed)
            seed += 1
        paths.append(write_tar(folder / f"{number:03d}.tar", contents))
    return paths
