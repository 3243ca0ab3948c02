"""Where other libraries meet this package: the only place that names transformers, open_clip, timm.

`load` and `get_tokenizer` are here because a caption's vocabulary may lie in open_clip's package.
"""

from tinyclip.integrations.loading import load
from tinyclip.integrations.vocabulary import get_tokenizer

__all__ = ["get_tokenizer", "load"]
