"""Zero-shot classification: a class is the mean of its prompts' embeddings.

Radford et al. 2021, section 3.1. Letters: N images, C classes, E embedding.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.eval.encoding import bar, encode_texts
from tinyclip.eval.ranking import hits
from tinyclip.eval.templates import PLAIN, check_templates
from tinyclip.models import CLIP


def zero_shot_classifier(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[str] = PLAIN,
    *,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """The weights of the classes: prompts embedded and normalised, their mean normalised again.

    Args:
        model: its device is where the weights are; an autocast around the call is respected.
        tokenizer: captions -> (N, L) int64.
        classnames: C names.
        templates: prompts that hold ``{}``, such as `TEMPLATES`' values.
        batch_size: captions at once.
        progress: show a bar.

    Returns:
        (C, E), fp32 (fp64 of an fp64 model); 100 times a product with it is the logits.

    Raises:
        ValueError: there is no class, or a prompt has no ``{}``.
    """
    templates = check_templates(templates)
    if isinstance(classnames, str) or not len(classnames):
        raise ValueError(f"zero_shot_classifier: classnames must be a list, got {classnames!r}")
    count = max(1, batch_size // len(templates))
    weights = []
    for start in bar(range(0, len(classnames), count), progress, "classes"):
        prompts = [
            template.replace("{}", name)
            for name in classnames[start : start + count]
            for template in templates
        ]
        features = encode_texts(model, tokenizer, prompts, batch_size=batch_size)
        weights.append(F.normalize(features.unflatten(0, (-1, len(templates))).mean(1), dim=1))
    return torch.cat(weights)


def classification(image_features: Tensor, classifier: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies with clip_benchmark's field names.

    Classes that score the same share their places (`ranking`), so duplicates of a class and a
    model that answers alike to everything get what guessing among them gets.

    Args:
        image_features: (N, E), L2-normalised.
        classifier: (C, E), of `zero_shot_classifier`, on the same device.
        labels: (N,) int64, the right classes.

    Returns:
        ``acc1``, ``acc5`` (nan with fewer than 5 classes) and ``mean_per_class_recall``, the mean
        of acc1 over the classes that occur.

    Raises:
        ValueError: a shape or a label breaks a rule above, or a feature is not finite.
    """
    n, c = len(image_features), len(classifier)
    if image_features.dim() != 2 or classifier.shape[1:] != image_features.shape[1:] or not n:
        raise ValueError(
            "classification: image_features must be (N, E) with N > 0 and classifier (C, E), got"
            f" {tuple(image_features.shape)} and {tuple(classifier.shape)}"
        )
    labels = torch.as_tensor(labels, device=image_features.device)
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(
            f"classification: labels must be ({n},) int64, got {tuple(labels.shape)} {labels.dtype}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < c:
        raise ValueError(
            f"classification: labels must be from 0 to {c - 1}, got {int(labels.min())} to"
            f" {int(labels.max())}"
        )
    classes = torch.arange(c, device=labels.device)
    first, fifth = hits(image_features, classifier, labels, classes, (1, 5)).T
    labels = labels.cpu()
    counts = torch.bincount(labels, minlength=c)
    right = torch.bincount(labels, weights=first, minlength=c)
    return {
        "acc1": first.mean().item(),
        "acc5": fifth.mean().item() if c >= 5 else float("nan"),
        "mean_per_class_recall": (right / counts)[counts > 0].mean().item(),
    }
