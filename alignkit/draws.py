"""Counter-based randomness: a draw is a pure function of its key.

Timesteps and noise are keyed by (seed, optimizer step, position in the global batch), augmentation
by (seed, epoch, row id). Never by process or micro-batch: so 1x8 = 2x4 = 8x1 = two processes, and a
resumed run needs no saved generator.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator for one draw.

    Args:
        purpose: keeps the streams of different uses apart ("noise", "shuffle" ...).
        key: non-negative integers that identify the draw.
    """
    # Philox is a counter-based generator (Salmon et al. 2011); SeedSequence hashes the key into it.
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
    return np.random.Generator(np.random.Philox(sequence))
