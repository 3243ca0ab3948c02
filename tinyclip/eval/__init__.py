"""Zero-shot classification and retrieval, with clip_benchmark's field names.

docs/eval.md is the page for users; `tinyclip eval` is the command.
"""

from tinyclip.eval.encoding import Encoded, encode_images, encode_source, encode_texts
from tinyclip.eval.retrieval import retrieval
from tinyclip.eval.templates import TEMPLATES, read_templates
from tinyclip.eval.zero_shot import classification, zero_shot_classifier

__all__ = [
    "TEMPLATES",
    "Encoded",
    "classification",
    "encode_images",
    "encode_source",
    "encode_texts",
    "read_templates",
    "retrieval",
    "zero_shot_classifier",
]
