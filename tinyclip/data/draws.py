"""Random numbers that are a pure function of where they are used: no state, no stream to restore.

A draw is a 64-bit hash of a few integers, such as (seed, epoch, index): the same on every machine,
in every process and version of NumPy, whatever was drawn before it.
"""

import numpy as np
from numpy.typing import ArrayLike

# The first word of a draw is what it is for: no two uses share a number.
SPLIT, SCENE, NOISE, ORDER, GROUPS, CAPTION, CROP = range(1, 8)

_STEP = np.uint64(0x9E3779B97F4A7C15)


def draw(*words: ArrayLike) -> np.ndarray:
    """Hash integers to 64 bits.

    Each word is absorbed by a round of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), which is a
    bijection: for fixed other words, different words give different hashes.

    Args:
        words: integers or arrays of integers that broadcast against each other.

    Returns:
        uint64, in the words' common shape.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = _finish((state ^ _unsigned(word)) + _STEP)
    return state


def _unsigned(word: ArrayLike) -> np.ndarray:
    if isinstance(word, int):
        return np.uint64(word & 0xFFFFFFFFFFFFFFFF)
    return np.asarray(word).astype(np.uint64)


def _finish(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def below(count: int, *words: ArrayLike) -> np.ndarray:
    """Integers from 0 to count - 1, int64; the bias of the remainder is below count / 2^64."""
    return (draw(*words) % np.uint64(count)).astype(np.int64)


def uniform(*words: ArrayLike) -> np.ndarray:
    """Numbers in [0, 1), float64."""
    return (draw(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *words: int) -> np.ndarray:
    """0 to count - 1 in an order of their own, int64."""
    return np.argsort(draw(*words, np.arange(count)), kind="stable")
