"""From a command line to what `fit` takes: the process, its folder, the model and its readers."""

import argparse
import contextlib
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tinyclip import integrations
from tinyclip.data import Reader, digits
from tinyclip.models import (
    CLIP,
    CLIPConfig,
    Preprocess,
    Tokenizer,
    create_model,
    get_config,
    list_models,
)
from tinyclip.models.files import read_json
from tinyclip.train import changes, checkpoint, options
from tinyclip.train.lock import LOCK
from tinyclip.train.loop import Summary
from tinyclip.train.ranks import Ranks, join, leave
from tinyclip.train.run import Run

_LOG = logging.getLogger("tinyclip")


class Start(NamedTuple):
    """A model before its first step, and how it reads."""

    model: CLIP
    preprocess: Preprocess
    tokenizer: Tokenizer

    @property
    def reader(self) -> Reader:
        return Reader(self.preprocess, self.tokenizer)


@contextlib.contextmanager
def process(args: argparse.Namespace) -> Iterator[tuple[torch.device, Ranks]]:
    """The device and the ranks of a command; all ranks draw the same numbers at first."""
    logging.basicConfig(format="%(message)s")
    device = options.device_of(args)
    join(device, args.dist_backend)
    seed(args.seed)
    ranks = Ranks.current()
    if ranks.rank:
        _LOG.setLevel(logging.ERROR)
    yield device, ranks
    leave()


def seed(number: int) -> None:
    """Of Python, numpy and torch."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def run_folder(args: argparse.Namespace, model_name: str, ranks: Ranks) -> Path:
    """The run's folder: a new one, or with --resume one that may be there.

    Raises:
        ValueError: there is a run of that name and no --resume, or --resume latest has no --name.
    """
    if args.name is None:
        if args.resume == "latest":
            raise ValueError("--resume latest needs --name: which run?")
        stem = Path(model_name).stem if Path(model_name).exists() else model_name
        name = time.strftime("%Y_%m_%d-%H_%M_%S-") + re.sub(r"[^\w.-]+", "_", stem)
        args.name, *_ = ranks.tell_text(name)
    folder = Path(args.logs) / args.name
    there = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if any(flag for (flag,) in ranks.tell(there and args.resume is None)):
        raise ValueError(
            f"{folder} holds a run already: --resume latest goes on with it, another --name begins"
            " a new one"
        )
    return folder


def config_of(name: str) -> CLIPConfig | None:
    """Of a published name or of a JSON file; None for what has to be loaded."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        data = read_json(path)
        return get_config(data.get("model_cfg", data))
    if path.exists() and name not in list_models():
        return None
    return get_config(name)


def open_model(name: str, pretrained: str | None = None) -> tuple[CLIP, Preprocess, Any]:
    """A model to train: new from a config, with `pretrained` weights, or all of a folder.

    Returns:
        The model, its preprocess, and the tokenizer that lies beside its weights, or None.
    """
    config = config_of(name)
    if config is None:
        if pretrained is not None:
            raise ValueError(f"--pretrained: {name} brings its own weights: leave one of them out")
        return integrations.load(name)
    if pretrained is not None:
        return integrations.load(pretrained, model=config)
    return create_model(config), Preprocess(config.vision.image_size), None


def open_tokenizer(source: str | None, found: Any, config: CLIPConfig) -> Tokenizer:
    """The tokenizer named by --tokenizer, else the one found beside the weights, else CLIP's own.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has tokens that the model does not know.
    """
    length = config.text.context_length
    if source == "digits":
        found = Tokenizer(*digits.vocabulary(), context_length=length)
    elif source is not None:
        found = integrations.get_tokenizer(source, length)
    elif found is None:
        found = integrations.get_tokenizer(None, length)
    if not isinstance(found, Tokenizer):
        found([""])  # what stands in for a vocabulary says why there is none
    if found.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"--tokenizer: its {found.vocab_size} tokens are more than the"
            f" {config.text.vocab_size} of the model: give the model's own, or another vocab_size"
        )
    return found


def make_run(
    folder: Path, start: Start, args: argparse.Namespace, config: Mapping[str, Any]
) -> Run:
    """The run's folder; a resumed run is told what is not as it was."""
    given = {name: value for name, value in vars(args).items() if name not in ("run", "traceback")}
    if args.resume is not None:
        changes.say(folder, given, config.get("stage"))
    return Run(
        folder,
        preprocess=start.preprocess,
        tokenizer=start.tokenizer,
        keep=args.keep,
        config={"arguments": given, **config},
    )


def resume_from(args: argparse.Namespace, folder: Path) -> str | None:
    """What `fit` is told; of "latest", a word when there is nothing to go on from."""
    if args.resume == "latest" and not checkpoint.steps(folder / "checkpoints"):
        _LOG.warning("%s holds no checkpoint yet: the run begins anew", folder)
    return args.resume


def report(summary: Summary, run: Run, args: argparse.Namespace, ranks: Ranks) -> None:
    """The last lines of a command."""
    if ranks.rank:
        return
    if summary.stopped:
        print(
            f"stopped after {summary.steps} steps, all saved; to go on, give the same command with"
            f" --logs {args.logs} --name {args.name} --resume latest"
        )
        return
    first, last = summary.losses.get("loss", (float("nan"),) * 2)
    print(
        f"{summary.steps} steps, {summary.samples} samples, {summary.seconds:.0f} s; loss"
        f" {first:.4f} -> {last:.4f}; {summary.skipped_steps} steps left out,"
        f" {summary.skipped_samples} samples skipped"
    )
    for name in ("model", "ema"):
        if (run.folder / name).is_dir():
            print(f"{name}: {run.folder / name}")
