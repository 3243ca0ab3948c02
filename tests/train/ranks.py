"""One rank of the distributed tests: started W times, it compares itself with one process.

python -m tests.train.ranks FOLDER RANK WORLD
"""

import datetime
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train import tiny
from tinyclip import train
from tinyclip.distill import Masked, Masks, Ramp
from tinyclip.models import load_model
from tinyclip.train import checkpoint
from tinyclip.train.ranks import Ranks

EXACT = 1e-10


def uneven(epoch: int, batch: int, row: int) -> bool:
    """Batch 1: the first rank of two has none; batch 2: nobody has; later: here and there."""
    return (batch == 1 and row < 4) or batch == 2 or (batch > 2 and (row * 7 + batch) % 5 == 0)


CASES = {"whole": {}, "uneven": {"broken": uneven}}


def five_steps(loader) -> tuple[train.Summary, torch.nn.Module]:
    return tiny.fit(
        None, loader=loader, objective=train.Contrastive(), steps=5, precision="fp64",
        grad_clip_norm=0.5, max_bad_fraction=1.0,
    )  # fmt: skip


def five_steps_of_masks(loader) -> Masked:
    """Log-alphas and multipliers move by lr at each step, so that rounding would show."""
    clip = tiny.model()
    model = Masked(clip, Masks(clip.config), Ramp(0.2, 0.6, 3), lr=0.2, seed=9)
    tiny.fit(
        None, loader=loader, model=model, objective=model.constrained(train.Contrastive()), steps=5,
        precision="fp64", max_bad_fraction=1.0, ema=None, eps=1e-4,
    )  # fmt: skip
    return model


def masks_are_one_processes(alone: dict[str, Masked], rank: int, world: int) -> float:
    worst = 0.0
    for name, case in CASES.items():
        model = five_steps_of_masks(tiny.Memory(rank=rank, world=world, **case))
        same_everywhere(model)
        for ours, theirs in zip(model.parameters(), alone[name].parameters(), strict=True):
            worst = max(worst, (ours - theirs).abs().max().item())
        assert worst <= EXACT, (name, worst)
        assert model.finished().config == alone[name].finished().config
    return worst


def parameters_are_one_processes(alone, rank: int, world: int) -> float:
    worst = 0.0
    for name, case in CASES.items():
        summary, model = five_steps(tiny.Memory(rank=rank, world=world, **case))
        wanted_summary, wanted = alone[name]
        assert summary.samples == wanted_summary.samples, name
        assert summary.skipped_samples == wanted_summary.skipped_samples, name
        for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            worst = max(worst, (ours - theirs).abs().max().item())
        assert worst <= EXACT, (name, worst)
    return worst


def same_everywhere(model) -> None:
    assert len(set(Ranks.current().tell_text(tiny.weights(model)))) == 1


def a_nan_on_one_rank_is_left_out_on_all(rank: int, world: int) -> None:
    class OnOne(train.Contrastive):
        """Without a group, so that nothing but the loop tells the others."""

        called = 0

        def __call__(self, image, text, scale, pair, group):
            self.called += 1
            terms = super().__call__(image, text, scale, pair, None)
            if self.called == 2 and rank == world - 1:
                terms["loss"] = terms["loss"] * float("nan")
            if self.called == 3 and rank == world - 1:
                terms["loss"] = terms["loss"] + float("nan")  # the gradients stay finite
            return terms

    loader = tiny.Memory(rank=rank, world=world)
    trace = []
    summary, model = tiny.fit(
        None, loader=loader, objective=OnOne(), at_step=lambda s, m: trace.append(tiny.weights(m))
    )
    assert summary.skipped_steps == 2
    assert trace[0] == trace[1] == trace[2] != trace[3]
    same_everywhere(model)
    try:
        tiny.fit(None, loader=loader, objective=OnOne(), max_skipped=2)
    except train.TrainingError as error:
        assert "2 steps in a row" in str(error)
    else:
        raise AssertionError("two steps in a row did not stop the run")


