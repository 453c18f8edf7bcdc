"""Where every random number of an evaluation comes from.

A number is named by (seed, image id, purpose, indices) and by nothing else. So the attacker, the defense and the
scoring never share a draw, and a result does not depend on the batch an image is in, on how many processes there are,
or on where a run was interrupted. The global generators are neither read nor advanced. `data.randomness` says why
training has other names.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


# Purposes in use. An attacker draws ATTACK, START and SELECT; what is scored is drawn from EVALUATE alone.
ATTACK, START, SELECT, EVALUATE = "attack", "start", "select", "evaluate"
PICTURE, RECONSTRUCTION, CERTIFY = "picture", "reconstruction", "certify"


def stream_seed(seed: int, image_id: str, purpose: str, *indices: int) -> int:
    """A 63-bit seed for one draw; equal names give equal seeds, on every machine.

    torch's CPU generator reads the low 32 bits alone. So one of an attack's thousands of draws equals one of the ten
    that are scored with a probability of 2e-5 per image, which changes no result. Where draws must be independent
    without exception, use `distinct_seeds`.
    """
    name = f"{seed}/{image_id}/{purpose}/{'/'.join(map(str, indices))}"
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big") >> 1


def distinct_seeds(seed: int, image_id: str, purpose: str, draws: range) -> list[int]:
    """A seed for each of an image's `draws` (numbers below 2^32), no two alike in the low 32 bits that CPUs read.

    Seeds drawn at random coincide about n^2 / 2^33 times in n draws: once in a certificate of 100,000, whose votes
    would then not be independent. These are steps of an odd length around the 2^32 numbers, which visit each of them
    once.
    """
    first = stream_seed(seed, image_id, purpose)
    return [(first & ~0xFFFFFFFF) | ((first + 0x9E3779B1 * draw) & 0xFFFFFFFF) for draw in draws]


def evaluation_order(image_ids: list[str], seed: int = 0) -> list[int]:
    """Indices of the images in a fixed random order: its first n are the n images of an evaluation, so subsets nest."""
    return sorted(range(len(image_ids)), key=lambda index: (stream_seed(seed, image_ids[index], "subset"), index))


@contextmanager
def isolated_global_rng(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch, numpy and random, and puts them back as they were: for code of others."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (others use the legacy generator)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
