"""How many broken samples a run has met, and when they are too many."""

from collections import deque

from tinyclip.data.source import Batch, Skipped


class TooManyBroken(RuntimeError):
    """More samples are broken than the run was told to accept; the text lists the last ones."""


class BadSamples:
    """Counts what a loader's batches held and left out.

    Args:
        most: the fraction of samples that may be broken.
        after: how many samples must have been seen before `count` judges: of the first few, one
            broken one is a large fraction. `check` judges at any time, such as after an epoch.
        keep: how many skipped samples are remembered and reported, the last ones.
        listed: the file that lists all of them, if there is one; only named.

    Raises:
        ValueError: most is not from 0 to 1, or after or keep is negative.
    """

    def __init__(
        self, most: float = 0.01, *, after: int = 1_000, keep: int = 10, listed: object = None
    ):
        if not 0 <= most <= 1:
            raise ValueError(f"BadSamples: most must be from 0 to 1, got {most!r}")
        if after < 0 or keep < 1:
            raise ValueError(
                f"BadSamples: after must be 0 or more and keep 1 or more, got {after} and {keep}"
            )
        self.most, self.after, self.listed = most, after, listed
        self.read = self.skipped = 0
        self.last: deque[Skipped] = deque(maxlen=keep)

    @property
    def exceeded(self) -> bool:
        """Whether more than `most` of the samples so far are broken."""
        return self.skipped > self.most * (self.read + self.skipped)

    def count(self, batch: Batch) -> None:
        """Add a batch.

        Raises:
            TooManyBroken: `after` samples have been seen, and too many of them were broken.
        """
        self.read += len(batch.keys)
        self.skipped += len(batch.skipped)
        self.last.extend(batch.skipped)
        if self.read + self.skipped >= self.after:
            self.check()

    def check(self) -> None:
        """Raise TooManyBroken if `exceeded`."""
        if self.exceeded:
            raise TooManyBroken(
                f"{self.skipped} of {self.read + self.skipped} samples are broken, more than the"
                f" accepted {self.most:.3%}; {self.report()}"
            )

    def report(self) -> str:
        """The last broken samples, one a line, and where all are; or "no broken samples"."""
        where = [f"all are listed in {self.listed}"] if self.listed and self.skipped else []
        if not self.last:
            return where[0] if where else "no broken samples"
        last = (f"  {key}: {reason}" for key, reason in self.last)
        return "\n".join([f"the last {len(self.last)}:", *last, *where])
