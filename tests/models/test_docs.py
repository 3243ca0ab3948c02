"""docs/models.md is true: its Python runs, its table is computed, its names are the real ones."""

import re
from pathlib import Path

import pytest
import torch

import tinyclip
from tests.models import build
from tinyclip import models
from tinyclip.integrations.vocabulary import open_clip_vocabulary

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()


@pytest.mark.skipif(open_clip_vocabulary() is None, reason="needs open_clip_torch's vocabulary")
def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    space = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "docs/models.md", "exec"), space)


def test_the_table_is_computed():
    rows = dict(re.findall(r"^\| (\S*ViT-\S+) \| (.*) \|$", TEXT, re.MULTILINE))
    published = [name for name in tinyclip.list_models() if not name.endswith("-quickgelu")]
    assert sorted(rows) == published
    for name in published:
        config = models.get_config(name)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in models.CLIP(config).parameters()) / 1e6
        image, text = models.count_macs(config)
        vision = config.vision
        expected = [
            f"{len(vision.layers)} × {vision.width}",
            f"{vision.tokens}",
            f"{len(config.text.layers)} × {config.text.width}",
            f"{config.embed_dim}",
            f"{parameters:.1f}",
            f"{image / 1e9:.2f}",
            f"{text / 1e9:.2f}",
            f"{models.count_macs(config, 12).text / 1e9:.2f}",
        ]
        assert rows[name].split(" | ") == expected


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("TinyCLIP-ViT-39M-16-Text-19M", 9.5),
        ("TinyCLIP-ViT-8M-16-Text-3M", 2.0),
        ("TinyCLIP-ViT-61M-32-Text-29M", 5.3),
        ("TinyCLIP-ViT-40M-32-Text-19M", 3.5),
    ],
)
def test_macs_are_the_published_ones(name, published):
    assert round(sum(models.count_macs(models.get_config(name))) / 1e9, 1) == published


def test_macs_of_irregular_towers_are_those_that_are_computed():
    """Counted by torch on the model itself, whose causal product it counts whole, too. Attention as
    plain products: before 2.15 the counter does not know the CPU's fused kernel. Into ops
    of ours it does not look: those of the `torch` backend are seen through."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build.model(build.IRREGULAR)
    for tokens in (12, 77):
        macs = models.count_macs(model.config, tokens)
        text = build.captions(length=tokens, count=1)
        counter, plain = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
        with counter, plain, torch.no_grad(), tinyclip.backend("torch"):
            model(build.images(64, 1), text)
        assert counter.get_total_flops() == 2 * sum(macs)


def test_the_names_are_real():
    state = tinyclip.create_model(build.json_config(), device="meta").state_dict()
    table = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (_.+?) \|$", TEXT, re.MULTILINE)
    assert len(table) == 13

    def pattern(cell: str) -> str:
        cell = re.escape(cell.split(" (")[0])
        return cell.replace(r"\.i\.", r"\.\d+\.").replace(r"\.\*", r"\..+")

    for ours, *others in table:
        keys = [key for key in state if re.fullmatch(pattern(ours), key)]
        assert keys, ours
        for cell, layout in zip(others, ("custom_text", "hf", "microsoft"), strict=True):
            cell = ours if cell == "same" else cell
            for key in keys:
                named = models.from_canonical({key: state[key]}, layout)
                assert all(re.fullmatch(pattern(cell), name) for name in named), (key, cell)
