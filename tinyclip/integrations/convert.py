"""``tinyclip convert``: a checkpoint in one layout to a folder in another."""

import argparse
from pathlib import Path

import torch

from tinyclip.integrations.loading import NoTokenizer, load
from tinyclip.models import FORMATS, load_model, save


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
    model, preprocess, tokenizer = load(
        args.source, model=args.model, activation=args.activation, image_size=args.image_size
    )
    # open_clip brings its own vocabulary, and Microsoft's code a copy of it.
    wanted = args.format in ("tinyclip", "hf") and not isinstance(tokenizer, NoTokenizer)
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
    return 0