def a_resumed_run_ends_as_an_uninterrupted_one(folder: Path, rank: int, world: int) -> None:
    """Each rank has noise of its own, so each generator's state must come back to its rank.

    Bit for bit where a sum over ranks has one order. Of more than two DDP changes it after its
    first step, and a resumed run has one more first step: to the last bits of fp64, there.
    """
    precision = "fp32" if world == 2 else "fp64"

    class Mine(tiny.Noisy):
        pass

    def fit(name, resume=None, at_step=None):
        loader = tiny.Memory(rank=rank, world=world)
        return tiny.fit(folder / name, resume, loader, Mine(), at_step=at_step, precision=precision)

    def differ(step, model):
        if step == 1:
            tiny.seed(40 + rank)

    _, whole = fit("whole", at_step=differ)
    same_everywhere(whole)

    def fail(step, model):
        differ(step, model)
        if step == 5:
            raise tiny.Interrupted

    try:
        fit("cut", at_step=fail)
    except tiny.Interrupted:
        dist.barrier()
    if rank == 0:
        (folder / "cut" / "checkpoints" / ".step_00000006.part").mkdir()
    _, resumed = fit("cut", "latest")
    same_everywhere(resumed)
    if world == 2:
        assert tiny.fingerprint(folder / "cut", 12) == tiny.fingerprint(folder / "whole", 12)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12
    assert (folder / "cut" / "metrics.jsonl").read_text().count("\n") == 12


def a_signal_to_one_rank_stops_all(folder: Path, rank: int, world: int) -> None:
    def ask(step, model):
        if step == 4 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    summary, model = tiny.fit(
        folder / "asked", loader=tiny.Memory(rank=rank, world=world), at_step=ask
    )
    assert (summary.steps, summary.stopped) == (4, True)
    dist.barrier()
    latest = checkpoint.latest(folder / "asked" / "checkpoints")
    assert latest.name == "step_00000004"
    saved = load_model(latest / "model").model
    assert tiny.weights(saved) == tiny.weights(model)


def an_error_of_one_rank_is_raised_on_all(folder: Path, rank: int, world: int) -> None:
    class Failing(tiny.Memory):
        def epoch(self, epoch, start=0):
            yield from list(super().epoch(epoch, start))[:2]
            if rank == world - 1:
                raise LookupError("a shard is gone")
            yield from list(super().epoch(epoch, start))[2:]

    try:
        tiny.fit(None, loader=Failing(rank=rank, world=world))
    except LookupError:
        assert rank == world - 1
    except train.TrainingError as error:
        assert f"the data of rank {world - 1} failed" in str(error) and rank != world - 1
    else:
        raise AssertionError("the run went on")

    try:
        tiny.fit(folder / "asked", loader=tiny.Memory(rank=rank, world=world))
    except ValueError as error:
        assert "holds a run already" in str(error)
    else:
        raise AssertionError("two runs in one folder")

    if rank == 0:
        (folder / "full").mkdir()
        (folder / "full" / "checkpoints").write_text("in the way")
    dist.barrier()
    try:
        tiny.fit(folder / "full", "latest", loader=tiny.Memory(rank=rank, world=world))
    except OSError as error:
        said = "step_00000003 could not be written" if rank == 0 else "rank 0 could not write"
        assert said in str(error)
    else:
        raise AssertionError("the run went on")

    try:
        tiny.fit(
            folder / "none", str(folder / "nowhere"), loader=tiny.Memory(rank=rank, world=world)
        )
    except ValueError as error:
        assert "manifest.sha256" in str(error) or "nothing sound to resume from" in str(error)
    else:
        raise AssertionError("the run went on")


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    # A deprecated collective would warn in every run, once a rank.
    warnings.filterwarnings("error", ".*torch.distributed", FutureWarning)
    alone = {name: five_steps(tiny.Memory(**case)) for name, case in CASES.items()}
    masked = {name: five_steps_of_masks(tiny.Memory(**case)) for name, case in CASES.items()}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    worst = parameters_are_one_processes(alone, rank, world)
    worst = max(worst, masks_are_one_processes(masked, rank, world))
    a_nan_on_one_rank_is_left_out_on_all(rank, world)
    a_resumed_run_ends_as_an_uninterrupted_one(folder, rank, world)
    a_signal_to_one_rank_stops_all(folder, rank, world)
    an_error_of_one_rank_is_raised_on_all(folder, rank, world)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} of {world}: worst difference {worst:.1e}")


if __name__ == "__main__":
    main()
