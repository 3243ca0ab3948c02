"""Which sample comes when, on which rank; read in worker processes if asked for.

The order is a pure function of (seed, epoch), so that the place to resume at is (epoch, batch).
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from weakref import WeakSet

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from tinyclip.data import draws
from tinyclip.data.source import Batch, Reader, Source, Turn, distinct

_PARALLEL = "TOKENIZERS_PARALLELISM"  # unset, the library warns in each process that is forked
_WORKERS: WeakSet[BaseProcess] = WeakSet()
_DECIDED_BY_MAIN = (signal.SIGINT, signal.SIGTERM)


class Loader:
    """Batches of a source, the same ones however many processes share the work.

    Global batch k of an epoch holds samples k·G to (k+1)·G - 1 of the epoch's order, G = batch_size
    x world; each rank reads its contiguous share.

    Args:
        source: see `open_data`.
        readers: one, or the student's and the teacher's.
        batch_size: samples of a batch, on each rank.
        seed: with the epoch, what the order and all randomness of the samples depend on.
        rank, world: which of how many processes this is.
        workers: processes that read ahead; 0 reads in this one. They give the same bits.
        augment: see `Source.batch`; its randomness depends on (seed, epoch, index) alone.
        shuffle: whether an epoch has an order of its own, or the source's.
        drop_last: whether an incomplete last batch is left out, or shared among the ranks (some of
            which may then get nothing).
        window: where a source has groups (shards), those are shuffled, and samples within this many
            of them: reading stays local.
        pin_memory: whether tensors arrive in page-locked memory.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the text names it.
    """

    def __init__(
        self,
        source: Source,
        readers: Sequence[Reader] | Reader,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        augment: Callable | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        window: int = 10_000,
        pin_memory: bool = False,
    ):
        if not isinstance(source, Source):
            raise TypeError(f"Loader: source must be a Source, got {type(source).__name__}")
        numbers = (("batch_size", batch_size, 1), ("world", world, 1), ("window", window, 1))
        for name, value, least in (*numbers, ("rank", rank, 0), ("workers", workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Loader: {name} must be {least} or more, got {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"Loader: seed must be an integer, got {seed!r}")
        if rank >= world:
            raise ValueError(f"Loader: rank must be below world, {world}, got {rank}")
        self.source = source
        self.readers = tuple(distinct([readers] if isinstance(readers, Reader) else readers))
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.workers, self.augment = workers, augment
        self.window, self.pin_memory = window, pin_memory
        self.shuffle, self.drop_last = shuffle, drop_last
        if len(self) == 0:
            raise ValueError(
                f"Loader: the source has {len(source)} samples, fewer than one batch of"
                f" {self.global_batch}: lower batch_size (--batch-size); in Python"
                " drop_last=False keeps what is there"
            )

    @property
    def global_batch(self) -> int:
        """Samples of a batch, of all ranks together."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(len(self.source), self.global_batch)
        return whole + (1 if rest and not self.drop_last else 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, which is how a run resumes.

        Raises:
            ValueError: epoch or start is negative, or start is beyond the epoch's last batch.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(
                f"Loader: epoch must be 0 or more and start from 0 to {len(self)}, got epoch"
                f" {epoch} and start {start}"
            )
        return self._batches(epoch, start)

    def order(self, epoch: int) -> np.ndarray:
        """The source's indices as an epoch reads them, on all ranks together: (len,) int64."""
        if not self.shuffle:
            return np.arange(len(self.source))
        return shuffled(len(self.source), self.source.groups, self.window, Turn(self.seed, epoch))

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        loaded = DataLoader(
            _Epoch(self, epoch),
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            # Its own, or starting workers would take a number from the model's.
            generator=Generator(),
        )
        if self.workers:
            # What a source makes once for a reader is made here, and not by each worker.
            self.source.batch((), self.readers)
        with _children() as workers:
            batches = iter(loaded)
        try:
            yield from batches
        except (OSError, EOFError) as error:
            _name_the_dead(workers, error)
            raise
        finally:
            # Not left to the iterator's end, which a traceback may put off.
            if workers:
                batches._shutdown_workers()
                _kill(workers)


def shuffled(count: int, groups: Sequence[int], window: int, turn: Turn) -> np.ndarray:
    """A permutation of `count` indices; with groups, those are permuted first, and samples then
    within each `window` of them."""
    if len(groups) < 2:
        return draws.permutation(count, draws.ORDER, *turn)
    starts = np.concatenate(([0], np.cumsum(groups)))
    order = np.concatenate(
        [
            np.arange(starts[g], starts[g + 1])
            for g in draws.permutation(len(groups), draws.GROUPS, *turn)
        ]
    )
    hashes = draws.draw(draws.ORDER, *turn, order)
    return order[np.lexsort((hashes, np.arange(count) // window))]


class _Epoch(Dataset):
    """The batches of one epoch by number."""

    def __init__(self, loader: Loader, epoch: int):
        self.source, self.readers, self.augment = loader.source, loader.readers, loader.augment
        self.order, self.turn = loader.order(epoch), Turn(loader.seed, epoch)
        self.batch, self.rank, self.world = loader.global_batch, loader.rank, loader.world

    def __getitem__(self, number: int) -> Batch:
        shared = self.order[number * self.batch : (number + 1) * self.batch]
        first, last = (len(shared) * rank // self.world for rank in (self.rank, self.rank + 1))
        return self.source.batch(shared[first:last], self.readers, self.turn, self.augment)


def _as_it_is(batch: Batch) -> Batch:
    return batch


@contextmanager
def _children() -> Iterator[list[BaseProcess]]:
    """Worker processes that start here never get SIGINT or SIGTERM: a signal to the whole group
    must not take them from a main process that is about to save. They tokenise in one thread.
    The list holds them afterwards."""
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, _DECIDED_BY_MAIN)
    parallel = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    before, started = multiprocessing.active_children(), []
    try:
        yield started
    finally:
        started += [child for child in multiprocessing.active_children() if child not in before]
        _WORKERS.update(started)
        if parallel is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = parallel
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _name_the_dead(workers: Sequence[BaseProcess], error: Exception) -> None:
    """Raise for a worker that died while it handed a batch over: of that the main process sees a
    broken connection only, and sees it before torch has looked after its workers."""
    gone = connection.wait([worker.sentinel for worker in workers], timeout=1)
    for worker in workers:
        if worker.sentinel in gone:
            worker.join()
            raise RuntimeError(
                f"DataLoader worker (pid {worker.pid}) died with exit code {worker.exitcode}"
            ) from error


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End those that did not end by themselves, such as one that waits for a lock that a dead one
    held: SIGTERM, which is all that torch and multiprocessing send, they do not hear."""
    for worker in list(workers):
        if worker.is_alive():
            worker.kill()
            worker.join()


@atexit.register
def _kill_at_exit() -> None:
    if any(process in _WORKERS for process in multiprocessing.active_children()):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
        _kill(_WORKERS)
