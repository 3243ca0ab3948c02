"""The processes that train together, and what they tell each other beside the gradients.

What a rank meets alone (a signal, a broken sample, an error of its data) is told to all before any
of them acts on it. It travels over gloo, on the host: a GPU is never waited for.
"""

import os
import time
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; `group` is None when it is alone."""

    rank: int = 0
    world: int = 1
    group: object | None = None
    control: object | None = None

    @classmethod
    def current(cls) -> "Ranks":
        """Of torch.distributed, if it is initialised; every rank has to ask."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        control = dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, control)

    def tell(self, *values: int) -> list[tuple[int, ...]]:
        """A few integers of every rank, in the ranks' order, on every rank."""
        if self.group is None:
            return [values]
        return list(map(tuple, self._gather(torch.tensor(values, dtype=torch.int64)).tolist()))

    def tell_text(self, text: str) -> list[str]:
        """A text of every rank, in the ranks' order, on every rank."""
        if self.group is None:
            return [text]
        data = text.encode()
        sizes = [size for (size,) in self.tell(len(data))]
        padded = torch.frombuffer(bytearray(data.ljust(max(*sizes, 1))), dtype=torch.uint8)
        rows = self._gather(padded).numpy()
        return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        everyone = mine.new_empty(self.world * len(mine))
        # The second is deprecated where there is the first.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(everyone, mine, group=self.control)
        return everyone.view(self.world, len(mine))


def under_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def join(device: torch.device, backend: str | None = None) -> None:
    """Enter torchrun's process group: nccl for GPUs and gloo for CPUs, unless one is named."""
    if not under_torchrun() or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend or ("nccl" if device.type == "cuda" else "gloo"),
        store=dist.PrefixStore(_attempt(store, rank, world), store),
        rank=rank,
        world_size=world,
    )


def _attempt(store: "dist.Store", rank: int, world: int) -> str:
    """A name of this attempt that all its ranks know, and none of an attempt before had.

    torchrun's store outlives the processes: what those of an attempt that died told each other
    there, addresses above all, must not be found by the next. Nothing in the environment names an
    attempt: each node counts the restarts that itself has asked for. So each rank leaves a mark of
    its own, and the first answers every mark it sees, old ones, too, until all have the answer.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"tinyclip/mark/{rank}", mine)
        name = store.get(f"tinyclip/answer/{mine}").decode()
        store.add(f"tinyclip/{name}", 1)
        return name
    answered: set[str] = set()
    until = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"tinyclip/{mine}", 0) < world - 1:
        if time.monotonic() > until:
            raise RuntimeError(f"not all of {world} processes have come: torchrun's log says more")
        keys = [f"tinyclip/mark/{other}" for other in range(1, world)]
        marks = {store.get(key).decode() for key in keys if store.check([key])} - answered
        for mark in marks:
            store.set(f"tinyclip/answer/{mark}", mine)
        answered |= marks
        time.sleep(0.01)
    return mine


def leave() -> None:
    """Leave it again, if `join` entered one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
