"""A run's folder: what was asked for, what happened, and everything to go on from.

    RUN/config.json          what was asked for, resolved
    RUN/environment.json     versions, device, backends
    RUN/metrics.jsonl        a row a line
    RUN/skipped.jsonl        broken samples
    RUN/tensorboard/         the rows again
    RUN/checkpoints/step_*/  model/, ema/, training.safetensors, training.json, manifest.sha256
    RUN/model/, RUN/ema/     the end: folders that `tinyclip.load` takes
    RUN/.lock                held while a process trains there

JSON and safetensors only. The first rank writes; all ranks enter `save` and `restore`.
"""

import json
import logging
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tinyclip.models import CLIP, CheckpointError, Preprocess, Tokenizer, load_model, save
from tinyclip.models.files import read_json, read_tensors, write_json, write_tensors
from tinyclip.train import checkpoint, rng
from tinyclip.train.ranks import Ranks
from tinyclip.train.rows import append, cut_after
from tinyclip.train.state import State
from tinyclip.train.update import Update

_LOG = logging.getLogger("tinyclip")
_PACKAGES = ("tinyclip", "torch", "triton", "numpy", "pillow", "safetensors", "tokenizers")


class Run:
    """The folder of a run.

    Args:
        folder: made when something is written.
        preprocess, tokenizer: written into every model folder.
        keep: checkpoints that are kept, at least one.
        config: what config.json is to hold.

    Raises:
        ValueError: keep is no positive integer.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        preprocess: Preprocess | None = None,
        tokenizer: Tokenizer | None = None,
        keep: int = 3,
        config: Mapping[str, Any] | None = None,
    ):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"Run: keep must be a positive integer, got {keep!r}")
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self._reading = {"preprocess": preprocess, "tokenizer": tokenizer}
        self._keep, self._config = keep, config
        self._saved: int | None = None
        self._samples: str | None = None
        self._board: Any = None

    def check_new(self, ranks: Ranks) -> None:
        """Raise ValueError if there is a run in the folder: two would mix.

        All ranks enter it, and raise together.
        """
        held = [name for name in ("checkpoints", "metrics.jsonl") if (self.folder / name).exists()]
        if any(flag for (flag,) in ranks.tell(bool(held))):
            raise ValueError(
                f"{self.folder} holds a run already: resume='latest' goes on with it, another"
                " folder begins a new one"
            )

    def begin(self, model: CLIP, ranks: Ranks, backends: Mapping[str, str | None]) -> None:
        """Write what was asked for and where it runs."""
        if ranks.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._config is not None:
            write_json(self.folder / "config.json", self._config)
        found = environment(model.logit_scale.device, ranks.world)
        write_json(self.folder / "environment.json", {**found, "backends": dict(backends)})

    def metrics(self, row: Mapping[str, Any], ranks: Ranks) -> None:
        """Add a row to metrics.jsonl and to TensorBoard's events."""
        if ranks.rank:
            return
        append(self.folder / "metrics.jsonl", [row])
        board = self._open_board(row["step"])
        for name, value in {**row, **row["terms"]}.items() if board else ():
            if isinstance(value, (int, float)) and name != "step":
                board.add_scalar(name, value, row["step"])

    def skipped(self, step: int, samples: Iterable[tuple[str, str]], ranks: Ranks) -> None:
        """Add the broken samples of a step to skipped.jsonl."""
        if ranks.rank:
            return
        rows = [{"step": step, "key": key, "reason": reason} for key, reason in samples]
        append(self.folder / "skipped.jsonl", rows)

    def save(self, state: State, model: CLIP, update: Update, loader: Any, ranks: Ranks) -> None:
        """Write the checkpoint of this step, unless it is there; then drop the oldest.

        Raises:
            OSError: it could not be written; the checkpoints before are as they were.
        """
        if self._saved == state.step:
            return
        states = ranks.tell_text(json.dumps(rng.snapshot()))
        error = None
        if ranks.rank == 0:
            training = {
                "format": 1,
                "state": state.to_dict(),
                "update": update.plain(),
                "data": self._position(state.step, loader),
                "rng": [json.loads(text) for text in states],
            }
            try:
                checkpoint.commit(
                    self.checkpoints / f"step_{state.step:08d}",
                    lambda part: self._write(part, model, update, training),
                )
                checkpoint.prune(self.checkpoints, self._keep)
            except Exception as caught:
                error = caught
        failed = any(flag for (flag,) in ranks.tell(error is not None))
        if error is not None:
            raise error
        if failed:
            raise OSError("rank 0 could not write the checkpoint: its own message says why")
        self._saved = state.step

    def _write(self, part: Path, model: CLIP, update: Update, training: dict[str, Any]) -> None:
        save(model, part / "model", **self._reading)
        if update.ema is not None:
            save(_with_weights(model, update.ema), part / "ema", **self._reading)
        write_tensors(part / "training.safetensors", update.tensors())
        write_json(part / "training.json", training)

    def finish(self, model: CLIP, update: Update, ranks: Ranks) -> None:
        """Write the end of the run: RUN/model, and RUN/ema."""
        if ranks.rank == 0:
            weights = {"model": model}
            if update.ema is not None:
                weights["ema"] = _with_weights(model, update.ema)
            for name, written in weights.items():
                checkpoint.commit(
                    self.folder / name, lambda part, m=written: save(m, part, **self._reading)
                )
        ranks.tell(0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        """Flush TensorBoard's events; what stands in the way is told unless there is worse."""
        board, self._board = self._board, None
        try:
            if board:
                board.close()
        except OSError:
            if kind is None:
                raise

    def restore(
        self,
        resume: str | Path,
        model: CLIP,
        update: Update,
        loader: Any,
        ranks: Ranks,
        first: int = 0,
    ) -> State:
        """Go on from a checkpoint.

        Args:
            resume: "latest", the newest whole one of this run (a fresh `State` if there is none, at
                step `first`), or the folder of one.

        Raises:
            CheckpointError: it is damaged, or of another model, data set or batch size.
        """
        chosen, error = "", None
        if ranks.rank == 0:
            try:
                chosen = str(self._choose(resume) or "")
            except Exception as caught:
                error = caught
        chosen, *_ = ranks.tell_text(chosen)
        if any(flag for (flag,) in ranks.tell(error is not None)):
            raise error or CheckpointError(self.folder, "rank 0 found nothing sound to resume from")
        state = State(first)
        if chosen:
            state = self._continue(Path(chosen), model, update, loader, ranks)
        if ranks.rank == 0:
            for name in ("metrics.jsonl", "skipped.jsonl"):
                cut_after(self.folder / name, state.step)
        return state

    def _continue(
        self, folder: Path, model: CLIP, update: Update, loader: Any, ranks: Ranks
    ) -> State:
        training = read_json(folder / "training.json")
        state = State(**training["state"])
        _check_position(folder, training["data"], self._position(state.step, loader))
        model.load_state_dict(_weights(folder / "model", model))
        ema = _weights(folder / "ema", model) if (folder / "ema").is_dir() else None
        try:
            update.restore(read_tensors(folder / "training.safetensors"), training["update"], ema)
        except (KeyError, TypeError, ValueError) as caught:
            raise CheckpointError(folder, str(caught)) from caught
        if len(training["rng"]) == ranks.world:
            rng.restore(training["rng"][ranks.rank])
        if folder.parent.resolve() == self.checkpoints.resolve():
            self._saved = state.step
        return state

    def _position(self, step: int, loader: Any) -> dict[str, Any]:
        """Where in the data a step begins, and in which data; the same for any number of ranks."""
        source = getattr(loader, "source", None)
        if source is not None and self._samples is None:
            self._samples = source.fingerprint()
        epoch, batch = divmod(step, len(loader))
        return {
            "epoch": epoch,
            "batch": batch,
            "batches": len(loader),
            "global_batch": getattr(loader, "global_batch", None),
            "seed": getattr(loader, "seed", None),
            "samples": self._samples,
        }

    def _choose(self, resume: str | Path) -> Path | None:
        """The checkpoint that is meant, made sure to be whole; leftovers of a kill removed."""
        checkpoint.clean(self.checkpoints)
        if resume == "latest":
            return checkpoint.latest(self.checkpoints)
        folder = Path(resume)
        checkpoint.verify(folder)
        found = {path.resolve(): step for step, path in checkpoint.steps(self.checkpoints).items()}
        chosen = found.get(folder.resolve())
        later = [step for step in found.values() if chosen is not None and step > chosen]
        if later:
            raise CheckpointError(
                folder,
                f"{len(later)} checkpoints of this run come after it: remove them, or give the new"
                " run another name",
            )
        return folder

    def _open_board(self, step: int) -> Any:
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(self.folder / "tensorboard", purge_step=step)
            except ImportError:
                _LOG.warning("no TensorBoard events are written: pip install 'tinyclip[train]'")
                self._board = False
        return self._board or None


def environment(device: torch.device, world: int) -> dict[str, Any]:
    """What a result depends on besides the config."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in _PACKAGES},
        "device": str(device),
        "gpu": gpu,
        "processes": world,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _check_position(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise where going on would not read the samples that come next."""
    for name, value in here.items():
        if saved.get(name) == value or (name == "samples" and saved.get(name) is None):
            continue  # checkpoints of before there were fingerprints have none
        changed = f"{name} of the data was {saved.get(name)} and is {value} here"
        if name == "samples":
            changed = "the data lists other samples, or others of their names and captions, here"
        raise CheckpointError(
            folder,
            f"{changed}: the run's own data, seed and global batch go on exactly; to train on from"
            " its weights, begin a new run from its model folder",
        )


def _weights(folder: Path, model: CLIP) -> dict[str, torch.Tensor]:
    loaded = load_model(folder).model
    if loaded.config != model.config:
        raise CheckpointError(folder, "is another model than the one to be trained")
    return loaded.state_dict()


def _with_weights(model: CLIP, weights: Mapping[str, torch.Tensor]) -> CLIP:
    with torch.device("meta"):
        other = CLIP(model.config, nonscalar_logit_scale=model.logit_scale.dim() == 1)
    other.load_state_dict(weights, assign=True)
    return other
