"""The flags that `tinyclip train` and `tinyclip distill` share, named as open_clip's are."""

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from tinyclip.data import Loader, RandomCrop, Reader, Source, open_data
from tinyclip.data.digits import DigitScenes
from tinyclip.data.images import MOST_PIXELS
from tinyclip.train.ranks import Ranks
from tinyclip.train.settings import PRECISIONS, Settings

_MOST_WARMUP = 2000


def add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train-data",
        required=True,
        metavar="SPEC",
        help="a .csv or .tsv table; tar shards, with brace lists and :: between; a folder with a"
        " folder a class; or digits:train",
    )
    group.add_argument(
        "--dataset-type",
        default="auto",
        choices=("auto", "csv", "webdataset", "folder", "digits"),
        help="default: by the looks of --train-data",
    )
    group.add_argument("--csv-separator", help="default: found in the first line")
    group.add_argument("--csv-img-key", default="filepath", help="default: filepath")
    group.add_argument("--csv-caption-key", default="title", help="default: title")
    group.add_argument(
        "--csv-unquoted", action="store_true", help="double quotes are characters like others"
    )
    group.add_argument(
        "--json-key", default="caption", help="of captions in shards' .json; default: caption"
    )
    group.add_argument(
        "--train-num-samples",
        type=int,
        help="samples that an epoch of --epochs stands for; default: all",
    )
    group.add_argument(
        "--batch-size", type=int, default=64, help="pairs a process and step; default: 64"
    )
    group.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read"
    )
    group.add_argument(
        "--crop-scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="random crops take this share of a picture's area; none: 1 1; default: 0.9 1, none of"
        " digits",
    )
    group.add_argument(
        "--max-image-pixels",
        type=int,
        default=MOST_PIXELS,
        help=f"larger pictures are broken samples; default: {MOST_PIXELS}",
    )
    group.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help="stop when more samples than this are broken; default: 0.01",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, help="passes over the data; default: 32")
    group.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    group.add_argument("--lr", type=float, help=f"the peak; default: {Settings.lr}")
    group.add_argument(
        "--warmup", type=int, help=f"steps; default: a tenth, at most {_MOST_WARMUP}"
    )
    group.add_argument("--wd", type=float, default=0.2, help="weight decay; default: 0.2")
    group.add_argument("--beta1", type=float, default=0.9, help="default: 0.9")
    group.add_argument("--beta2", type=float, default=0.98, help="default: 0.98")
    group.add_argument("--eps", type=float, default=1e-6, help="default: 1e-6")
    group.add_argument("--grad-clip-norm", type=float, help="default: no clipping")
    group.add_argument(
        "--logit-scale", type=float, help="a fixed multiplier of the similarities, such as 50"
    )
    group.add_argument("--ema", type=float, metavar="DECAY", help="keep a mean of the weights")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="default: amp_bf16 on a GPU, fp32 on a CPU"
    )
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--torchcompile", action="store_true", help="through torch.compile")
    group.add_argument(
        "--max-skipped",
        type=int,
        default=100,
        help="stop after so many steps in a row that are not finite; default: 100",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--logs",
        "--logs-dir",
        default="logs",
        metavar="DIR",
        help="the folder of runs; torchrun takes --logs for its own; default: logs",
    )
    group.add_argument("--name", help="the run's folder in it; default: date and model")
    group.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="go on from the run's newest whole checkpoint (from the start if it has none), or"
        " from one",
    )
    group.add_argument(
        "--save-every-n-steps",
        type=int,
        default=1000,
        help="steps between checkpoints; there is one at the end, too; default: 1000",
    )
    group.add_argument("--keep", type=int, default=3, help="checkpoints that are kept; default: 3")
    group.add_argument(
        "--log-every-n-steps", type=int, default=10, help="steps between rows; default: 10"
    )
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument("--device", help="cpu, cuda; default: the GPU if there is one")
    group.add_argument("--dist-backend", help="nccl, gloo; default: nccl for GPUs")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of this process: under torchrun each has its own GPU."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here (tinyclip doctor says why)")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def make_loader(
    args: argparse.Namespace, readers: Sequence[Reader], ranks: Ranks, device: torch.device
) -> Loader:
    """The data of `args`, as `readers` read it."""
    source: Source = open_data(
        args.train_data,
        kind=args.dataset_type,
        separator=args.csv_separator,
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        quoted=not args.csv_unquoted,
        json_key=args.json_key,
        most_pixels=args.max_image_pixels,
    )
    return Loader(
        source,
        readers,
        batch_size=args.batch_size,
        seed=args.seed,
        rank=ranks.rank,
        world=ranks.world,
        workers=args.workers,
        augment=_augment(args, source, readers[0]),
        pin_memory=device.type == "cuda",
    )


def _augment(args: argparse.Namespace, source: Source, reader: Reader) -> RandomCrop | None:
    """open_clip's random crop, with the aspect ratio drawn around that of the model's images."""
    scale = args.crop_scale or ((1, 1) if isinstance(source, DigitScenes) else (0.9, 1.0))
    if tuple(scale) == (1, 1):
        return None
    size = reader.preprocess.size
    height, width = (size, size) if isinstance(size, int) else size
    return RandomCrop(tuple(scale), (3 / 4 * width / height, 4 / 3 * width / height))


def make_settings(
    args: argparse.Namespace, loader: Loader, device: torch.device, **changes: Any
) -> Settings:
    """`Settings` of `args`; `changes` (of a stage) come before them where they are not None."""
    wanted = {"epochs": args.epochs, "steps": args.steps, "lr": args.lr, "warmup": args.warmup}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.keys() & {"epochs", "steps"}:
        wanted |= {"epochs": None, "steps": None}
    wanted |= changes
    epochs, steps = wanted.pop("epochs"), wanted.pop("steps")
    if args.train_num_samples is not None and args.train_num_samples < 1:
        raise ValueError(
            f"--train-num-samples must be a positive integer, got {args.train_num_samples}"
        )
    if epochs is not None and steps is not None:
        raise ValueError("--epochs and --steps say the same thing: give one of them")
    if steps is None:
        steps = _steps(args, loader, 32.0 if epochs is None else epochs)
    if wanted["lr"] is None:
        wanted["lr"] = Settings.lr
    if wanted["warmup"] is None:
        wanted["warmup"] = min(_MOST_WARMUP, steps // 10)
    named = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in named}
    return Settings(
        **{
            **given,
            **wanted,
            "steps": steps,
            "precision": args.precision or ("amp_bf16" if device.type == "cuda" else "fp32"),
            "save_every": args.save_every_n_steps,
            "log_every": args.log_every_n_steps,
            "compile": args.torchcompile,
        }
    )


def _steps(args: argparse.Namespace, loader: Loader, epochs: float) -> int:
    if not 0 < epochs < math.inf:
        raise ValueError(f"--epochs must be a number above 0, got {epochs}")
    an_epoch = len(loader)
    if args.train_num_samples is not None:
        an_epoch = args.train_num_samples / loader.global_batch
    return max(1, round(epochs * an_epoch))
