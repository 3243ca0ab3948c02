"""``tinyclip eval``: zero-shot classification and retrieval of a saved model."""

import argparse
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tinyclip.data import BadSamples, Source, digits, open_data
from tinyclip.eval.encoding import Encoded, encode_source, encode_texts
from tinyclip.eval.retrieval import retrieval
from tinyclip.eval.templates import TEMPLATES, read_templates
from tinyclip.eval.zero_shot import classification, zero_shot_classifier
from tinyclip.integrations import get_tokenizer, load
from tinyclip.models import CLIPConfig, Tokenizer, get_config, list_models
from tinyclip.models.files import write_json

CLASSIFICATION, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"
# Of the parameters, and of an autocast around them; the names are those of training.
_PRECISIONS = {
    "fp32": (torch.float32, None),
    "fp64": (torch.float64, None),
    **dict.fromkeys(("bf16", "amp_bf16", "amp_bfloat16"), (torch.float32, torch.bfloat16)),
    **dict.fromkeys(("fp16", "amp"), (torch.float32, torch.float16)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a folder or file to load")
    parser.add_argument("--activation", help="of a file without a config: gelu, quick_gelu, ...")
    parser.add_argument(
        "--tokenizer", help="a vocabulary, where the model's folder has none, or 'digits'"
    )
    parser.add_argument(
        "--data", required=True, help="a .csv or .tsv, tar shards, a folder a class, digits:test"
    )
    parser.add_argument("--dataset-type", default="auto", help="of --data; default: auto")
    parser.add_argument("--csv-separator", help="default: found in the first line")
    parser.add_argument("--csv-img-key", default="filepath", help="default: filepath")
    parser.add_argument("--csv-caption-key", default="title", help="default: title")
    parser.add_argument(
        "--csv-unquoted", action="store_true", help="double quotes are characters like others"
    )
    parser.add_argument(
        "--json-key", default="caption", help="of captions in shards' .json; default: caption"
    )
    parser.add_argument(
        "--task",
        choices=("auto", CLASSIFICATION, RETRIEVAL),
        default="auto",
        help="auto: classification where the data or --classnames gives classes, else retrieval",
    )
    parser.add_argument(
        "--templates",
        default="plain",
        help=f"the prompts: {', '.join(TEMPLATES)}, or a file of one a line; default: plain, the"
        " class name alone",
    )
    parser.add_argument(
        "--classnames",
        type=Path,
        help="a file of one name a line, or JSON: a list, or an object from caption to name",
    )
    parser.add_argument(
        "--recall-k", type=int, nargs="+", default=(1, 5, 10), metavar="K", help="default: 1 5 10"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read"
    )
    parser.add_argument(
        "--precision", choices=tuple(_PRECISIONS), default="fp32", help="default: fp32"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="default: 0.01")
    parser.add_argument("--language", default="en", help="only named in the result")
    parser.add_argument("--output", type=Path, help="the JSON file to write")


def run(args: argparse.Namespace) -> int:
    """Load, read, embed, compare, print, write."""
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, name)}")
    if min(args.recall_k) < 1:
        raise ValueError(f"--recall-k must be at least 1, got {min(args.recall_k)}")
    if args.output is not None:
        _check_writable(args.output)
    templates = read_templates(args.templates)
    named = None if args.classnames is None else read_classnames(args.classnames)
    source = open_data(
        args.data,
        kind=args.dataset_type,
        separator=args.csv_separator,
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        quoted=not args.csv_unquoted,
        json_key=args.json_key,
    )
    task = args.task
    if task == "auto":
        classes = named is not None or hasattr(source, "classes")
        task = CLASSIFICATION if classes else RETRIEVAL
    model, preprocess, tokenizer = load(args.model, activation=args.activation)
    if args.tokenizer == "digits":
        tokenizer = Tokenizer(*digits.vocabulary(), context_length=model.context_length)
    elif args.tokenizer is not None:
        tokenizer = get_tokenizer(args.tokenizer, model.context_length)
    tokenizer([""])  # a missing vocabulary is told now, not after the pictures
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"--tokenizer: its {tokenizer.vocab_size} tokens are more than the {model.vocab_size}"
            " of the model: give the model's own"
        )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch sees no GPU here")
    dtype, autocast = _PRECISIONS[args.precision]
    model = model.to(device, dtype).eval()
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        encoded = encode_source(
            model,
            preprocess,
            source,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=True,
        )
        check_read(args.data, encoded, args.max_bad_fraction)
        if task == CLASSIFICATION:
            names, labels = classes_of(source, encoded, named)
            weights = zero_shot_classifier(
                model, tokenizer, names, templates, batch_size=4 * args.batch_size, progress=True
            )
            metrics = classification(encoded.images, weights, torch.tensor(labels))
        else:
            texts = [text for said in encoded.captions for text in said]
            owners = [image for image, said in enumerate(encoded.captions) for _ in said]
            features = encode_texts(
                model, tokenizer, texts, batch_size=4 * args.batch_size, progress=True
            )
            metrics = retrieval(encoded.images, features, torch.tensor(owners), args.recall_k)
    result = {
        "dataset": args.data,
        "model": _name(model.config, args.model),
        "pretrained": str(args.model),
        "task": task,
        "metrics": {key: None if math.isnan(value) else value for key, value in metrics.items()},
        "language": args.language,
        "samples": len(encoded.keys),
        "skipped": [list(one) for one in encoded.skipped],
    }
    print(_table(result))
    if args.output is not None:
        write_json(args.output, result)
    return 0


