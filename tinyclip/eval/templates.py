"""Prompts around class names: the 80 of CLIP's ImageNet evaluation and the 7 that serve as well.

Radford et al. 2021, section 3.1.4. Averaged over 80 prompts a class costs 80 captions; the 7 were
chosen from them and are a little better for small models.
"""

import json
from pathlib import Path

SIMPLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
OPENAI = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
PLAIN = ("{}",)
TEMPLATES = {"plain": PLAIN, "simple": SIMPLE, "openai": OPENAI}


def read_templates(source: str | Path) -> tuple[str, ...]:
    """Prompts by name or from a file.

    Args:
        source: a name of `TEMPLATES`, or a text file of a prompt a line, or a JSON list. Each holds
            ``{}`` where the class name goes.

    Raises:
        FileNotFoundError: it is neither a name nor a file.
        ValueError: there is no prompt, or one without ``{}``.
    """
    if source in TEMPLATES:
        return TEMPLATES[source]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"templates: {str(source)!r} is no file, and none of {', '.join(TEMPLATES)}"
        )
    text = path.read_text(encoding="utf-8")
    found = (
        json.loads(text) if path.suffix == ".json" else list(filter(str.strip, text.split("\n")))
    )
    if not isinstance(found, list):
        raise ValueError(f"{path}: must be a list of prompts, got {type(found).__name__}")
    return check_templates(found)


def check_templates(templates) -> tuple[str, ...]:
    """The prompts, each a string with ``{}`` in it."""
    templates = tuple(templates)
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(
                f"templates: each must be a string that holds {{}} for the class, got {template!r}"
            )
    if not templates:
        raise ValueError("templates: must be at least one, got none")
    return templates
