"""Where other libraries meet this package: the only place that names transformers, open_clip, timm.

`load` and `get_tokenizer` are here because a caption's vocabulary may lie in open_clip's package,
`accelerate` and `restore` because they look for other libraries' classes.
"""

from tinyclip.integrations.accelerating import accelerate, restore
from tinyclip.integrations.loading import load
from tinyclip.integrations.report import Report
from tinyclip.integrations.vocabulary import get_tokenizer

__all__ = ["Report", "accelerate", "get_tokenizer", "load", "restore"]