def _check_writable(file: Path) -> None:
    """Raise OSError before the work and not after it."""
    if file.is_dir():
        raise IsADirectoryError(f"--output {file} is a folder: name a file in it")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.touch()
    part.unlink()


def check_read(data: str, encoded: Encoded, most: float) -> None:
    """Raise if nothing, or too little, could be read."""
    bad = BadSamples(most)
    bad.count(encoded)
    bad.check()
    if not encoded.keys:
        raise ValueError(f"{data}: there is no sample")


def read_classnames(path: Path) -> list[str] | dict[str, str]:
    """Class names, or the class name of each caption.

    Raises:
        ValueError: it is neither, or empty.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found = json.loads(text)
        words = found.values() if isinstance(found, dict) else found
    else:
        found = words = [line.strip() for line in text.splitlines() if line.strip()]
    kind = isinstance(found, (list, dict)) and len(found) > 0
    if not kind or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: must be a list of names, or an object of names, and not empty")
    return found


def classes_of(
    source: Source, encoded: Encoded, named: Sequence[str] | Mapping[str, str] | None
) -> tuple[list[str], list[int]]:
    """The class names, and each picture's place among them.

    A picture's caption is its class. Names that are given are the captions themselves, or for a
    folder of classes as many other names in the order of the sorted folders, or, as a mapping,
    the name of each caption.

    Raises:
        ValueError: a caption is no class, or a picture has several; the text names them.
    """
    captions = []
    for key, said in zip(encoded.keys, encoded.captions, strict=True):
        if len(set(said)) != 1:
            raise ValueError(
                f"{key}: classification needs one caption, the class, got {list(said)[:3]}"
            )
        captions.append(said[0])
    own = getattr(source, "classes", None)
    classes = list(own or sorted(set(captions)))
    names = classes
    if isinstance(named, Mapping):
        _find(classes, named)
        names = [named[caption] for caption in classes]
    elif named is not None:
        if own is not None and len(named) == len(own) and not set(own) & set(named):
            names = list(named)
        else:
            _find(captions, named)
            names = classes = list(named)
    places: dict[str, int] = {}
    for place, caption in enumerate(classes):
        if places.setdefault(caption, place) != place:
            raise ValueError(f"class names: {caption!r} is there twice")
    return names, [places[caption] for caption in captions]


def _find(captions: Sequence[str], known: Sequence[str] | Mapping[str, str]) -> None:
    """Raise unless all are known."""
    known = set(known)
    for caption in captions:
        if caption not in known:
            near = difflib.get_close_matches(caption, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"class names: the data's {caption!r} is not among the {len(known)} that"
                f" --classnames gives{hint}"
            )


def _name(config: CLIPConfig, path: Path) -> str:
    """The published model's, or the folder's; a run's folder where it is that run's ``model``."""
    path = path.resolve()
    own = path.parent.name if path.name == "model" else path.name
    return next((name for name in list_models() if get_config(name) == config), own)


def _table(result: dict[str, Any]) -> str:
    skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
    lines = [
        f"{result['model']} on {result['dataset']}: {result['task']},"
        f" {result['samples']} pictures{skipped}"
    ]
    width = max(map(len, result["metrics"]))
    for key, value in result["metrics"].items():
        lines.append(f"  {key:<{width}}  {'-' if value is None else f'{value:.4f}'}")
    lines += [f"  skipped {key}: {reason}" for key, reason in result["skipped"][:10]]
    return "\n".join(lines)
