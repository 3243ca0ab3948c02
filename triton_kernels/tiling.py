"""How a length is cut into tiles: main tiles, and a narrow tail for the little more.

No torch and no triton here: the same arithmetic serves launches, tests and the tables in docs.
"""

TAILS = (16, 32)


def split(length: int, block: int) -> int:
    """The tail tile of a length cut into blocks: 16 or 32 where the rest fits in one, else 0.

    With 0 the last block itself is ragged, or the length is a multiple.
    """
    rest = length % block
    if length > block and rest:
        return next((tail for tail in TAILS if rest <= tail < block), 0)
    return 0


def tiles(length: int, block: int) -> int:
    """How many tiles, the tail included, cover the length."""
    return -(-length // block)


def ragged(length: int, block: int) -> bool:
    """Whether a tile of full size reaches beyond the length."""
    return length % block != 0 and split(length, block) == 0


def padded(length: int, block: int) -> int:
    """How many rows the tiles of a length compute."""
    tail = split(length, block)
    return length // block * block + tail if tail else tiles(length, block) * block


def useful_fraction(lq: int, lk: int, block_m: int, block_n: int, causal: bool = False) -> float:
    """Scores that count over scores that are computed, forward."""
    if not causal:
        return lq * lk / (padded(lq, block_m) * padded(lk, block_n))
    computed = 0
    for start in range(0, lq, block_m):
        rows = min(block_m, padded(lq, block_m) - start)
        keys = -(-min(start + rows, lk) // block_n) * block_n
        computed += rows * min(keys, padded(lk, block_n))
    return (lq * (lq + 1) / 2) / computed
