"""Embeddings of a whole data set: each picture and each different caption once.

Letters: N pictures or captions, E embedding, L tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinyclip.data import BrokenSample, Skipped, Source
from tinyclip.data.tables import Table
from tinyclip.models import CLIP


class Encoded(NamedTuple):
    """The good pictures of a source, in its order.

    A picture that is in several rows of a table is here once, with all its captions.
    """

    images: Tensor  # (N, E), L2-normalised
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    skipped: tuple[Skipped, ...]


@torch.no_grad()
def encode_texts(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    *,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Embed captions, each different one once.

    Args:
        model: its device is where this happens; an autocast around the call is respected.
        tokenizer: captions -> (N, L) int64, padded with 0.
        texts: N captions.
        batch_size: captions at once; each batch is cut to its longest.
        progress: show a bar.

    Returns:
        (N, E), L2-normalised, fp32 (fp64 of an fp64 model).
    """
    device = model.logit_scale.device
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    different = list(places)
    encoded = []
    for start in bar(range(0, len(different), batch_size), progress, "captions"):
        tokens = tokenizer(different[start : start + batch_size])
        tokens = tokens[:, : max(1, int((tokens != 0).sum(1).max()))]
        encoded.append(_normalised(model.encode_text(tokens.to(device))))
    wanted = torch.tensor([places[text] for text in texts], dtype=torch.int64, device=device)
    return torch.cat(encoded or [_none(model)])[wanted]


@torch.no_grad()
def encode_images(model: CLIP, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Embed preprocessed images (N, 3, height, width) -> (N, E), L2-normalised."""
    like = model.visual.proj
    parts = images.to(like.dtype).split(batch_size)
    return torch.cat([_normalised(model.encode_image(part.to(like.device))) for part in parts])


@torch.no_grad()
def encode_source(
    model: CLIP,
    preprocess: Callable[[Any], Tensor],
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> Encoded:
    """Embed every picture of a source; what cannot be read is listed, not lost.

    Args:
        model: its device is where this happens; an autocast around the call is respected.
        preprocess: a PIL image -> (3, height, width).
        source: of `tinyclip.data.open_data`.
        batch_size: pictures at once.
        workers: processes that read; 0 reads in this one.
        progress: show a bar.
    """
    # A generator of its own: training that evaluates on the way keeps its random numbers.
    loader = DataLoader(
        _Samples(source, preprocess),
        batch_size,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    # Shards of two sources may share keys; only a table names one picture in several rows.
    rows_of_one = isinstance(source, Table)
    features, keys, captions, skipped, places = [], [], [], [], {}
    batches = bar(loader, progress, "pictures")
    for samples in batches:
        images = []
        for sample in samples:
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            key, image, said = sample
            if rows_of_one and key in places:
                captions[places[key]] += said
                continue
            places[key] = len(keys)
            keys.append(key)
            captions.append(said)
            images.append(image)
        if images:
            features.append(encode_images(model, torch.stack(images)))
        if skipped and progress:
            batches.set_postfix(skipped=len(skipped))
    return Encoded(
        torch.cat(features or [_none(model)]), tuple(keys), tuple(captions), tuple(skipped)
    )


class _Samples(Dataset):
    """Key, preprocessed picture and captions, or why there is none."""

    def __init__(self, source: Source, preprocess: Callable[[Any], Tensor]):
        self.source, self.preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, Tensor, tuple[str, ...]] | Skipped:
        try:
            key, image, captions = self.source.sample(index)
        except BrokenSample as broken:
            return Skipped(broken.key, broken.reason)
        return key, self.preprocess(image), captions


def _normalised(features: Tensor) -> Tensor:
    """At fp32 at least: what is compared is not rounded to 16 bit once more."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def _none(model: CLIP) -> Tensor:
    return torch.empty(0, model.config.embed_dim, device=model.logit_scale.device)


def bar(steps: Any, shown: bool, what: str) -> Any:
    """The same steps, under a bar if it is to be shown."""
    if not shown:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc=what, unit="batch", dynamic_ncols=True)
