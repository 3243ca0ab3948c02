"""Retrieval: captions find their picture, pictures find one of their captions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyclip.eval.ranking import hits


def retrieval(
    image_features: Tensor, text_features: Tensor, owners: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k both ways, with clip_benchmark's field names.

    A picture's query counts when any of its captions is among the first k. What scores the same
    shares its places (`ranking`).

    Args:
        image_features: (N, E), text_features: (M, E), L2-normalised, on one device.
        owners: (M,) int64: text j belongs to image ``owners[j]``; any number of texts an image, at
            least one.
        ks: positive integers.

    Returns:
        ``image_retrieval_recall@k``, the mean over the texts, and ``text_retrieval_recall@k``, the
        mean over the images.

    Raises:
        ValueError: a shape or an owner breaks a rule above, or a feature is not finite.
    """
    n, m = len(image_features), len(text_features)
    if image_features.dim() != 2 or text_features.shape[1:] != image_features.shape[1:]:
        raise ValueError(
            "retrieval: features must be (N, E) and (M, E), got"
            f" {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    owners = torch.as_tensor(owners, device=image_features.device)
    if owners.shape != (m,) or owners.dtype != torch.int64:
        raise ValueError(
            f"retrieval: owners must be ({m},) int64, got {tuple(owners.shape)} {owners.dtype}"
        )
    if m and not 0 <= int(owners.min()) <= int(owners.max()) < n:
        raise ValueError(
            f"retrieval: owners must be from 0 to {n - 1}, got {int(owners.min())} to"
            f" {int(owners.max())}"
        )
    lonely = torch.bincount(owners, minlength=n) == 0
    if n == 0 or lonely.any():
        first = f", {int(lonely.nonzero()[0])} first" if n else ""
        raise ValueError(
            f"retrieval: every image must have a caption, and {int(lonely.sum())} of {n} have"
            f" none{first}"
        )
    images = torch.arange(n, device=owners.device)
    found = {
        "image_retrieval": hits(text_features, image_features, owners, images, ks),
        "text_retrieval": hits(image_features, text_features, images, owners, ks),
    }
    return {
        f"{way}_recall@{k}": column.mean().item()
        for way, table in found.items()
        for k, column in zip(ks, table.T, strict=True)
    }
