"""CLIP's towers, the published models by name, and everybody's checkpoints.

`create_model` builds, `load_model` and `save` read and write, `Tokenizer` and `Preprocess` make
the inputs. docs/models.md is the page for users.
"""

from tinyclip.models.checkpoints import FORMATS, Loaded, load_model, save
from tinyclip.models.clip import CLIP
from tinyclip.models.config import CLIPConfig, Layer, TextConfig, VisionConfig
from tinyclip.models.cost import Macs, count_macs
from tinyclip.models.files import CheckpointError
from tinyclip.models.gates import Gates, TowerGates
from tinyclip.models.layouts import LAYOUTS, from_canonical, to_canonical
from tinyclip.models.positions import resize_positions
from tinyclip.models.preprocess import Preprocess
from tinyclip.models.registry import create_model, get_config, list_models
from tinyclip.models.tokenizer import Tokenizer

__all__ = [
    "CLIP",
    "FORMATS",
    "LAYOUTS",
    "CLIPConfig",
    "CheckpointError",
    "Gates",
    "Layer",
    "Loaded",
    "Macs",
    "Preprocess",
    "TextConfig",
    "Tokenizer",
    "TowerGates",
    "VisionConfig",
    "count_macs",
    "create_model",
    "from_canonical",
    "get_config",
    "list_models",
    "load_model",
    "resize_positions",
    "save",
    "to_canonical",
]
