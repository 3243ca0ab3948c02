"""``tinyclip convert``: a checkpoint in one layout to a folder in another."""

import argparse
from pathlib import Path

import torch

from tinyclip.integrations.loading import NoTokenizer, load
from tinyclip.models import FORMATS, load_model, save
from tinyclip.models.checkpoints import file_names
from tinyclip.models.folders import WEIGHTS

CLIP_VOCABULARY = 49_408


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder, or a weight file, of any layout")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--format", choices=FORMATS, default="tinyclip", help="default: tinyclip")
    parser.add_argument("--model", help="the config of a file without one, such as ViT-B-32")
    parser.add_argument("--activation", help="of a file without a config: gelu, quick_gelu, ...")
    parser.add_argument(
        "--image-size", type=int, help="interpolate the position embeddings to this input size"
    )
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that holds files already"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, read back, compare every tensor, and say what was done."""
    if args.folder.exists() and not args.force and any(args.folder.iterdir()):
        raise ValueError(f"{args.folder} holds files already; --force writes among them")
    _check_layout(args.folder, args.format)
    model, preprocess, tokenizer = load(
        args.source, model=args.model, activation=args.activation, image_size=args.image_size
    )
    # open_clip brings CLIP's vocabulary, and Microsoft's code a copy of it; no other one.
    known = not isinstance(tokenizer, NoTokenizer)
    brought = args.format in ("open_clip", "microsoft")
    wanted = known and not (brought and tokenizer.vocab_size == CLIP_VOCABULARY)
    save(
        model,
        args.folder,
        args.format,
        preprocess=preprocess,
        tokenizer=tokenizer if wanted else None,
    )
    written = load_model(args.folder).model.state_dict()
    for key, value in model.state_dict().items():
        if not torch.equal(written[key].reshape(value.shape), value):
            raise RuntimeError(f"{args.folder}: key {key!r} reads back differently")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    config = model.config
    print(f"{args.source} -> {args.folder} ({args.format})")
    print(
        f"  {millions:.1f} M parameters, {config.activation}, image {config.vision.image_size} px,"
        f" {len(config.vision.layers)} + {len(config.text.layers)} layers; read back and equal"
    )
    if not known:
        print(f"  no vocabulary is written: {tokenizer.reason}")
    elif wanted and brought:
        print(
            f"  its vocabulary of {tokenizer.vocab_size} tokens is written for TinyCLIP: other code"
            " of this format reads CLIP's own"
        )
    return 0


def _check_layout(folder: Path, format: str) -> None:
    """Raise where files of another layout lie, which a reader would take before the new ones."""
    names = file_names(format)
    every = {name for config, weights in WEIGHTS.items() for name in (config, *weights)}
    others = sorted(name for name in every - set(names) if (folder / name).is_file())
    if others:
        raise ValueError(
            f"{folder} holds a model in another layout, {', '.join(others)}, which a reader would"
            " take for this one: remove it, or give another folder"
        )
