"""Random numbers that depend on the image, not on the process that loads it.

Every draw is a pure function of (seed, epoch, image index, purpose). On one GPU or eight, with or without workers, also
after an interruption: the same image in the same epoch gets the same crop, the same sigma and the same epsilon.

The evaluation names its draws by the image's text id (`robustness.draws`): a result must not depend on the place of an
image in the data, and few images have many draws. Training names them by index, because an epoch draws for millions of
images: arithmetic on whole batches is a hundred times faster than a hash of each text.
"""

import zlib

import numpy as np
import torch


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def image_seeds(seed: int, epochs, indices, purpose: str) -> np.ndarray:
    """One 64-bit seed per image, shape (B,); `epochs` and `indices` are (B,) integers or scalars, `purpose` a name."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64, on purpose
        state = _mix(np.atleast_1d(np.asarray(seed).astype(np.uint64)) + _GOLDEN)
        for part in (zlib.crc32(purpose.encode()), epochs, indices):
            state = _mix(state * _GOLDEN + np.asarray(part).astype(np.uint64) + np.uint64(1))
    return state


def uniforms(seeds: np.ndarray, num: int) -> np.ndarray:
    """(B, num) numbers in [0, 1): the first `num` outputs of SplitMix64 started from each of the (B,) seeds."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(seeds[:, None] + steps[None, :])  # (B, num)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generators(seeds: np.ndarray, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One torch generator per seed, as the models' `generator` argument takes them."""
    return [torch.Generator(device).manual_seed(int(seed >> np.uint64(1))) for seed in seeds]
