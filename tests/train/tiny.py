"""A CLIP, data in memory and an objective: small enough for hundreds of runs."""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tinyclip
from tinyclip import models, train
from tinyclip.data import Batch, Pair, Skipped

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 8,
        "patch_size": 4,
        "width": 16,
        "layers": 1,
        "head_width": 8,
    },
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


def model(seed: int = 0) -> models.CLIP:
    torch.manual_seed(seed)
    return tinyclip.create_model(CONFIG)


class Memory:
    """`count` random pairs, in an order of each epoch's own; a global batch is cut into `world`.

    ``broken(epoch, batch, row)`` says which samples of the global batch cannot be read.
    """

    def __init__(
        self,
        count: int = 48,
        global_batch: int = 8,
        rank: int = 0,
        world: int = 1,
        broken: Callable[[int, int, int], bool] = lambda epoch, batch, row: False,
    ):
        draw = torch.Generator().manual_seed(11)
        self.images = torch.randn(count, 3, 8, 8, generator=draw)
        self.texts = torch.randint(1, 19, (count, 6), generator=draw)
        self.texts[:, -1] = 19
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.broken = broken

    def __len__(self) -> int:
        return len(self.images) // self.global_batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(epoch)
        ).tolist()
        share = self.global_batch // self.world
        for number in range(start, len(self)):
            rows = range(self.rank * share, (self.rank + 1) * share)
            chosen = {row: order[number * self.global_batch + row] for row in rows}
            good = [i for row, i in chosen.items() if not self.broken(epoch, number, row)]
            bad = [i for row, i in chosen.items() if self.broken(epoch, number, row)]
            pair = Pair(self.images[good], self.texts[good])
            skipped = tuple(Skipped(f"sample {i}", "broken on purpose") for i in bad)
            yield Batch((pair,), tuple(f"sample {i}" for i in good), skipped)


class Noisy(train.Contrastive):
    """CLIP's loss of features with noise of all three generators: a resumed run needs each."""

    def __call__(self, image, text, scale, pair, group):
        image = F.normalize(image + 0.1 * torch.randn_like(image), dim=-1)
        text = text + 0.1 * torch.from_numpy(np.random.randn(*text.shape)).to(text.dtype)
        text = F.normalize(text * (1 + 0.1 * random.random()) + 0.1 * random.random(), dim=-1)
        terms = super().__call__(image, text, scale, pair, group)
        return {**terms, "clip": terms["loss"].detach()}


def settings(**changes) -> train.Settings:
    wanted = {"steps": 12, "lr": 1e-2, "warmup": 3, "log_every": 1, "save_every": 3, "ema": 0.8}
    return train.Settings(**{**wanted, **changes})


def seed(number: int = 5) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def fit(folder: Path | None, resume: str | None = None, loader=None, objective=None, **changes):
    """One run; its folder is RUN, if there is one. Gives the summary and the model."""
    at_step, keep = changes.pop("at_step", None), changes.pop("keep", 3)
    trained = changes.pop("model", None) or model()
    seed()
    summary = train.fit(
        trained,
        objective or Noisy(),
        loader or Memory(),
        settings(**changes),
        run=None if folder is None else train.Run(folder, keep=keep),
        resume=resume,
        at_step=at_step,
        progress=False,
    )
    return summary, trained


class Interrupted(Exception):
    """What ends a run at a step, as a crash would."""


def interrupted(folder: Path, at: int, resume: str | None = None, **changes) -> None:
    """A run that fails after step `at`, before that step is saved."""

    def fail(step: int, trained: torch.nn.Module) -> None:
        if step == at:
            raise Interrupted

    with contextlib.suppress(Interrupted):
        fit(folder, resume, at_step=fail, **changes)
        raise AssertionError(f"the run went past step {at}")


def weights(trained: torch.nn.Module) -> str:
    """SHA-256 of all parameters."""
    digest = hashlib.sha256()
    for name, value in trained.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(run: Path, step: int) -> dict[str, object]:
    """What a checkpoint holds, times aside: digests of its tensors, and its JSON."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    training = json.loads((folder / "training.json").read_text())
    del training["state"]["seconds"]
    return {**found, **training}
